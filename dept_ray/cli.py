"""`dept-ray`: the command line. Each command is a few lines over `client`; heavy imports wait until one is called."""

import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from dept_ray import __version__, cli_finetune, cli_jobs, cli_live, cli_preemption, cli_region, cli_study
from dept_ray.errors import ConfigError, DeptError, VocabularyError
from dept_ray.method_names import METHOD_NAMES

if TYPE_CHECKING:
    from rich.console import Console

    from dept_ray.config import Job

method_option = click.option("--method", type=click.Choice(METHOD_NAMES), help="Instead of the job's own.")
folder_option = click.option("--folder", help="Holds data/, runs/ and silos/, instead of the job's own.")
address_option = click.option("--address", help="Ray cluster to join (default: RAY_ADDRESS, else a local Ray).")


class Commands(click.Group):
    """Shows our own errors as one message, and anything else as the bug it is."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DeptError as err:
            click.secho(f"{type(err).__name__}: {err}", fg="red", err=True)
            ctx.exit(1)


@click.group(cls=Commands)
@click.version_option(__version__)
def main() -> None:
    """Pre-train one language model on sources that do not belong together (DEPT, arXiv 2410.05021)."""
    from dept_ray.silo.memory import keep_freed_memory

    keep_freed_memory(one_arena=False)  # some commands tokenise, and train, in this process


for command in (
    *cli_live.COMMANDS, cli_jobs.submit, cli_region.region, cli_preemption.watch_preemption, cli_study.study,
    cli_finetune.finetune,
):  # fmt: skip
    main.add_command(command)


@main.command()
@method_option
@click.option("--folder", default="dept-demo", show_default=True, help="Where text, run and snapshots go.")
@click.option("--local", is_flag=True, help="In this process, without Ray.")
def demo(method: str | None, folder: str, local: bool) -> None:
    """Train four silos on text that is installed on this machine, in under three minutes."""
    from dept_ray import demo as show

    console = _console()
    job = show.demo_job(method, folder)
    console.print(show.introduction(job))
    records = _train_here(job, console) if local else _train(job, None, console)
    console.print(show.summary(job, records))


@main.command()
@click.argument("job_file")
@address_option
@click.option("--local", is_flag=True, help="In this process, without Ray.")
@method_option
@folder_option
def prepare(job_file: str, address: str | None, local: bool, method: str | None, folder: str | None) -> None:
    """Read, clean, tokenise and pack the text of JOB_FILE; what is there already is kept."""
    from dept_ray.preparing import prepare as prepare_text
    from dept_ray.stages import shown_on

    console = _console()
    job = _load(job_file, method, folder)
    with shown_on(console) as report:
        prepare_text(job, address, report, local)
    where = "will be prepared by their regions" if job.regions.mailbox else "are prepared"
    console.print(f"{job.name}: {len(job.sources)} sources {where}")


@main.command()
@click.argument("job_file")
@address_option
@click.option("--local", is_flag=True, help="The identical loop in this process, without Ray.")
@click.option("--detach", is_flag=True, help="Leave the run to the cluster.")
@method_option
@folder_option
def train(
    job_file: str, address: str | None, local: bool, detach: bool, method: str | None, folder: str | None
) -> None:
    """Train JOB_FILE to its last round, from wherever its run folder stands."""
    console = _console()
    job = _load(job_file, method, folder)
    records = _train_here(job, console) if local else _train(job, address, console, detach)
    _show_scores(job, records, console)


@main.command()
@click.argument("run")
@click.argument("job_file")
@click.option(
    "--embedding",
    type=click.Choice(("random", "own", "overlap", "ofa", "tokenadapt")),
    help="To begin from (default: the job's; random).",
)
@click.option("--round", "round_", type=click.IntRange(1), help="RUN's committed round (default: the last).")
@click.option("--silo", help="Whose body, where each silo of RUN has its own.")
@click.option("--frozen-body", is_flag=True, help="Train the embedding alone.")
@click.option("--name", help="Of the new run (default: the job's, or RUN's with -adapted).")
@click.option("--against", metavar="RUN2", help="Also how fast it learnt beside this run.")
@address_option
@click.option("--local", is_flag=True, help="The identical loop in this process, without Ray.")
@method_option
@folder_option
def adapt(
    run: str, job_file: str, embedding: str | None, round_: int | None, silo: str | None, frozen_body: bool,
    name: str | None, against: str | None, address: str | None, local: bool, method: str | None, folder: str | None,
) -> None:  # fmt: skip
    """Go on from RUN's body with JOB_FILE, whose [[sources]] suffice: one mixture with a global vocabulary."""
    from dept_ray.client import Run
    from dept_ray.study.adapt import adapt_job
    from dept_ray.study.plasticity import plasticity_table

    console = _console()
    baseline = Run.open(against) if against else None
    init = {"embedding": embedding, "round": round_, "silo": silo, "frozen_body": frozen_body or None}
    given = {"method": method, "folder": folder, "name": name, "init": {k: v for k, v in init.items() if v is not None}}
    job = adapt_job(Run.open(run).folder, job_file, **{key: value for key, value in given.items() if value})
    records = _train_here(job, console) if local else _train(job, address, console)
    _show_scores(job, records, console)
    theirs, called = (baseline.history(), baseline.job.name) if baseline else ([], "")
    console.print(plasticity_table(records, f"{job.name}: how fast it learnt", theirs, called))


