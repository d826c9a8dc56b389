"""What errors say."""

import doctest

import dept_ray.errors as module


def test_the_examples_in_docstrings_hold():
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed
