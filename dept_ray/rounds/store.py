"""The run folder: the one place where a round becomes a fact.

    runs/<run>/config.json  environment.json  metrics.jsonl  tensorboard/  asked.json  lock
    runs/<run>/rounds/000012/{body,rows,body_momentum,rows_momentum}.safetensors  manifest.json  [kept]

A round's tensors are written first; its manifest, which names them with their checksums, each silo's snapshot and
position, and the round's own record, is renamed into place last. Without a manifest there is no round. Older rounds
go only after, but for those that somebody asked to keep.
"""

import fcntl
import functools
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dept_ray.config import Job
from dept_ray.draws import checksum
from dept_ray.errors import DeptError, RunError, StoreError, WrongRunError
from dept_ray.messages import Change
from dept_ray.metrics import Record, finite, read_records
from dept_ray.rounds.folder import (
    committed,
    in_progress,
    in_words,
    layout_fingerprint,
    load_round,
    read_manifest,
    run_folder,
)
from dept_ray.text.shards import write_atomically

if TYPE_CHECKING:
    from dept_ray.rounds.state import RunState

_LOOK_EVERY_S = 0.1
_A_LOOK_S = 1.0
"""Whoever only looks whether the run is in progress holds it for a moment, and is waited for."""

FORMAT = 1


@dataclass(frozen=True)
class Standing:
    """Where a run stands, as its last manifest says; by default: nowhere yet."""

    round: int = 0
    changes: tuple[Change, ...] = ()
    heard: int = 0


