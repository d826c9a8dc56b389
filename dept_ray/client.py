"""`Run`: the handle on a run that the command line and notebooks share.

    run = Run.start(load_job("jobs/tiny_spec.toml"))      # prepares the text, starts Ray if there is none
    run.follow()                                          # until it is over
    run.history()[-1]["mean"]["bits_per_byte"]

A run that is over is read from its folder; one in progress is asked.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dept_ray.config import Job
from dept_ray.errors import ClusterError, ConfigError, RunError
from dept_ray.messages import Change, RunStatus
from dept_ray.metrics import Record, read_records
from dept_ray.preparing import begun, prepare

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from dept_ray.on_ray.launch import Coordinator
    from dept_ray.study.choose import Choice
    from dept_ray.study.report import Plot
    from dept_ray.study.story import Story


@dataclass
class Run:
    """One run, in progress or over."""

    job: Job
    folder: Path
    _coordinator: "Coordinator | None" = None
    _told: int = 0
    """Records that `wait` need not show: this handle did, or they were there when it attached."""

    # ------------------------------------------------------------------------------------------ getting one
    @classmethod
    def start(
        cls, job: Job, address: str | None = None, detach: bool = False, console: "Console | None" = None
    ) -> "Run":  # fmt: skip
        """Begin a run on Ray, or go on with the one in its folder; prepares the text first where that is due.

        Args:
            job: what to run.
            address: of a cluster; None: RAY_ADDRESS, else a local Ray of this process.
            detach: leave the run to the cluster when this process ends.
            console: to show on how far text is prepared; None: standard output.

        Raises:
            ClusterError: no cluster there, or it can never hold the silos.
            DataError: the text cannot be prepared.
            WrongRunError: the run folder belongs to another job.
        """
        from rich.console import Console

        from dept_ray.on_ray.cluster import check_lasting, connect
        from dept_ray.on_ray.launch import Coordinator
        from dept_ray.rounds.folder import in_progress, in_words, run_folder
        from dept_ray.rounds.methods import resources_of, silos_of
        from dept_ray.rounds.regions import check_regions
        from dept_ray.rounds.store import RunStore
        from dept_ray.stages import shown_on

        check_regions(job)
        if (where := in_progress(run_folder(job))) is not None:
            raise RunError(
                f"run {job.name} is in progress ({in_words(where)}): follow it with "
                f"`dept-ray status {job.name} --watch`, or give this job another `name`"
            )
        job = begun(job)
        store = RunStore(job)  # refuses another job's folder before anything is spent
        claims = sum(resources_of(job, silo).num_cpus for silo in silos_of(job))
        connect(address, silos=len(silos_of(job)) + math.ceil(claims), outlive=detach)  # tasks want some besides
        check_lasting(job)
        with shown_on(console or Console()) as report:
            prepare(job, address, report)
        return cls(job, store.folder, Coordinator.start(job, detach))

    @classmethod
    def open(cls, run: str | Path) -> "Run":
        """A run by its name (under ./runs) or folder, over or not; it is only read.

        Raises:
            ConfigError: there is no such run.
        """
        folder = next((p for p in (Path(run), Path("runs") / run) if (p / "config.json").exists()), None)
        if folder is None:
            known = sorted(p.parent.name for p in Path("runs").glob("*/config.json"))
            raise ConfigError(
                f'no run "{run}": neither a run folder nor a name under runs/ (known: {", ".join(known) or "none"})'
            )
        from dept_ray.rounds.folder import read_job

        return cls(read_job(folder), folder)

    @classmethod
    def attach(cls, run: str | Path, address: str | None = None) -> "Run":
        """A run in progress on a cluster.

        Args:
            run: name under ./runs, or folder.
            address: of the cluster; None: the one that the run's folder names.

        Raises:
            RunError: it is not in progress there.
        """
        from dept_ray.on_ray.cluster import connect, connected
        from dept_ray.on_ray.launch import Coordinator, address_of

        opened = cls.open(run)
        if address is None and not connected():
            address = address_of(opened.job.name, opened.folder)
        connect(address)
        coordinator = Coordinator.find(opened.job.name)
        if coordinator is None:
            raise RunError(
                f"run {opened.job.name} is not in progress on this cluster; `dept-ray train` goes on with it"
            )
        return cls(opened.job, opened.folder, coordinator, coordinator.status().num_records)

    # ------------------------------------------------------------------------------------------ asking and telling
    def status(self) -> RunStatus:
        """How it is; from its folder where it is not in progress."""
        if (coordinator := self._coordinator) is not None:
            with self._unless_over():
                return coordinator.status()
        from dept_ray.rounds.folder import in_progress

        records = self.history()
        rounds = max((r["round"] for r in records), default=0)
        file = self.folder / "error.txt"
        error = file.read_text() if file.exists() else ""
        over = "finished" if any(r["event"] == "scores" for r in records) else "failed" if error else "not in progress"
        phase = "training" if in_progress(self.folder) is not None else over
        return RunStatus(self.job.name, phase, rounds, self.job.rounds.total, error,
                         num_records=len(records))  # fmt: skip

    @property
    def address(self) -> str | None:
        """Of the Ray cluster that it is in progress on; None where it is not, or in a process without Ray."""
        from dept_ray.rounds.folder import in_progress

        return (in_progress(self.folder) or {}).get("address")

    def new_records(self, since: int) -> list[Record]:
        """Records from number `since` on."""
        if (coordinator := self._coordinator) is not None:
            with self._unless_over():
                return coordinator.new_records(since)
        return self.history()[since:]

    def history(self) -> list[Record]:
        """All records; their fields are told in `rounds.ledger`."""
        return read_records(self.folder / "metrics.jsonl")

    def story(self, name: str | None = None) -> "Story":
        """What became of it, to be drawn; `name` tells it from other runs."""
        from dept_ray.study.story import Story

        now = self.status()
        return Story(name or self.job.name, self.job, tuple(self.history()), now.phase, now.error)

    def table(self, of: Literal["rounds", "silos", "scores"] = "silos") -> "pandas.DataFrame":
        """Its records as a table: a row per round, per round and silo, or per measured state and source.

        Columns are those of the record (`study.tables`), as `run.table().groupby("silo").loss.last()` uses them.

        Raises:
            ConfigError: there is no such table.
        """
        from dept_ray.study.tables import table_of

        return table_of(self.history(), of)

    def plot(self, *others: "Run") -> "Plot":
        """Its charts, beside those of other runs, for a notebook to show; the same as `dept-ray report` draws."""
        from dept_ray.study.report import plot_of

        return plot_of(stories_of([self, *others]))

    def score(self, source: str | None = None) -> Record:
        """Validation of the last committed round, made here and now, without Ray.

        Args:
            source: only this one's; None: every source's.

        Returns:
            As the record that closes a run: round, scores by source, and their mean.

        Raises:
            ConfigError: there is no such source.
            StoreError: no round is committed yet.
            ShardError: the prepared text is not here.
        """
        from dept_ray.rounds.ledger import final_record
        from dept_ray.study.generate import score_run

        round, scores = score_run(self.job, self.folder, source)
        return final_record(self.job, round, scores)

    def choose(self, text: str) -> "Choice":
        """The source that a text is most like (the first, of no text): whose tokenizer and embedding to use where
        nobody says it.

        Raises:
            StoreError: no round is committed yet.
            ShardError: the prepared text is not here.
        """
        from dept_ray.study.choose import choose_for

        return choose_for(self.job, self.folder, text)

    def score_text(self, text: str, source: str | None = None) -> Record:
        """What the model of the last committed round makes of a text.

        Args:
            text: not empty.
            source: whose tokenizer and embedding to use; None: the one that `choose` says.

        Returns:
            source, and the figures of a record's `scores`.

        Raises:
            ConfigError: the text is empty, or there is no such source.
            StoreError, ShardError: as `choose`.
            VocabularyError: the text holds a token that a trimmed vocabulary has not.
        """
        from dept_ray.rounds.ledger import scores_record
        from dept_ray.study.generate import trained_silo

        if not text:
            raise ConfigError("the text to be scored is empty")
        source = source or self.choose(text).source
        _, silo = trained_silo(self.job, self.folder, source)
        return {"source": source, **scores_record({source: silo.score_text(source, text)})["scores"][source]}

    def sample(
        self, prompt: str = "", source: str | None = None, tokens: int = 100, temperature: float = 0.8, top_k: int = 50,
        seed: int = 0,
    ) -> Iterator[str]:  # fmt: skip
        """Text from the model of the last committed round, piece by piece: `"".join(run.sample("The "))`.

        Args:
            prompt: to go on from; it is not among the pieces.
            source: whose tokenizer and embedding to use; None: the one that `choose` says.
            tokens: at most.
            temperature: 0 takes the likeliest token each time.
            top_k: draw among that many.
            seed: of the draws.

        Raises:
            StoreError: no round is committed yet, or the source's silo has not trained.
            ConfigError: there is no such source, or a number is out of range.
            VocabularyError: the prompt holds a token that a trimmed vocabulary has not.
        """
        from dept_ray.study import generate as using

        source = source or self.choose(prompt).source
        _, silo = using.trained_silo(self.job, self.folder, source)
        return using.generate(silo, source, prompt, tokens, temperature, top_k, seed)

    def stop(self, now: bool = False) -> None:
        """End after the round in progress is committed; `now`: its silos hand in what they have."""
        if (coordinator := self._coordinator) is not None:
            with self._unless_over():
                coordinator.stop()
                self._hurry(now)

    def pause(self, now: bool = False) -> None:
        """Hold after the round in progress; `now`: its silos hand in what they have."""
        self._live().pause()
        self._hurry(now)

    def checkpoint(self, now: bool = False) -> Path:
        """Keep the round in progress for good or, while the run is held, the last one.

        Args:
            now: its silos hand in what they have.

        Returns:
            Where it is, once it is committed.
        """
        round = self._live().checkpoint()
        if now:
            self._live().hand_in(round)
        return self.folder / "rounds" / f"{round:06d}"

    def resume(self) -> None:
        """Go on after a pause."""
        self._live().resume()

    def step(self, rounds: int = 1) -> None:
        """Let so many rounds through, then hold."""
        self._live().step(rounds)

    def set(self, key: str, value: Any) -> None:
        """Change a setting from the next round on, such as `set("outer.lr", 0.7)`.

        Raises:
            ConfigError: the key cannot be changed in a run, or the value is wrong.
        """
        self._live().change({"set": key, "to": value})

    def add(self, source: Change) -> None:
        """Let a source join (see `jobfile.load_source`): prepared in the background, it enters between two rounds."""
        self._live().change(source)

    def drop(self, silo: str) -> None:
        """Let a silo leave after the round in progress; its snapshot stays, so that it may return."""
        self._live().change({"drop": silo})

    def bring_back(self, silo: str) -> None:
        """Let a silo that was dropped, or set aside, take part again."""
        self._live().change({"return": silo})

    @contextmanager
    def _unless_over(self) -> Iterator[None]:
        """A detached run's coordinator leaves with the run: whoever asks it too late reads the folder from then on."""
        from dept_ray.rounds.folder import told_end

        try:
            yield
        except ClusterError:
            if not told_end(self.folder):
                raise
            self._coordinator = None

    def _hurry(self, now: bool) -> None:
        if now:
            self._live().hand_in()

    def _live(self) -> "Coordinator":
        if self._coordinator is None:
            raise RunError(f"run {self.job.name} is not in progress; `dept-ray train` goes on with it")
        return self._coordinator

    def kill(self) -> None:
        """End now; the last committed round stands."""
        if self._coordinator is not None:
            self._coordinator.kill()

    def follow(self, console: "Console | None" = None, on: bool = False) -> list[Record]:
        """Show the run until it is over. An interrupt ends the watching, not the run.

        Args:
            console: to show it on; None: standard output.
            on: leave out what this handle has shown.

        Raises:
            RunError: it failed; with its reason.
        """
        return self._watch(console, held=False, since=self._told if on else 0)

    def wait(self, console: "Console | None" = None) -> list[Record]:
        """Show the run until it is held (after `step` or `pause`) or over. An interrupt ends the waiting, not the run.

        Returns:
            The records that were shown: all since this handle showed some last.

        Raises:
            RunError: it failed; with its reason.
        """
        told = self._told
        return self._watch(console, held=True, since=told)[told:]

    def _watch(self, console: "Console | None", held: bool, since: int = 0) -> list[Record]:
        from rich.console import Console

        from dept_ray.console import watch

        def tell(since: int) -> list[Record]:
            self._told = max(self._told, since)  # who asks from there on has shown what came before
            return self.new_records(since)

        with self._coordinator.patiently() if self._coordinator is not None else nullcontext():
            status, records = watch(console or Console(), self.status, tell, since=since, held=held)
        self._told = len(records)
        if status.phase == "failed":
            raise RunError(f"run {status.run} failed after round {status.round}: {status.error}")
        return records


def stories_of(runs: "Sequence[Run]") -> "list[Story]":
    """What became of runs, with names to tell them apart by: two of one name go by their folders."""
    names = [run.job.name for run in runs]
    return [
        run.story(str(run.folder) if names.count(name) > 1 else name) for run, name in zip(runs, names, strict=True)
    ]