@main.command()
@click.argument("run")
@cli_live.address_option
@click.option("--watch", is_flag=True, help="Go on showing it until it is over.")
def status(run: str, address: str | None, watch: bool) -> None:
    """How RUN (a name under runs/, or a folder) is."""
    from dept_ray.client import Run
    from dept_ray.console import ledger_table, live_table, round_line

    console = _console()
    handle = Run.open(run)
    if watch or address or handle.address is not None:
        handle = Run.attach(run, address)
    if watch:
        handle.follow(console)
        return
    now, records = handle.status(), handle.history()
    if now.silos:
        console.print(live_table(now, records))
    else:
        console.print(f"{now.run}: {now.phase}, {now.round} of {now.rounds} rounds committed")
    if now.error:
        console.print(now.error, markup=False)
    for record in records[-5:]:
        console.print(round_line(record), highlight=False)
    for record in [record for record in records if record["event"] == "round"][-1:]:
        console.print(ledger_table(record))


@main.command()
@click.argument("run")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="This file instead of the validation text.")
@click.option("--source", help="Only this one; of a --text: whose embedding it is scored with (default: the likest).")
def score(run: str, text: str | None, source: str | None) -> None:
    """Validation of RUN's last committed round, per source; or what its model makes of a text."""
    from dept_ray.client import Run
    from dept_ray.console import score_table, text_table

    handle = Run.open(run)
    if text is None:
        record = handle.score(source)
        _console().print(score_table(record, f"{handle.job.name} after {record['round']} rounds"))
        return
    words = _read(text)
    choice = handle.choose(words)
    try:
        record = handle.score_text(words, source or choice.source)
    except VocabularyError as err:
        raise VocabularyError(f"--text {text}: {err}") from None
    _console().print(text_table(record, choice.bits, choice.cannot, text))


