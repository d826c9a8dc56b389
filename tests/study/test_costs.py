"""What follows from a plan's figures alone."""

import doctest

import dept_ray.study.costs as module
from dept_ray.study.costs import SourcePlan, Values, reduction


def test_the_paper_s_own_numbers_give_its_factor_to_the_digit():
    assert round(reduction(1.71e9, 1.71e9 - 512.2e6, 500)) == 714


def test_a_model_is_the_sum_of_its_parts():
    assert Values(body=100, rows=20, positions=3).total == 123


def test_epochs_are_known_where_both_counts_are():
    assert SourcePlan("a", tokens=100, trained=250.0).epochs == 2.5
    assert SourcePlan("a", tokens=None, trained=250.0).epochs is None
    assert SourcePlan("a", tokens=100, trained=None).epochs is None


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(module).failed == 0
