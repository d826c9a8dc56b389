"""What people change while a run goes on: it acts from the next round on, is on record, and a resumed run knows it."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError
from dept_ray.messages import Change, RoundOrder, SiloUpdate
from dept_ray.method_names import METHOD_NAMES
from dept_ray.metrics import JsonLines, Log, read_records
from dept_ray.rounds.changes import LIVE_KEYS, check_change
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import load_round
from dept_ray.rounds.methods import METHODS
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train

OUTER = {"preset": "nesterov", "rows_momentum": 0.5}
SHORT = {"inner": {"local_steps": 2}, "rounds": {"total": 4, "score_every": 0}}


class Ordered(LocalPool):
    """Keeps the orders of each round."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: dict[int, dict[str, RoundOrder]] = {}
        self.limits: dict[int, float] = {}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        first = next(iter(orders.values()))
        if first.steps:
            self.orders[first.round], self.limits[first.round] = dict(orders), deadline([])
        return super().run_round(orders, deadline, meanwhile)


def run(job: Job, *asks: tuple[int, Change], stop_after: int | None = None, pool: LocalPool | None = None
        ) -> tuple[RunState, list[dict[str, Any]]]:  # fmt: skip
    """Train with new objects; `asks` are (committed rounds, change)."""
    store, control, pool = RunStore(job), Control(), pool or LocalPool()

    def ask(round: int) -> None:
        for at, change in asks:
            if at == round:
                control.change(change)

    def watch(record: dict[str, Any]) -> None:
        if record["event"] == "round":
            ask(record["round"])
            if record["round"] == stop_after:
                control.stop()

    ask(max(store.rounds(), default=0))
    try:
        state = train(job, pool, store, Log(JsonLines(store.metrics), watch), control)
    finally:
        pool.close()
    return state, read_records(store.metrics)


def rounds_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["event"] == "round"]


def changes_of(records: list[dict[str, Any]]) -> list[tuple[int, Change]]:
    return [(record["round"], record["change"]) for record in records if record["event"] == "change"]


# ------------------------------------------------------------------------------------------------ settings

VALUES: dict[str, Any] = {
    "inner.local_steps": 1, "inner.lr": 1e-3, "outer.lr": 0.3, "outer.momentum": 0.1, "outer.rows_lr": 0.3,
    "outer.rows_momentum": 0.1, "rounds.total": 3, "rounds.choose": 1, "rounds.score_every": 1,
    "faults.quorum": 1.0, "faults.attempts": 1, "faults.failures": 1, "faults.deadline_mads": 1.0,
    "faults.deadline_floor_s": 1.0, "faults.deadline_cap_s": 500.0, "faults.norm_limit": 2.0,
    "faults.norm_policy": "clip", "faults.newcomer_steps": 1, "faults.newcomer_rows": "ofa",
}  # fmt: skip


def test_every_live_key_is_tried_here():
    assert set(VALUES) == LIVE_KEYS


@pytest.mark.parametrize("key", sorted(VALUES))
def test_a_setting_survives_a_resume_bit_for_bit(tiny, key):
    asked = (1, {"set": key, "to": VALUES[key]})
    whole, halves = (tiny("glob", at=at, outer=OUTER, **SHORT) for at in ("whole", "halves"))
    state, records = run(whole, asked)
    run(halves, asked, stop_after=2)
    resumed, again = run(halves)
    assert resumed.silos == state.silos
    assert resumed.changes == state.changes == (asked[1],)
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert changes_of(again) == changes_of(records) == [asked]
    assert resumed.round == (3 if key == "rounds.total" else 4)


@pytest.mark.parametrize("key", ["inner.lr", "inner.local_steps", "outer.lr", "outer.momentum", "outer.rows_lr",
                                 "outer.rows_momentum", "rounds.choose"])  # fmt: skip
def test_a_setting_acts_from_the_next_round_on(tiny, key):
    short = {**SHORT, "rounds": {"total": 3, "keep": 9}, "outer": OUTER}
    plain, changed = tiny("glob", at="plain", **short), tiny("glob", at="changed", **short)
    _, expected = run(plain)
    _, found = run(changed, (1, {"set": key, "to": VALUES[key]}))
    rows = {job.folder: [load_round(RunStore(job).folder, r)[0].rows for r in (1, 3)] for job in (plain, changed)}
    assert torch.equal(rows[plain.folder][0], rows[changed.folder][0])
    assert not torch.equal(rows[plain.folder][1], rows[changed.folder][1])
    other = [[(r.get("loss"), sorted(r["silos"])) for r in rounds_of(records)] for records in (expected, found)]
    assert other[0][0] == other[1][0]
    assert other[0][2] != other[1][2]


