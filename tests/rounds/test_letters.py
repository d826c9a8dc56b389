"""A letter is read whole and unaltered, or not at all."""

import math
from pathlib import Path

import numpy as np
import pytest
from tiny import an_answer

from dept_ray.codec import Coded, Moves, encode
from dept_ray.errors import ConfigError, QuorumLost, SiloError
from dept_ray.messages import RoundOrder, Score, SiloCard, SiloStatus, SiloUpdate
from dept_ray.rounds.letters import Mailbox, seal, unseal


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(v, getattr(b, k)) for k, v in vars(a).items())
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(v, b[k]) for k, v in a.items())
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("codec", ["int4", "int4-zstd"])
def test_every_message_comes_back_as_it_was(tmp_path: Path, codec: str):
    vector = np.linspace(-3, 5, 1000, dtype=np.float32)
    coded, _ = encode(vector, codec)
    half, _ = encode(vector.reshape(10, 100), "bf16")
    order = RoundOrder("run", "is", 3, 1, "000002-1-0", {"is": 7}, 12, 4, True, keep=("a", "b"), body=vector)
    moved = RoundOrder("run", "de", 3, 1, None, {}, 12, 4, False, body=Moves((1000,), 2, (coded, coded)))
    update = an_answer("de", 8, vector, vector.reshape(10, 100), scores={"de": Score(0.1, 2, 3, 1 / 3)})
    messages = {
        "orders": {"is": order, "de": moved}, "update": update,
        "lossy": an_answer("is", body=None, loss=float("nan")),
        "coded": SiloUpdate(**{**vars(update), "body": coded, "rows": half}),
        "card": SiloCard("de", ("de",), 3, {"de": 9}, np.array([0, 5, 2**40]), 10, {"de": "f"}, "cpu"),
        "status": SiloStatus("de"), "none": None, "empty": np.zeros((0, 4), np.float32),
    }  # fmt: skip
    box = Mailbox(str(tmp_path))
    box.write("region=eu/letter", messages)
    assert same(messages, box.read("region=eu/letter"))
    assert isinstance(box.read("region=eu/letter")["coded"].body, Coded)


def test_what_several_orders_share_is_written_once():
    body = np.ones(100_000, np.float32)
    orders = {name: RoundOrder("run", name, 0, 0, None, {}, 0, 1, False, body=body) for name in ("a", "b", "c")}
    assert len(seal(orders)) < body.nbytes + 5000
    read = unseal(seal(orders))
    assert read["a"].body is read["c"].body


def test_an_error_of_ours_comes_back_as_itself_and_no_other_kind_is_made():
    error = unseal(seal(QuorumLost("too few")))
    assert (type(error), str(error)) == (QuorumLost, "too few")
    forged = seal(QuorumLost("x"))[32:].replace(b"QuorumLost", b"difflib   ")
    from dept_ray.draws import checksum

    assert type(unseal(checksum(forged).encode() + forged)) is SiloError


@pytest.mark.parametrize("at", [0, 40, -1])
def test_a_letter_that_was_altered_or_cut_is_refused(at):
    letter = bytearray(seal({"body": np.ones(50, np.float32)}))
    with pytest.raises(SiloError, match="altered"):
        unseal(bytes(letter[:-7]))
    letter[at] ^= 1
    with pytest.raises(SiloError, match="altered"):
        unseal(bytes(letter))


def test_a_mailbox_knows_what_it_holds(tmp_path: Path):
    box = Mailbox(f"file://{tmp_path}/new")
    assert (box.names(), box.read("run")) == ([], None)
    box.write("run", 1)
    box.write("eu/beat", {"at": 1})
    box.write("eu/beat", {"at": 2})
    (tmp_path / "new" / "eu" / "beat.0f.tmp").write_bytes(b"half of one")
    assert (box.names(), box.names("eu"), box.read("eu/beat")) == (["eu", "run"], ["beat"], {"at": 2})
    for _ in range(2):
        box.delete("eu/beat")
        box.delete("run")
    assert box.names("eu") == []
    box.delete("eu")
    assert box.names() == []


def test_what_is_no_place_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"mailbox 'ftp://x' is no place for letters .* s3://bucket/prefix"):
        Mailbox("ftp://x")
