"""`dept-ray region`: the silos of one region, behind its walls."""

import signal
from typing import Any

import click


@click.command()
@click.option("--mailbox", required=True, help="As in the job's regions.mailbox: a folder, s3://... or gs://...")
@click.option("--labels", default="", help="That this region bears, as region=eu,market=spot (default: all silos).")
@click.option("--address", help="The region's Ray cluster (default: RAY_ADDRESS, else a local Ray).")
@click.option("--folder", help="Where text and snapshots of sources without a `storage` stay (default: the job's).")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--leave", is_flag=True, help="End with the run that it served, instead of waiting for the next.")
def region(
    mailbox: str, labels: str, address: str | None, folder: str | None, local: bool, leave: bool
) -> None:  # fmt: skip
    """Serve the silos of a region: take a run's orders from the mailbox, train them here, answer."""
    from pathlib import Path

    borne = _labels(labels)
    mailbox = mailbox if "://" in mailbox else str(Path(mailbox).expanduser().absolute())
    folder = folder and str(Path(folder).expanduser().absolute())
    if local:
        from dept_ray.rounds.agent import local_region

        agent = local_region(mailbox, borne, folder, click.echo)
    else:
        from dept_ray.on_ray.region import region_on_ray

        agent = region_on_ray(mailbox, borne, address, folder, click.echo)
    click.echo(f"region {agent.name} looks into {agent.box.uri}")
    signal.signal(signal.SIGTERM, _end)
    try:
        agent.serve(leave)
    except KeyboardInterrupt:
        click.echo("it is gone; a run that goes on does so without its silos")


def _end(*signal_and_frame: Any) -> None:
    raise KeyboardInterrupt


def _labels(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    if wrong := [key for key, _, value in pairs if not key or not value or "/" in value]:
        raise click.UsageError(f"--labels {text!r}: {wrong[0]!r} has no value; write region=eu,market=spot")
    return {key.strip(): value.strip() for key, _, value in pairs}
