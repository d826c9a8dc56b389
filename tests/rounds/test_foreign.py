"""A run begins from a GPT-2 or a Llama that transformers wrote: the same body to 1e-5, its rows where they fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SOURCES, document
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError, VocabularyError
from dept_ray.in_process import train_here
from dept_ray.preparing import begun, prepare
from dept_ray.rounds.control import Control
from dept_ray.rounds.folder import run_folder
from dept_ray.sections import TokenizerSection
from dept_ray.silo.fresh import fresh_body, fresh_embedding
from dept_ray.silo.model import Body, Embedding, LanguageModel, layout_of
from dept_ray.study.export import export
from dept_ray.study.generate import trained_silo
from dept_ray.text.tokenizer import Vocabulary, train_tokenizer

SIZE = 320
"""Tokens of the checkpoint's tokenizer; its table has some rows more, as many have."""


CONSTANTS = {"kv_heads": 1, "norm_eps": 1e-3, "rope_theta": 500.0}
"""Of the Llama of another make: all three differ enough to be seen in a logit."""


@pytest.fixture(scope="module", params=["gpt2", "llama", "another llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers by transformers' own classes, and a tokenizer of the tiny languages."""
    torch.manual_seed(3)
    shape: dict[str, Any] = {"vocab_size": SIZE + 8, "bos_token_id": 0, "eos_token_id": 0}
    if request.param == "gpt2":
        settings: Any = GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=2, **shape)
        model: Any = GPT2LMHeadModel(settings)
    else:
        if request.param == "another llama":
            shape |= {"num_key_value_heads": 1, "rms_norm_eps": 1e-3, "rope_parameters": {"rope_theta": 500.0}}
        settings = LlamaConfig(
            hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True,
            **shape,
        )  # fmt: skip
        model = LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():  # none is 0 or 1, as biases and norms are when they are drawn
            parameter += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    section = TokenizerSection.model_validate({"kind": "bpe", "vocab_size": SIZE})
    texts = (document(name, i) for name in SOURCES for i in range(20))
    train_tokenizer(texts, section, "").save(str(folder / "tokenizer.json"))
    return folder


def beginning(tiny: Callable[..., Job], checkpoint: Path, method: str = "std", at: str = "run", **more: Any) -> Job:
    init = {"checkpoint": str(checkpoint), **more.pop("init", {})}
    model = {**make_of(checkpoint), "layers": 2, "mlp_width": 128, **more.pop("model", {})}
    tokenizer = {"kind": "file", "name": str(checkpoint / "tokenizer.json")} if init.get("embedding") == "own" else {}
    return tiny(method, at, init=init, model=model, tokenizer=more.pop("tokenizer", tokenizer), **more)


def make_of(checkpoint: Path) -> dict[str, Any]:
    """What a `[model]` must say of it beside its shapes."""
    config = json.loads((checkpoint / "config.json").read_text())
    another = config.get("num_key_value_heads") == 1
    return {"arch": config["model_type"], **(CONSTANTS if another else {})}


def fitted(job: Job) -> Job:
    job = begun(job)
    prepare(job, local=True)
    return job


def model_of(job: Job, rows: Embedding) -> LanguageModel:
    body = Body(job.model)
    named = {name: torch.empty(0) for name in layout_of(job.model).names}
    assert named.keys() == dict(body.named_parameters()).keys()
    body.load_state_dict(layout_of(job.model).views(fresh_body(job)))
    return LanguageModel(body, rows)


def altered(checkpoint: Path, at: Path, **settings: Any) -> Path:
    folder = shutil.copytree(checkpoint, at)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


# The body and the rows.


def test_logits_are_those_of_transformers(tiny, checkpoint: Path):
    job = fitted(beginning(tiny, checkpoint, init={"embedding": "own"}))
    model = model_of(job, fresh_embedding(job, Vocabulary(SIZE), "mixture"))
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, SIZE, (3, 32)))
    with torch.no_grad():
        expected = theirs(ids).logits[..., :SIZE]
        assert expected.std() > 0.1, "the comparison is of something"
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


