"""Truths about streams: a batch is a function of where it stands, however it is come by."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dept_ray.draws import generator
from dept_ray.errors import ShardError
from dept_ray.text import stream as stream_module
from dept_ray.text.shards import ShardFile, Shards, write_shard
from dept_ray.text.stream import MixedStream, Position, Stream

BATCH, CONTEXT = 4, 8
SIZES = {"de": 50, "en": 23, "fr": 200}
"""Blocks of each source."""


class Reader:
    """Makes up tokens that say which block of which source they are, and keeps a record of what was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, list[int]] = {name: [] for name in SIZES}
        self.threads: list[str] = []
        self.error: Exception | None = None

    def __call__(self, source: str, blocks: np.ndarray) -> np.ndarray:
        self.asked[source] += blocks.tolist()
        self.threads.append(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        return (list(SIZES).index(source) * 1000 + blocks)[:, None].repeat(CONTEXT + 1, axis=1).astype(np.uint16)


def mixed(
    read: Reader | None = None,
    tau: float = 1,
    seed: int = 0,
    names: tuple[str, ...] = tuple(SIZES),
    weights: dict[str, float] | None = None,
) -> MixedStream:
    p = {name: (weights or {}).get(name, 1.0) * SIZES[name] ** tau for name in names}
    streams = {name: Stream(name, SIZES[name], seed) for name in names}
    return MixedStream(streams, p, BATCH, CONTEXT, seed, read or Reader())


def all_batches(stream: MixedStream, position: Position, steps: int) -> np.ndarray:
    found = np.array(list(stream.batches(position, steps)))
    stream.close()
    return found


def small_windows(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    monkeypatch.setattr(stream_module, "WINDOW_BYTES", steps * BATCH * (CONTEXT + 1) * 2)


# One source.


def test_every_epoch_holds_every_block_once_in_another_order() -> None:
    stream = Stream("de", 50, seed=0)
    epochs = stream.blocks(0, 200).reshape(4, 50)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(50))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


@pytest.mark.parametrize(("position", "count"), [(0, 0), (0, 1), (49, 2), (13, 150), (99, 1), (100, 50), (777, 3)])
def test_blocks_depend_on_the_position_alone(position: int, count: int) -> None:
    through = Stream("de", 50, seed=3).blocks(0, position + count)
    np.testing.assert_array_equal(Stream("de", 50, seed=3).blocks(position, count), through[position:])


def test_orders_differ_between_sources_and_seeds() -> None:
    orders = [Stream(name, 50, seed).blocks(0, 50).tolist() for name in ("de", "en") for seed in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_two_threads_may_ask_for_two_epochs_at_once() -> None:
    stream = Stream("de", 50, seed=0)
    expected = stream.blocks(0, 100)
    wrong: list[int] = []

    def ask(position: int) -> None:
        for _ in range(10_000):
            if not np.array_equal(stream.blocks(position, 50), expected[position : position + 50]):
                wrong.append(position)

    threads = [threading.Thread(target=ask, args=(position,)) for position in (0, 50)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that they interrupt each other anywhere
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_a_source_without_a_block_is_refused() -> None:
    with pytest.raises(ShardError, match='"de" has no whole block of the context: lower'):
        Stream("de", 0, seed=0)


def test_batches_cross_shards_and_read_the_tokens_that_are_stored(tmp_path: Path) -> None:
    files = []
    for i, count in enumerate((40, 0, 75)):
        documents = [generator("test", i, j).integers(1, 500, 9) for j in range(count)]
        tokens, _, checksum = write_shard(tmp_path / f"{i}", documents, 0, "uint16")
        files.append(ShardFile(f"{i}", tokens, checksum, 0))
    shards = Shards(tmp_path, files, "uint16")
    blocks = int(shards.starts(CONTEXT)[-1])
    steps = blocks // BATCH
    stream = MixedStream(
        {"de": Stream("de", blocks, 0)}, {"de": 1}, BATCH, CONTEXT, 0, lambda _, b: shards.read(b, CONTEXT)
    )
    rows = all_batches(stream, stream.start(), steps).reshape(-1, CONTEXT + 1)
    order = Stream("de", blocks, 0).blocks(0, steps * BATCH)
    stored = [
        shards.map(i)[k * CONTEXT : k * CONTEXT + CONTEXT + 1]
        for i in (0, 2)
        for k in range((files[i].tokens - 1) // CONTEXT)
    ]
    np.testing.assert_array_equal(rows, np.array(stored)[order])


# Several sources.


@pytest.mark.parametrize("names", [("de",), tuple(SIZES)])
def test_a_batch_is_the_same_from_wherever_one_starts(names: tuple[str, ...]) -> None:
    through = all_batches(mixed(names=names), dict.fromkeys(names, 0), 60)
    assert through.shape == (60, BATCH, CONTEXT + 1)
    for steps in (1, 7, 59):
        stream = mixed(names=names)
        position = stream.advance(stream.start(), steps)
        np.testing.assert_array_equal(all_batches(stream, position, 60 - steps), through[steps:])


def test_advancing_twice_is_advancing_by_the_sum() -> None:
    stream = mixed()
    assert stream.advance(stream.advance(stream.start(), 5), 8) == stream.advance(stream.start(), 13)
    assert stream.advance(stream.start(), 0) == stream.start()


@pytest.mark.parametrize("names", [("en",), tuple(SIZES)])
@pytest.mark.parametrize("window", [1, 4, 1000])
def test_a_position_is_what_was_really_read(
    names: tuple[str, ...], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_windows(monkeypatch, window)
    read = Reader()
    stream = mixed(read, names=names)
    before = stream.advance(stream.start(), 3)
    all_batches(stream, before, 33)
    after = stream.advance(before, 33)
    assert sum(after.values()) - sum(before.values()) == 33 * BATCH
    for name in names:
        expected = Stream(name, SIZES[name], 0).blocks(before[name], after[name] - before[name]).tolist()
        assert read.asked[name][: len(expected)] == expected  # and what follows, for whoever goes on
    assert stream.epochs(after) == {name: after[name] / SIZES[name] for name in names}


@pytest.mark.parametrize(("tau", "weights"), [(0, {}), (1, {}), (0.3, {}), (1, {"de": 4.0})])
def test_sources_are_drawn_in_proportion_to_weight_and_size(tau: float, weights: dict[str, float]) -> None:
    stream = mixed(tau=tau, weights=weights)
    draws = 5000 * BATCH
    drawn = stream.advance(stream.start(), 5000)
    p = {name: weights.get(name, 1.0) * size**tau for name, size in SIZES.items()}
    for name in SIZES:
        share = p[name] / sum(p.values())
        deviation = (share * (1 - share) / draws) ** 0.5
        assert abs(drawn[name] / draws - share) < 4 * deviation


def test_mixtures_differ_between_seeds() -> None:
    first, second = (all_batches(mixed(seed=seed), dict.fromkeys(SIZES, 0), 10) for seed in (0, 1))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("window", [1, 3, 7, 20])
def test_the_size_of_a_window_changes_no_batch(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = all_batches(mixed(), dict.fromkeys(SIZES, 0), 20)
    small_windows(monkeypatch, window)
    np.testing.assert_array_equal(all_batches(mixed(), dict.fromkeys(SIZES, 0), 20), whole)


# Windows.


@pytest.mark.parametrize("names", [("fr",), tuple(SIZES)])
def test_rounds_of_any_length_take_from_the_windows_that_are_there(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = all_batches(mixed(names=names), dict.fromkeys(names, 0), 30)
    small_windows(monkeypatch, 8)
    read = Reader()
    stream = mixed(read, names=names)
    position, rounds = stream.start(), []
    for steps in (3, 3, 3, 1, 14, 0, 6):
        rounds += list(stream.batches(position, steps))
        position = stream.advance(position, steps)
    stream._thread.submit(lambda: None).result()
    np.testing.assert_array_equal(rounds, plain)
    assert sum(map(len, read.asked.values())) == 5 * 8 * BATCH  # four windows, and the one read ahead: each once


def test_windows_after_the_first_are_read_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 2)
    read = Reader()
    stream = mixed(read, names=("fr",))
    all_batches(stream, {"fr": 0}, 6)
    assert [name.startswith("read-ahead") for name in read.threads][:3] == [False, True, True]


@pytest.mark.parametrize("back", [0, 2, 9, 100])
def test_who_goes_back_or_leaps_reads_what_is_there(back: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 8)
    stream = mixed()
    position = stream.advance(stream.start(), 10)
    list(stream.batches(position, 5))
    other = stream.advance(stream.start(), back)
    np.testing.assert_array_equal(all_batches(stream, other, 10), all_batches(mixed(), other, 10))


def test_a_position_of_another_mixture_is_not_taken_from_the_window() -> None:
    stream = mixed()
    list(stream.batches(stream.start(), 5))
    other = {"de": 3 * BATCH, "en": 0, "fr": 0}
    np.testing.assert_array_equal(all_batches(stream, other, 4), all_batches(mixed(), other, 4))


def test_nothing_is_read_for_no_steps() -> None:
    read = Reader()
    stream = mixed(read)
    assert list(stream.batches(stream.start(), 0)) == []
    stream.close()
    assert read.threads == []


def test_what_the_background_reader_fails_with_reaches_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch, 2)
    read = Reader()
    stream = mixed(read)
    batches = stream.batches(stream.start(), 6)
    next(batches)
    next(batches)  # and the second window is asked for
    stream._thread.submit(lambda: None).result()  # and has been read
    read.error = ShardError("the disk is gone")
    next(batches)
    next(batches)  # and the third is asked for
    with pytest.raises(ShardError, match="the disk is gone"):
        next(batches)
    read.error = None
    later = stream.advance(stream.start(), 4)
    np.testing.assert_array_equal(all_batches(stream, later, 2), all_batches(mixed(), later, 2))  # and is forgotten


def test_closing_ends_the_thread() -> None:
    stream = mixed()
    batches = stream.batches(stream.start(), 2)
    next(batches)
    assert not stream._thread._threads, "the first step shares its cores with nobody"
    next(batches)
    threads = list(stream._thread._threads)
    assert len(threads) == 1
    stream.close()
    deadline = time.monotonic() + 5
    while threads[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads[0].is_alive()