class RunStore:
    """One run's folder, open for writing: by anyone while nobody holds the run, from then on by who does.

    Raises:
        WrongRunError: the folder belongs to another job.
        StoreError: it cannot be written, or its rounds are gone.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.folder = job, run_folder(job)
        self._corpora: dict[str, str] = {}  # also of silos that are not here now
        self._lock: IO[str] | None = None
        self.life = 0
        """How often the run was taken up by `hold`: part of every order's fence."""
        try:
            (self.folder / "rounds").mkdir(parents=True, exist_ok=True)
            self._check_owner()
            with open(self.folder / "lock", "a+") as lock:  # to be read, too: NFS shares no lock otherwise
                if _locked(lock, fcntl.LOCK_SH):  # else who holds the run has claimed it, or does so now
                    self._claim()
        except OSError as err:
            raise self._cannot_be_written(err) from err

    def _check_owner(self) -> None:
        """Before the first round nothing can be lost, and a job that was wrong is mended in place."""
        if not self.rounds():
            return
        config = self.folder / "config.json"
        try:
            stored = json.loads(config.read_text())
        except (OSError, ValueError) as err:
            raise StoreError(
                f"{config} cannot be read ({err}): restore it, or choose another name for the run"
            ) from None
        if stored["fingerprint"] != self.job.fingerprint:
            theirs, ours = _flat(stored["identity"]), _flat(self.job.identity)
            differs = [key for key in sorted(theirs | ours) if theirs.get(key) != ours.get(key)]
            shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differs)
            raise WrongRunError(
                f"run folder {self.folder} belongs to another job ({shown}): "
                "give this job another `name`, or delete the folder"
            )

    def _claim(self) -> None:
        """Write whose folder it is; only while nobody else holds the run."""
        self._check_rounds()
        about = {"fingerprint": self.job.fingerprint, "identity": self.job.identity}
        about["job"] = self.job.model_dump(mode="json")
        write_atomically(self.folder / "config.json", json.dumps(about, indent=1).encode())
        write_atomically(self.folder / "environment.json", json.dumps(_environment(), indent=1).encode())

    def _check_rounds(self) -> None:
        """Whether rounds that were committed are still there; to go back from round 1 is to begin anew."""
        if self.rounds():
            return
        told = max((record["round"] for record in read_records(self.metrics) if record["event"] == "round"), default=0)
        if told > 1:
            raise StoreError(
                f"{self.folder / 'rounds'} holds no round, but {self.metrics} tells of {told}: restore its rounds, or "
                f"delete {self.folder} to begin anew"
            )

    def _cannot_be_written(self, err: OSError) -> StoreError:
        return StoreError(f"run folder {self.folder} cannot be written ({err}): free space, mend it, or set `folder`")

    def hold(self, patience_s: float = 0.0, **where: Any) -> None:
        """Say that the run is in progress here, until `let_go` or this process's end.

        Args:
            patience_s: how long to wait for who holds it now.
            where: told to others, such as the address of the Ray cluster.

        Raises:
            RunError: it is in progress elsewhere.
            WrongRunError: it has become another job's meanwhile.
            StoreError: its folder cannot be written.
        """
        try:
            lock = open(self.folder / "lock", "a")  # noqa: SIM115 - its lifetime is the point
        except OSError as err:
            raise self._cannot_be_written(err) from err
        until = time.monotonic() + max(patience_s, _A_LOOK_S)
        while not _locked(lock):
            if time.monotonic() >= until:
                lock.close()
                raise RunError(f"run {self.job.name} is in progress ({in_words(in_progress(self.folder) or {})})")
            time.sleep(_LOOK_EVERY_S)
        self._lock = lock
        try:
            self._take_up(where)
        except DeptError:
            self.let_go()
            raise

    def _take_up(self, where: dict[str, Any]) -> None:
        try:
            self._check_owner()
            self._claim()
            self.life = self._lives() + 1
            about = {"pid": os.getpid(), "host": platform.node(), **where}
            write_atomically(self.folder / "lives", str(self.life).encode())
            write_atomically(self.folder / "live.json", json.dumps(about).encode())
            (self.folder / "error.txt").unlink(missing_ok=True)
        except OSError as err:
            raise self._cannot_be_written(err) from err

    def _lives(self) -> int:
        lives = self.folder / "lives"
        try:
            return int(lives.read_text()) if lives.exists() else 0
        except ValueError:
            raise StoreError(f"{lives} holds no number: write how often the run was started into it") from None

    def let_go(self) -> None:
        """The run is not in progress any more; nothing, where it never was here."""
        if self._lock is not None:
            (self.folder / "live.json").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    @property
    def metrics(self) -> Path:
        """The records, one JSON object a line."""
        return self.folder / "metrics.jsonl"

    def save(self, state: "RunState", record: dict[str, Any], corpora: dict[str, str]) -> None:
        """Make a round a fact.

        Args:
            state: after the round.
            record: the round's record, kept in the manifest so that it is never lost.
            corpora: fingerprint of each source's prepared tokens.

        Raises:
            StoreError: it cannot be written; the round before is untouched.
        """
        from safetensors.torch import save

        folder, kept = self.folder / "rounds" / f"{state.round:06d}", self.kept()
        self._corpora |= corpora
        try:
            folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone is not made anew
            files = {}
            for name, tensor in state.tensors.items():
                blob = save({name: tensor})
                write_atomically(folder / f"{name}.safetensors", blob)
                files[name] = checksum(blob)
            manifest = {
                "format": FORMAT,
                "run": self.job.name,
                "fingerprint": self.job.fingerprint,
                "layout": layout_fingerprint(self.job),
                "round": state.round,
                "step": state.step,
                "changes": state.changes,
                "heard": state.heard,
                "files": files,
                "silos": {name: asdict(silo) for name, silo in state.silos.items()},
                "corpora": self._corpora,
                "record": finite(record),
            }
            write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        except FileNotFoundError as err:
            raise StoreError(
                f"round {state.round} cannot be written: run folder {self.folder} is gone (moved, deleted, or its disk "
                f"is not mounted); round {state.round - 1} was its last: put it back and run the same command again"
            ) from err
        except OSError as err:
            raise StoreError(
                f"round {state.round} cannot be written to {folder} ({err}); round {state.round - 1} stands"
            ) from err
        for old in self.rounds()[: -self.job.rounds.keep]:
            if old not in kept:
                shutil.rmtree(self.folder / "rounds" / f"{old:06d}", ignore_errors=True)

    def rounds(self) -> list[int]:
        """Committed rounds on disk, oldest first."""
        return committed(self.folder)

    def stands(self) -> "Standing":
        """What the last committed round says of where the run stands.

        Raises:
            StoreError: its manifest cannot be read.
        """
        rounds = self.rounds()
        if not rounds:
            return Standing()
        manifest = read_manifest(self.folder / "rounds" / f"{rounds[-1]:06d}")
        return Standing(rounds[-1], tuple(manifest["changes"]), manifest["heard"])

    # ------------------------------------------------------------------------------------ what people asked for
    def asked(self) -> dict[str, Any] | None:
        """What people asked of the life before (`rounds.control`); None: nothing.

        Raises:
            StoreError: it cannot be read.
        """
        file = self.folder / "asked.json"
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except (OSError, ValueError) as err:
            raise StoreError(
                f"{file} cannot be read ({err}): it holds what people asked of the run since its last round; restore "
                "it, or delete it and ask again"
            ) from None

    def keep_asked(self, asked: dict[str, Any]) -> None:
        """Keep what people ask until a round has heard it.

        Raises:
            StoreError: it cannot be written; whoever asks is told.
        """
        try:
            write_atomically(self.folder / "asked.json", json.dumps(asked).encode())
        except OSError as err:
            raise StoreError(f"{self.folder / 'asked.json'} cannot be written ({err}): free space, ask again") from err

    def keep(self, round: int) -> None:
        """Never prune a committed round, nor the snapshots that it names.

        Raises:
            StoreError: the folder cannot be written.
        """
        mark = self.folder / "rounds" / f"{round:06d}" / "kept"
        try:
            mark.touch()
        except OSError as err:
            raise StoreError(f"{mark} cannot be written ({err}): free space, ask again") from err

    def kept(self) -> dict[int, dict[str, str]]:
        """Rounds that are kept for good, and by silo the snapshots that they name."""
        folders = [path.parent for path in (self.folder / "rounds").glob("*/kept")]
        manifests = {int(folder.name): read_manifest(folder) for folder in folders}
        return {
            round: {name: silo["snapshot"] for name, silo in manifest["silos"].items() if silo["snapshot"]}
            for round, manifest in sorted(manifests.items())
        }

    # ------------------------------------------------------------------------------------ going on

    def load(self, corpora: dict[str, str]) -> "RunState | None":
        """The last committed round, or None for a run that has none.

        Raises:
            StoreError: its files are missing or altered.
            WrongRunError: it is another job's, or the prepared tokens are not those that it was trained on.
        """
        self.history()
        rounds = self.rounds()
        if not rounds:
            return None
        state, manifest = load_round(self.folder, rounds[-1])
        if (theirs := manifest.get("fingerprint", self.job.fingerprint)) != self.job.fingerprint:
            raise WrongRunError(
                f"round {rounds[-1]} in {self.folder} was trained by another job (fingerprint {theirs}, this job's is "
                f"{self.job.fingerprint}): give this job another `name`, or delete the folder"
            )
        if manifest["layout"] != layout_fingerprint(self.job):
            raise WrongRunError(
                f"run folder {self.folder} was written by a version that orders the body's parameters otherwise: "
                "go on with that version, or give the job another `name`"
            )
        for source, fingerprint in manifest["corpora"].items():
            if corpora.get(source, fingerprint) != fingerprint:
                raise WrongRunError(
                    f'run {self.job.name} was trained on other tokens of source "{source}" (fingerprint {fingerprint}, '
                    f"now {corpora[source]}): restore the prepared data, or give the job another `name`"
                )
        self._corpora = manifest["corpora"]
        return state

    def history(self) -> list[Record]:
        """The records of all committed rounds, for one who is about to train.

        `metrics.jsonl` is made to agree: a crash may have lost a line, or left one of no fact.
        """
        rounds = self.rounds()
        known, records = read_records(self.metrics), []
        if rounds:
            last = read_manifest(self.folder / "rounds" / f"{rounds[-1]:06d}")["record"]
            before = [r for r in known if r["event"] == "round" and r["round"] < rounds[-1]]
            changed = [r for r in known if r["event"] == "change" and r["round"] < rounds[-1]]
            records = sorted([*before, *changed, last], key=lambda r: (r["round"], r["event"] == "change"))
        write_atomically(self.metrics, "".join(json.dumps(finite(record)) + "\n" for record in records).encode())
        return records


def _locked(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Whether it is this file's now; others may hold it."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if pairs is None:
        return {prefix: value}
    return {k: v for key, inner in pairs for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}


def _environment() -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "packages": _packages(),
    }


@functools.cache
def _packages() -> dict[str, str]:
    names = ("dept-ray", "torch", "ray", "numpy", "tokenizers", "datasets", "pyarrow")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
