"""`dept-ray finetune`: what a run's body is worth to a task with labels."""

import click


@click.command()
@click.argument("run")
@click.argument("task")
@click.option("--source", help="Whose tokenizer and embedding (default: the likest to the task's text).")
@click.option("--train", type=click.Path(), help="A parquet or jsonl file of the task's columns, not the Hub's.")
@click.option("--validation", type=click.Path(), help="Another one, to measure on.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--batch-size", default=128, show_default=True)
@click.option("--lr", default=3e-5, show_default=True, help="Of the first step; it falls linearly to nothing.")
@click.option("--context", type=int, help="Tokens read of a text at most (default: the run's).")
@click.option("--most", type=int, help="Examples of each split (default: all).")
@click.option("--seed", default=0, show_default=True)
@click.option("--baseline/--no-baseline", default=True, help="Also from a body that nobody trained.")
@click.option("--out", type=click.Path(), help="The JSON to write (default: downstream/ in the run's folder).")
def finetune(
    run: str, task: str, source: str | None, train: str | None, validation: str | None, epochs: int, batch_size: int,
    lr: float, context: int | None, most: int | None, seed: int, baseline: bool, out: str | None,
) -> None:  # fmt: skip
    """Fine-tune RUN's model on TASK: sst2, mnli, stsb or race, from the Hub or from files of the same columns."""
    import json
    from pathlib import Path

    from rich.console import Console

    from dept_ray.client import Run
    from dept_ray.console import figure_table
    from dept_ray.errors import StoreError
    from dept_ray.study.downstream import downstream
    from dept_ray.study.tuned import Settings
    from dept_ray.text.shards import write_atomically

    def tell(which: str, step: int, of: int) -> None:
        if step % max(1, of // 10) == 0 or step == of:
            click.secho(f"{which} body: step {step} of {of}", dim=True, err=True)

    settings = Settings(epochs, batch_size, lr, context=context, most=most, seed=seed)
    handle = Run.open(run)
    figures = downstream(handle.job, handle.folder, task, source, train, validation, settings, baseline, tell)
    file = Path(out) if out else handle.folder / "downstream" / f"{task}-{figures['source']}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(figures, indent=1).encode())
    except OSError as err:
        raise StoreError(f"{file} cannot be written ({err}): name another file with --out") from err
    metric = figures["metric"]
    title = f"{task} with {handle.job.name} after {figures['round']} rounds, as source {figures['source']}"
    table = figure_table(title, "body", metric, "loss of the\nlast epoch")
    for which, found in figures["bodies"].items():
        told = "undefined" if found[metric] is None else f"{found[metric]:.4f}"
        table.add_row(which, told, f"{found['loss']:.4f}")
    table.add_row("one answer for all", f"{figures['chance']:.4f}", "")
    console = Console()
    console.print(table)
    if figures["left_out"]:
        console.print(f"{figures['left_out']:.1%} of the text's tokens have no row in this vocabulary: left out")
    console.print(f"{file} is written", highlight=False)
