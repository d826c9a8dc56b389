"""Regions that are cut off, killed, lied to: agents and coordinator take turns, on a clock that only waiting moves.

No network is between them but letters in a folder; what was lost had simply not been chosen.
"""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import Harness, endure_once
from faulty_silo import FaultySilo
from lives import relive
from ordeals import compare, lost_of, smallest
from test_local_pool import MortalPool
from test_privacy import Finished, Tapped, secrets_of
from tiny import SOURCES, tiny_job, write_texts

from dept_ray.config import Job
from dept_ray.errors import ClusterError, ConfigError, RunError, StoreError, WrongRunError
from dept_ray.in_process import train_here
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import JsonLines
from dept_ray.rounds.agent import Agent, prepare_here
from dept_ray.rounds.control import Control
from dept_ray.rounds.letters import Mailbox, seal
from dept_ray.rounds.mailbox import RUN, MailboxPool
from dept_ray.rounds.pool import LocalPool
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.text.prepare import global_tokenizer_folder

HOMES = {"west": ("code", "latin"), "east": ("numbers",)}


class Wire(Mailbox):
    """A region's way to the mailbox, which can be cut; keeps what was written through it."""

    cut = False

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.written: dict[str, list[bytes]] = {}

    def _reaching(self, done: str, path: str) -> Any:
        if self.cut:
            raise StoreError("the network is down")
        return super()._reaching(done, path)

    def write(self, path: str, message: Any) -> None:
        super().write(path, message)
        self.written.setdefault(path, []).append(seal(message))


