"""What went wrong elsewhere is a test here: bugs that the field's own systems had, and where each would be caught.

That each named test is there is checked, so that none is lost in a clean-up.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent

CAUGHT_BY = {
    "an outer step of the wrong sign or scale": (
        "golden/test_diloco_numpy.py::test_three_rounds_are_diloco_with_masked_rows",
        "rounds/test_outer.py::test_the_outer_step_is_torch_s_nesterov_bit_for_bit",
    ),
    "participants that start a round from different bodies": (
        "rounds/test_joining.py::test_all_silos_of_a_round_start_from_the_body_that_the_folder_holds",
        "silo/test_silo.py::test_an_altered_body_is_refused",
    ),
    "a mean over those who were asked instead of those who answered": (
        "rounds/test_faults.py::test_a_silo_dies_and_the_round_goes_on_with_the_others",
        "rounds/test_outer.py::test_only_those_who_answered_count",
    ),
    "a participant that always fails, retried for ever": (
        "contract.py::test_who_always_fails_is_set_aside_with_its_reason",
        "rounds/test_faults.py::test_all_fail_and_the_run_ends_with_every_reason",
    ),
    "empty, NaN, misshapen, outdated and duplicate deltas that count": (
        "rounds/test_faults.py::test_a_lie_is_refused_and_its_reason_is_on_record",
        "rounds/test_membership.py::test_any_other_answer_is_refused_with_its_reason",
    ),
    "a checkpoint of several objects, half of them written": (
        "rounds/test_faults.py::test_the_coordinator_dies_and_nothing_is_lost",
        "on_ray/test_coordinator.py::test_killed_at_each_step_of_a_commit_it_comes_back_by_itself",
    ),
    "a newcomer with another learning rate, step or body": (
        "rounds/test_joining.py::test_a_newcomer_stands_where_a_veteran_stands",
    ),
    "vectors cut at the size of a bucket": (
        "rounds/test_outer.py::test_a_body_longer_than_what_is_folded_at_a_time_makes_the_whole_step",
        "contract.py::test_resume_is_exact_though_a_silo_joined_and_another_left_between_the_halves",
    ),
    "text that is read twice or left out after a restart": (
        "rounds/test_random_ordeals.py::test_what_was_lost_had_simply_not_been_chosen",
        "contract.py::test_what_was_lost_had_simply_not_been_chosen",
    ),
    "a local phase longer than a health check, taken for a death": (
        "on_ray/test_nodes.py::test_nodes_die_freeze_and_leave_and_silos_train_for_long",
    ),
    "settings of the inner optimizer that are read and not used": (
        "silo/test_inner.py::test_each_setting_changes_the_result",
        "test_jobfile.py::test_an_unknown_key_is_refused_with_the_nearest_name",
    ),
    "parameters told apart by a part of their name": (
        "silo/test_model.py::test_what_is_shared_is_told_by_its_place_and_not_by_a_part_of_its_name",
    ),
    "memory that grows with the rounds": (
        "rounds/test_faults.py::test_two_hundred_rounds_leave_nothing_behind",
        "on_ray/test_soak.py::test_three_hundred_rounds_leave_nothing_behind",
    ),
}


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_it_would_be_caught(bug):
    for where in CAUGHT_BY[bug]:
        file, name = where.split("::")
        tree = ast.parse((HERE / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, where
