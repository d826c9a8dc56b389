"""What is private stays home (METHOD.md): every message and every file of a finished run is searched for it.

Two nets. By shape: no array of a message or of the run folder has the size of an embedding or of positions. By content:
no row of any embedding that the silo ever held, no tokenizer, no run of token ids and no text occurs in what was sent,
pickled as Ray would send it, or in a file outside the silo's own folders.
"""

import dataclasses
import functools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny import SOURCES, document, ready_job, tiny_job, write_texts

from dept_ray.config import Job
from dept_ray.messages import RoundOrder, SiloUpdate
from dept_ray.metrics import JsonLines, Log, TensorBoard, read_records
from dept_ray.preparing import prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.pool import Deadline, LocalPool, Meanwhile, nothing
from dept_ray.rounds.state import RunState
from dept_ray.rounds.store import RunStore
from dept_ray.rounds.train import train
from dept_ray.silo.snapshot import silo_folder
from dept_ray.text.prepare import corpus_folder

PRIVATE = ["spec", "spec-opt"]


class Tapped(LocalPool):
    """Keeps all that crosses the seam, and every row that a silo ever had."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Any] = []
        self.rows: dict[str, list[np.ndarray]] = {}

    def run_round(
        self, orders: Mapping[str, RoundOrder], deadline: Deadline, meanwhile: Meanwhile = nothing
    ) -> dict[str, SiloUpdate | Exception]:
        answers = super().run_round(orders, deadline, meanwhile)
        told = [each for order in orders.values() for each in (order, order.from_nothing)]
        self.messages += [dataclasses.replace(each, whole=None) for each in told if each]  # as it travels
        self.messages += [*answers.values(), *self.statuses().values(), *self.cards.values()]
        for name, silo in self.silos.items():
            self.rows.setdefault(name, []).append(silo._learner.vectors.read("rows"))
        return answers


@dataclass
class Finished:
    """A run in which every source but one has a storage of its own."""

    job: Job
    pool: Tapped
    state: RunState


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    @functools.cache
    def train_once(method: str) -> Finished:
        folder = tmp_path_factory.mktemp(method)
        sources = write_texts(folder / "text")
        for source in sources:
            if source["name"] != "numbers":
                source["storage"] = str(folder / f"region-{source['name']}")
        job = tiny_job(folder / "shared", method, text=folder / "text", sources=sources, rounds={"total": 3, "keep": 9},
                       inner={"optimizer_state": "keep", "ahead_steps": 2})  # fmt: skip
        prepare(job, local=True)
        pool, store = Tapped(), RunStore(job)
        board = TensorBoard(store.folder / "tensorboard")
        state = train(job, pool, store, Log(JsonLines(store.metrics), board), Control())
        board.close()
        pool.close()
        return Finished(job, pool, state)

    return train_once


@pytest.fixture(params=PRIVATE)
def ran(request, finished) -> Finished:
    return finished(request.param)


def arrays_in(value: Any) -> Iterator[np.ndarray]:
    """Every array and every sequence of numbers in a message, however deep."""
    if isinstance(value, np.ndarray):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from arrays_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in (*value.keys(), *value.values()):
            yield from arrays_in(inner)
    elif isinstance(value, list | tuple | set | frozenset):
        if value and all(isinstance(item, int | float) for item in value):
            yield np.asarray(list(value))
        for inner in value:
            yield from arrays_in(inner)
    else:
        assert value is None or isinstance(value, str | bytes | int | float | bool | Exception), type(value)
        assert not isinstance(value, bytes) or len(value) < 100
        assert not isinstance(value, str) or len(value) < 200, value


def files_of_run(ran: Finished) -> dict[Path, bytes]:
    found = {path: path.read_bytes() for path in RunStore(ran.job).folder.rglob("*") if path.is_file()}
    assert {"manifest.json", "metrics.jsonl", "config.json", "body.safetensors"} <= {path.name for path in found}
    assert any("tensorboard" in str(path) for path in found)
    return found


def held_at_home(ran: Finished, name: str) -> list[np.ndarray]:
    """(V_k + L, D) of each snapshot and of what was in memory between the rounds."""
    held = list(ran.pool.rows[name])
    for file in sorted(silo_folder(ran.job, name).glob("*/embedding.safetensors")):
        parts = load_file(file)
        held += [parts["tokens"].numpy(), parts["positions"].numpy()]
    assert len(held) >= 3 + 3
    return held


def secrets_of(ran: Finished, name: str) -> dict[str, list[bytes]]:
    """Byte strings of a source that nobody else may have."""
    kind = "own" if ran.job.method == "spec-opt" else "global"
    corpus = corpus_folder(ran.job, name, kind)
    rows = {row.tobytes() for table in held_at_home(ran, name) for row in table[:: max(1, len(table) // 40)]}
    rows |= {row.astype(np.float16).tobytes() for table in held_at_home(ran, name)[:1] for row in table[:20]}
    shards = [np.frombuffer(file.read_bytes(), np.uint16) for file in sorted(corpus.glob("*.tokens"))]
    assert shards
    ids = [shard[at : at + 8] for shard in shards for at in range(0, len(shard) - 8, len(shard) // 50)]
    ids = [piece for piece in ids if len(piece) == 8]
    spelt = [document(name, number)[at : at + 24] for number in (0, 7, 61) for at in (0, 100, 500)]
    tokenizer = (corpus / "tokenizer.json").read_bytes()
    return {
        "rows": sorted(row for row in rows if any(row)),
        "ids": [piece.astype(kind).tobytes() for piece in ids for kind in (np.uint16, np.uint32, np.int64)],
        "ids in JSON": [str(piece[:5].tolist()).strip("[]").encode() for piece in ids],
        "text": [piece.encode() for piece in spelt],
        "tokenizer": [tokenizer[at : at + 60] for at in range(0, len(tokenizer) - 60, len(tokenizer) // 20)],
    }


@pytest.mark.parametrize("method", PRIVATE)
def test_no_array_of_a_message_has_the_size_of_an_embedding_or_of_positions(finished, method):
    ran = finished(method)
    job, body = ran.job, ran.state.body
    assert body is not None
    width, sizes = job.model.width, {silo.vocabulary.size for silo in ran.pool.silos.values()}
    forbidden = sizes | {job.positions} | {rows * width for rows in (*sizes, job.positions)}
    forbidden |= {(size + job.positions) * width for size in sizes}
    assert body.numel() not in forbidden
    kinds = {type(message).__name__ for message in ran.pool.messages}
    assert kinds == {"RoundOrder", "SiloUpdate", "SiloStatus", "SiloCard"}
    for message in ran.pool.messages:
        for array in arrays_in(message):
            assert array.shape == (body.numel(),), (type(message).__name__, array.shape)
            assert array.size not in forbidden


def test_cards_hold_no_row_ids(ran):
    for card in ran.pool.cards.values():
        assert (card.owned_rows, card.global_vocabulary_size) == (None, 0)
        assert list(arrays_in(card)) == []


def test_no_file_of_the_run_has_the_size_of_an_embedding(ran):
    width = ran.job.model.width
    smallest = 4 * width * min(ran.job.positions, *(silo.vocabulary.size for silo in ran.pool.silos.values()))
    for path, blob in files_of_run(ran).items():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            assert list(tensors) == [path.stem]
            assert path.stem in ("body", "body_momentum")
            assert tensors[path.stem].shape == ran.state.body.shape
            assert len(blob) < 4 * ran.state.body.numel() + 200  # no room for anything else
        elif "tensorboard" not in str(path):
            assert len(blob) < 4 * smallest, path
    assert sorted(ran.state.tensors) == ["body"]


@pytest.mark.parametrize("name", SOURCES)
def test_no_bytes_of_it_are_in_any_message_or_file(ran, name):
    places: dict[str, bytes] = {str(path): blob for path, blob in files_of_run(ran).items()}
    for number, message in enumerate(ran.pool.messages):
        places[f"message {number}, {type(message).__name__}"] = pickle.dumps(message)
    for what, secrets in secrets_of(ran, name).items():
        assert len(secrets) >= 9, what
        for secret in secrets:
            assert len(secret) >= 10
            found = [place for place, blob in places.items() if secret in blob]
            assert not found, f"{what} of {name} in {found}"


def test_the_search_finds_what_is_there(ran):
    """Turned upon the silo's own folders, and on a method that does share rows, the same search strikes."""
    name = "latin"
    home = b"".join(file.read_bytes() for file in sorted(silo_folder(ran.job, name).rglob("*")) if file.is_file())
    kind = "own" if ran.job.method == "spec-opt" else "global"
    data = b"".join(file.read_bytes() for file in corpus_folder(ran.job, name, kind).rglob("*") if file.is_file())
    secrets = secrets_of(ran, name)
    assert sum(row in home for row in secrets["rows"]) > 100
    assert all(tokens in data for tokens in secrets["tokenizer"])
    assert sum(ids in data for ids in secrets["ids"]) >= 20


