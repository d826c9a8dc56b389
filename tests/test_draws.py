"""Draws and digests are functions of their labels: on every machine, in every version, in every order of asking."""

import doctest

import numpy as np

import dept_ray.draws as module
from dept_ray.draws import checksum, digest, fingerprint, fingerprint_of, generator, pieces, seed_for


def test_seeds_are_what_they_have_always_been():
    assert seed_for(0, "order", "de", 3) == 1077689162603233936
    assert seed_for("choose") == 3859554730135910032


def test_draws_are_what_they_have_always_been():
    assert generator(0, "order").integers(0, 1000, 5).tolist() == [137, 280, 56, 777, 802]
    assert generator(0, "order").permutation(6).tolist() == [3, 2, 5, 0, 4, 1]


def test_a_label_is_its_type_and_value():
    asked = [("1",), (1,), ("a", "b"), ("ab",), ("a", "b", ""), ("b", "a")]
    assert len({seed_for(*labels) for labels in asked}) == len(asked)


def test_seeds_fit_torch_and_numpy():
    assert all(0 <= seed_for("seed", i) < 1 << 63 for i in range(1000))


def test_asking_twice_or_for_something_else_first_changes_nothing():
    first = generator(7, "a").random(4)
    generator(7, "b").random(100)
    assert np.array_equal(generator(7, "a").random(4), first)
    assert not np.array_equal(generator(8, "a").random(4), first)


def test_a_digest_is_of_the_parts_and_not_of_their_join():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("é") == digest("é".encode()) == digest("é")
    assert len(digest("x")) == 16


def test_a_checksum_sees_every_bit_and_only_the_bytes():
    body = np.arange(1000, dtype=np.float32)
    other = body.copy()
    other.view(np.uint32)[500] ^= 1
    assert checksum(body) == checksum(body.tobytes()) == checksum(body.copy())
    assert checksum(body) != checksum(other)


def test_a_fingerprint_sees_every_piece_and_their_order(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 100)
    body = np.arange(250, dtype=np.float32)
    seen = {fingerprint_of(body), fingerprint_of(body[:249]), fingerprint_of(np.roll(body, 100))}
    for at in (0, 150, 249):
        other = body.copy()
        other.view(np.uint32)[at] ^= 1
        seen.add(fingerprint_of(other))
    assert len(seen) == 6
    assert fingerprint(checksum(body[here]) for here in pieces(250)) == fingerprint_of(body.copy())


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(module).failed == 0
