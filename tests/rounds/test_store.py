"""A round is a fact when its manifest is renamed, and nothing before or after that moment can make half a fact."""

import json
import shutil

import pytest
import torch

from dept_ray.errors import StoreError, WrongRunError
from dept_ray.metrics import JsonLines, read_records
from dept_ray.rounds import store as store_module
from dept_ray.rounds.folder import load_round
from dept_ray.rounds.state import RunState, SiloRecord
from dept_ray.rounds.store import RunStore

CORPORA = {"a": "tokens of a", "b": "tokens of b"}


@pytest.fixture
def job(tiny):
    return tiny("glob")


def state_after(round: int) -> RunState:
    draw = torch.Generator().manual_seed(round)
    silos = {
        "a": SiloRecord(f"{round - 1:06d}-0", {"a": 16 * round}, round, 512 * round),
        "b": SiloRecord(None, {"b": 0}),
    }
    body, rows, momentum = (torch.randn(size, generator=draw) for size in ((50,), (7, 4), (50,)))
    return RunState(round, silos, body, rows, body_momentum=momentum)


def record_of(round: int) -> dict:
    return {"event": "round", "round": round, "loss": 1 / round}


def save(store: RunStore, round: int) -> None:
    store.save(state_after(round), record_of(round), CORPORA)


def assert_equal(found: RunState | None, expected: RunState) -> None:
    assert found is not None
    assert (found.round, found.silos, sorted(found.tensors)) == (
        expected.round,
        expected.silos,
        sorted(expected.tensors),
    )
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())


# ------------------------------------------------------------------------------------------------ what is saved


def test_a_new_folder_has_no_round(job):
    store = RunStore(job)
    assert (store.rounds(), store.load(CORPORA)) == ([], None)


def test_what_is_loaded_is_what_was_saved(job):
    save(RunStore(job), 1)
    assert_equal(RunStore(job).load(CORPORA), state_after(1))


def test_a_state_without_tensors_is_saved_too(job):
    alone = RunState(1, {"mixture": SiloRecord("000000-0-0", {"a": 3, "b": 5}, 1, 256)})
    RunStore(job).save(alone, record_of(1), CORPORA)
    assert_equal(RunStore(job).load(CORPORA), alone)


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_rounds_are_kept(tiny, keep):
    store = RunStore(tiny("glob", rounds={"keep": keep}))
    for round in range(1, 6):
        save(store, round)
        assert store.rounds() == list(range(max(1, round - keep + 1), round + 1))
    assert sorted(path.name for path in (store.folder / "rounds").iterdir()) == [f"{r:06d}" for r in store.rounds()]


# ------------------------------------------------------------------------------------------------ crashes


@pytest.mark.parametrize("dies_at", ["body.safetensors", "rows.safetensors", "manifest.json"])
def test_a_crash_before_the_manifest_leaves_the_round_before(job, monkeypatch, dies_at):
    store = RunStore(job)
    save(store, 1)
    write = store_module.write_atomically

    def write_until(path, data):
        if path.name == dies_at:
            raise KeyboardInterrupt
        write(path, data)

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "write_atomically", write_until)
        with pytest.raises(KeyboardInterrupt):
            save(store, 2)
    store = RunStore(job)
    assert store.rounds() == [1]
    assert_equal(store.load(CORPORA), state_after(1))
    save(store, 2)  # and the round can be made again over what is left of it
    assert_equal(RunStore(job).load(CORPORA), state_after(2))


def test_older_rounds_go_only_after_the_manifest(tiny, monkeypatch):
    store = RunStore(tiny("glob", rounds={"keep": 1}))
    save(store, 1)
    write = store_module.write_atomically

    def write_but_no_manifest(path, data):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(store_module, "write_atomically", write_but_no_manifest)
    with pytest.raises(StoreError, match=r"round 2 cannot be written.*No space left.*round 1 stands"):
        save(store, 2)
    assert_equal(store.load(CORPORA), state_after(1))


def test_a_crash_while_an_old_round_goes_is_no_harm(job):
    store = RunStore(job)
    save(store, 1)
    save(store, 2)
    (store.folder / "rounds" / "000001" / "body.safetensors").unlink()
    assert_equal(RunStore(job).load(CORPORA), state_after(2))


@pytest.mark.parametrize("left", ["nothing", "what others made anew"])
def test_a_run_folder_that_is_gone_is_not_made_anew(job, left):
    store = RunStore(job)
    save(store, 1)
    away = store.folder.rename(store.folder.with_name("moved"))
    if left != "nothing":
        store.folder.mkdir()
    with pytest.raises(StoreError, match=rf"round 2 .*{store.folder} is gone .*round 1 was its last: put it back"):
        save(store, 2)
    assert not (store.folder / "rounds").exists()
    if left != "nothing":
        store.folder.rmdir()
    away.rename(store.folder)
    save(store, 2)  # the remedy works
    assert_equal(RunStore(job).load(CORPORA), state_after(2))


# ------------------------------------------------------------------------------------------------ altered files


def test_an_altered_tensor_is_refused_with_file_and_remedy(job):
    store = RunStore(job)
    save(store, 1)
    file = store.folder / "rounds" / "000001" / "rows.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(StoreError, match=rf"{file} was altered: restore it, or delete .*000001 to go back a round"):
        store.load(CORPORA)


