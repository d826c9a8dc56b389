"""A plan as tables for a terminal: what `dept-ray plan` prints. The arithmetic is `study.plan`'s."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dept_ray.codec import PACKED
from dept_ray.console import figure_table, human
from dept_ray.study.costs import Plan


def render(costs: Plan) -> RenderableType:
    """The plan as tables for a terminal of 80 columns."""
    tables = [_silo_table(costs), _traffic_table(costs), _memory_table(costs), _length_table(costs)]
    return Group(
        Text(headline(costs), style="bold"),
        *(part for table in tables if table is not None for part in (Text(), table)),
        *(Text(f"note: {note}", style="yellow") for note in costs.notes),
    )


def headline(costs: Plan) -> str:
    """The one sentence to remember."""
    name, silos = costs.method.name.upper(), len(costs.silos)
    if costs.method.mixed:
        return f"{name} trains one silo on a mixture of {len(costs.silos[0].sources)} sources; no silo sends anything"
    if not costs.step_values:
        return f"{name} trains {silos} silos, each alone; no silo sends anything"
    if costs.reduction is None:
        return f"{name} sends {human(costs.step_values)} parameters per silo and step"
    told = f"{name} sends {_times(costs.reduction)} times less than data-parallel training"
    if costs.codec == "fp32" or costs.byte_reduction is None:
        return told
    about = "about " * (costs.codec in PACKED)
    return f"{told}, and {about}{_times(costs.byte_reduction)} times fewer bytes in {costs.codec}"


def _times(factor: float) -> str:
    return f"{float(f'{factor:.3g}'):,.0f}"


def _silo_table(costs: Plan) -> Table:
    """One line per silo; silos that cost the same share one."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for silo in costs.silos:
        p, epochs = silo.parameters, [r.epochs for r in silo.sources if r.epochs is not None]
        figures = (
            f"{silo.vocabulary_size:,}",
            *(human(count) for count in (p.body, p.rows, p.positions, p.total, silo.round_tokens, silo.total_tokens)),
            "-".join(dict.fromkeys(f"{e:.2g}" for e in (min(epochs), max(epochs)))) if epochs else "?",
            human(silo.memory.total, "B"),
        )
        alike.setdefault(figures, []).append(silo.name)
    table = figure_table(
        "What a silo holds and reads",
        "silo", "|V_k|", "body", "+ rows", "+ pos.", "= all", "tokens\na round", "a run", "epochs", "memory",
    )  # fmt: skip
    for figures, names in alike.items():
        table.add_row(f"{len(names)} alike" if len(names) > 1 else names[0], *figures)
    lines = [f"{len(names)} alike: {', '.join(names)}" for names in alike.values() if len(names) > 1]
    if costs.silos_per_round < len(costs.silos):
        lines.append("tokens a run are expected ones: which silos a round draws is not known yet")
    table.caption = "\n".join(lines) or None
    return table


def _traffic_table(costs: Plan) -> Table | None:
    """The method beside data-parallel training, whichever of them sends anything."""
    sides = {f"{costs.method.name.upper()}": (costs.step_values, costs.step_bytes)} if costs.step_values else {}
    if (parallel := costs.data_parallel) is not None:
        sides[f"data-parallel,\n|V| = {parallel.vocabulary_size:,}"] = (parallel.step_values, parallel.step_bytes)
    if not sides:
        return None
    silos, steps, rounds = costs.silos_per_round, costs.local_steps, costs.rounds
    beside = "" if costs.codec == "fp32" or parallel is None else "; data-parallel in fp32"
    packed = " (as many bytes as deltas had where it was measured)" * (costs.codec in PACKED)
    table = figure_table(f"What travels, in {costs.codec}{packed}{beside}", "", *sides)
    table.add_row("parameters per step, one way (as the paper counts)", *(human(n) for n, _ in sides.values()))
    for what, times in (
        ("bytes per step, down + up", 1),
        (f"bytes per round of {steps} steps, down + up", steps),
        (f"the same for {silos} silos" if silos > 1 else "", steps * silos),
        (f"the same for {rounds} rounds", steps * silos * rounds),
    ):
        if what:
            table.add_row(what, *(human(each * times, "B") for _, each in sides.values()))
    if costs.embedding_saved:
        share = f"{costs.embedding_saved_share:.0%}"
        table.caption = (
            f"each silo saves {human(costs.embedding_saved)} embedding parameters, {share} of the global ones"
        )
    return table


def _memory_table(costs: Plan) -> Table:
    silo = max(costs.silos, key=lambda silo: silo.memory.total)
    m = silo.memory
    table = figure_table(
        "Memory while it trains (estimate)",
        "silo", "weights", "gradients", "AdamW", "bf16 copy", "activations", "loss", "total",
    )  # fmt: skip
    figures = (m.weights, m.gradients, m.moments, m.casts, m.activations, m.loss, m.total)
    table.add_row(silo.name, *(human(figure, "B") for figure in figures))
    verb = "without" if m.checkpointed else "with"
    lines = [
        f"{verb} checkpoint_activations: {human(m.activations_otherwise, 'B')} of activations",
        f"the loss holds logits of {m.loss_rows:,} tokens at once",
    ]
    if m.ranks > 1:
        cut = {"moments": f"moments in {m.ranks} parts", "all": f"weights, gradients and moments in {m.ranks} parts"}
        lines.append(f"on each of {m.ranks} ranks: {cut.get(m.shard, 'moments whole (resources.shard)')}")
    table.caption = "\n".join(lines)
    return table


def _length_table(costs: Plan) -> Table:
    standard, chosen = costs.standard, f"{costs.silos_per_round} of {len(costs.silos)} silos a round"
    table = figure_table("How long it is", "", "steps", "tokens")
    own = f"{costs.rounds} rounds x {costs.local_steps} steps" + ("" if costs.method.mixed else f", {chosen}")
    table.add_row(own, f"{costs.total_steps:,}", human(costs.total_tokens))
    if costs.silos_per_round > 1:
        for words, steps, tokens in (
            ("STD of as many steps", standard.step_matched_steps, standard.step_matched_tokens),
            ("STD of as many tokens", standard.token_matched_steps, standard.token_matched_tokens),
        ):
            table.add_row(words, f"{steps:,}", human(tokens))
    return table
