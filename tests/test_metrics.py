"""Records are kept as they were told: JSON lines are the truth, TensorBoard shows each number at its round."""

import doctest
import math
from typing import Any

import pytest

import dept_ray.metrics as module
from dept_ray.metrics import JsonLines, Log, TensorBoard, numbers, read_records


def a_round(number: int, bits: float = 2.0) -> dict[str, Any]:
    return {
        "event": "round", "run": "r", "round": number, "attempt": 0, "time": "2025-01-01", "loss": 3.0 + number,
        "refused": {}, "silos": {"de": {"loss": 1.5, "cosine": None}, "fr": {"loss": math.nan}},
        "scores": {"de": {"bits_per_byte": bits}}, "mean": {"bits_per_byte": bits},
    }  # fmt: skip


def final(number: int, bits: float) -> dict[str, Any]:
    return {"event": "scores", "run": "r", "round": number, "scores": {"de": {"bits_per_byte": bits}}, "mean": {}}


# JSON lines.


def test_records_are_read_as_they_were_written(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    records = [{"event": "round", "round": 1, "text": "Ü\n\u2028"}, {"event": "round", "round": 2, "loss": 1 / 3}]
    for i, record in enumerate(records, 1):
        lines(record)
        assert read_records(tmp_path / "metrics.jsonl") == records[:i], "each is there as soon as it was told"


def test_a_run_that_told_nothing_has_no_records(tmp_path):
    assert read_records(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("half", ['{"event": "rou', "{", '{"event": "round", "round": 2', '{"a": "\u00fc'])
def test_a_line_still_being_written_is_left_out(tmp_path, half):
    path = tmp_path / "metrics.jsonl"
    JsonLines(path)({"round": 1})
    with open(path, "a", encoding="utf-8") as file:
        file.write(half)
    assert read_records(path) == [{"round": 1}]


# TensorBoard.


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_norms_over_steps_and_the_last_of_those_that_are_made_again(tmp_path):
    for steps, body in (([4.0, 6.0], [1.0, 2.0]), ([6.0, 8.0], [5.0, 6.0])):  # the second time in another life
        board, record = TensorBoard(tmp_path), a_round(2, 5.0)
        record["silos"]["de"]["norms"] = {"step": steps, "body": body, "activation": [3.0, None]}
        board(record)
        board.close()
    found = shown(tmp_path / "steps")
    assert found["norms/de/body"] == [(4, 1.0), (6, 5.0), (8, 6.0)]
    assert found["norms/de/activation"] == [(4, 3.0), (6, 3.0)]


def test_tensorboard_shows_each_number_at_its_round_and_scores_at_the_round_they_are_of(tmp_path):
    board = TensorBoard(tmp_path)
    for record in (a_round(1, 9.0), a_round(2, 5.0), final(2, 4.0)):
        board(record)
    board.close()
    found = shown(tmp_path)
    assert set(found) == {"loss", "silos/de/loss", "scores/de/bits_per_byte", "mean/bits_per_byte"}
    assert found["loss"] == [(1, 4.0), (2, 5.0)]
    assert found["silos/de/loss"] == [(1, 1.5), (2, 1.5)]
    assert found["scores/de/bits_per_byte"] == [(0, 9.0), (1, 5.0), (2, 4.0)], "measured before a round's training"


def test_a_resumed_run_goes_on_and_overwrites_rounds_that_are_done_again(tmp_path):
    first = TensorBoard(tmp_path)
    for number in (1, 2, 3):
        first(a_round(number))
    first.close()
    second = TensorBoard(tmp_path)
    second(a_round(3) | {"loss": 0.5})
    second.close()
    assert shown(tmp_path)["loss"] == [(1, 4.0), (2, 5.0), (3, 0.5)]


def test_a_board_that_was_told_nothing_leaves_nothing(tmp_path):
    TensorBoard(tmp_path / "board").close()
    assert not (tmp_path / "board").exists()


# Both.


def test_a_log_tells_every_sink_in_order():
    told: list[tuple[str, dict[str, Any]]] = []
    log = Log(lambda record: told.append(("a", record)), lambda record: told.append(("b", record)))
    log({"round": 1})
    assert told == [("a", {"round": 1}), ("b", {"round": 1})]


def test_only_finite_numbers_are_numbers():
    assert dict(numbers({"a": True, "b": None, "c": math.inf, "d": {"e": 2, "f": "2"}, "g": [1]})) == {"d/e": 2.0}


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(module).failed == 0
