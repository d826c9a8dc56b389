"""`dept-ray submit`: a run as a job of a cluster elsewhere."""

import click

from dept_ray.method_names import METHOD_NAMES


@click.command()
@click.argument("job_file", required=False)
@click.option("--address", help="Its dashboard (default: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265).")
@click.option("--folder", help="A folder of the cluster, instead of the job's own.")
@click.option("--method", type=click.Choice(METHOD_NAMES), help="Instead of the job's own.")
@click.option("--detach", is_flag=True, help="Do not watch it.")
@click.option("--attach", metavar="ID", help="Watch a job that was submitted before.")
@click.option("--cancel", metavar="ID", help="End a job, with all its processes.")
def submit(
    job_file: str | None, address: str | None, folder: str | None, method: str | None, detach: bool,
    attach: str | None, cancel: str | None,
) -> None:  # fmt: skip
    """Let a Ray cluster train JOB_FILE: sends it with this package, and shows its log until it is over.

    Ctrl-C ends the watching, not the job.
    """
    if sum(given is not None for given in (job_file, attach, cancel)) != 1:
        raise click.UsageError("give one of JOB_FILE, --attach ID and --cancel ID")
    from dept_ray.on_ray import jobs

    client = jobs.reach(address)
    if cancel is not None:
        was = jobs.cancel(client, cancel)
        click.echo("it has ended; the last committed round stands" if was else "it was over already")
        return
    at = f" --address {address}" if address else ""
    if job_file is not None:
        attach = jobs.submit(client, job_file, method, folder)
        click.echo(f"submitted as {attach}")
    assert attach is not None
    later = f"watch it: dept-ray submit --attach {attach}{at}\nend it:   dept-ray submit --cancel {attach}{at}"
    if detach:
        click.echo(later)
        return
    try:
        jobs.follow(client, attach, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        click.echo(f"\nno longer watching; the job goes on\n{later}")