def test_orders_carry_the_settings_in_force(tiny):
    pool = Ordered()
    run(
        tiny("spec", **SHORT),
        (1, {"set": "inner.lr", "to": 1e-3}),
        (2, {"set": "inner.local_steps", "to": 1}),
        (3, {"set": "rounds.total", "to": 6}),
        pool=pool,
    )
    orders = [pool.orders[round]["code"] for round in range(6)]
    assert [order.lr for order in orders] == [1e-2] + [1e-3] * 5
    assert [order.steps for order in orders] == [2, 2, 1, 1, 1, 1]
    assert [order.first_step for order in orders] == [0, 2, 4, 5, 6, 7]
    assert [order.total_steps for order in orders] == [8, 8, 6, 8, 8, 8]


def test_a_deadline_that_is_set_is_the_next_round_s(tiny):
    pool = Ordered()
    run(tiny("spec", **SHORT), (2, {"set": "faults.deadline_floor_s", "to": 7000.0}), pool=pool)
    assert pool.limits[0] == 86_400.0
    assert pool.limits[1] < 7000.0
    assert pool.limits[2] == pool.limits[3] == 7000.0


def test_scores_that_are_asked_for_come_and_go(tiny):
    asked = ((1, {"set": "rounds.score_every", "to": 1}), (3, {"set": "rounds.score_every", "to": 0}))
    _, records = run(tiny("spec", **SHORT), *asked)
    assert ["scores" in record for record in rounds_of(records)] == [False, True, True, False]


def test_a_run_that_is_made_longer_goes_on_and_one_made_shorter_ends_with_its_scores(tiny):
    longer, _ = run(tiny("spec", at="longer", **SHORT), (3, {"set": "rounds.total", "to": 5}))
    shorter, records = run(tiny("spec", at="shorter", **SHORT), (1, {"set": "rounds.total", "to": 2}))
    assert (longer.round, shorter.round) == (5, 2)
    assert [record["event"] for record in records] == ["round", "change", "round", "scores"]


def test_a_total_that_lies_behind_is_refused_and_the_run_goes_on(tiny):
    state, records = run(tiny("spec", **SHORT), (2, {"set": "rounds.total", "to": 2}))
    assert (state.round, state.changes) == (4, ())
    assert [r["refused"] for r in records if r["event"] == "change"] == [
        "rounds.total = 2: round 2 is committed; stop the run"
    ]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("outer.lrr", 1.0, r"outer\.lrr cannot be changed in a run; did you mean outer\.lr\?"),
        ("inner.batch_size", 8, r"inner\.batch_size cannot be changed in a run"),
        ("rounds.keep", 8, r"rounds\.keep cannot be changed in a run"),
        ("seed", 1, "seed cannot be changed in a run"),
        ("method", "glob", "method cannot be changed in a run"),
        ("inner.lr", -1.0, r"inner\.lr = -1\.0: must be greater than 0"),
        ("inner.lr", "fast", r"inner\.lr = 'fast': must be a valid number"),
        ("rounds.choose", 9, r"rounds\.choose = 9, but there are only 3 sources"),
        ("faults.deadline_floor_s", 1e9, r"faults\.deadline_floor_s = 1e\+09 is above faults\.deadline_cap_s"),
    ],
)
def test_what_cannot_be_set_is_refused_by_name(tiny, key, value, told):
    with pytest.raises(ConfigError, match=told):
        check_change(tiny("spec"), {"set": key, "to": value})


# ------------------------------------------------------------------------------------------------ who is there


def dialect(job: Job, name: str = "dialect", **more: Any) -> Change:
    """Adds the text of `latin` under another name."""
    latin = next(source for source in job.sources if source.name == "latin").model_dump(mode="json")
    return {"add": {**latin, "name": name, **more}}


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_source_can_join_unless_one_silo_trains_on_a_mixture(tiny, method):
    job = tiny(method, **SHORT)
    if METHODS[method].mixed:
        with pytest.raises(ConfigError, match="one silo on a mixture: a source cannot join it; start another run"):
            check_change(job, dialect(job))
    else:
        assert check_change(job, dialect(job)).source("dialect").joined


def test_what_cannot_join_or_leave_is_refused_by_name(tiny):
    job = tiny("spec", **SHORT)
    with pytest.raises(ConfigError, match=r'sources: the name "latin" stands twice'):
        check_change(job, dialect(job, "latin"))
    with pytest.raises(ConfigError, match=r"sources\.dialect\.held_out = true: under method"):
        check_change(job, dialect(job, held_out=True))
    with pytest.raises(ConfigError, match=r"sources\.dialect\.colum: unknown key; did you mean column\?"):
        check_change(job, dialect(job, colum="x"))
    for change in ({"drop": "latn"}, {"return": "latn"}):
        with pytest.raises(ConfigError, match=r'no silo "latn" in run tiny-spec; known: code, latin, numbers'):
            check_change(job, change)


def test_of_two_who_ask_for_the_same_the_second_is_refused_on_record(tiny):
    job = tiny("spec", **SHORT)
    state, records = run(job, (1, dialect(job)), (1, dialect(job)))
    first, second = (record for record in records if record["event"] == "change")
    assert "refused" not in first
    assert second["refused"].endswith('sources: the name "dialect" stands twice; each source needs a name of its own')
    assert len(state.changes) == 1
    assert "dialect" in state.silos


