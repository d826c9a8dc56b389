"""`Places`: which silo lives where. Placed, opening, ready; made anew when it died, moved when its node is to go.

Ray restarts nothing by itself: a silo that died is made anew here and reloads the snapshot which its next order names.
One that has no place yet is a demand that the cluster may meet later, and holds nothing up.
"""

import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from dept_ray.config import Job
from dept_ray.draws import digest
from dept_ray.errors import ClusterError, DeptError, ShardError, SiloError, discreet
from dept_ray.messages import SiloCard, SiloSpec, SiloStatus
from dept_ray.on_ray.actors import SiloActor, explain
from dept_ray.on_ray.cluster import has_labels, leaving_nodes
from dept_ray.rounds.methods import method_of, resources_of
from dept_ray.rounds.pool import MakeSilo, without_other_newcomers
from dept_ray.sections import Resources
from dept_ray.silo.reading import open_corpora
from dept_ray.text.prepare import prepare, tokenizer_kind

LOOK_EVERY_S = 0.5
_PING_S = 5.0


class Places:
    """The silos of one run as actors, children of the calling process.

    Args:
        make: what makes a silo.
    """

    def __init__(self, make: MakeSilo) -> None:
        self.make = make
        self.actors: dict[str, Any] = {}
        self.cards: dict[str, SiloCard] = {}
        self.failed: dict[str, DeptError] = {}
        """Who could not be made, and why."""
        self._opening: dict[str, tuple[Any, float, bool]] = {}
        """Silos that were placed and have not shown their card yet: (reference, since when, whether to wait for it)."""
        self._tries: dict[str, int] = {}
        self._homes: dict[str, str] = {}
        """The nodes that were chosen here."""
        self._preparing: set[str] = set()
        self._one_at_a_time = threading.Lock()
        self._prepared: queue.SimpleQueue[str] = queue.SimpleQueue()
        """Newcomers whose text is ready; the thread that runs the rounds places them."""
        self._statuses: dict[str, SiloStatus] = {}
        self._lock = threading.Lock()

    def plan(self, job: Job, specs: Mapping[str, SiloSpec]) -> None:
        """What silos are made of from now on."""
        self.job, self.specs = job, specs

    # ------------------------------------------------------------------------------------------ opening
    def open(self) -> None:
        """Place every silo and wait for those that find a place.

        Raises:
            DeptError: one cannot open its data; none could be placed.
        """
        for name, spec in self.specs.items():
            if self._is_prepared(name, spec):
                self.place(name)
            else:  # it was joining when the coordinator died
                self.prepare_and_place(name)
        began = moved = time.monotonic()
        seen = (0, 0)
        while self._opening and time.monotonic() - began < self.job.faults.start_timeout_s:
            self.settle(LOOK_EVERY_S)
            joined = {source.name for source in self.job.sources if source.joined}
            if missing := self.failed.keys() - joined:  # one that joined, and cannot, was never needed
                raise self.failed[min(missing)]
            self.poll(self._opening)
            homeless = [name for name in self._opening if not self._statuses[name].pid]
            if (now := (len(self.cards), len(homeless))) != seen:
                seen, moved = now, time.monotonic()
            nothing_moves = time.monotonic() - moved > self.job.faults.patience_s
            if self.cards and len(homeless) == len(self._opening) and nothing_moves:
                return  # the cluster has no room for them now; they come when it has
        if not self.cards:
            wishes = {name: resources_of(self.job, name) for name in self._opening}
            asked = "; ".join(f"{n}: {w.num_gpus:g} GPUs, {w.num_cpus:g} CPUs, {w.labels}" for n, w in wishes.items())
            raise ClusterError(
                f"no silo was placed within faults.start_timeout_s = {self.job.faults.start_timeout_s:g} s ({asked}): "
                "is there such a node?"
            )

    def prepare_and_place(self, silo: str) -> None:
        """Its text is prepared in the background, unless it is here; a source that cannot be is among `failed`."""
        if silo in self.actors or silo in self._preparing:
            return
        self._preparing.add(silo)
        self.failed.pop(silo, None)
        self.note(SiloStatus(silo, "preparing"))
        job = without_other_newcomers(self.job, silo)
        threading.Thread(target=self._prepare, args=(job, silo), daemon=True).start()

    def _prepare(self, job: Job, silo: str) -> None:
        from dept_ray.on_ray.ingest import ray_runner

        try:
            with self._one_at_a_time:
                prepare(job, tokenizer_kind(method_of(job).vocabulary), ray_runner(job))
            self._prepared.put(silo)
        except DeptError as err:
            self.failed[silo] = err
        except Exception as err:  # noqa: BLE001 - a bug must reach the user, not die with this thread
            bug = err.cause if isinstance(err, RayTaskError) else err
            if isinstance(err, RayError) and isinstance(bug, DeptError | RayError):
                self.failed[silo] = explain(err)
            else:  # what it says may hold a piece of text
                traceback.print_exception(bug)
                self.failed[silo] = discreet(bug, "the coordinator's log")
        finally:
            self._preparing.discard(silo)

    def _is_prepared(self, silo: str, spec: SiloSpec) -> bool:
        """Whether a silo's text is there; only of one that joined may it not be."""
        if not any(source.joined for source in self.job.sources if source.name == silo):
            return True
        try:
            open_corpora(self.job, spec)
        except ShardError:
            return False
        return True

    # ------------------------------------------------------------------------------------------ placing
    def place(self, name: str, hold_up: bool = True) -> None:
        """Ask Ray for a silo; `hold_up`: whether a round may wait for it, for a while."""
        resources = resources_of(self.job, name)
        options = self._where(name, resources)
        as_actor: Any = ray.remote
        actor = as_actor(concurrency_groups={"control": 2})(SiloActor).options(
            num_cpus=resources.num_cpus, num_gpus=resources.num_gpus, max_restarts=0, max_task_retries=0, **options,
        ).remote(self.job.model_dump_json(), self.specs[name], self.make)  # fmt: skip
        self.actors[name] = actor
        self._opening[name] = (actor.card.remote(), time.monotonic(), hold_up)
        self.note(SiloStatus(name, "starting"))

    def _where(self, name: str, resources: Resources) -> dict[str, Any]:
        """Ray's options: a node with its labels; of who asks for no resources, the one with the fewest for its cores.

        For those Ray chooses by chance, also a node that runs no task, where nobody would read their text. Who is
        placed again goes elsewhere, if it can; and of nodes that are alike other runs take others.
        """
        labels = resources.labels
        anywhere: dict[str, Any] = {"label_selector": labels} if labels else {}
        left = self._homes.pop(name, None)
        if resources.num_cpus or resources.num_gpus:
            return anywhere
        leaving, taken = leaving_nodes(), Counter(self._homes.values())
        cores = {
            node["NodeID"]: node["Resources"].get("CPU", 0.0)
            for node in ray.nodes()
            if node["Alive"] and has_labels(node, labels) and node["NodeID"] not in leaving
        }
        room = [
            (node == left, taken[node] / cpus, digest(self.job.name, name, node), node)
            for node, cpus in cores.items()
            if cpus >= 1
        ]
        if not room:
            return anywhere
        self._homes[name] = min(room)[-1]
        here = {**labels, "ray.io/node-id": self._homes[name]}
        return {"label_selector": here, "fallback_strategy": [{"label_selector": labels}]}

    def place_anew(self, name: str) -> None:
        """Give up a silo's process, whatever it is doing, and make another."""
        ray.kill(self.actors[name])
        self.place(name)

    def settle(self, timeout_s: float) -> None:
        """Place who was prepared; see who has opened, or failed to."""
        while not self._prepared.empty():
            self.place(self._prepared.get(), hold_up=False)
        refs = {ref: name for name, (ref, _, _) in self._opening.items()}
        opened = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else []
        for ref in opened:
            name = refs[ref]
            try:
                self.cards[name] = ray.get(ref)
                del self._opening[name]
                self._tries[name] = 0
                self.note(replace(self._statuses[name], doing="waiting"))
            except RayError as err:
                self._try_again(name, explain(err), _is_data(err))
        self.poll([refs[ref] for ref in opened if refs[ref] in self.cards])  # what they hold

    def _unhang(self) -> None:
        """Make anew who has a process and does not open; who has no place waits on."""
        now, limit_s = time.monotonic(), self.job.faults.start_timeout_s
        long = {name: entry for name, entry in self._opening.items() if now - entry[1] > limit_s}
        if long:
            self.poll(long)
        for name, (ref, _, _) in long.items():
            self._opening[name] = (ref, now, False)  # and is looked at again after as long; no round waits twice
            if self._statuses[name].pid:
                ray.kill(self.actors[name])
                self._try_again(name, SiloError(f"it did not open within faults.start_timeout_s = {limit_s:g}"), False)

    def _try_again(self, name: str, reason: DeptError, in_vain: bool) -> None:
        """A silo did not open: make it anew, a few times."""
        self._tries[name] = self._tries.get(name, 0) + 1
        if in_vain or self._tries[name] >= self.job.faults.failures:
            self.failed[name] = reason
            del self._opening[name], self.actors[name]
        else:
            self.place(name)

    def ready(self) -> set[str]:
        """Those that can take an order now, once the dead are being made anew and those on leaving nodes moved."""
        self.revive(name for name in self.actors if name not in self._opening)
        for name in self.leaving():
            self.place_anew(name)
        self._unhang()
        patience_s = self.job.faults.patience_s
        while any(wait and time.monotonic() - since < patience_s for _, since, wait in self._opening.values()):
            self.settle(0.1)
        self.settle(0)
        nobody_since = time.monotonic()
        while self.actors.keys() == self._opening.keys() and self._opening:  # they were all lost at once
            self.settle(LOOK_EVERY_S)
            if time.monotonic() - nobody_since > self.job.faults.start_timeout_s:
                break
        return set(self.actors) - set(self._opening)

    def is_open(self, name: str) -> bool:
        """Whether it can take an order, as far as is known here."""
        return name in self.actors and name not in self._opening

    def revive(self, names: Iterable[str]) -> None:
        """Ask for a sign of life. Who is dead is made anew; who is silent is left alone until Ray decides."""
        refs = {self.actors[name].status.remote(): name for name in names}
        answered, _ = ray.wait(list(refs), num_returns=len(refs), timeout=_PING_S) if refs else ([], [])
        for ref in answered:
            try:
                self.note(ray.get(ref))
            except ActorUnavailableError:  # perhaps; the next look will tell
                continue
            except RayError:
                self.place(refs[ref])

    def leaving(self) -> set[str]:
        """Silos, opened ones, on nodes that were told to go (a preemption notice, a drain)."""
        nodes = leaving_nodes()
        with self._lock:
            return {name for name in self.actors.keys() - self._opening if self._statuses[name].node in nodes}

    # ------------------------------------------------------------------------------------------ looking
    def poll(self, names: Collection[str]) -> None:
        """Ask how they are; who does not answer at once keeps its last word."""
        refs = [self.actors[name].status.remote() for name in names]
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0.2) if refs else ([], [])
        for ref in ready:
            try:
                self.note(ray.get(ref))
            except RayError:  # its order will say so
                continue

    def statuses(self) -> dict[str, SiloStatus]:
        """The last word of each."""
        with self._lock:
            return dict(self._statuses)

    def note(self, status: SiloStatus) -> None:
        """Take a silo's word."""
        with self._lock:
            self._statuses[status.silo] = status

    def close(self) -> None:
        """Let all silos go."""
        for actor in self.actors.values():
            ray.kill(actor)
        self.actors, self._opening = {}, {}


def _is_data(err: RayError) -> bool:
    """Whether a silo could not open for a reason that trying again does not mend."""
    return isinstance(err, RayTaskError) and isinstance(err.cause, DeptError)