def test_a_missing_tensor_is_refused_with_file_and_remedy(job):
    store = RunStore(job)
    save(store, 1)
    (store.folder / "rounds" / "000001" / "body.safetensors").unlink()
    with pytest.raises(StoreError, match=r"000001.*body\.safetensors.*restore it, or delete the folder"):
        store.load(CORPORA)


def test_a_truncated_manifest_is_refused_with_file_and_remedy(job):
    store = RunStore(job)
    save(store, 1)
    file = store.folder / "rounds" / "000001" / "manifest.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(StoreError, match=rf"{file} cannot be read.*restore it, or delete .*000001 to go back a round"):
        RunStore(job).history()


def test_the_remedy_works_a_deleted_round_goes_back_one(job):
    store = RunStore(job)
    for round in (1, 2):
        save(store, round)
        JsonLines(store.metrics)(record_of(round))
    (store.folder / "rounds" / "000002" / "manifest.json").write_text("{")
    shutil.rmtree(store.folder / "rounds" / "000002")
    store = RunStore(job)
    assert_equal(store.load(CORPORA), state_after(1))
    assert store.history() == [record_of(1)]


def test_a_run_that_lost_all_its_rounds_does_not_begin_anew_unasked(job, three_rounds):
    lost = three_rounds.folder / "rounds"
    kept = lost.rename(lost.with_name("elsewhere"))
    for start in (lambda: RunStore(job), three_rounds.hold):
        told = rf"{lost} holds no round, but .*metrics\.jsonl tells of 3: restore its rounds, or delete {lost.parent}"
        with pytest.raises(StoreError, match=told):
            start()
        assert read_records(three_rounds.metrics) == ALL
    lost.rmdir()
    kept.rename(lost)
    assert_equal(RunStore(job).load(CORPORA), state_after(3))
    shutil.rmtree(three_rounds.folder)
    assert RunStore(job).load(CORPORA) is None


def test_from_round_one_one_goes_back_to_none(job):
    store = RunStore(job)
    save(store, 1)
    JsonLines(store.metrics)(record_of(1))
    shutil.rmtree(store.folder / "rounds" / "000001")
    assert RunStore(job).load(CORPORA) is None


def test_a_manifest_that_lacks_what_it_must_say_is_refused(job):
    store = RunStore(job)
    save(store, 1)
    file = store.folder / "rounds" / "000001" / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["silos"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match="000001"):
        load_round(store.folder, 1)


def test_an_unreadable_config_is_refused_with_file_and_remedy(job):
    store = RunStore(job)
    save(store, 1)
    (store.folder / "config.json").write_text("{")
    with pytest.raises(StoreError, match=r"config\.json cannot be read.*restore it, or choose another name"):
        RunStore(job)


# ------------------------------------------------------------------------------------------------ two starts


def test_other_tokens_are_refused_with_the_source(job):
    store = RunStore(job)
    save(store, 1)
    with pytest.raises(
        WrongRunError, match=r'other tokens of source "b".*tokens of b.*now changed.*restore the prepared data'
    ):
        store.load({**CORPORA, "b": "changed"})


def test_housekeeping_may_differ_between_two_starts(tiny, job):
    save(RunStore(job), 1)
    again = tiny("glob", rounds={"keep": 9, "score_every": 2}, faults={"attempts": 7}, resources={"num_cpus": 1})
    assert again.fingerprint == job.fingerprint
    assert_equal(RunStore(again).load(CORPORA), state_after(1))


def test_the_environment_is_on_record(job):
    about = json.loads((RunStore(job).folder / "environment.json").read_text())
    assert about["packages"]["torch"] == torch.__version__


# ------------------------------------------------------------------------------------------------ records


@pytest.fixture
def three_rounds(job):
    """A folder of three committed rounds, of which two are kept, and all lines."""
    store = RunStore(job)
    for round in (1, 2, 3):
        save(store, round)
        JsonLines(store.metrics)(record_of(round))
    return store


ALL = [record_of(1), record_of(2), record_of(3)]


def test_whole_records_are_left_alone(job, three_rounds):
    assert RunStore(job).history() == ALL
    assert read_records(RunStore(job).metrics) == ALL


def test_a_lost_last_line_comes_back_from_the_manifest(job, three_rounds):
    lines = three_rounds.metrics.read_text().splitlines(keepends=True)
    three_rounds.metrics.write_text("".join(lines[:2]))
    assert RunStore(job).history() == ALL
    assert read_records(RunStore(job).metrics) == ALL


def test_a_line_beyond_the_manifest_is_dropped(job, three_rounds):
    JsonLines(three_rounds.metrics)(record_of(4))
    assert RunStore(job).history() == ALL
    assert read_records(RunStore(job).metrics) == ALL


def test_a_half_written_line_is_dropped_and_the_next_one_is_whole(job, three_rounds):
    text = three_rounds.metrics.read_text()
    three_rounds.metrics.write_text(text + '{"event": "round", "rou')
    store = RunStore(job)
    assert store.history() == ALL
    JsonLines(store.metrics)(record_of(4))
    assert read_records(store.metrics) == [*ALL, record_of(4)]


def test_the_closing_scores_are_made_again(job, three_rounds):
    JsonLines(three_rounds.metrics)({"event": "scores", "round": 3})
    assert RunStore(job).history() == ALL
    assert read_records(RunStore(job).metrics) == ALL


def test_lines_without_any_round_are_dropped(job):
    store = RunStore(job)
    JsonLines(store.metrics)(record_of(1))
    assert RunStore(job).history() == []
    assert read_records(RunStore(job).metrics) == []