@main.command()
@click.argument("run")
@click.option("--source", help="Whose tokenizer and embedding to use (default: the likest to the prompt).")
@click.option("--prompt", default="", help="Text to go on from.")
@click.option("--tokens", default=100, show_default=True, help="At most.")
@click.option("--temperature", default=0.8, show_default=True)
@click.option("--top-k", default=50, show_default=True)
@click.option("--seed", default=0, show_default=True)
def generate(run: str, source: str | None, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Text from RUN's model."""
    from dept_ray.client import Run

    handle = Run.open(run)
    choice = handle.choose(prompt) if source is None else None
    source = source or (choice and choice.source)
    pieces = handle.sample(prompt, source, tokens, temperature, top_k, seed)
    first = next(pieces, "")  # a prompt that cannot be used fails before anything is shown
    if choice is not None:
        click.secho(choice.why, dim=True, err=True)  # beside the output, so that a pipe gets only that
    click.echo(prompt + first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@main.command()
@click.argument("run")
@click.argument("out", type=click.Path())
@click.option("--source", help="Whose embedding and vocabulary.")
@click.option("--push", metavar="NAME", help="Also upload it to the Hugging Face Hub, privately.")
def export(run: str, out: str, source: str | None, push: str | None) -> None:
    """RUN's model for one source as the Hugging Face folder OUT."""
    from pathlib import Path

    from dept_ray.client import Run
    from dept_ray.study.export import export as write

    handle = Run.open(run)
    folder = write(handle.job, handle.folder, Path(out), source, push)
    click.echo(f'{folder} is written: AutoModelForCausalLM.from_pretrained("{folder}")')
    if push:
        click.echo(f"and uploaded as {push}")


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--out", help="The file to write (default: report.html in the run's folder; of several runs, here).")
def report(runs: tuple[str, ...], out: str | None) -> None:
    """One HTML page on RUN, or on several side by side: curves, time, bytes, membership, scores."""
    from dept_ray.reporting import write_report

    click.echo(write_report(runs, out))


@main.command()
@click.argument("job_file")
@method_option
def plan(job_file: str, method: str | None) -> None:
    """What JOB_FILE will cost: parameters, memory, bytes, tokens. Runs nothing."""
    from dept_ray.study.plan import plan_job
    from dept_ray.study.plan_table import render

    _console().print(render(plan_job(_load(job_file, method))))


@main.command()
@click.argument("names", nargs=-1)
@click.option("--folder", default="dept-bench", show_default=True, help="Keeps prepared text and runs.")
@click.option("--size", type=click.Choice(("full", "small")), default="full", show_default=True)
@click.option("--repeats", type=click.IntRange(1), help="Measurements of each side (default: each benchmark's own).")
def bench(names: tuple[str, ...], folder: str, size: str, repeats: int | None) -> None:
    """Measure this machine: ours beside the best by hand, in turns.

    NAMES: silo, silos (four of them), coordinator, overlap (a slow line), startup, text, joining, peers; without any
    all of them, about an hour.
    """
    from dept_ray.study.bench import render, run_benchmarks

    ratios = list(run_benchmarks(names, folder, size, repeats))
    _console().print(render(ratios))
    if any(ratio["value"] is None for ratio in ratios):
        sys.exit(1)


# ------------------------------------------------------------------------------------------------ shared by commands
def _console() -> "Console":
    from rich.console import Console

    return Console()


def _load(job_file: str, method: str | None, folder: str | None = None) -> "Job":
    from dept_ray.jobfile import load_job

    given = {"method": method, "folder": folder}
    return load_job(job_file, **{key: value for key, value in given.items() if value})


def _read(file: str) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            return opened.read()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--text {file}: cannot be read as UTF-8 text ({err})") from None


def _show_scores(job: "Job", records: list[dict[str, Any]], console: "Console") -> None:
    """What a run that is finished is worth."""
    if records and records[-1]["event"] == "scores":
        from dept_ray.console import score_table

        console.print(score_table(records[-1], f"{job.name}, {job.method}, after {records[-1]['round']} rounds"))


def _train_here(job: "Job", console: "Console") -> list[dict[str, Any]]:
    from dept_ray.console import round_line
    from dept_ray.in_process import train_here
    from dept_ray.metrics import read_records
    from dept_ray.rounds.control import Control
    from dept_ray.rounds.folder import run_folder
    from dept_ray.stages import shown_on

    control = Control()

    def stop(*signal_and_frame: Any) -> None:
        if control.stopping:
            raise KeyboardInterrupt
        console.print("stopping after this round is committed; Ctrl-C again stops at once")
        control.stop()

    with shown_on(console) as report:
        before = signal.signal(signal.SIGINT, stop)
        try:
            train_here(job, lambda record: console.print(round_line(record), highlight=False), report, control)
        finally:
            signal.signal(signal.SIGINT, before)
    return read_records(run_folder(job) / "metrics.jsonl")


def _train(job: "Job", address: str | None, console: "Console", detach: bool = False) -> list[dict[str, Any]]:
    """On Ray; Ctrl-C once stops after the round's commit, twice at once."""
    from dept_ray.client import Run

    run = Run.start(job, address, detach, console)
    try:
        return run.follow(console)
    except KeyboardInterrupt:
        if detach:
            console.print(f"\nno longer watching; the run goes on: dept-ray status {job.name} --watch")
            return []
        console.print("\nstopping after this round is committed; Ctrl-C again stops at once")
        run.stop()
    try:
        return run.follow(console, on=True)
    except KeyboardInterrupt:
        run.kill()
        console.print("\nstopped; the last committed round stands, and the same command goes on from it")
        sys.exit(130)