def test_where_rows_are_shared_the_search_strikes(prepared, tmp_path):
    job = ready_job(prepared, tmp_path / "run", "trim", rounds={"total": 1})
    pool, store = Tapped(), RunStore(job)
    train(job, pool, store, JsonLines(store.metrics), Control())
    pool.close()
    sent = b"".join(pickle.dumps(message) for message in pool.messages)
    rows = pool.messages[0].rows
    assert rows[5].tobytes() in sent
    assert sum(array.ndim == 2 for message in pool.messages for array in arrays_in(message)) > 0
    assert any(path.name == "rows.safetensors" for path in store.folder.rglob("*"))


def test_snapshots_and_text_lie_in_the_source_s_own_storage_and_nowhere_else(ran):
    shared = Path(ran.job.folder)
    for name in ("code", "latin"):
        own = ran.job.storage_of(name)
        assert own.name == f"region-{name}"
        assert sorted(path.name for path in own.iterdir()) == ["data", "silos"]
        snapshots = silo_folder(ran.job, name)
        assert snapshots.is_relative_to(own)
        assert sorted(path.name for path in snapshots.iterdir()) == ["000000-0-0", "000001-0-0", "000002-0-0"]
        assert sorted(path.name for path in (own / "silos" / ran.job.name).iterdir()) == [name]
        assert sorted(path.name for path in (own / "data").iterdir()) == [name]
        assert list((own / "data" / name).rglob("*.tokens"))
        strangers = [path for path in shared.rglob("*") if name in path.relative_to(shared).parts]
        assert strangers == []
    assert sorted(path.name for path in (shared / "silos" / ran.job.name).iterdir()) == ["numbers"]
    assert not list(shared.rglob("runs/**/*.tokens"))


