"""A run's model for one source as a Hugging Face folder: transformers loads it without any code of ours.

    OUT/  model.safetensors  config.json  tokenizer.json  tokenizer_config.json  README.md

The source brings its own embedding and vocabulary; the ids of the tokenizer that is written are the rows of its table,
as the silo itself counts them. Where the vocabulary was trimmed, a few rows follow that nobody trained
(`study.spare_rows`), for what other text needs to be spelled with (`text.renumber`). The folder exists whole or not at
all. `transformers` is not needed to write it.
"""

import json
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dept_ray.config import Job
from dept_ray.errors import ConfigError, StoreError, VocabularyError
from dept_ray.metrics import read_records
from dept_ray.rounds.ledger import scores_record
from dept_ray.rounds.methods import method_of
from dept_ray.rounds.state import RunState
from dept_ray.silo.hugging_face import settings_of, to_hugging_face
from dept_ray.silo.silo import Silo
from dept_ray.study.generate import trained_silo
from dept_ray.study.model_card import model_card
from dept_ray.study.spare_rows import spare_rows
from dept_ray.text.renumber import rows_tokenizer
from dept_ray.text.shards import Corpus
from dept_ray.text.tokenizer import Vocabulary, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAMPLE_TOKENS = 100_000


def export(job: Job, folder: Path, out: Path, source: str | None, push: str | None = None) -> Path:
    """Write the model of the last committed round, as one source uses it.

    Args:
        job: the run.
        folder: of the run.
        out: where to; must be new, or empty.
        source: whose embedding and vocabulary.
        push: also upload to the Hub under this name, to a private repository unless it exists.

    Returns:
        `out`.

    Raises:
        ConfigError: no source, or an unknown one; `out` is not empty; `push` is no name for a repository.
        StoreError: no round is committed, the silo never trained, or something cannot be written or uploaded.
        VocabularyError: the tokenizer cannot be written with the ids of a trimmed vocabulary.
    """
    if source is None:
        known = ", ".join(sorted(each.name for each in job.sources))
        shared = f' (under method = "{job.method}" all share one model)' if method_of(job).mixed else ""
        raise ConfigError(f"which source's model is it to be? Name it with --source: {known}{shared}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and not an empty folder: name a new one, or empty it")
    if push is not None:
        _check_name(push)
    state, silo = trained_silo(job, folder, source)
    job = silo.job
    corpus = silo.corpora[source]
    tokenizer = rows_tokenizer(corpus.tokenizer, silo.vocabulary)
    _check_same(corpus, silo.vocabulary, tokenizer)
    spare = spare_rows(silo, source, vocabulary_size(tokenizer) - silo.vocabulary.size)
    text_files = {
        **_tokenizer_files(tokenizer, corpus, job),
        "README.md": model_card(job, state, silo, source, _scores(folder, state, silo), spare, push),
    }
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        _write_model(part, job, silo, corpus, spare.rows)
        for file, text in text_files.items():
            (part / file).write_text(text, encoding="utf-8")
        part.replace(out)
    except OSError as err:
        raise StoreError(f"{out} cannot be written ({err}): free space, or name another folder") from err
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if push is not None:
        _push(out, push)
    return out


# ------------------------------------------------------------------------------------------------ the files
def _write_model(folder: Path, job: Job, silo: Silo, corpus: Corpus, spare: torch.Tensor) -> None:
    from safetensors.torch import save_file

    ours = silo.model.state_dict()
    ours["embedding.tokens"] = torch.cat([ours["embedding.tokens"], spare])
    tensors = to_hugging_face(job.model, ours)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    end = int(silo.vocabulary.to_local(np.array([corpus.end_of_text]))[0])
    settings = settings_of(job.model, silo.vocabulary.size + len(spare), job.positions, end)
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _tokenizer_files(tokenizer: "Tokenizer", corpus: Corpus, job: Job) -> dict[str, str]:
    end = corpus.tokenizer.id_to_token(corpus.end_of_text)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # of tokenizer.json as it is: no model's own rules on top
        "bos_token": end,
        "eos_token": end,
        "model_max_length": job.positions,
        "split_special_tokens": True,  # as in training: a text that mentions the end of a text does not end there
        "clean_up_tokenization_spaces": False,
    }
    first = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in first:  # transformers would set its own default
        settings["add_prefix_space"] = first["add_prefix_space"]
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(settings, indent=2)}


def _check_same(corpus: Corpus, vocabulary: Vocabulary, rows: "Tokenizer") -> None:
    """Hold the renumbered tokenizer against the source's own, on text of the source."""
    shards = next((shards for shards in (corpus.validation, corpus.train) if shards.tokens), None)
    if vocabulary.ids is None or shards is None:
        return
    tokens = np.asarray(shards.map(0)[:_SAMPLE_TOKENS])
    documents = np.split(tokens, np.flatnonzero(tokens == corpus.end_of_text))
    texts = corpus.tokenizer.decode_batch([document[1:].tolist() for document in documents if len(document) > 1])
    theirs = rows.encode_batch_fast(texts, add_special_tokens=False)
    for text, our, their in zip(texts, corpus.tokenizer.encode_batch_fast(texts, add_special_tokens=False), theirs,
                                strict=True):  # fmt: skip
        ids = np.array(our.ids)
        if np.isin(ids, vocabulary.ids).all() and not np.array_equal(vocabulary.to_local(ids), their.ids):
            raise VocabularyError(
                f"the tokenizer of {corpus.folder} cuts text otherwise once its ids are those of the trimmed "
                f'vocabulary, for one {text[:60]!r}: train with tokenizer.vocabulary = "global" to export it'
            )


def _scores(folder: Path, state: RunState, silo: Silo) -> dict[str, Any]:
    """Validation of this model on its silo's sources: as the run recorded it, else measured now."""
    for record in reversed(read_records(folder / "metrics.jsonl")):
        if record["event"] == "scores" and record["round"] == state.round:
            return {name: figures for name, figures in record["scores"].items() if name in silo.corpora}
    return scores_record(silo.score())["scores"]


# ------------------------------------------------------------------------------------------------ the Hub
def _check_name(push: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(push)
        why = "" if push.count("/") == 1 else "it names no owner"
    except HFValidationError as err:
        why = str(err)
    if why:
        raise ConfigError(f"--push {push}: no name for a repository of the Hub ({why}); give OWNER/NAME")


def _push(out: Path, name: str) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        # What a silo learnt from is often private: to publish it is a second, deliberate step, on the Hub.
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=out, commit_message="Export from dept_ray")
    except Exception as err:  # its own, the network's and the login's have no common parent
        why = " ".join(f"{type(err).__name__}: {err}".split())
        raise StoreError(
            f"{out} is written, but could not be uploaded as {name} ({why}): log in with "
            f"`hf auth login`, then `hf upload {name} {out}`"
        ) from err
