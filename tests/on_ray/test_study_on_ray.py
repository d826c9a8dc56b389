"""The runs of a study side by side on a cluster make the numbers that they make one after the other in this process."""

from pathlib import Path

import pytest
from tiny import tiny_study

from dept_ray.studying import here, known, on_ray, run_study

pytestmark = [pytest.mark.ray]


def test_runs_side_by_side_are_those_of_one_after_the_other(ray_here: None, tmp_path: Path) -> None:
    variants = {"std": {"job": {"method": "std"}, "match": "steps"}, "glob": {"job": {"method": "glob"}}}
    beside, after = (tiny_study(tmp_path / at, variants) for at in ("beside", "after"))
    run_study(beside, on_ray(at_once=2))
    run_study(after, here)
    (_, theirs), (_, ours) = known(beside), known(after)
    assert len(theirs) == 2
    assert {name: one.scores for name, one in theirs.items()} == {name: one.scores for name, one in ours.items()}
