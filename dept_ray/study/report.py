"""One page on a run, or on several side by side: what was run, what became of it, what it cost, what it is worth.

Self-contained HTML: no script, no link, no network. It is drawn by `figures` from what `story` tells; here is only what
stands where. `plot_of` gives the charts alone, for a notebook.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dept_ray.config import Job
from dept_ray.console import duration, human
from dept_ray.errors import ConfigError
from dept_ray.rounds.methods import method_of
from dept_ray.study import figures, page
from dept_ray.study.plan import plan
from dept_ray.study.story import Story
from dept_ray.study.timeline import clock, spoken, timeline_of


@dataclass(frozen=True)
class Plot:
    """Charts that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return "the charts of a run, to be seen in a notebook; dept-ray report writes them as a page"


def plot_of(stories: Sequence[Story]) -> Plot:
    """The charts of runs, without the page around them."""
    return Plot(page.fragment(_curves(stories) + _time(stories) + _traffic(stories) + _agreement(stories)))


def report_on(stories: Sequence[Story]) -> str:
    """The page.

    Args:
        stories: one run, or several to be compared; each with a name of its own.

    Returns:
        HTML.
    """
    common = _common(stories)
    of = f" of {common.removesuffix('.')}" if common else ""
    title = stories[0].name if len(stories) == 1 else f"{len(stories)} runs{of} side by side"
    stories = [replace(story, name=story.name.removeprefix(common)) for story in stories]
    parts = [page.heading(title, 1)]
    parts += [page.words(_standing(story, len(stories) > 1)) for story in stories]
    parts += [page.words(f"{story.name}: {story.error}", "bad") for story in stories if story.error]
    parts.append(_tiles(stories[0]) if len(stories) == 1 else _comparison(stories))
    parts += [_what_was_run(stories), _curves(stories), _scores(stories), _time(stories), _membership(stories)]
    parts += [_traffic(stories), _agreement(stories), _sizes(stories), _settings(stories)]
    return page.document(f"dept_ray: {title}", "".join(parts))


def _common(stories: Sequence[Story]) -> str:
    """What all names begin with up to a dot, such as a study's; it leaves no room for what tells them apart."""
    heads = {story.name.partition(".")[0] + "." for story in stories}
    shared = len(stories) > 1 and len(heads) == 1 and all(story.name.partition(".")[2] for story in stories)
    return heads.pop() if shared else ""


# ------------------------------------------------------------------------------------------ the first screen
def _standing(story: Story, named: bool) -> str:
    rounds = story.rounds[-1]["round"] if story.rounds else 0
    phase = f", {story.phase}" if story.phase else ""
    times = [story.records[at].get("time", "")[:16].replace("T", " ") for at in (0, -1)] if story.records else []
    when = f"; records from {times[0]} to {times[1]}" if times else ""
    name = f"{story.name}: " if named else ""
    return f"{name}{story.job.method.upper()}{phase}, {rounds} of {story.job.rounds.total} rounds committed{when}"


def _tiles(story: Story) -> str:
    mean, points, sent = story.mean_worth(), story.mean_bits(), sum(down + up for _, down, up in story.sent())
    figures_ = [("bits per byte, mean over sources", _figure(mean, 3))] if mean is not None else []
    if mean is not None and len(points) > 1 and points[0][0] == 0:
        figures_.append(("bits per byte before training", _figure(points[0][1], 3)))
    if story.rounds:
        last = story.rounds[-1]
        figures_.append(("training loss of the last round, nats per token", _figure(last["loss"], 3)))
        figures_.append(("tokens trained, all silos", human(last["tokens"])))
        took_s = sum(record["seconds"] for record in story.rounds)
        figures_.append((f"of rounds, {clock(took_s)}", duration(took_s)))
        figures_.append(("sent, down and up", human(sent, "B") if sent else "nothing"))
        parallel = story.data_parallel_bytes()
        if parallel and sent:
            times = parallel[-1][1] / sent
            figures_.append(("less than data-parallel training", f"{times:,.{0 if times >= 10 else 1}f} times"))
    return page.tiles(figures_)


