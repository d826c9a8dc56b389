"""Rows for new tokens: the same token begins where it was, in one space; others are drawn like those that are known."""

import torch

from dept_ray.silo.warmstart import Table, laid_onto, overlapping_rows, rotation


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def a_table(words: str, rows: int = 0, width: int = 8) -> Table:
    pieces = tuple(words.split()) if words else tuple(f"w{i}" for i in range(rows))
    return Table(pieces, torch.randn(len(pieces), width, generator=draws()))


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