def test_a_silo_with_rows_of_its_own_has_the_body_to_the_bit(tiny, checkpoint: Path):
    taken = fresh_body(fitted(beginning(tiny, checkpoint)))
    job = beginning(tiny, checkpoint, "spec-opt", at="silos", rounds={"total": 1}, init={"frozen_body": True})
    assert torch.equal(train_here(job, lambda record: None).body, taken)


def test_tokens_that_the_checkpoint_knows_begin_from_its_rows(tiny, checkpoint: Path):
    job = fitted(beginning(tiny, checkpoint, init={"embedding": "overlap"}))
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    table = theirs.get_input_embeddings().weight.detach()
    rows = fresh_embedding(job, Vocabulary(300), "mixture").tokens.detach()
    same = (rows[:, None] == table[None]).all(-1).any(1)
    assert 256 < same.sum() <= 300, "all bytes, and the merges that both tokenizers have"
    assert torch.isfinite(rows).all()


def test_a_run_exported_is_begun_from_to_the_bit(tiny, tmp_path: Path, checkpoint: Path):
    run = tiny("std", "first", model=make_of(checkpoint), rounds={"total": 1})
    train_here(run, lambda record: None)
    silo = trained_silo(run, run_folder(run), "latin")[1]
    out = export(run, run_folder(run), tmp_path / "out", "latin")
    job = beginning(tiny, out, at="second", model={"layers": 1, "mlp_width": None}, init={"embedding": "own"})
    job = fitted(job)
    assert torch.equal(fresh_body(job), silo.body)
    assert torch.equal(fresh_embedding(job, Vocabulary(300), "mixture").tokens, silo.model.embedding.tokens)


def test_a_file_of_the_body_alone_and_of_half_precision_will_do(tiny, tmp_path: Path, checkpoint: Path):
    whole: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    whole.base_model.half().save_pretrained(tmp_path / "half", max_shard_size="40KB")
    assert (tmp_path / "half" / "model.safetensors.index.json").exists(), "in several files, too"
    body, half = (fresh_body(begun(beginning(tiny, at, at=at.name))) for at in (checkpoint, tmp_path / "half"))
    assert half.dtype == torch.float32
    assert torch.equal(half, body.half().float())


# Going on.


def test_a_run_from_a_checkpoint_that_was_stopped_goes_on_to_the_bit_without_it(tiny, tmp_path: Path, checkpoint: Path):
    gone = shutil.copytree(checkpoint, tmp_path / "gone")
    once, twice = (beginning(tiny, at, "trim", at=name) for at, name in ((checkpoint, "once"), (gone, "twice")))
    state, control = train_here(once, lambda record: None), Control()
    train_here(twice, lambda record: control.stop(), control=control)
    shutil.rmtree(gone)
    again = train_here(twice, lambda record: None)
    assert again.round == state.round == 3
    for name, tensor in state.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
    assert begun(twice).init.fingerprint == begun(once).init.fingerprint is not None


# What does not fit.