@dataclass
class Turns:
    """Two regions and a coordinator, one after the other; each wait of the coordinator is a turn for the others."""

    box: Path
    make: Callable[[str], LocalPool]
    now: float = 0.0
    agents: dict[str, Agent] = field(default_factory=dict)
    after_each: Callable[[], None] = lambda: None
    told: list[str] = field(default_factory=list)

    def start(self, name: str) -> None:
        serves = lambda job, silo: silo in HOMES[name]  # noqa: E731
        self.agents[name] = Agent(Wire(str(self.box)), {}, partial(self.make, name), prepare_here,
                                  serves=serves, name=name, tell=self.told.append)  # fmt: skip

    def look(self) -> None:
        for name, agent in dict(self.agents).items():
            try:
                agent.look()
            except Killed:
                self.start(name)
            self.after_each()

    def pool(self) -> MailboxPool:
        for name in HOMES:
            self.start(name)
        return MailboxPool(clock=lambda: self.now, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds
        self.look()

    def wire(self, name: str) -> Wire:
        box = self.agents[name].box
        assert isinstance(box, Wire)
        return box


class Killed(BaseException):
    """An agent's process is gone: nobody catches it."""


def mailed(prepared: Path, folder: Path, method: str = "spec-opt", **more: Any) -> Job:
    """A job whose mailbox is a folder beside its run, with seconds that only waiting lets pass."""
    more = {"regions": {"mailbox": str(folder / "mailbox"), "look_every_s": 3.0, "silent_s": 30.0}} | more
    return smallest(prepared, folder, method, **more)


def suffer(
    turns: Turns, job: Job, notes: Path, watch: Callable[[int], None] = lambda round: None, monkeypatch: Any = None,
    reference: Job | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train a job, compare it with the reference in which what was lost had not been chosen; its rounds."""
    pool = turns.pool()
    commit = RunStore.save

    def save(store: RunStore, state: Any, *rest: Any) -> None:
        commit(store, state, *rest)
        watch(state.round)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "save", save)
        ordeal = endure_once(Harness(lambda plan, notes: pool), job, {}, notes=notes)
    turns.look()
    assert turns.box.exists()
    assert Mailbox(str(turns.box)).names() == [RUN]
    ordeal.lost.update(lost_of(ordeal.records))
    assert reference is not None
    compare(ordeal, relive(ordeal, reference, monkeypatch))
    return ordeal.rounds


def mortal(notes: Path) -> Callable[[str], LocalPool]:
    return lambda name: MortalPool(partial(FaultySilo, {}, str(notes), False))


@pytest.mark.parametrize("codec", ["fp32", "int4"])
def test_the_bits_are_those_of_one_process(prepared, tmp_path, codec):
    wire = {"codec": codec}
    job = mailed(prepared, tmp_path / "mailed", wire=wire)
    turns = Turns(tmp_path / "mailed" / "mailbox", lambda name: LocalPool())
    store, records = RunStore(job), list[dict[str, Any]]()
    mailed_state = train(job, pool := turns.pool(), store, records.append, Control())
    pool.close()
    here = smallest(prepared, tmp_path / "here", "spec-opt", wire=wire)
    alone: list[dict[str, Any]] = []
    state = train(here, LocalPool(), RunStore(here), alone.append, Control())
    assert all(torch.equal(mailed_state.tensors[name], tensor) for name, tensor in state.tensors.items())
    down = [[silo["down_bytes"] for silo in record["silos"].values()] for record in records[:-1]]
    assert down == [[silo["down_bytes"] for silo in record["silos"].values()] for record in alone[:-1]]
    assert (down[0] == [0, 0, 0]) == (codec == "int4")  # what everybody can draw is not sent


@pytest.mark.parametrize("cut", ["before the order", "before the answer"])
def test_a_region_that_is_cut_off_for_two_rounds_is_back_in_the_third(prepared, tmp_path, monkeypatch, cut):
    """It may have trained by then, and not answered: that counts for nothing, and is trained again."""
    job = mailed(prepared, tmp_path / "run", rounds={"total": 5})

    class Cut(MortalPool):
        def run_round(self, orders: Mapping[str, RoundOrder], *more: Any) -> Any:
            answers = super().run_round(orders, *more)
            if cut == "before the answer":
                turns.wire("east").cut = any(order.round == 1 for order in orders.values())
            return answers

    class Mended(MortalPool):
        def run_round(self, orders: Mapping[str, RoundOrder], *more: Any) -> Any:
            if any(order.round == 2 for order in orders.values()):
                turns.wire("east").cut = False
                turns.agents["east"].look()
            return super().run_round(orders, *more)

    silo = partial(FaultySilo, {}, str(tmp_path / "notes"), False)
    turns = Turns(tmp_path / "run" / "mailbox", lambda name: Cut(silo) if name == "east" else Mended(silo))

    def after(round: int) -> None:
        """A round that all answered is committed once the orders of the next are out."""
        if round == 1 and cut == "before the order":
            turns.wire("east").cut = True

    reference = smallest(prepared, tmp_path / "reference", "spec-opt", rounds={"total": 5})
    rounds = suffer(turns, job, tmp_path / "notes", after, monkeypatch, reference)
    assert ["numbers" in record["silos"] for record in rounds] == [True, False, False, True, True]
    assert "region east has been silent for 30 s" in rounds[1]["refused"]["numbers"]
    assert [list(record["refused"]) for record in rounds[2:]] == [[], [], []]
    assert "silent" in rounds[1]["away"]["numbers"]
    assert [record["away"] for record in rounds[3:]] == [{}, {}]
    told = [text.partition(":")[0] for text in turns.told if "mailbox" in text]
    assert told == ["cut off from the mailbox", "the mailbox is in order again"], "once, however often it looked"


def test_an_agent_that_is_killed_in_mid_round_is_started_anew_and_goes_on(prepared, tmp_path, monkeypatch):
    class Mortal(FaultySilo):
        def obey(self, order: RoundOrder) -> SiloUpdate:
            if (order.round, order.silo, order.steps > 0) == (1, "numbers", True) and not deaths:
                deaths.append(order.round)
                batches = self.stream.batches
                self.stream.batches = lambda position, steps: dying(batches(position, steps))
            return super().obey(order)

    def dying(batches: Any) -> Any:
        yield next(batches)
        raise Killed

    deaths: list[int] = []
    job = mailed(prepared, tmp_path / "run", rounds={"total": 4})
    turns = Turns(
        tmp_path / "run" / "mailbox", lambda name: MortalPool(partial(Mortal, {}, str(tmp_path / "n"), False))
    )
    reference = smallest(prepared, tmp_path / "reference", "spec-opt", rounds={"total": 4})
    rounds = suffer(turns, job, tmp_path / "n", monkeypatch=monkeypatch, reference=reference)
    assert deaths == [1]
    assert ["numbers" in record["silos"] for record in rounds] == [True, False, True, True]
    assert "its agent was started anew" in rounds[1]["refused"]["numbers"]


@pytest.mark.parametrize("kind", ["update", "order"])
def test_a_letter_that_was_altered_on_its_way_counts_for_nothing(prepared, tmp_path, monkeypatch, kind):
    job = mailed(prepared, tmp_path / "run")
    turns = Turns(tmp_path / "run" / "mailbox", mortal(tmp_path / "notes"))

    def alter() -> None:
        for file in (turns.box / "east").glob(f"{kind}-*-2*"):
            letter = bytearray(file.read_bytes())
            letter[len(letter) // 2] ^= 1
            file.write_bytes(letter)
            turns.after_each = lambda: None

    turns.after_each = alter
    reference = smallest(prepared, tmp_path / "reference", "spec-opt")
    rounds = suffer(turns, job, tmp_path / "notes", monkeypatch=monkeypatch, reference=reference)
    assert ["numbers" in record["silos"] for record in rounds] == [True, False, True]
    assert ("altered" if kind == "update" else "sent no answer") in rounds[1]["refused"]["numbers"]


def test_a_region_that_is_there_and_does_not_answer_is_given_up_after_deadline_and_grace(prepared, tmp_path):
    """Seconds are those of the clock that only waiting moves."""
    faults = {"deadline_floor_s": 60.0, "deadline_cap_s": 60.0, "grace_s": 15.0, "failures": 1}
    job = mailed(prepared, tmp_path / "run", faults=faults)
    turns, stops = Turns(tmp_path / "run" / "mailbox", mortal(tmp_path / "notes")), list[float]()

    def stuck() -> None:
        turns.agents["east"]._obey = lambda: None
        if list((turns.box / "east").glob("stop-*-1")):
            stops.append(turns.now)

    turns.after_each = stuck
    pool = turns.pool()
    rounds = endure_once(Harness(lambda plan, notes: pool), job, {}, notes=tmp_path / "notes").rounds
    assert ["numbers" in record["silos"] for record in rounds] == [False] * 3
    assert rounds[0]["refused"]["numbers"] == "SiloError: late: no answer from region east within 45 s of grace"
    assert 45 <= max(stops) - min(stops) <= 48
    assert "set aside" in rounds[1]["away"]["numbers"]


def test_what_an_earlier_life_left_is_nobody_s(prepared, tmp_path, monkeypatch):
    job = mailed(prepared, tmp_path / "run")
    box = Mailbox(str(tmp_path / "run" / "mailbox"))
    box.write(RUN, {"run": job.name, "opening": "dead", "word": 1, "closed": False})
    silos = {"silos": ["numbers"], "ready": ["numbers"], "statuses": {}, "failed": {}, "cards": {}, "tokenizer": None}
    beat = {"agent": "dead", "opening": "dead", "beat": 9, "begun": 0, "done": 0, "phase": "open", **silos}
    box.write("east/beat", beat)
    box.write("gone/beat", beat)
    box.write("east/order-dead-1", {"agent": "dead", "number": 1, "orders": {}})
    box.write("east/update-dead-1-numbers", StoreError("never heard"))
    turns = Turns(tmp_path / "run" / "mailbox", mortal(tmp_path / "notes"))
    reference = smallest(prepared, tmp_path / "reference", "spec-opt")
    rounds = suffer(turns, job, tmp_path / "notes", monkeypatch=monkeypatch, reference=reference)
    assert [record["refused"] for record in rounds] == [{}, {}, {}]


def test_a_run_that_goes_on_finds_its_regions_again(prepared, tmp_path):
    """Two lives of a coordinator, the first of which closed nothing; its agents stayed."""
    job = mailed(prepared, tmp_path / "run", rounds={"total": 4})
    turns = Turns(tmp_path / "run" / "mailbox", lambda name: LocalPool())
    control = Control()

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 2:
            control.stop()

    train(job, turns.pool(), RunStore(job), stop, control)
    pool = MailboxPool(clock=lambda: turns.now, sleep=turns._sleep)
    state = train(job, pool, RunStore(job), lambda record: None, Control())
    pool.close()
    here = smallest(prepared, tmp_path / "here", "spec-opt", rounds={"total": 4})
    whole = train(here, LocalPool(), RunStore(here), lambda record: None, Control())
    assert torch.equal(state.tensors["body"], whole.tensors["body"])


def test_another_run_s_mailbox_is_not_taken(prepared, tmp_path):
    job = mailed(prepared, tmp_path / "run")
    box = Mailbox(str(tmp_path / "run" / "mailbox"))
    box.write(RUN, {"run": "another", "opening": "o", "word": 1, "closed": False})
    pool = MailboxPool()
    with pytest.raises(WrongRunError, match="is run another's: give this one another prefix"):
        pool.open(job, job)
    pool.close()
    assert box.read(RUN)["run"] == "another"


def test_a_folder_with_other_things_in_it_is_not_swept(prepared, tmp_path):
    mine = tmp_path / "mine"
    job = mailed(prepared, tmp_path / "job", regions={"mailbox": str(mine)})
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    pool = MailboxPool()
    with pytest.raises(ConfigError, match=r"holds other things \(thesis.txt\), and a mailbox is swept"):
        pool.open(job, job)
    (mine / "run").write_bytes(b"a file that happens to be called run, and is no letter of ours at all")
    with pytest.raises(RunError, match="altered"):
        pool.open(job, job)
    pool.close()
    assert (mine / "thesis.txt").read_text() == "all of it"


def test_where_no_region_answers_the_run_says_what_to_start(prepared, tmp_path):
    job = mailed(prepared, tmp_path / "run")
    turns = Turns(tmp_path / "run" / "mailbox", mortal(tmp_path))
    pool = MailboxPool(clock=lambda: turns.now, sleep=turns._sleep)
    with pytest.raises(ClusterError, match=r"no silo answered .* 600 s .*start `dept-ray region --mailbox"):
        pool.open(job, job)


def test_an_agent_that_was_told_to_leave_goes_with_its_run(prepared, tmp_path):
    """As the command line does it: the coordinator in one thread, without text, the agent in another."""
    job = mailed(prepared, tmp_path / "run", regions={"mailbox": str(tmp_path / "box"), "look_every_s": 0.01})
    agent = Agent(Mailbox(str(tmp_path / "box")), {}, LocalPool, prepare_here, folder=str(tmp_path / "there"))
    served = threading.Thread(target=agent.serve, args=(True, lambda seconds: None), daemon=True)
    served.start()
    state = train_here(job, lambda record: None)
    served.join(60)
    assert not served.is_alive()
    assert state.round == 3
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["data", "silos"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data", "runs"]
    assert Mailbox(str(tmp_path / "box")).names() == [RUN]


@pytest.mark.parametrize("method", ["spec", "spec-opt"])
def test_no_letter_holds_anything_private(prepared, tmp_path, method):
    """The same search as of messages, over every letter that was ever written, and the coordinator's folder."""
    sources = write_texts(tmp_path / "text")
    for source in sources:
        source["storage"] = str(tmp_path / f"region-{source['name']}")
    file = str(global_tokenizer_folder(tiny_job(prepared, "glob")) / "tokenizer.json")
    job = tiny_job(
        tmp_path / "shared", method, text=tmp_path / "text", sources=sources, rounds={"total": 3, "keep": 9},
        regions={"mailbox": str(tmp_path / "mailbox")}, inner={"optimizer_state": "keep"},
        tokenizer={"kind": "file", "name": file} if method == "spec" else {},
    )  # fmt: skip
    tapped = {name: Tapped() for name in HOMES}
    turns = Turns(tmp_path / "mailbox", tapped.__getitem__)
    pool, store = turns.pool(), RunStore(job)
    box = Wire(str(tmp_path / "mailbox"))
    pool.reach = lambda uri: box
    state = train(job, pool, store, JsonLines(store.metrics), Control())
    pool.close()
    rows = {name: held for pool in tapped.values() for name, held in pool.rows.items()}
    both = Tapped()
    both.rows = rows
    ran = Finished(job, both, state)
    letters = [letter for wire in (box, *map(turns.wire, HOMES)) for each in wire.written.values() for letter in each]
    places = [*letters, *(path.read_bytes() for path in (tmp_path / "shared").rglob("*") if path.is_file())]
    assert len(letters) > 20
    assert sum(len(letter) for letter in letters) > 9 * 4 * state.tensors["body"].numel()
    for name in SOURCES:
        for what, secrets in secrets_of(ran, name).items():
            if what == "tokenizer" and method == "spec":
                continue  # everybody has it
            assert not [secret for secret in secrets for place in places if secret in place], (what, name)


def test_regions_with_different_tokenizers_share_no_rows(prepared, tmp_path):
    file = tmp_path / "tokenizer.json"
    text = (global_tokenizer_folder(tiny_job(prepared, "glob")) / "tokenizer.json").read_text()
    file.write_text(text)
    job = mailed(prepared, tmp_path / "run", "trim", tokenizer={"kind": "file", "name": str(file)})

    def make(name: str) -> LocalPool:
        if name == "east":
            turns.agents[name]._tokenizer = "another"
        return LocalPool()

    turns = Turns(tmp_path / "run" / "mailbox", make)
    pool = turns.pool()
    with pytest.raises(RunError, match="different tokenizers"):
        pool.open(job, job)
    pool.close()