def test_what_a_storage_holds_is_of_its_own_source_alone(ran):
    """Neither does one silo's folder hold a row or a word of another's."""
    for name, other in (("code", "latin"), ("latin", "numbers"), ("numbers", "code")):
        files = [path for path in silo_folder(ran.job, name).rglob("*") if path.is_file()]
        blob = b"".join(path.read_bytes() for path in files)
        secrets = secrets_of(ran, other)
        assert not [row for row in secrets["rows"] if row in blob]
        assert not [text for text in secrets["text"] if text in blob]


def test_the_records_say_nothing_but_numbers_and_names(ran):
    known = {*SOURCES, ran.job.name}

    def words(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from words(inner)
        else:
            assert isinstance(value, int | float) or value is None, value

    for record in read_records(RunStore(ran.job).metrics):
        rest = set(words(record)) - known - {record["event"], record["time"]}
        assert rest == set(), rest


def test_what_is_coded_is_the_body_and_nothing_else(prepared, tmp_path):
    job = ready_job(prepared, tmp_path / "run", "spec", rounds={"total": 2}, wire={"codec": "int4"})
    pool, store = Tapped(), RunStore(job)
    state = train(job, pool, store, JsonLines(store.metrics), Control())
    pool.close()
    assert state.body is not None
    sent = [m for m in pool.messages if isinstance(m, RoundOrder | SiloUpdate)]
    assert {message.rows for message in sent} == {None}
    bodies = [body for message in sent if (body := message.body) is not None]
    assert {body.shape for body in bodies} == {tuple(state.body.shape)}
    forms = {(array.dtype.str, array.size) for body in bodies for array in arrays_in(body) if array.dtype != int}
    blocks = -(-state.body.numel() // 64)
    whole = "<f4", state.body.numel()  # for who holds nothing any more
    assert forms == {("|u1", 32 * blocks), ("<u2", blocks), whole}
    assert sorted(path.name for path in store.folder.rglob("000002/*.safetensors")) == [
        "body.safetensors", "body_residual.safetensors",
    ]  # fmt: skip
