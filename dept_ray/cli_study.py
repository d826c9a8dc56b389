"""`dept-ray study`: many runs, one table."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dept_ray.study.study_file import Study


@click.command()
@click.argument("study_file")
@click.option("--plan", is_flag=True, help="Print the runs, their tokens and what is done already; run nothing.")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@click.option("--parallel", type=click.IntRange(1), default=1, show_default=True, help="Runs side by side, on Ray.")
@click.option("--retry", is_flag=True, help="Run again what failed.")
@click.option("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local Ray).")
@click.option("--folder", help="Holds data/, runs/, silos/ and studies/, instead of the study's own.")
def study(
    study_file: str, plan: bool, local: bool, parallel: int, retry: bool, address: str | None, folder: str | None
) -> None:
    """Run all that STUDY_FILE compares, as far as it is not done; then write its table and report pages.

    Ctrl-C stops at once: what is committed stands, and the same command goes on.
    """
    if local and parallel > 1:
        raise click.UsageError("--parallel needs Ray: leave out --local, or --parallel")
    from dept_ray import studying
    from dept_ray.study.study_file import load_study

    asked = load_study(study_file, **({"folder": folder} if folder else {}))
    if plan:
        _show_plan(asked)
        return
    try:
        train = studying.here if local else studying.on_ray(address, parallel)
        studying.run_study(asked, train, retry, click.echo)
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on", err=True)
        raise SystemExit(130) from None
    found = studying.known(asked)
    table = studying.write_tables(asked, *found)
    click.echo(table.read_text(encoding="utf-8"))
    for page in (table, *studying.write_pages(asked, *found)):
        click.echo(page)


def _show_plan(asked: "Study") -> None:
    from rich.console import Console

    from dept_ray.console import figure_table, human
    from dept_ray.study.cells import all_cells
    from dept_ray.study.outcomes import read_outcome
    from dept_ray.study.study_table import plan_table
    from dept_ray.studying import known

    _, outcomes = known(asked)
    cells = all_cells(asked, outcomes)
    table = figure_table(f"study {asked.name}: {len(cells)} runs", "run", "tokens", "state")
    for row in plan_table(cells, {cell.name: read_outcome(cell.job) for cell in cells}):
        table.add_row(*row)
    todo = [cell for cell in cells if cell.name not in outcomes]
    table.caption = f"{len(todo)} to do, {human(sum(cell.tokens for cell in todo))} tokens"
    if any(variant.sweep for variant in asked.variants.values()):
        table.caption += "; which value of a sweep is taken, its trials will tell"
    Console().print(table)
