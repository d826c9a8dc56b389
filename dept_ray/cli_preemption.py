"""`dept-ray watch-preemption`: what a cluster file starts on each node that its cloud may take."""

import click


@click.command("watch-preemption")
@click.option("--cloud", "name", required=True, help="Whose machine this is: aws or gcp.")
@click.option("--address", default="auto", show_default=True, help="Ray cluster that this machine's node is of.")
@click.option("--node", help="Id of the Ray node to be drained (default: this machine's).")
@click.option("--metadata", metavar="URL", help="Of the metadata service (default: the cloud's own).")
def watch_preemption(name: str, address: str, node: str | None, metadata: str | None) -> None:
    """Wait for the notice that this machine will be taken, and drain its Ray node: silos hand in, and move."""
    from dataclasses import replace

    from dept_ray.on_ray.notices import await_notice, cloud_of, drain, this_node

    cloud = cloud_of(name)
    cloud = replace(cloud, metadata=metadata.rstrip("/")) if metadata else cloud
    cluster, here = this_node(address)
    node = node or here
    click.echo(f"node {node} waits for a notice of {name}")
    left_s = await_notice(cloud)
    drain(cluster, node, left_s, f"{name} takes its machine")
    click.echo(f"it will be taken in {left_s:.0f} s: drained")
