"""A study's runs follow from the study and from what is known of them, and are fair by construction."""

import doctest
from pathlib import Path

import pytest
from tiny import tiny_study

from dept_ray.errors import ConfigError
from dept_ray.study import cells as module
from dept_ray.study import study_file
from dept_ray.study.cells import Cell, all_cells, cells_of
from dept_ray.study.outcomes import Outcome
from dept_ray.study.study_file import load_study

JOBS = Path(__file__).parents[2] / "jobs"


def finished(bits: float = 3.0) -> Outcome:
    return Outcome("finished", {"latin": {"bits_per_byte": bits, "unigram_bits_per_byte": 4.0, "perplexity": 9.0}})


def names(cells: list[Cell]) -> list[str]:
    return [cell.name for cell in cells]


def test_the_examples_in_docstrings_hold() -> None:
    assert doctest.testmod(module).failed == doctest.testmod(study_file).failed == 0


def test_plain_training_is_matched_by_steps_or_by_tokens(tmp_path: Path) -> None:
    std = {"method": "std"}
    variants = {"spec": {"job": {"method": "spec"}}, "steps": {"job": std, "match": "steps"}, "tokens": {"job": std}}
    spec, steps, tokens = cells_of(tiny_study(tmp_path, variants), {})
    assert steps.job.total_steps == spec.job.total_steps == 12
    assert tokens.tokens == spec.tokens == 3 * steps.tokens
    assert tokens.job.inner.local_steps == 4, "rounds are as long: what is drawn anew each round is so as often a step"
    assert tokens.job.rounds.score_every == 3, "validated as often"


def test_shorter_rounds_are_more_rounds(tmp_path: Path) -> None:
    variants = {"half": {"job": {"inner": {"local_steps": 2}}}, "small": {"job": {"inner": {"batch_size": 2}}}}
    half, small = cells_of(tiny_study(tmp_path, variants), {})
    assert (half.job.rounds.total, small.job.rounds.total) == (6, 6)
    assert half.tokens == small.tokens


def test_what_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"odd": {"job": {"inner": {"local_steps": 5}}}})
    with pytest.raises(ConfigError, match=r"variants\.odd\]: 4,608 tokens, .* no whole number of rounds of 1,920"):
        cells_of(study, {})


def test_the_length_of_a_run_is_no_variant_s_business(tmp_path: Path) -> None:
    for wrong in ({"job": {"rounds": {"total": 9}}}, {"sweep": {"rounds.total": (1, 2)}}):
        with pytest.raises(ValueError, match=r"variants\.v: rounds\.total cannot vary, for it is matched"):
            tiny_study(tmp_path, {"v": wrong})
    with pytest.raises(ValueError, match="seed cannot vary, for the study sets it"):
        tiny_study(tmp_path, {"v": {"job": {"seed": 3}}})


def test_a_grid_is_a_row_for_each_value_and_each_seed_a_run(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"spec": {}}, grid={"inner.lr": (0.1, 0.2)}, seeds=(0, 1))
    found = cells_of(study, {})
    assert names(found) == ["s.spec.lr0.1.s0", "s.spec.lr0.1.s1", "s.spec.lr0.2.s0", "s.spec.lr0.2.s1"]
    assert [cell.row for cell in found[1:3]] == ["spec lr 0.1", "spec lr 0.2"]
    assert [(cell.job.inner.lr, cell.job.seed) for cell in found[1:3]] == [(0.1, 1), (0.2, 0)]


def test_a_sweep_is_tried_under_the_first_seed_and_its_best_taken_under_all(tmp_path: Path) -> None:
    study = tiny_study(
        tmp_path, {"std": {"job": {"method": "std"}, "sweep": {"inner.lr": (0.1, 0.2, 0.3)}}}, seeds=(0, 1)
    )
    trials = cells_of(study, {})
    assert [cell.seed for cell in trials] == [0, 0, 0]
    assert not any(cell.taken for cell in trials)
    known = dict(zip(names(trials), [finished(3.0), finished(2.0), Outcome("failed", error="nan")], strict=True))
    after = cells_of(study, known)
    assert [cell.name for cell in after if cell.taken] == ["s.std.lr0.2.s0", "s.std.lr0.2.s1"]


def test_a_body_is_adapted_when_it_is_trained_and_not_when_it_failed(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"std": {"job": {"method": "std"}}}, adaptations={"random": {}}, seeds=(0, 1))
    assert names(cells_of(study, {})) == ["s.std.s0", "s.std.s1"]
    known = {"s.std.s0": finished(), "s.std.s1": Outcome("failed", error="diverged")}
    assert names(cells_of(study, known))[2:] == ["s.std.s0.random"]
    assert len(all_cells(study, {})) == 4