def test_a_source_without_text_is_refused_on_record_and_the_run_goes_on(tiny, tmp_path):
    job = tiny("spec-opt", **SHORT)
    nowhere = dialect(job, paths=[str(tmp_path / "nowhere" / "*.txt")], validation_paths=[])
    state, records = run(job, (1, nowhere))
    assert state.round == 4
    assert state.changes == ()
    refused = [record["refused"] for record in records if record["event"] == "change"]
    assert len(refused) == 1
    assert "nowhere" in refused[0]
    again, _ = run(job)  # and a resumed run does not look for it either
    assert again.silos == state.silos


def test_the_last_silo_that_works_cannot_be_dropped(tiny):
    job = tiny("spec", **SHORT)
    state, records = run(job, *[(1, {"drop": name}) for name in ("code", "latin", "numbers")])
    assert [sorted(record["silos"]) for record in rounds_of(records)][1:] == [["numbers"]] * 3
    told = [record["refused"] for record in records if record["event"] == "change" and "refused" in record]
    assert told == ["numbers is the last silo that works: let another join or return first, or stop the run"]
    assert (state.silos["latin"].away, len(state.changes), state.heard) == ("dropped", 2, 3)


def test_dropping_one_who_left_and_returning_one_who_stayed_is_no_harm(tiny):
    asks = [(1, {"drop": "code"}), (1, {"drop": "code"}), (2, {"return": "code"}), (2, {"return": "latin"})]
    state, records = run(tiny("spec", **SHORT), *asks)
    assert ["code" in record["silos"] for record in rounds_of(records)] == [True, False, True, True]
    assert len(state.changes) == 4


# ------------------------------------------------------------------------------------------------ on record


def test_changes_are_in_the_manifest_and_in_order_on_record_over_a_resume(tiny):
    job = tiny("spec", **SHORT)
    first = [(0, {"set": "inner.lr", "to": 1e-3}), (1, {"drop": "code"}), (1, {"set": "outer.lr", "to": 0.5})]
    second = [(2, {"return": "code"}), (3, {"set": "inner.lr", "to": 2e-3})]
    run(job, *first, stop_after=2)
    manifest = json.loads((RunStore(job).folder / "rounds" / "000002" / "manifest.json").read_text())
    assert manifest["changes"] == [change for _, change in first]
    state, records = run(job, *second)
    assert list(state.changes) == [change for _, change in first + second]
    assert changes_of(records) == first + second
    events = [(record["event"], record["round"]) for record in records]
    assert events == [
        ("change", 0), ("round", 1), ("change", 1), ("change", 1), ("round", 2), ("change", 2), ("round", 3),
        ("change", 3), ("round", 4), ("scores", 4),
    ]  # fmt: skip


class Killed(Exception):
    """The coordinator's end."""


@pytest.mark.parametrize("when", ["before the manifest", "after the manifest"])
def test_what_was_asked_is_not_lost_with_the_coordinator_and_acts_once(tiny, monkeypatch, when):
    """It acted in a round that was lost, or the round was saved and nobody had noted yet that it was heard."""
    job = tiny("spec", **SHORT)
    asks = [(1, {"set": "inner.lr", "to": 1e-3}), (1, {"drop": "nobody"}), (1, {"drop": "latin"})]
    expected, expected_records = run(tiny("spec", at="whole", **SHORT), *asks)
    save = RunStore.save

    def dying(self: RunStore, state: RunState, *more: Any) -> None:
        if state.round == 2 and when == "before the manifest":
            raise Killed
        save(self, state, *more)
        if state.round == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "save", dying)
        with pytest.raises(Killed):
            run(job, *asks)
    asked = json.loads((RunStore(job).folder / "asked.json").read_text())
    assert (asked["first"], asked["changes"]) == (0, [change for _, change in asks])
    state, records = run(job)
    assert state.changes == expected.changes == (asks[0][1], asks[2][1])
    assert state.heard == 3
    assert torch.equal(state.body, expected.body)
    assert changes_of(records) == changes_of(expected_records)
    assert json.loads((RunStore(job).folder / "asked.json").read_text())["changes"] == []


def test_an_unreadable_file_of_what_was_asked_is_told(tiny):
    job = tiny("spec", **SHORT)
    run(job, stop_after=1)
    file = RunStore(job).folder / "asked.json"
    file.write_text("{")
    with pytest.raises(StoreError, match=rf"{file} cannot be read .*delete it and ask again"):
        run(job)


def test_the_job_a_folder_belongs_to_is_the_one_it_began_with(tiny):
    """A changed run is resumed by the same command: the job file is not to be edited along."""
    job = tiny("spec", **SHORT)
    run(job, (1, dialect(job)), (1, {"set": "rounds.total", "to": 5}), stop_after=3)
    assert RunStore(job).job == job
    state, _ = run(job)
    assert (state.round, len(state.silos)) == (5, 4)
