"""Rows for new tokens: the same token begins where it was, in one space; others are drawn like those that are known."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny import document

from dept_ray.sections import TokenizerSection
from dept_ray.silo.spelling import spelling, table_of
from dept_ray.silo.usage import usage_of
from dept_ray.silo.warmstart import WAYS, Table, Wanted, laid_onto, rotation, warm_rows
from dept_ray.text.tokenizer import Vocabulary, train_tokenizer


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def a_table(words: str, rows: int = 0, width: int = 8) -> Table:
    pieces = tuple(words.split()) if words else tuple(f"w{i}" for i in range(rows))
    return Table(pieces, torch.randn(len(pieces), width, generator=draws()))


def overlapping_rows(pieces: Sequence[str], tables: list[Table], generator: torch.Generator) -> torch.Tensor:
    return warm_rows("overlap", Wanted(tuple(pieces), unused), tables, generator)


def unused() -> torch.Tensor:
    raise AssertionError("text is looked at by one way only")


def turned(table: Table) -> tuple[Table, torch.Tensor]:
    """In another space, with its tokens in another order."""
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=draws().manual_seed(7)))
    return Table(table.pieces[::-1], (table.rows @ turn).flip(0)), turn


def test_a_table_that_was_only_turned_is_turned_back():
    table = a_table("", 40)
    other, turn = turned(table)
    back = laid_onto(other, table)
    torch.testing.assert_close(back.rows.flip(0), table.rows, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation(table.rows @ turn, table.rows), turn.T, rtol=1e-5, atol=1e-5)


def test_a_rotation_keeps_lengths_whatever_the_tables_are():
    found = rotation(torch.randn(20, 8, generator=draws()), torch.randn(20, 8, generator=draws().manual_seed(3)))
    torch.testing.assert_close(found @ found.T, torch.eye(8), rtol=1e-5, atol=1e-5)


def test_too_few_common_tokens_turn_nothing():
    table = a_table("a b c d")
    assert laid_onto(table, a_table("a b x y")) is table


def test_a_token_of_one_table_begins_where_it_was_to_the_bit():
    table = a_table("a b c d")
    rows = overlapping_rows(["d", "new", "a"], [table], draws())
    assert torch.equal(rows[[0, 2]], table.rows[[3, 0]])
    assert not (rows[1] == table.rows).all(1).any()


def test_a_token_of_several_tables_begins_at_their_mean_in_the_first_one_s_space():
    table = a_table("", 40)
    rows = overlapping_rows(table.pieces, [table, turned(table)[0]], draws())
    torch.testing.assert_close(rows, table.rows, rtol=1e-5, atol=1e-5)


def test_what_nobody_knows_is_drawn_with_the_mean_and_spread_of_what_is_known():
    known = Table(tuple(f"w{i}" for i in range(500)), 3 + 0.1 * torch.randn(500, 8, generator=draws()))
    rows = overlapping_rows([f"new{i}" for i in range(2000)], [known], draws())
    assert abs(rows.mean() - 3) < 0.01
    assert abs(rows.std() - 0.1) < 0.01
    assert torch.equal(rows, overlapping_rows([f"new{i}" for i in range(2000)], [known], draws()))


# What is in no table.


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leaves_what_is_known_where_it_was_and_draws_what_it_cannot_say(way: str):
    table = a_table("a b c d")
    wanted = Wanted(("d", "q", "a"), lambda: torch.tensor([[1.0, 0], [0, 0], [0, 1]]))
    rows = warm_rows(way, wanted, [table], draws())
    assert torch.equal(rows, overlapping_rows(wanted.pieces, [table], draws()))


def test_a_token_is_like_those_that_are_used_alike_in_proportion():
    table = a_table("a b c")
    usage = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [2, 1, 0]])
    rows = warm_rows("ofa", Wanted(("a", "b", "c", "new"), lambda: usage), [table], draws())
    cosines = torch.tensor([2.0, 1, 0]) / 5**0.5
    torch.testing.assert_close(rows[3], torch.softmax(cosines / 0.1, 0) @ table.rows)


def test_a_token_that_an_old_tokenizer_cuts_is_the_mean_of_its_parts_by_length():
    table = a_table("token ize x")
    table = Table(table.pieces, table.rows, lambda piece: ["token", "ize", "?"] if piece == "tokenize" else [])
    rows = warm_rows("tokenadapt", Wanted(("tokenize", "none"), unused), [table], draws())
    torch.testing.assert_close(rows[0], (5 * table.rows[0] + 3 * table.rows[1]) / 8)
    assert torch.equal(rows[1], overlapping_rows(("tokenize", "none"), [table], draws())[1])


def test_parts_in_several_tables_meet_in_the_first_one_s_space():
    table = a_table("", 40)
    first, second = (Table(each.pieces, each.rows, lambda piece: ["w1", "w2"]) for each in (table, turned(table)[0]))
    wanted = Wanted(("w1w2",), unused)
    one, both = (warm_rows("tokenadapt", wanted, tables, draws()) for tables in ([first], [first, second]))
    torch.testing.assert_close(one, both, rtol=1e-5, atol=1e-5)


def test_a_tokenizer_cuts_a_token_of_another_also_half_a_character():
    section = TokenizerSection.model_validate({"kind": "bpe", "vocab_size": 300})
    tokenizer = train_tokenizer((document("latin", i) for i in range(9)), section, "")
    table = table_of(spelling(tokenizer, Vocabulary(300)), torch.randn(300, 8, generator=draws()))
    whole = tokenizer.encode(" lorus", add_special_tokens=False).tokens
    assert list(table.cut("".join(whole))) == whole
    assert table.cut("\u0120\u00e6") == ["\u0120", "\u00e6"], "a space and the first byte of a Chinese character"
    trimmed = spelling(tokenizer, Vocabulary.trimmed(300, np.array([0, 7, 9])))
    assert trimmed["pieces"] == [tokenizer.id_to_token(id) for id in (0, 7, 9)]


def test_tokens_that_stand_in_each_other_s_places_are_used_alike():
    draw = np.random.default_rng(0)
    nouns, verbs = draw.integers(1, 5, 4000), draw.integers(5, 9, 4000)  # 0 noun verb 0 noun verb ...
    text = np.stack([np.zeros(4000, np.int64), nouns, verbs], 1).ravel()
    usage = torch.nn.functional.normalize(usage_of([text[:3000], text[3000:]], 10, draws()), dim=1)
    alike = usage @ usage.T
    assert alike[1:5, 1:5].min() > 0.8 > alike[1:5, 5:9].max()
    assert not usage[9].any(), "it never occurs"
