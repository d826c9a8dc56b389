"""One Ray for all tests of this room; each test's run has a name of its own."""

from collections.abc import Iterator

import pytest
from nodes import connect


@pytest.fixture(scope="session", autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def ray_here() -> None:
    """A small Ray of this process: more logical CPUs than cores, so that nothing waits for a slot."""
    import ray

    if not ray.is_initialized():
        connect(address="local", num_cpus=4, include_dashboard=False, object_store_memory=300 << 20)
