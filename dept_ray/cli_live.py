"""The commands that change a run in progress: each asks its coordinator, and says when that will be true."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dept_ray.client import Run

address_option = click.option("--address", help="The cluster that the run is on (default: the one its folder names).")
now_option = click.option("--now", is_flag=True, help="Its silos hand in what they have, instead of all their steps.")


def _live(run: str, address: str | None) -> "Run":
    from dept_ray.client import Run

    return Run.attach(run, address)


@click.command()
@click.argument("run")
@address_option
@now_option
def pause(run: str, address: str | None, now: bool) -> None:
    """Hold RUN after the round in progress."""
    _live(run, address).pause(now)
    click.echo("it holds after the round in progress: dept-ray resume, or dept-ray step")


@click.command()
@click.argument("run")
@address_option
def resume(run: str, address: str | None) -> None:
    """Let RUN go on after a pause."""
    _live(run, address).resume()
    click.echo("it goes on")


@click.command()
@click.argument("run")
@click.argument("rounds", type=click.IntRange(1), default=1)
@address_option
def step(run: str, rounds: int, address: str | None) -> None:
    """Let ROUNDS more rounds of RUN through, then hold."""
    _live(run, address).step(rounds)
    click.echo(f"it trains {rounds} more, then holds")


@click.command()
@click.argument("run")
@address_option
@now_option
def stop(run: str, address: str | None, now: bool) -> None:
    """End RUN after the round in progress is committed; `dept-ray train` goes on with it."""
    _live(run, address).stop(now)
    click.echo("it ends after the round in progress is committed")


@click.command()
@click.argument("run")
@address_option
@now_option
def checkpoint(run: str, address: str | None, now: bool) -> None:
    """Keep the round of RUN that is in progress for good (while it is held, the last one)."""
    folder = _live(run, address).checkpoint(now)
    click.echo(f"it is kept, once it is committed, in {folder}; to go back to it, delete the rounds after it")


@click.command()
@click.argument("run")
@click.argument("source_file")
@address_option
def add(run: str, source_file: str, address: str | None) -> None:
    """Let the source that SOURCE_FILE describes (one [[sources]] table) join RUN between two rounds."""
    from dept_ray.jobfile import load_source

    change = load_source(source_file)
    _live(run, address).add(change)
    click.echo(f"{change['add']['name']} is being prepared, and joins between two rounds")


@click.command()
@click.argument("run")
@click.argument("silo")
@address_option
def drop(run: str, silo: str, address: str | None) -> None:
    """Let SILO leave RUN after the round in progress; its snapshot stays."""
    _live(run, address).drop(silo)
    click.echo(f"{silo} leaves after the round in progress; dept-ray return {run} {silo} brings it back")


@click.command("return")
@click.argument("run")
@click.argument("silo")
@address_option
def bring_back(run: str, silo: str, address: str | None) -> None:
    """Let SILO, which was dropped or set aside, take part in RUN again."""
    _live(run, address).bring_back(silo)
    click.echo(f"{silo} takes part again from the next round on")


@click.command("set")
@click.argument("run")
@click.argument("key")
@click.argument("value")
@address_option
def set_key(run: str, key: str, value: str, address: str | None) -> None:
    """Change a setting of RUN from the next round on, such as: set RUN outer.lr 0.7."""
    import json

    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    _live(run, address).set(key, parsed)
    click.echo(f"{key} is {value} from the next round on")


COMMANDS = (pause, resume, step, stop, checkpoint, add, drop, bring_back, set_key)
