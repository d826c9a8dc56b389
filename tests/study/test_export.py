"""What is exported is the silo's own model and tokenizer, read by transformers alone: the same logits, the same ids."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from tiny import document, ready_job, tiny_job
from tokenizers import AddedToken, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM

from dept_ray.cli import main
from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError
from dept_ray.in_process import train_here
from dept_ray.metrics import read_records
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.sections import TokenizerSection
from dept_ray.silo.score import bits_per_byte
from dept_ray.silo.silo import Silo
from dept_ray.study.export import export
from dept_ray.study.generate import generate, trained_silo
from dept_ray.study.spare_rows import SHARE
from dept_ray.text.tokenizer import train_tokenizer

SOURCE = "latin"
CLASSES = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
RUNS = [(arch, method) for arch in CLASSES for method in ("spec", "spec-opt", "trim", "glob", "std")]
TEXTS = [
    document("latin", 1), document("code", 2), document("numbers", 3), "", " ", "\n\n\t x", "qui lorus", "日本 👍 é",
    "before <|endoftext|> after", "a\u200bb\r\n",
]  # fmt: skip


class Exported:
    """A run of two rounds, its silo, and what transformers makes of the folder."""

    def __init__(self, job: Job, out: Path, source: str = SOURCE) -> None:
        train_here(job, lambda record: None)
        self.job, self.out, self.source = job, out, source
        self.silo: Silo = trained_silo(job, run_folder(job), source)[1]
        export(job, run_folder(job), out, source)
        self.model: Any = AutoModelForCausalLM.from_pretrained(out)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(out)

    def our_ids(self, text: str) -> list[int]:
        """The tokenizer's, under the ids that the shards are written with."""
        return self.silo.corpora[self.source].tokenizer.encode(text, add_special_tokens=False).ids

    def has_rows_for(self, ids: list[int]) -> bool:
        """Whether the silo itself has a row for each of these."""
        vocabulary = self.silo.vocabulary
        return vocabulary.ids is None or bool(np.isin(ids, vocabulary.ids).all())

    @property
    def added(self) -> int:
        """Rows that nobody trained."""
        return self.model.config.vocab_size - self.silo.vocabulary.size


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: "-".join(run))
def exported(request: pytest.FixtureRequest, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    arch, method = request.param
    folder = tmp_path_factory.mktemp("export")
    job = ready_job(prepared, folder, method, model={"arch": arch, "layers": 2}, rounds={"total": 2})
    return Exported(job, folder / "out")


# The model.


def test_logits_are_ours(exported: Exported):
    silo = exported.silo
    ids = torch.from_numpy(silo.vocabulary.to_local(np.concatenate([
        silo.corpora[exported.source].validation.map(0)[start : start + 32].astype(np.int64)[None]
        for start in (0, 100, 200)
    ])))  # fmt: skip
    with torch.no_grad():
        ours, theirs = silo.model(ids.long()), exported.model(ids.long()).logits[..., : silo.vocabulary.size]
    assert theirs.std() > 0.1, "the comparison is of something"
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_transformers_knows_it_by_its_own_class(exported: Exported):
    section = exported.job.model
    assert type(exported.model) is CLASSES[section.arch]
    assert exported.model.dtype == torch.float32
    count = sum(parameter.numel() for parameter in exported.silo.model.parameters()) + exported.added * section.width
    assert sum(parameter.numel() for parameter in exported.model.parameters()) == count


def test_head_and_embedding_are_one(exported: Exported):
    assert exported.model.lm_head.weight is exported.model.get_input_embeddings().weight
    with safe_open(exported.out / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name]  # noqa: SIM118 - it is no mapping


def test_nothing_is_missing_and_nothing_is_left_over(exported: Exported):
    _, told = AutoModelForCausalLM.from_pretrained(exported.out, output_loading_info=True)
    assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


# The tokenizer.


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_has_rows_and_comes_back(exported: Exported, text: str):
    ids, theirs = exported.our_ids(text), exported.tokenizer(text)["input_ids"]
    if exported.has_rows_for(ids):
        assert theirs == exported.silo.vocabulary.to_local(np.array(ids, np.int64)).tolist()
    assert all(0 <= row < exported.model.config.vocab_size for row in theirs)
    assert exported.tokenizer.decode(theirs) == text
    with torch.no_grad():
        logits = exported.model(torch.tensor([[exported.tokenizer.bos_token_id, *theirs][:32]])).logits
    assert torch.isfinite(logits).all()


def test_the_source_s_own_text_is_cut_as_in_training(exported: Exported):
    ids, theirs = exported.our_ids(document(SOURCE, 5)), exported.tokenizer(document(SOURCE, 5))["input_ids"]
    assert exported.has_rows_for(ids)
    assert theirs == exported.silo.vocabulary.to_local(np.array(ids)).tolist()
    assert max(theirs) < exported.silo.vocabulary.size


def test_only_a_trimmed_vocabulary_has_rows_that_nobody_trained(exported: Exported):
    trimmed, trained = exported.silo.vocabulary.ids is not None, exported.silo.vocabulary.size
    assert (exported.added > 0) == trimmed
    assert len(exported.tokenizer) == exported.model.config.vocab_size
    if trimmed:
        assert not exported.has_rows_for(exported.our_ids("if x: return 7")), "which the silo itself refuses"
        own = exported.tokenizer(document(SOURCE, 7))["input_ids"]
        with torch.no_grad():
            shares = exported.model(torch.tensor(own[:512]).view(-1, 32)).logits.softmax(-1)
        assert exported.added > trained, "more than were trained, by a few steps alone, and yet:"
        assert shares[..., trained:].sum(-1).mean() < 300 * SHARE


def test_a_text_ends_where_ours_ends(exported: Exported):
    corpus, vocabulary, tokenizer = exported.silo.corpora[exported.source], exported.silo.vocabulary, exported.tokenizer
    end = int(vocabulary.to_local(np.array([corpus.end_of_text]))[0])
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == end
    assert exported.model.config.eos_token_id == exported.model.generation_config.eos_token_id == end
    assert tokenizer("<|endoftext|>", split_special_tokens=False)["input_ids"] == [end]
    assert len(tokenizer("<|endoftext|>")["input_ids"]) > 1


def test_it_goes_on_with_a_prompt_as_we_do(exported: Exported):
    ours = "".join(generate(exported.silo, exported.source, "qui lor", 12, temperature=0))
    prompt = [exported.tokenizer.bos_token_id, *exported.tokenizer("qui lor")["input_ids"]]
    said = exported.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert exported.tokenizer.decode(said[0], skip_special_tokens=True) == "qui lor" + ours


# The card.


def test_the_card_has_the_run_s_own_figures(exported: Exported):
    card = (exported.out / "README.md").read_text()
    scores = read_records(run_folder(exported.job) / "metrics.jsonl")[-1]["scores"]
    for source in exported.silo.spec.sources:
        assert f"| {source} | {scores[source]['bits_per_byte']:.4f} |" in card
    assert "After 2 of 2 rounds (8 inner steps)" in card
    assert (f"and with {exported.added:,} more, from id" in card) == (exported.silo.vocabulary.ids is not None)
    others = set(scores) - set(exported.silo.spec.sources)
    assert not [name for name in others if f"| {name} |" in card], "others' figures are theirs to tell"


def test_what_the_card_says_works(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(exported.out)
    exec((exported.out / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("<|endoftext|>")


# What else may be exported.


def test_every_other_method_is_exported_too(tiny: Callable[..., Job], tmp_path: Path):
    for method in ("act", "isolated"):
        exported = Exported(tiny(method, at=method, rounds={"total": 1}), tmp_path / f"of-{method}", "numbers")
        ids = torch.tensor([exported.tokenizer(document("numbers", 1))["input_ids"][:32]])
        with torch.no_grad():
            ours = exported.silo.model(ids)
            torch.testing.assert_close(exported.model(ids).logits[..., : ours.shape[-1]], ours, rtol=1e-5, atol=1e-5)


def test_a_llama_that_shares_keys_and_has_constants_of_its_own_is_exported(tiny: Callable[..., Job], tmp_path: Path):
    model = {"arch": "llama", "kv_heads": 1, "norm_eps": 1e-3, "rope_theta": 500.0}
    exported = Exported(tiny("spec-opt", model=model, rounds={"total": 1}), tmp_path / "out")
    ids = torch.tensor([exported.tokenizer(document(SOURCE, 1))["input_ids"][:32]])
    with torch.no_grad():
        torch.testing.assert_close(exported.model(ids).logits, exported.silo.model(ids), rtol=1e-5, atol=1e-5)
    assert "2 heads (1 of keys and values)" in (tmp_path / "out" / "README.md").read_text()


def test_a_tokenizer_that_was_brought_along_is_exported(tiny: Callable[..., Job], tmp_path: Path):
    """Like many on the Hub: a space before a text, runs of spaces beside the model, an end around a text."""
    section = TokenizerSection.model_validate({"kind": "bpe", "vocab_size": 400})
    brought = train_tokenizer(
        (document(name, i) for name in ("code", "latin", "numbers") for i in range(9)), section, ""
    )
    brought.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    brought.add_tokens([AddedToken(" " * n, normalized=False) for n in (4, 2)])
    brought.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    brought.save(str(tmp_path / "tokenizer.json"))
    tokenizer = {"kind": "file", "name": str(tmp_path / "tokenizer.json")}
    job = tiny_job(tmp_path / "run", "spec", tokenizer=tokenizer, rounds={"total": 1})
    exported = Exported(job, tmp_path / "out", "code")
    for text in (document("code", 7), "    if x\n"):
        ids = exported.tokenizer(text)["input_ids"]
        assert ids == exported.silo.vocabulary.to_local(np.array(exported.our_ids(text))).tolist()


def test_a_source_that_joined_the_run_is_exported(tiny: Callable[..., Job], tmp_path: Path):
    job = tiny("spec-opt", rounds={"total": 3})
    newcomer = job.model_dump(mode="json", exclude_unset=True)["sources"][-1]
    job, control = job.model_copy(update={"sources": job.sources[:-1]}), Control()
    control.change({"add": newcomer})
    train_here(job, lambda record: None, control=control)
    assert newcomer["name"] not in {source.name for source in job.sources}
    export(job, run_folder(job), tmp_path / "out", newcomer["name"])
    assert f"# {job.name}: {newcomer['name']}" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_that_was_stopped_has_figures_too(tiny: Callable[..., Job], tmp_path: Path):
    job, control = tiny("spec", rounds={"total": 3}), Control()
    train_here(job, lambda record: control.stop() if record["event"] == "round" else None, control=control)
    records = read_records(run_folder(job) / "metrics.jsonl")
    assert [record["event"] for record in records] == ["round"]
    export(job, run_folder(job), tmp_path / "out", SOURCE)
    card = (tmp_path / "out" / "README.md").read_text()
    score = trained_silo(job, run_folder(job), SOURCE)[1].score()[SOURCE]
    assert f"| {SOURCE} | {bits_per_byte(score):.4f} |" in card
    assert "After 1 of 3 rounds" in card


def test_transformers_is_not_needed_to_export(tiny: Callable[..., Job], tmp_path: Path):
    job = tiny("spec", rounds={"total": 1})
    train_here(job, lambda record: None)
    code = (
        "import sys; sys.modules['transformers'] = None; from dept_ray.cli import main; "
        f"main(['export', {str(run_folder(job))!r}, 'out', '--source', {SOURCE!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}, "nothing half-written is left"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


# Failing on purpose.


@pytest.fixture(scope="module")
def spec(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A trained run."""
    job = ready_job(prepared, tmp_path_factory.mktemp("refused"), "spec", rounds={"total": 1, "choose": 2}, seed=1)
    train_here(job, lambda record: None)
    return job


def test_an_unknown_source_is_told_with_those_there_are(spec: Job, tmp_path: Path):
    with pytest.raises(ConfigError, match='no source "zulu" in job tiny-spec; known: code, latin, numbers'):
        export(spec, run_folder(spec), tmp_path / "out", "zulu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["spec", "std", "act"])
def test_no_source_is_told_with_those_there_are(tiny: Callable[..., Job], tmp_path: Path, method: str):
    job = tiny(method)
    with pytest.raises(ConfigError, match="--source: code, latin, numbers") as err:
        export(job, run_folder(job), tmp_path / "out", None)
    assert ("all share one model" in str(err.value)) == (method != "spec")


def test_what_is_there_is_never_written_over(spec: Job, tmp_path: Path):
    (tmp_path / "mine").write_text("mine")
    for out in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="is there already and not an empty folder"):
            export(spec, run_folder(spec), out, SOURCE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_will_do(spec: Job, tmp_path: Path):
    (tmp_path / "out").mkdir()
    trained = next(name for name in ("code", "latin") if name in _trained(spec))
    assert export(spec, run_folder(spec), tmp_path / "out", trained) == tmp_path / "out"


def test_a_run_without_a_round_is_not_exported(tiny: Callable[..., Job], tmp_path: Path):
    job = tiny("spec")
    with pytest.raises(StoreError, match="no committed round yet: train first"):
        export(job, run_folder(job), tmp_path / "out", SOURCE)


def test_a_silo_that_never_trained_is_not_exported(spec: Job, tmp_path: Path):
    (resting,) = {"code", "latin", "numbers"} - _trained(spec)
    with pytest.raises(StoreError, match=f"silo {resting} has not trained in any of the 1 committed rounds"):
        export(spec, run_folder(spec), tmp_path / "out", resting)


def test_a_folder_that_cannot_be_written_is_said(spec: Job, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        export(spec, run_folder(spec), tmp_path / "file" / "out", min(_trained(spec)))


@pytest.mark.parametrize("name", ["a/b/c", "ours", "a/..b", ""])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything(spec: Job, tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=f"--push {name}: no name for a repository"):
        export(spec, run_folder(spec), tmp_path / "out", SOURCE, push=name)
    assert not (tmp_path / "out").exists()


def test_the_command_exports(spec: Job, tmp_path: Path):
    asked = ["export", str(run_folder(spec)), str(tmp_path / "out")]
    refused = CliRunner().invoke(main, asked)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("ConfigError: which source's model is it to be?")
    done = CliRunner().invoke(main, [*asked, "--source", min(_trained(spec))])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"


def _trained(job: Job) -> set[str]:
    (record,) = [r for r in read_records(run_folder(job) / "metrics.jsonl") if r["event"] == "round"]
    return set(record["silos"])
