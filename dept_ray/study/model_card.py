"""The README.md of an exported model: what it is, the run's figures, how to use it, and what to know before."""

from dept_ray.config import Job
from dept_ray.rounds.state import RunState
from dept_ray.silo.silo import Silo
from dept_ray.study.spare_rows import Spare


def model_card(
    job: Job, state: RunState, silo: Silo, source: str, scores: dict[str, dict[str, float]], spare: Spare,
    name: str | None,
) -> str:  # fmt: skip
    """Markdown with the front matter that the Hub reads.

    Args:
        job: the run.
        state: its last committed round.
        silo: the one that is exported, loaded.
        source: whose vocabulary it is.
        scores: by source, as a record of event "scores" has them (`rounds.ledger`).
        spare: rows that its table has beside those that were trained.
        name: on the Hub; None: the folder is loaded from where it lies.
    """
    parameters = sum(parameter.numel() for parameter in silo.model.parameters()) + spare.rows.numel()
    *_, shared = job.model.head_groups
    heads = f"{job.model.heads} heads" + (f" ({shared} of keys and values)" if shared < job.model.heads else "")
    section, inner, record = job.model, job.inner, state.silos[silo.spec.silo]
    optimizer = "AdamW" if inner.optimizer == "adamw" else "Muon on the body's matrices, AdamW elsewhere"
    end = silo.corpora[source].tokenizer.id_to_token(silo.corpora[source].end_of_text)
    table = [
        f"| {each} | {s['bits_per_byte']:.4f} | {s['unigram_bits_per_byte']:.4f} | {s['perplexity']:.2f} "
        f"| {s['loss']:.4f} | {s['tokens']:,} |"
        for each, s in scores.items()
    ]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [dept, {section.arch}]
---

# {job.name}: {source}

{parameters:,} parameters: {section.layers} blocks of width {section.width} with {heads}, laid out as \
{"GPT-2" if section.arch == "gpt2" else "Llama"}, fp32; {silo.vocabulary.size + len(spare.rows):,} tokens. \
Trained by dept_ray with method `{job.method}` ([DEPT](https://arxiv.org/abs/2410.05021)).

## Figures

After {state.round} of {job.rounds.total} rounds ({state.step:,} inner steps); text held out from training.

| source | bits per byte | unigram model, bits per byte | perplexity | nats per token | tokens |
|---|---|---|---|---|---|
{chr(10).join(table) or "| none has held-out text | | | | | |"}

| | |
|---|---|
| trained by this silo | {record.tokens:,} tokens of {", ".join(silo.spec.sources)}, in {record.rounds} rounds |
| trained by all silos | {sum(each.tokens for each in state.silos.values()):,} tokens |
| a round | {inner.local_steps:,} steps of {inner.batch_size} sequences of {inner.context} tokens |
| {optimizer} | peak {inner.lr:g}, betas {inner.betas}, weight decay {inner.weight_decay:g}, clipped at {inner.clip:g} |
| seed, run | {job.seed}, {job.fingerprint} |

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name or "."}")
tokenizer = AutoTokenizer.from_pretrained("{name or "."}")
ids = tokenizer(tokenizer.bos_token, split_special_tokens=False, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens={min(50, job.positions - 1)}, do_sample=True)[0]))
```

## Before use

- In training each text began and ended with `{end}`. The tokenizer adds none, and spells it out where a text mentions
  it; with `split_special_tokens=False` it is read as the token.
- Trained on sequences of {inner.context} tokens.
{_vocabulary(silo, source, spare)}"""


def _vocabulary(silo: Silo, source: str, spare: Spare) -> str:
    size, whole = silo.vocabulary.size, silo.vocabulary.global_size
    if silo.vocabulary.ids is None:
        return ""
    return f"""\
- The vocabulary is what occurs in {source}: {size:,} of {whole:,} pieces, with the ids 0 to {size - 1:,}. Text of
  {source} is cut as in training. Any other text is spelled with smaller pieces of these where it holds one of the rest,
  and with {len(spare.rows):,} more, from id {size:,} on, which stand nowhere alone in {source}: letters, bytes, and
  parts of its pieces. Their rows, all alike, were never trained; together they get {spare.share:.1g} of the
  probability in text of {source}. dept_ray itself has no such rows, and refuses a text that needs one.
"""