@pytest.mark.parametrize(
    ("settings", "model", "told"),
    [
        ({}, {"layers": 3}, r"model.layers = 3, there \w+ = 2\): set \[model\]"),
        ({}, {"width": 64}, r"model.width = 64, there \w+ = 32"),
        ({}, {"mlp_width": 96}, r"model.mlp_width = 96, there \w+ = 128"),
        ({"n_head": 4, "num_attention_heads": 4, "num_key_value_heads": 4}, {}, r"model.heads = 2, there \w+ = 4"),
        ({"model_type": "gpt_neox"}, {}, r"no model that could be gone on with \(.*there model_type = 'gpt_neox'"),
        ({"activation_function": "relu", "hidden_act": "gelu"}, {}, r"= '(relu|gelu)' there, '.*' is all that this"),
        ({"layer_norm_epsilon": 0.5, "rms_norm_eps": 0.5}, {}, r"model.norm_eps = [\d.e-]+, there \w+ = 0.5\): set"),
    ],
)  # fmt: skip
def test_another_model_is_refused_before_a_tensor_is_read(
    tiny, tmp_path: Path, checkpoint: Path, settings: dict[str, Any], model: dict[str, Any], told: str
):
    folder = altered(checkpoint, tmp_path / "altered", **settings)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=told):
        begun(beginning(tiny, folder, model={**make_of(checkpoint), **model}))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_key_value_heads": 4}, r"model.kv_heads = \d, there num_key_value_heads = 4\): set \[model\]"),
        ({"rope_parameters": {"rope_theta": 5e5}}, r"model.rope_theta = .*rope_theta = 500000.0\): set \[model\]"),
        ({"rope_parameters": None, "rope_theta": 5e5}, r"model.rope_theta = .*rope_theta = 500000.0\): set \[model\]"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type = 'llama3' there, 'default' is all"),
        ({"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": None}, "rope_type = 'llama3' there, 'default'"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "rope_type = 'linear' there, 'default' is all"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 there, 1.0 is all"),
        ({"head_dim": 8}, "head_dim = 8 there, 16 is all"),
        ({"attention_bias": True}, "attention_bias = True there, False is all"),
        ({"mlp_bias": True}, "mlp_bias = True there, False is all"),
        ({"sliding_window": 4096}, "sliding_window = 4096 there, None is all"),
        ({"model_type": "mistral"}, "there model_type = 'mistral'"),
    ],
)
def test_a_llama_of_another_make_is_refused(
    tiny, tmp_path: Path, checkpoint: Path, settings: dict[str, Any], told: str
):
    if (make := make_of(checkpoint)) == {"arch": "llama"}:
        with pytest.raises(ConfigError, match=told):
            begun(beginning(tiny, altered(checkpoint, tmp_path / "altered", **settings), model=make))


def test_positions_matter_where_they_are_taken(tiny, checkpoint: Path):
    longer = {"model": {"positions": 64}, "init": {"embedding": "own"}}
    if "n_positions" not in json.loads((checkpoint / "config.json").read_text()):
        begun(beginning(tiny, checkpoint, **longer))
        return
    with pytest.raises(ConfigError, match=r"model.positions = 64, there n_positions = 32"):
        begun(beginning(tiny, checkpoint, **longer))
    begun(beginning(tiny, checkpoint, at="drawn", model={"positions": 64}))


def test_rows_are_taken_where_they_are_also_the_head_alone(tiny, tmp_path: Path, checkpoint: Path):
    untied = altered(checkpoint, tmp_path / "untied", tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r'has a head beside its token embedding .* set init.embedding = "random"'):
        begun(beginning(tiny, untied, init={"embedding": "overlap"}))
    begun(beginning(tiny, untied, at="body"))


def test_rows_of_another_tokenizer_or_of_none_are_refused(tiny, tmp_path: Path, checkpoint: Path):
    with pytest.raises(VocabularyError, match=rf'name = "{checkpoint}/tokenizer.json"'):
        fitted(beginning(tiny, checkpoint, init={"embedding": "own"}, tokenizer={"vocab_size": 300}))
    folder = shutil.copytree(checkpoint, tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        begun(beginning(tiny, folder, at="mute", init={"embedding": "overlap"}))


def test_a_checkpoint_that_is_not_there_or_is_pickled_or_damaged_is_told(
    tiny, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    here = {"arch": "gpt2"}
    for name in ("nobody/nothing", "/no/such/folder"):
        with pytest.raises(ConfigError, match=f"init.checkpoint = '{name}': no such folder, and config.json cannot be"):
            begun(tiny("std", "none", init={"checkpoint": name}, model=here))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"neither a folder with a config.json nor"):
        begun(tiny("std", "none", init={"checkpoint": str(tmp_path / "empty")}))
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(StoreError, match=r"cannot be read .*fetch the checkpoint again"):
        begun(beginning(tiny, folder, at="damaged"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors: .*pickled weights are not read"):
        begun(beginning(tiny, folder, at="pickled"))


@pytest.mark.parametrize(
    ("init", "told"),
    [
        ({"run": "a"}, "init.run = 'a': none for a checkpoint; remove either"),
        ({"round": 3}, "init.round = 3: none for a checkpoint"),
        ({"silo": "en"}, "init.silo = 'en': none for a checkpoint"),
    ],
)
def test_a_checkpoint_has_no_rounds_or_silos_and_is_no_run(tiny, init: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        tiny("std", init={"checkpoint": "x", **init})
