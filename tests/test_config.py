"""A job is a value with an identity, and says what follows from its keys."""

from typing import Any

import pytest

from dept_ray.config import Job
from dept_ray.errors import ConfigError
from dept_ray.jobfile import parse_job

DOCS = {"name": "docs", "kind": "installed", "collection": "docs"}
TEXTS = {"name": "texts", "kind": "files", "paths": "texts/*.txt"}


def values(**changes: Any) -> dict[str, Any]:
    """Two sources; sections as given."""
    return {"name": "job", "sources": [DOCS, TEXTS], **changes}


def job(**changes: Any) -> Job:
    return parse_job(values(**changes))


@pytest.mark.parametrize("spelling", ["spec-opt", "spec_opt", "SPEC-OPT", "Spec_Opt"])
def test_a_method_may_be_spelt_as_people_do(spelling):
    assert job(method=spelling).method == "spec-opt"


def test_what_follows_from_other_values():
    assert job(inner={"context": 64}).positions == 64
    assert job(inner={"context": 64}, model={"positions": 128}).positions == 128
    assert job(inner={"local_steps": 7}, rounds={"total": 3}).total_steps == 21
    assert (job().outer.eta, job().outer.mu) == (1.0, 0.0)
    assert job(outer={"preset": "nesterov", "lr": 0.5}).outer.eta == 0.5
    assert job(model={"arch": "gpt2"}).model.hidden == 3072
    assert job(model={"arch": "llama"}).model.hidden == 2048
    assert (job().model.epsilon, job(model={"arch": "llama"}).model.epsilon) == (1e-5, 1e-6)
    assert job(model={"arch": "llama", "norm_eps": 1e-5}).model.epsilon == 1e-5
    assert job(model={"arch": "llama", "kv_heads": 4}).model.head_groups == (12, 4, 4)


@pytest.mark.parametrize(
    ("wish", "ranks"),
    [({}, 1), ({"num_gpus": 0.5}, 1), ({"num_gpus": 1}, 1), ({"num_gpus": 4}, 4), ({"ranks": 3}, 3)],
)
def test_a_silo_has_a_rank_for_each_whole_gpu_unless_it_says_otherwise(wish, ranks):
    assert job(resources=wish, inner={"batch_size": 12}).resources.processes == ranks


def test_a_source_is_found_by_name_or_the_nearest_is_offered():
    assert job().source("docs").name == "docs"
    with pytest.raises(ConfigError, match='no source "dosc" in job job; did you mean docs'):
        job().source("dosc")


@pytest.mark.parametrize(
    "changes",
    [
        {"folder": "elsewhere"},
        {"resources": {"num_gpus": 1}},
        {"resources": {"num_gpus": 2, "ranks": 2}},
        {"sources": [{**DOCS, "storage": "there", "resources": {"num_cpus": 2}, "vocab_size": 9, "tokens": 9}, TEXTS]},
        {"rounds": {"keep": 5, "score_every": 0}},
        {"faults": {"start_timeout_s": 3.0, "attempts": 1}},
        {"tokenizer": {"global_vocab_size": 9}},
    ],
)
def test_where_a_run_is_kept_and_placed_is_not_its_identity(changes):
    assert job(**changes).fingerprint == job().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"seed": 1},
        {"method": "glob"},
        {"sources": [DOCS]},
        {"sources": [TEXTS, DOCS]},
        {"sources": [{**DOCS, "weight": 2.0}, TEXTS]},
        {"sources": [{**DOCS, "max_bytes": 9}, TEXTS]},
        {"model": {"layers": 2}},
        {"model": {"norm_eps": 1e-4}},
        {"tokenizer": {"vocab_size": 300}},
        {"inner": {"lr": 1e-3}},
        {"inner": {"precision": "fp32"}},
        {"outer": {"lr": 0.5}},
        {"rounds": {"total": 11}},
        {"rounds": {"choose": 1}},
        {"mixture": {"temperature": 0.5}},
    ],
)
def test_what_decides_the_numbers_is_the_identity(changes):
    assert job(**changes).fingerprint != job().fingerprint


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 5e5}, {"norm_eps": 1e-5}, {"kv_heads": 4}])
def test_what_a_model_computes_is_its_identity_and_a_key_left_open_is_not(changes):
    llama = job(model={"arch": "llama", **changes})
    assert (llama.fingerprint == job(model={"arch": "llama"}).fingerprint) == (not changes)
    assert llama.identity["model"].keys() - changes.keys() == {
        "arch", "layers", "width", "heads", "mlp_width", "positions",
    }  # fmt: skip


def test_a_job_survives_json():
    given = job(method="glob", sources=[{**DOCS, "resources": {"labels": {"region": "eu"}}}, TEXTS])
    assert Job.model_validate_json(given.model_dump_json()) == given
    assert Job.model_validate(given.model_dump(mode="json")).fingerprint == given.fingerprint


def test_a_job_is_a_value():
    with pytest.raises(ValueError, match="frozen"):
        job().seed = 3  # type: ignore[misc]


def test_a_source_is_stored_with_the_job_unless_it_says_otherwise(tmp_path):
    made = job(folder=str(tmp_path), sources=[{**DOCS, "storage": str(tmp_path / "eu")}, TEXTS])
    assert made.storage_of("docs") == tmp_path / "eu"
    assert made.storage_of("texts") == made.storage_of("mixture") == tmp_path


def test_a_key_that_older_runs_lack_is_no_part_of_their_identity():
    assert "row_weights" not in job().identity["outer"]
    assert job(outer={"row_weights": "uses"}).fingerprint != job().fingerprint
