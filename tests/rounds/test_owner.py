"""Whose a run's folder is: one job's, and, while it trains, of who holds it."""

import threading
from pathlib import Path

import pytest
from test_store import CORPORA, assert_equal, save, state_after

from dept_ray.errors import RunError, StoreError, WrongRunError
from dept_ray.rounds import folder as folder_module
from dept_ray.rounds import store as store_module
from dept_ray.rounds.folder import in_progress, read_job
from dept_ray.rounds.store import RunStore


@pytest.fixture
def job(tiny):
    return tiny("glob")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"inner": {"lr": 0.5}}, r"inner\.lr: 0\.01 there, 0\.5 here"),
        ({"rounds": {"total": 9}}, r"rounds\.total: 3 there, 9 here"),
        ({"outer": {"preset": "nesterov"}}, r"outer\.preset: 'average' there, 'nesterov' here"),
    ],
)
def test_another_job_s_folder_is_refused_with_the_key_that_differs(tiny, job, change, told):
    save(RunStore(job), 1)
    with pytest.raises(WrongRunError, match=rf"\({told}\).*another `name`, or delete the folder"):
        RunStore(tiny("glob", **change))


def test_before_its_first_round_a_folder_is_claimed_by_the_job_as_mended(tiny, job):
    RunStore(job)
    mended = tiny("glob", inner={"lr": 0.5})
    save(RunStore(mended), 1)
    with pytest.raises(WrongRunError):
        RunStore(job)


def about(store: RunStore) -> list[bytes]:
    return [(store.folder / name).read_bytes() for name in ("config.json", "environment.json", "live.json", "lives")]


def test_who_does_not_hold_a_run_in_its_first_round_writes_nothing_of_it(tiny, job, monkeypatch):
    """Else the one who trains would be refused as another job later, and the other go on with its rounds."""
    first = RunStore(job)
    first.hold()
    before = about(first)
    monkeypatch.setattr(store_module, "_environment", lambda: {"machine": "another"})
    second = RunStore(tiny("glob", inner={"lr": 0.5}))
    with pytest.raises(RunError, match="is in progress"):
        second.hold()
    assert about(first) == before
    save(first, 1)
    first.let_go()
    assert_equal(RunStore(job).load(CORPORA), state_after(1))
    with pytest.raises(WrongRunError, match=r"inner\.lr: 0\.01 there, 0\.5 here"):
        second.hold()
    assert in_progress(first.folder) is None, "who was refused holds nothing"


def test_who_comes_to_hold_a_run_without_a_round_makes_it_its_own(tiny, job):
    first, second = RunStore(job), RunStore(mended := tiny("glob", inner={"lr": 0.5}))
    first.hold()
    assert read_job(first.folder) == job, "though the other came later, it does not train"
    first.let_go()
    second.hold()
    assert read_job(first.folder) == mended
    second.let_go()


def test_a_round_of_another_job_is_refused_even_where_the_config_is_this_one_s(tiny, job):
    store, other = RunStore(job), RunStore(tiny("glob", at="other", inner={"lr": 0.5}))
    save(store, 1)
    (store.folder / "config.json").write_bytes((other.folder / "config.json").read_bytes())
    with pytest.raises(WrongRunError, match=r"round 1 in .* trained by another job .*another `name`"):
        RunStore(tiny("glob", inner={"lr": 0.5})).load(CORPORA)


def test_who_may_not_open_the_lock_is_not_told_that_the_run_is_in_progress(job, monkeypatch):
    folder = RunStore(job).folder

    def forbidden(file: Path, *how: str) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(folder_module, "open", forbidden, raising=False)
    with pytest.raises(StoreError, match=rf"{folder}/lock cannot be opened .*Permission denied.*let this user read it"):
        in_progress(folder)
    store = RunStore(job)
    monkeypatch.setattr(store_module, "open", forbidden, raising=False)
    for ask in (store.hold, lambda: RunStore(job)):
        with pytest.raises(StoreError, match=rf"cannot be written .*Permission denied: '{folder}/lock'"):
            ask()


def test_who_is_patient_holds_a_run_when_it_is_let_go(job):
    """A coordinator that Ray has started again may find the one before it still alive."""
    first, second = RunStore(job), RunStore(job)
    first.hold(address="here:1")
    with pytest.raises(RunError, match="is in progress"):
        second.hold(patience_s=0.3)
    ends = threading.Timer(0.3, first.let_go)
    ends.start()
    second.hold(patience_s=60, address="there:2")
    ends.join()
    assert in_progress(first.folder)["address"] == "there:2"
    second.let_go()


def test_a_run_is_in_progress_once(job):
    first, second = RunStore(job), RunStore(job)
    assert in_progress(first.folder) is None
    first.hold(address="here:1")
    with pytest.raises(RunError, match=r"is in progress .*here:1"):
        second.hold()
    second.let_go()  # who never held it takes nothing away
    assert in_progress(first.folder)["address"] == "here:1"
    first.let_go()
    second.hold()
    second.let_go()
    assert in_progress(first.folder) is None
