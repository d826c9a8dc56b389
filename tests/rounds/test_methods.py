"""The table of methods says what METHOD.md section 2 says, and overrides cannot make it contradict itself."""

import pytest

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import parse_job
from dept_ray.method_names import METHOD_NAMES
from dept_ray.rounds.methods import METHODS, method_of, silos_of, silos_per_round


def job_of(method: str, vocabulary: str | None = None, names: tuple[str, ...] = ("en", "de", "ur"), **rounds) -> Job:
    return parse_job(
        {
            "name": "tiny",
            "method": method,
            "sources": [{"kind": "installed", "name": name, "collection": "docs"} for name in names],
            "tokenizer": {"vocabulary": vocabulary} if vocabulary else {},
            "rounds": rounds,
        }
    )


def test_every_method_that_a_job_may_name_is_a_row_under_its_own_name():
    assert tuple(METHODS) == METHOD_NAMES
    assert all(name == method.name for name, method in METHODS.items())


def test_the_paper_s_variants_average_the_body():
    assert {name for name, method in METHODS.items() if method.share_body} == {"glob", "trim", "spec", "spec-opt"}


def test_nobody_shares_rows_without_sharing_the_body():
    assert all(method.share_body for method in METHODS.values() if method.share_rows != "none")


def test_who_shares_rows():
    assert {name: method.share_rows for name, method in METHODS.items() if method.share_rows != "none"} == {
        "glob": "all",
        "trim": "owned",
    }


def test_who_has_which_vocabulary():
    assert {name: method.vocabulary for name, method in METHODS.items()} == {
        "glob": "global",
        "trim": "trimmed",
        "spec": "trimmed",
        "spec-opt": "own",
        "std": "global",
        "act": "global",
        "isolated": "trimmed",
    }


def test_std_and_act_mix_and_only_act_forgets():
    assert {name for name, method in METHODS.items() if method.mixed} == {"std", "act"}
    assert {name for name, method in METHODS.items() if method.reset_embedding} == {"act"}


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_job_without_an_override_gets_its_row(name):
    assert method_of(job_of(name)) is METHODS[name]


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("isolated", "own"), ("isolated", "global"), ("spec", "own"), ("spec", "global"), ("spec-opt", "trimmed"),
     ("trim", "global"), ("trim", "trimmed"), ("glob", "global"), ("std", "global"), ("act", "global")],
)  # fmt: skip
def test_an_override_changes_the_vocabulary_and_nothing_else(name, vocabulary):
    changed, row = method_of(job_of(name, vocabulary)), METHODS[name]
    assert changed.vocabulary == vocabulary
    assert (changed.name, changed.share_body, changed.share_rows, changed.mixed, changed.reset_embedding) == (
        row.name, row.share_body, row.share_rows, row.mixed, row.reset_embedding,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "vocabulary"),
    [("glob", "own"), ("glob", "trimmed"), ("trim", "own"), ("std", "own"), ("std", "trimmed"), ("act", "own"),
     ("act", "trimmed")],
)  # fmt: skip
def test_a_contradicting_override_is_refused_with_key_value_and_remedy(name, vocabulary):
    with pytest.raises(ConfigError, match=rf'tokenizer\.vocabulary = "{vocabulary}".*method = "{name}".*choose'):
        method_of(job_of(name, vocabulary))


def test_each_source_has_a_silo_of_its_name():
    assert silos_of(job_of("trim")) == {"en": ("en",), "de": ("de",), "ur": ("ur",)}


def test_a_mixed_method_has_one_silo_whatever_rounds_choose_says():
    job = job_of("std", choose=2)
    assert silos_of(job) == {"mixture": ("en", "de", "ur")}
    assert silos_per_round(job) == 1


def test_all_silos_work_unless_fewer_are_chosen():
    assert silos_per_round(job_of("spec")) == 3
    assert silos_per_round(job_of("spec", choose=2)) == 2


def test_a_source_may_not_bear_the_mixture_s_name_where_there_is_a_mixture():
    with pytest.raises(ConfigError, match=r'"mixture".*rename'):
        silos_of(job_of("act", names=("en", "mixture")))
    assert silos_of(job_of("spec", names=("en", "mixture"))) == {"en": ("en",), "mixture": ("mixture",)}
