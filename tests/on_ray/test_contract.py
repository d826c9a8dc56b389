"""`RayPool` keeps the contract of all pools, with processes that really die."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
from contract import Harness, PoolContract
from faulty_silo import Moment

from dept_ray.rounds.pool import SiloPool

pytestmark = [pytest.mark.ray]


@pytest.fixture
def harness(ray_here: None) -> Harness:
    import faulty_silo
    import ray.cloudpickle

    from dept_ray.on_ray.pool import RayPool

    ray.cloudpickle.register_pickle_by_value(faulty_silo)

    def make(plan: Mapping[Moment, str], notes: Path) -> SiloPool:
        return RayPool(make=partial(faulty_silo.FaultySilo, plan, str(notes), True))

    return Harness(make)


class TestRayPool(PoolContract):
    """On a cluster."""