def _comparison(stories: Sequence[Story]) -> str:
    """Bits per byte of each source under each run, the best marked."""
    worths = [story.worth() for story in stories]
    rows = []
    for source in sorted({source for worth in worths for source in worth}):
        values = [_bits(worth[source].score) if source in worth else None for worth in worths]
        mine = [worth.get(source) for worth in worths]
        late = [f" ({it.why_not}, after round {it.round})" if it and it.why_not else "" for it in mine]
        rows.append([source, *(cell + note for cell, note in zip(_marked(values), late, strict=True))])
    rows.append(["mean", *_marked([story.mean_worth() for story in stories])])
    parts = [
        page.heading("Bits per byte of held-out text"),
        page.table(["source", *(story.name for story in stories)], rows),
        page.words(
            f"Less is better; {page.BEST} marks the best of a row. The mean is over the sources that take part."
        ),
    ]
    texts = {
        source: {worth[source].score.get("text_bytes") for worth in worths if source in worth}
        for source in {source for worth in worths for source in worth}
    }
    if differ := sorted(source for source, sizes in texts.items() if len(sizes) > 1):
        note = f"Not comparable: the held-out text of {', '.join(differ)} differs in size between these runs."
        parts.append(page.words(note, "bad"))
    if len({frozenset(s for s, w in worth.items() if w.counts) for worth in worths}) > 1:
        parts.append(page.words("The means are not comparable: the runs do not end with the same sources.", "bad"))
    return "".join(parts) + figures.mean_bits(stories)


def _marked(values: Sequence[float | None]) -> list[str]:
    """Figures as told, the least of several with a star."""
    told = [_figure(value, 4) for value in values]
    known = [text for value, text in zip(values, told, strict=True) if value is not None and math.isfinite(value)]
    best = min(known, key=float) if len(known) > 1 else None
    return [f"{page.BEST} {text}" if text == best else text for text in told]


# ------------------------------------------------------------------------------------------ sections
def _what_was_run(stories: Sequence[Story]) -> str:
    facts = [_facts(story) for story in stories]
    keys = list(dict.fromkeys(key for known in facts for key in known))
    head = ["", *(story.name for story in stories)]
    return page.heading("What was run") + page.table(
        head, [[key, *(known.get(key, "") for known in facts)] for key in keys], words=True, joined=True
    )


def _facts(story: Story) -> dict[str, str]:
    job = story.job
    method, model, inner, outer = method_of(job), job.model, job.inner, job.outer
    rows = {"none": "stay home", "owned": "averaged over the silos that own them", "all": "averaged"}[method.share_rows]
    drawn = ", drawn anew each round" if method.reset_embedding else ""
    chosen = f", {job.rounds.choose} silos chosen each round" if job.rounds.choose else ""
    moments = "begin anew each round" if method.share_body and inner.optimizer_state == "reset" else "are kept"
    facts = {
        "method": f"{job.method.upper()}: {method.vocabulary} vocabulary; "
        f"body {'averaged' if method.share_body else 'stays home'}; embedding rows {rows}{drawn}; "
        + ("one silo of all sources, plain training" if method.mixed else "a silo a source"),
        "model": f"{model.arch}: layers {model.layers}, width {model.width}, heads {model.heads}, MLP {model.hidden}",
        "sources": ", ".join(_source(source) for source in job.sources),
        "tokenizer": f"{job.tokenizer.kind}, {job.tokenizer.vocab_size:,} rows",
        "a round": f"{inner.local_steps} steps of {inner.batch_size} x {inner.context} tokens a silo{chosen}",
        "inner": f"AdamW, peak lr {inner.lr:g}, {inner.warmup_steps} warm-up steps, "
        f"cosine to {inner.lr_floor:g} of it, betas {inner.betas[0]:g} and {inner.betas[1]:g}, "
        f"weight decay {inner.weight_decay:g}, moments {moments}, precision {inner.precision}",
        "seed": str(job.seed),
    }  # fmt: skip
    if job.init.origin is not None:
        frozen = ", which stands still" if job.init.frozen_body else ""
        of_round = f"round {job.init.round} of " if job.init.round else ""
        facts["begins from"] = f"the body of {of_round}{job.init.origin}{frozen}; {job.init.embedding} embedding"
    if method.share_body:
        facts["outer"] = f"lr {outer.eta:g}, momentum {outer.mu:g}"
    if method.share_rows != "none":
        facts["outer"] += f"; rows: lr {outer.rows_lr:g}, {outer.rows_momentum:g}, averaged by {outer.row_weights}"
    with contextlib.suppress(ConfigError):  # where nothing says how large the vocabulary is, nothing is planned
        facts["model"] += f"; {human(plan(story.first).silos[0].parameters.body)} parameters in the body"
    return facts


def _source(source: Any) -> str:
    notes = [source.kind] + (["joined"] if source.joined else [])
    notes += [f"weight {source.weight:g}"] if source.weight != 1 else []
    return f"{source.name} ({', '.join(notes)})"


def _curves(stories: Sequence[Story]) -> str:
    return page.heading("What was learnt") + _laid_out(stories, figures.losses, figures.bits)


def _time(stories: Sequence[Story]) -> str:
    parts = [page.heading("Where the time went")]
    for story, chart in zip(stories, page.sharing(figures.timelines(stories)), strict=True):
        parts += (
            [page.wide(chart), page.words(spoken(timeline_of(story.records)))] if story.rounds else [page.wide(chart)]
        )
    return "".join(parts) + page.words(
        "A cell's figures, and the reason where an answer was lost, show under the pointer."
    )


