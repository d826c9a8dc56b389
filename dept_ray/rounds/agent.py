"""A region's agent: reads the letters of a `MailboxPool`, has the region's own pool obey them, writes the answers.

It knows no cluster: the pool, and who prepares text, are arguments (`on_ray.region` passes those of Ray). It connects
to the mailbox alone, and only when it looks; what it cannot write now it writes when it can, unless nobody asks any
more.
Text, tokenizers and what stays home never leave: a letter has what `dept_ray.messages` has, and nothing else.
"""

import secrets
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from dept_ray.config import Job
from dept_ray.draws import digest
from dept_ray.errors import DeptError, RunError, SiloError, StoreError, discreet
from dept_ray.messages import RoundOrder, SiloStatus, SiloUpdate
from dept_ray.rounds.letters import Mailbox, seal
from dept_ray.rounds.mailbox import BEAT, RUN
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.pool import LocalPool, SiloPool, fence_of
from dept_ray.rounds.regions import Serves, by_labels, job_of_region, region_name
from dept_ray.sections import RegionsSection
from dept_ray.text.prepare import corpus_folder, prepare, tokenizer_kind

Prepare = Callable[[Job], None]
"""Makes tokens of the text of a job's sources, skipping what is there."""


class Agent:
    """One region's hand in the mailbox.

    Args:
        box: the mailbox.
        labels: which the region bears.
        make_pool: called when a run opens: where its silos shall live.
        prepare: called before that, and when a source joins.
        folder: where text and snapshots of sources without a `storage` stay; None: the job's.
        serves: which silos are this region's; None: those that ask for its labels.
        name: of the region, in the mailbox; None: its labels.
        tell: what people here may read.
    """

    def __init__(
        self, box: Mailbox, labels: Mapping[str, str], make_pool: Callable[[], SiloPool], prepare: Prepare, *,
        folder: str | None = None, serves: Serves | None = None, name: str | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.box, self.labels, self.make_pool, self.prepare = box, labels, make_pool, prepare
        self.folder, self.serves, self.name = folder, serves or by_labels(labels), name or region_name(labels)
        self.tell = tell
        self.settings = RegionsSection()
        self.pool: SiloPool | None = None
        self.id = secrets.token_hex(4)
        self.opening: str | None = None
        self._word = 0
        self._phase = "preparing"
        """preparing, opening or open."""
        self._silos: list[str] = []
        self._ready: set[str] = set()
        self._failed: dict[str, DeptError] = {}
        self._cards: dict[str, str] = {}
        self._tokenizer: str | None = None
        self._beats = self._begun = self._done = 0
        """Beats, the last order that was begun, the last whose answers are written."""
        self._answers: dict[str, Any] = {}
        """Letters that could not be written yet, by path."""
        self._beating = threading.Lock()
        self._in_trouble = False
        """Whether the last look ended in an error."""

    # ------------------------------------------------------------------------------------------ looking
    def serve(self, leave: bool = False, sleep: Callable[[float], None] = time.sleep) -> None:
        """Look, for ever.

        Args:
            leave: when the run that it has served is closed.
        """
        try:
            while not (self.look() and leave):
                sleep(self.settings.look_every_s)
        finally:
            self.release()

    def look(self) -> bool:
        """Do what the mailbox asks for now.

        Returns:
            Whether a run that was served here has just been closed.
        """
        try:
            closed, trouble = self._do_what_is_asked(), ""
        except StoreError as err:
            closed, trouble = False, f"cut off from the mailbox: {err}"
        except RunError as err:  # a letter that was altered: it is looked at again
            closed, trouble = False, str(err)
        if bool(trouble) != self._in_trouble:  # once, however long it lasts
            self.tell(trouble or f"the mailbox is in order again: {self.box.uri}")
        self._in_trouble = bool(trouble)
        return closed

    def _do_what_is_asked(self) -> bool:
        said = self.box.read(RUN)
        if said is None or said["closed"]:
            closed = self.opening is not None and said is not None
            self.release()
            return closed
        if (said["opening"], said["word"]) != (self.opening, self._word):
            self._take_up(said)
        self._obey()
        self._write_answers()
        self._beat()
        return False

    def release(self) -> None:
        """Let silos and letters go."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None
        if self.opening is not None:
            self.opening = None
            with suppress(StoreError):
                self.box.delete(self.name)

    # ------------------------------------------------------------------------------------------ a run, its silos
    def _take_up(self, said: Mapping[str, Any]) -> None:
        """Make the silos that a run has here, or those that joined since."""
        try:
            whole, first = Job.model_validate_json(said["job"]), Job.model_validate_json(said["first"])
        except ValueError as err:
            raise SiloError(f"the job in {self.box.uri} is of another version of dept_ray: {err}") from None
        if said["opening"] != self.opening:
            self.release()
            self._begun = self._done = 0
            self._answers, self._cards, self._failed, self._silos = {}, {}, {}, []
        self.opening, self._word, self.settings = said["opening"], said["word"], whole.regions
        job = job_of_region(whole, self.serves, self.labels, self.folder)
        self._silos = [source.name for source in job.sources]
        self.tell(f"run {job.name}: {len(self._silos)} of its {len(whole.sources)} sources are here")
        with self._meanwhile():
            self._failed = self._place(job, first)
        self._phase = "open"
        for silo, reason in self._failed.items():
            self.tell(f"silo {silo} cannot be made: {reason}")

    def _place(self, job: Job, first: Job) -> dict[str, DeptError]:
        """Make the silos of a job that are not there yet; who cannot be made, and why."""
        failed = dict[str, DeptError]()
        if self.pool is None:
            standing = [source.name for source in job.sources if not source.joined]
            for silos in [standing] if standing else [[name] for name in self._silos]:
                with self._noting(failed, silos):
                    self._open(_only(job, silos), first)
                    break
        if self.pool is not None:
            for silo in sorted(set(self._silos) - self.pool.cards.keys()):
                with self._noting(failed, [silo]):
                    self.pool.add(job, silo)
            with self._noting(failed, self._silos):
                self._ready = self.pool.ready()
        return failed

    @contextmanager
    def _noting(self, failed: dict[str, DeptError], silos: Iterable[str]) -> Iterator[None]:
        """What goes wrong here is why these silos cannot be made; it ends no agent."""
        try:
            yield
        except Exception as err:  # noqa: BLE001 - a bug ends no agent
            failed |= dict.fromkeys(silos, err if isinstance(err, DeptError) else self._untold(err))

    def _open(self, job: Job, first: Job) -> None:
        """Prepare the text of a job, and make its silos."""
        self._phase = "preparing"
        self.prepare(job)
        if method_of(job).vocabulary != "own":
            tokenizer = corpus_folder(job, job.sources[0].name, "global") / "tokenizer.json"
            self._tokenizer = digest(tokenizer.read_bytes())
        self._phase = "opening"
        with ExitStack() as unless_open:
            unless_open.callback((pool := self.make_pool()).close)
            pool.open(job, first)
            unless_open.pop_all()
        self.pool = pool

    def _untold(self, err: Exception) -> DeptError:
        """What may leave of an exception; the rest is printed here."""
        told = discreet(err, f"the log of region {self.name}")
        if told is not err:
            traceback.print_exception(err)
        return told

    # ------------------------------------------------------------------------------------------ orders
    def _obey(self) -> None:
        """Train the newest order, unless it was addressed to an agent that is gone."""
        mine = f"order-{self.opening}-"
        numbers = [int(name.rpartition("-")[2]) for name in self.box.names(self.name) if name.startswith(mine)]
        number = max(numbers, default=0)
        if self.pool is None:
            return
        if number > self._begun:
            try:
                letter = self.box.read(f"{self.name}/{mine}{number}")
            except SiloError as err:  # altered on its way: the round does without
                self.tell(str(err))
                letter = None
            self._begun = number
            if letter is not None and letter["agent"] == self.id:
                self._train(number, letter["orders"])
        with self._meanwhile():  # who was lost is being made anew
            self._ready = self.pool.ready()

    def _train(self, number: int, orders: dict[str, RoundOrder]) -> None:
        assert self.pool is not None
        with self._meanwhile(f"{self.opening}-{number}", fence_of(orders)):
            there = {silo: orders[silo] for silo in orders.keys() & self.pool.ready()}
            answers: dict[str, Any] = dict.fromkeys(orders.keys() - there, SiloError("its region cannot place it now"))
            try:
                answers |= self.pool.run_round(there, lambda took_s: float("inf"))
            except Exception as err:  # noqa: BLE001 - a bug ends no agent
                answers |= dict.fromkeys(there, self._untold(err))
        for silo, answer in sorted(answers.items()):
            told = answer if isinstance(answer, SiloUpdate) else self._untold(answer)
            self._answers[f"update-{self.opening}-{number}-{silo}"] = told
        self._write_answers()

    def _write_answers(self) -> None:
        """Write what is still to be written, unless its order was withdrawn meanwhile."""
        names = self.box.names(self.name) if self._answers else []
        orders = {name.removeprefix("order-") for name in names if name.startswith("order-")}
        for name in list(self._answers):
            opening, number, _ = name.removeprefix("update-").split("-", 2)
            if f"{opening}-{number}" in orders:
                answer = self._answers[name]
                if isinstance(answer, SiloUpdate):
                    answer = self._whole(answer)
                self.box.write(f"{self.name}/{name}", answer)
            del self._answers[name]
        self._done = self._begun

    def _whole(self, answer: SiloUpdate) -> SiloUpdate | Exception:
        """With its deltas, which may lie in the region's object store, or, with the node that had them, be lost."""
        try:
            return replace(answer, body=answer.delta("body"), rows=answer.delta("rows"))
        except DeptError as err:
            return self._untold(err)

    # ------------------------------------------------------------------------------------------ signs of life
    def _beat(self) -> None:
        """Say how it is here."""
        with self._beating:
            pool, self._beats = self.pool, self._beats + 1
            named = {silo: SiloStatus(silo, self._phase) for silo in self._silos}
            statuses = named | (pool.statuses() if pool is not None else {})
            failed: dict[str, DeptError] = dict(self._failed)
            if pool is not None:
                failed |= {silo: SiloError(reason) for silo, reason in pool.failed().items()}
                for silo, card in pool.cards.items():
                    if (mark := digest(seal(card))) != self._cards.get(silo):
                        self.box.write(f"{self.name}/card-{silo}", card)
                        self._cards[silo] = mark
            self.box.write(f"{self.name}/{BEAT}", {
                "agent": self.id, "opening": self.opening, "beat": self._beats, "phase": self._phase,
                "begun": self._begun, "done": self._done, "silos": list(self._silos), "ready": sorted(self._ready),
                "statuses": statuses, "failed": failed, "cards": dict(self._cards), "tokenizer": self._tokenizer,
            })  # fmt: skip

    @contextmanager
    def _meanwhile(self, order: str | None = None, fence: tuple[int, int] = (-1, 0)) -> Iterator[None]:
        """Go on beating while there is long work; under an order, hear when nobody waits for more of it.

        Args:
            order: its letter's name.
            fence: its round and attempt.
        """
        done = threading.Event()

        def watch() -> None:
            handed_in = order is None
            while not done.wait(self.settings.look_every_s):
                with suppress(RunError):
                    self._beat()
                    if not handed_in and self._unwanted(str(order)):
                        assert self.pool is not None
                        self.pool.hand_in(*fence)
                        handed_in = True

        watcher = threading.Thread(target=watch, name="beat", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _unwanted(self, order: str) -> bool:
        """Whether what an order has is wanted now, or nobody waits for it any more."""
        names = self.box.names(self.name)
        return f"stop-{order}" in names or f"order-{order}" not in names


def _only(job: Job, silos: Collection[str]) -> Job:
    """The job with only these of its sources."""
    return job.model_copy(update={"sources": tuple(source for source in job.sources if source.name in silos)})


def local_region(mailbox: str, labels: Mapping[str, str], folder: str | None, tell: Callable[[str], None]) -> Agent:
    """An agent whose silos are in its own process, without Ray.

    Raises:
        ConfigError: the mailbox is no place for letters.
    """
    return Agent(Mailbox(mailbox), labels, LocalPool, prepare_here, folder=folder, tell=tell)


def prepare_here(job: Job) -> None:
    """Make tokens of the text of a job's sources in this process, skipping what is there.

    Raises:
        DataError: the text cannot be prepared.
    """
    prepare(job, tokenizer_kind(method_of(job).vocabulary))
