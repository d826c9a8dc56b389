"""A snapshot comes back bit for bit or not at all."""

import json

import pytest
import torch

from dept_ray.errors import StoreError
from dept_ray.silo import snapshot as snapshot_module
from dept_ray.silo.snapshot import load_snapshot, prune_snapshots, save_snapshot, snapshot_name

PARTS = {
    "embedding": {"tokens": torch.randn(7, 3), "positions": torch.randn(4, 3)},
    "optimizer": {"tokens.step": torch.tensor(12.0), "tokens.exp_avg": torch.randn(7, 3)},
}
STATE = {"run": "tiny", "silo": "de", "round": 3, "attempt": 1, "position": {"de": 192}}


def test_what_is_loaded_is_what_was_saved(tmp_path):
    save_snapshot(tmp_path / "000003-1", PARTS, STATE)
    parts, state = load_snapshot(tmp_path / "000003-1")
    assert {key: state[key] for key in STATE} == STATE
    assert {stem: sorted(tensors) for stem, tensors in parts.items()} == {stem: sorted(t) for stem, t in PARTS.items()}
    assert all(torch.equal(parts[stem][name], tensor) for stem, t in PARTS.items() for name, tensor in t.items())


def test_views_and_parameters_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    save_snapshot(tmp_path / "s", {"body": {"part": base[:, 1:3], "leaf": torch.nn.Parameter(base)}}, STATE)
    parts, _ = load_snapshot(tmp_path / "s")
    assert torch.equal(parts["body"]["part"], base[:, 1:3])
    assert torch.equal(parts["body"]["leaf"], base)


def test_a_silo_that_keeps_nothing_home_still_has_a_position(tmp_path):
    save_snapshot(tmp_path / "s", {}, STATE)
    parts, state = load_snapshot(tmp_path / "s")
    assert (parts, state["position"]) == ({}, {"de": 192})


def test_it_exists_only_once_its_state_does(tmp_path, monkeypatch):
    write = snapshot_module.write_atomically

    def write_until(path, data):
        if path.name == "state.json":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(snapshot_module, "write_atomically", write_until)
    with pytest.raises(KeyboardInterrupt):
        save_snapshot(tmp_path / "s", PARTS, STATE)
    with pytest.raises(StoreError, match=r"s cannot be read.*state\.json.*restore it, or start another run"):
        load_snapshot(tmp_path / "s")


def test_an_altered_file_is_refused_by_name(tmp_path):
    save_snapshot(tmp_path / "s", PARTS, STATE)
    file = tmp_path / "s" / "embedding.safetensors"
    blob = bytearray(file.read_bytes())
    blob[-1] ^= 1
    file.write_bytes(blob)
    with pytest.raises(StoreError, match=rf"{file} was altered: restore it"):
        load_snapshot(tmp_path / "s")


@pytest.mark.parametrize("lost", ["embedding.safetensors", "state.json"])
def test_a_missing_file_is_refused_by_name(tmp_path, lost):
    save_snapshot(tmp_path / "s", PARTS, STATE)
    (tmp_path / "s" / lost).unlink()
    with pytest.raises(StoreError, match=rf"{lost}.*restore it, or start another run"):
        load_snapshot(tmp_path / "s")


@pytest.mark.parametrize("content", ["", "{", json.dumps(STATE), "[]", "3"])
def test_a_state_that_says_too_little_is_refused(tmp_path, content):
    save_snapshot(tmp_path / "s", PARTS, STATE)
    (tmp_path / "s" / "state.json").write_text(content)
    with pytest.raises(StoreError, match=r"cannot be read"):
        load_snapshot(tmp_path / "s")


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written.*free space or mend the folder"):
        save_snapshot(tmp_path / "file" / "s", PARTS, STATE)


def test_pruning_keeps_the_current_one_those_before_and_whatever_ran_ahead(tmp_path):
    moments = ((1, 1, 0), (2, 1, 0), (5, 1, 0), (7, 2, 0), (7, 10, 0), (8, 10, 1), (8, 10, 11), (9, 10, 0), (10, 1, 0))
    names = [snapshot_name(*moment) for moment in moments]
    for name in [*names, "notes"]:
        save_snapshot(tmp_path / name, {}, STATE)
    for _ in range(2):
        prune_snapshots(tmp_path, names[5], names[7], count=2, keep=[names[1]])
        assert {path.name for path in tmp_path.iterdir()} == {names[1], *names[3:6], *names[7:], "notes"}


def test_pruning_after_nothing_drops_only_what_was_lost(tmp_path):
    names = [snapshot_name(0, life, attempt) for life, attempt in ((1, 0), (9, 3), (10, 0))]
    for name in names:
        save_snapshot(tmp_path / name, {}, STATE)
    prune_snapshots(tmp_path, None, names[-1], count=2)
    assert [path.name for path in tmp_path.iterdir()] == names[-1:]