def _traffic(stories: Sequence[Story]) -> str:
    parts = [page.heading("What travelled"), _laid_out(stories, figures.bytes_per_round, figures.bytes_so_far)]
    unknown = [story.name for story in stories if story.data_parallel_bytes() is None]
    if unknown:
        parts.append(page.words(
            f"No comparison with data-parallel training for {', '.join(unknown)}: tokenizer.global_vocab_size, "
            "the |V| that it would use, is not declared."
        ))  # fmt: skip
    if len(unknown) < len(stories):
        parts.append(page.words(
            "data-parallel: the same model with the global vocabulary, its gradient sent down and up in fp32 "
            "by each silo at each step that was really made."
        ))  # fmt: skip
    return "".join(parts)


def _agreement(stories: Sequence[Story]) -> str:
    return page.heading("How the silos agree") + _laid_out(stories, figures.norms, figures.cosines)


def _sizes(stories: Sequence[Story]) -> str:
    """Nothing, where no run measured its norms."""
    if not any(story.norms("body") for story in stories):
        return ""
    charts = _laid_out(stories, figures.parameter_norms, figures.activation_norms)
    return page.heading("How large parameters and activations grow") + charts


def _laid_out(stories: Sequence[Story], *kinds: Callable[[Sequence[Story]], list[str]]) -> str:
    """One run: its charts beside each other. Several: each chart beside those of the other runs."""
    drawn = [kind(stories) for kind in kinds]
    rows = [[charts[0] for charts in drawn]] if len(stories) == 1 else drawn
    return "".join(page.beside(map(page.wide, page.sharing(row))) for row in rows)


def _scores(stories: Sequence[Story]) -> str:
    parts = [page.heading("What it is worth")]
    for story in stories:
        worth, first = story.worth(), story.bits()
        if len(stories) > 1:
            parts.append(page.heading(story.name, 3))
        if not worth:
            parts.append(page.words("nothing is measured yet"))
            continue
        rows = []
        for source, found in worth.items():
            before = next((value for at, value in first[source] if at == 0), None)
            score = found.score
            rows.append([
                source, _figure(before, 4), _figure(_bits(score), 4), _figure(score.get("unigram_bits_per_byte"), 4),
                _figure(score.get("loss"), 4), _figure(score.get("perplexity"), 2), _figure(score.get("normalised"), 4),
                f"{score.get('tokens') or 0:,}", f"{score.get('text_bytes') or 0:,}",
                f"{found.round}" + (f", {found.why_not}" if found.why_not else ""),
            ])  # fmt: skip
        rows.append(["mean", "", _figure(story.mean_worth(), 4), *[""] * 7])
        head = ["source", "bits/byte before", "bits/byte", "unigram bits/byte", "nats/token", "perplexity",
                "minus unigram, nats/token", "tokens", "text bytes", "after round"]  # fmt: skip
        parts.append(page.table(head, rows))
    return "".join(parts)


def _membership(stories: Sequence[Story]) -> str:
    parts = [page.heading("Who came, who left, and what was asked")]
    for story in stories:
        events = story.events()
        if len(stories) > 1:
            parts.append(page.heading(story.name, 3))
        if not events:
            quiet = "Every silo was there from the first round to the last, and every answer counted."
            parts.append(page.words(quiet if story.rounds else "no round is committed yet"))
            continue
        rows = [[f"{'after ' if e.why.startswith('people') else ''}{e.round}", e.who, e.what, e.why] for e in events]
        parts.append(page.table(["round", "silo", "what", "why"], rows, words=True))
    return "".join(parts)


def _settings(stories: Sequence[Story]) -> str:
    flat = [_flat(story.job) for story in stories]
    head = ["setting", *(story.name for story in stories)]
    keys = list(dict.fromkeys(key for known in flat for key in known))
    rows = {key: [known.get(key, "") for known in flat] for key in keys}
    every = page.table(head, [[key, *values] for key, values in rows.items()], words=True, joined=True)
    parts = [page.heading("Settings")]
    if len(stories) > 1:
        differ = [[key, *values] for key, values in rows.items() if len(set(values)) > 1]
        parts.append(page.words("What differs between them:") + page.table(head, differ, words=True))
    return "".join(parts) + page.folded("All settings, with what people changed while it ran", every)


def _flat(job: Job) -> dict[str, str]:
    """Every setting in words, by its key as `dept-ray set` would name it."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else key, inner)
        elif value not in (None, {}, []):
            found[prefix] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    walk("", job.model_dump(mode="json", exclude={"sources"}))
    for source in job.sources:
        walk(f"sources.{source.name}", source.model_dump(mode="json", exclude={"name"}, exclude_defaults=True))
    return found


def _bits(score: dict[str, Any]) -> float | None:
    return score.get("bits_per_byte")


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"