def test_every_body_is_adapted_alike_whatever_it_was_trained_with(tmp_path: Path) -> None:
    variants = {
        "tokens": {"job": {"method": "std", "inner": {"lr": 0.1}}},
        "opt": {
            "job": {"tokenizer": {"vocab_size": 260}, "inner": {"local_steps": 2, "batch_size": 8, "optimizer": "muon"}}
        },
    }
    study = tiny_study(tmp_path, variants, held_out=("numbers",), adaptations={"random": {}})
    tokens, opt = (cell.job for cell in all_cells(study, {}) if cell.adaptation)
    assert tokens.held_out == opt.held_out == ("numbers",)
    assert (tokens.total_steps, tokens.tokenizer) == (opt.total_steps, opt.tokenizer)
    assert tokens.tokenizer.vocab_size == 300
    assert opt.inner.optimizer == "adamw"
    assert (tokens.inner.lr, opt.inner.lr) == (0.1, 1e-2), "the peak of the body's own training"
    assert {**tokens.inner.model_dump(), "lr": 0} == {**opt.inner.model_dump(), "lr": 0}


def test_a_warm_up_is_that_of_the_study_or_follows_the_base_job_s_steps(tmp_path: Path) -> None:
    variants = {"std": {"job": {"method": "std", "inner": {"warmup_steps": 7}}}}
    study = tiny_study(tmp_path, variants, adaptations={"random": {}})
    _, adapted = all_cells(study, {})
    assert adapted.job.inner.warmup_steps == 2, "as the base job says"
    study.job["inner"] = {k: v for k, v in study.job["inner"].items() if k != "warmup_steps"}
    _, adapted = all_cells(study, {})
    assert (adapted.job.total_steps, adapted.job.inner.warmup_steps) == (4, 1)


def test_what_is_held_out_trains_no_body(tmp_path: Path) -> None:
    for cell in cells_of(tiny_study(tmp_path, {"std": {"job": {"method": "std"}}, "spec": {}}, ("numbers",)), {}):
        assert [source.name for source in cell.job.sources] == ["code", "latin"]


def test_of_bodies_that_stay_home_each_is_adapted(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, {"alone": {"job": {"method": "isolated"}}}, ("numbers",), adaptations={"random": {}})
    assert names(all_cells(study, {}))[1:] == ["s.alone.s0.random.of-code", "s.alone.s0.random.of-latin"]


def test_an_embedding_of_its_own_is_gone_on_with_where_there_is_one(tmp_path: Path) -> None:
    variants = {method: {"job": {"method": method}} for method in ("std", "glob", "trim", "spec", "spec-opt")}
    study = tiny_study(tmp_path, variants, adaptations={"own": {"job": {"init": {"embedding": "own"}}}})
    adapted = [cell for cell in all_cells(study, {}) if cell.adaptation]
    assert [cell.variant for cell in adapted] == ["std", "glob", "trim"]
    assert {cell.job.inner.lr for cell in adapted} == {5e-3}


def test_dealt_text_is_in_as_many_silos_as_there_are_sources(tmp_path: Path) -> None:
    glob, dealt = cells_of(tiny_study(tmp_path, {"glob": {}, "dealt": {"dealt": True}}), {})
    assert [source.name for source in dealt.job.sources] == ["share-0", "share-1", "share-2"]
    assert dealt.tokens == glob.tokens


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two runs would be called s\.v\.lr0\.5\.s0"):
        cells_of(tiny_study(tmp_path, {"v": {}}, grid={"inner.lr": (0.5, 0.50)}), {})


@pytest.mark.parametrize("path", sorted(JOBS.glob("study_*.toml")), ids=lambda path: path.stem)
def test_every_study_file_is_tiny_study(path: Path, tmp_path: Path) -> None:
    study = load_study(path, folder=str(tmp_path))
    assert study.name == path.stem
    tokens = {cell.tokens for cell in cells_of(study, {}) if study.variants[cell.variant].match == "tokens"}
    assert len(tokens) == 1


def test_a_study_file_that_is_wrong_says_how(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    with pytest.raises(ConfigError, match=r"study file .*x\.toml does not exist"):
        load_study(path)
    path.write_text("[job]\n[variants.a]\nbase_line = true\n[variants.b]\nmatch = 'token'\n")
    with pytest.raises(ConfigError, match=r"variants\.a\.base_line: unknown key; did you mean baseline") as caught:
        load_study(path)
    assert "variants.b.match = 'token': must be 'tokens' or 'steps'" in str(caught.value)
    path.write_text("[variants.a]")
    with pytest.raises(ConfigError, match="job: missing; add it"):
        load_study(path)
    path.write_text("job = 'none.toml'\n[variants.a]")
    with pytest.raises(ConfigError, match=r"job file .*none\.toml does not exist"):
        load_study(path)
