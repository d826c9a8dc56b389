"""Starting a run's coordinator on a cluster, and finding it again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from dept_ray.config import Job
from dept_ray.errors import ClusterError, RunError
from dept_ray.messages import Change, RunStatus
from dept_ray.metrics import Record
from dept_ray.on_ray.actors import CoordinatorActor, explain
from dept_ray.on_ray.cluster import NAMESPACE, connect
from dept_ray.rounds.folder import in_progress, in_words, last_place


def _name(run: str) -> str:
    return f"coordinator:{run}"


class Coordinator:
    """A handle on a run's coordinator actor, in plain calls."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._patience_s: float | None = 120.0

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Within, an answer is waited for, however long: who watches a run does not end it because it is slow."""
        before, self._patience_s = self._patience_s, None
        try:
            yield
        finally:
            self._patience_s = before

    @classmethod
    def start(cls, job: Job, detach: bool) -> "Coordinator":
        """Begin (or go on with) a run, on the node of this process, where its run folder is.

        On another one only when that node is gone. (A soft `NodeAffinitySchedulingStrategy`, which says the same, means
        nothing to an actor that asks for no resources, in Ray 2.60.)

        Raises:
            ClusterError: the run is in progress already.
        """
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        anywhere: list[dict[str, Any]] = [{"label_selector": {}}]
        try:
            # Ray asks again after a restart; what must not act twice carries an id of its own.
            remote: Any = ray.remote(CoordinatorActor)
            actor = remote.options(
                num_cpus=0, max_restarts=-1, max_task_retries=-1, name=_name(job.name), namespace=NAMESPACE,
                lifetime="detached" if detach else None, label_selector=here, fallback_strategy=anywhere,
            ).remote(job.model_dump_json(), os.cpu_count() or 1, detach)  # fmt: skip
        except ValueError:
            raise ClusterError(
                f"run {job.name} is in progress on this cluster: follow it with `dept-ray status {job.name}`, "
                "or give this job another `name`"
            ) from None
        return cls(actor)

    @classmethod
    def find(cls, run: str) -> "Coordinator | None":
        """The coordinator of a run in progress, or None."""
        try:
            return cls(ray.get_actor(_name(run), namespace=NAMESPACE))
        except ValueError:
            return None

    def status(self) -> RunStatus:
        """How the run is; waits while the coordinator restarts.

        Raises:
            ClusterError: it is gone.
        """
        return self._ask("status")

    def new_records(self, since: int) -> list[Record]:
        """Records from number `since` on."""
        return self._ask("new_records", since)

    def stop(self) -> None:
        """End after the round in progress is committed."""
        self._ask("stop")

    def checkpoint(self) -> int:
        """Keep the round in progress, or the last one, for good; its number."""
        return self._ask("checkpoint")

    def hand_in(self, round: int | None = None) -> None:
        """End a round by its number, or the one in progress, now, with what its silos have."""
        self._ask("hand_in", round)

    def pause(self) -> None:
        """Hold after the round in progress."""
        self._ask("pause")

    def resume(self) -> None:
        """Go on."""
        self._ask("resume")

    def step(self, rounds: int) -> None:
        """Let so many rounds through, then hold."""
        self._ask("step", rounds, uuid4().hex)

    def change(self, change: Change) -> None:
        """Ask for a change.

        Raises:
            ConfigError: it cannot be made in a run.
        """
        self._ask("change", change, uuid4().hex)

    def kill(self) -> None:
        """End now; the last committed round stands."""
        ray.kill(self._actor)

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, method).remote(*args), timeout=self._patience_s)
        except GetTimeoutError:
            raise ClusterError(
                f"the run's coordinator has not answered for {self._patience_s:g} s: its process stands still, or its "
                "machine has no time for it; the run may be well, ask again"
            ) from None
        except RayActorError as err:
            raise ClusterError(
                f"the run's coordinator is gone ({type(err).__name__}); its last committed round stands"
            ) from None
        except RayError as err:
            raise explain(err) from None


def address_of(run: str, folder: Path) -> str:
    """Of the Ray cluster that a run is in progress on, as its folder tells; joined, where nobody holds the run.

    Nobody does while its coordinator is being started again, and where all were killed.

    Raises:
        RunError: it is in progress nowhere, or in a process without Ray.
    """
    held = in_progress(folder)
    where = last_place(folder) if held is None else held
    if held == {}:
        raise RunError(f"run {run} is being taken up at this moment: ask again")
    if held is not None and "address" not in held:
        raise RunError(
            f"run {run} is in progress in one process, without Ray ({in_words(where)}): it is watched and stopped "
            "(Ctrl-C) in its own terminal alone"
        )
    try:
        if held is None:
            connect(where["address"])
        return where["address"]
    except KeyError:
        raise RunError(f"run {run} is not in progress; `dept-ray train` goes on with it") from None
    except ClusterError as err:
        raise RunError(f"run {run} is not in progress ({err}); `dept-ray train` goes on with it") from None
