"""One Ray for all tests of this room; each test's run has a name of its own."""

import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """A small Ray of this process: more logical CPUs than cores, so that nothing waits for a slot."""
    import ray

    from dept_ray.on_ray.cluster import NAMESPACE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=300 << 20,
            namespace=NAMESPACE, logging_level=logging.ERROR,
        )  # fmt: skip
    yield
    ray.shutdown()
