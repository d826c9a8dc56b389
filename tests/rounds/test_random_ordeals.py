"""Chance draws what goes wrong, hundreds of times; what was lost had simply not been chosen, whatever it was."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from faults import COORDINATOR_DEATHS, CORRUPTIONS, DEATHS, POISONS, Faults
from lives import endure, relive
from ordeals import NEWCOMER, compare, newcomer, smallest
from tiny import SOURCES

from dept_ray.draws import generator
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.methods import METHODS, MIXTURE


def plan(seed: int, method: str, prepared: Path, rounds: int) -> tuple[Faults, dict[str, Any]]:
    """One to six faults, and a job for them to happen to."""
    draw = generator("ordeal", seed)
    mixed, shares = METHODS[method].mixed, METHODS[method].share_body
    silos = (MIXTURE,) if mixed else SOURCES

    def one_of(values: Any) -> Any:
        return values[int(draw.integers(len(values)))]

    def a_round() -> int:
        return int(draw.integers(rounds))

    def a_moment() -> tuple[int, int, str]:
        return a_round(), int(draw.integers(4) == 0), one_of(silos if NEWCOMER not in joined else (*silos, NEWCOMER))

    joined: list[str] = []
    faults = Faults()
    job: dict[str, Any] = {
        "seed": seed,
        "rounds": {"total": rounds, "keep": one_of((2, 3))},
        "faults": {"quorum": one_of((0.3, 0.5, 1.0)), "newcomer_steps": one_of((0, 1, 5))},
        "inner": {"optimizer_state": one_of(("reset", "keep")), "ahead_steps": (0, 0, 1, 2)[seed // 5 % 4]},
        "outer": {"preset": one_of(("average", "nesterov")), "rows_momentum": one_of((0.0, 0.5))},
        "wire": {"codec": ("fp32", "fp32", "bf16", "int8", "int4")[seed % 5]},
    }
    if not mixed and draw.integers(3) == 0:
        job["rounds"]["choose"] = 2
    for _ in range(int(draw.integers(1, 7))):
        match one_of(("die", "late", "poison", "raise", "absent", "people", "coordinator", "disk", "corrupt")):
            case "die":
                faults.dies_at[a_moment()] = one_of(DEATHS)
            case "late":
                faults.late_at[a_moment()] = one_of((0, 1, None))
            case "poison":
                faults.poisons_at[a_moment()] = one_of([*POISONS, "noise", "hundredfold"])
            case "raise":
                faults.raises_at.add(a_moment())
            case "absent":
                faults.absent_at.add((a_round(), one_of(silos)))
            case "people" if not mixed and draw.integers(3):
                if not joined and draw.integers(2):
                    faults.joins_at[a_round()] = newcomer(prepared)
                    joined.append(NEWCOMER)
                else:
                    left = a_round()
                    name = one_of(silos)
                    faults.drops_at[left] = name
                    faults.returns_at[left + 1 + int(draw.integers(2))] = name
            case "people":
                faults.sets_at[a_round()] = one_of(
                    (("outer.lr", 0.5), ("inner.lr", 3e-3), ("inner.local_steps", 1), ("rounds.score_every", 1))
                    if shares
                    else (("inner.lr", 3e-3), ("inner.local_steps", 3))
                )
            case "coordinator":
                faults.coordinator_dies_at[a_round()] = one_of(COORDINATOR_DEATHS)
            case "disk":
                faults.disk_full_at[a_round()] = one_of(("run", *silos))
            case "corrupt":
                faults.corrupts_at[1 + a_round()] = one_of(CORRUPTIONS)
    return faults, job


PER_METHOD, BATCHES = 44, 4


@pytest.mark.parametrize("batch", [0, 1, *(pytest.param(batch, marks=pytest.mark.soak) for batch in (2, 3))])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_what_was_lost_had_simply_not_been_chosen(prepared, tmp_path, monkeypatch, method, batch):
    """44 ordeals of each of seven methods: 308 in all. In half of them silos run ahead of the commit; in about as many
    of those with a shared body they also make steps ahead of their orders, and the reference run makes none early."""
    for number in range(batch, PER_METHOD, BATCHES):
        seed = 1000 * METHOD_NAMES.index(method) + number
        faults, overrides = plan(seed, method, prepared, rounds=3 + number % 2)
        told = f"seed {seed}: {faults}"
        try:
            job = smallest(prepared, tmp_path / f"{seed}", method, **overrides)
            ordeal = endure(job, faults, monkeypatch, remote=bool(number // BATCHES % 2))
            same = smallest(prepared, tmp_path / f"{seed}-r", method, **overrides)
            compare(ordeal, relive(ordeal, same, monkeypatch))
        except BaseException as err:
            err.add_note(told)
            raise
        shutil.rmtree(tmp_path / f"{seed}")
        shutil.rmtree(tmp_path / f"{seed}-r")
