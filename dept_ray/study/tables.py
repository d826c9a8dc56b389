"""A run's records as pandas tables, for notebooks: one row a round, a round and silo, or a measured state and source.

Figures are as the ledger has them (units: `rounds.ledger`), with what is nested there under flat names. Nothing is
computed but the round that scores are of.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dept_ray.errors import ConfigError, nearest
from dept_ray.metrics import Record
from dept_ray.study.story import measured

if TYPE_CHECKING:
    import pandas

_FIRST = {"rounds": ["round"], "silos": ["round", "silo"], "scores": ["round", "source"]}


def table_of(records: Sequence[Record], of: str = "silos") -> "pandas.DataFrame":
    """Records as a table.

    Args:
        records: of a run, in order.
        of: `rounds`: round, attempt, time, seconds, step, tokens, loss, down_bytes, up_bytes, refused and away (how
            many), bits_per_byte (of the state before the round, where it was measured).
            `silos`: round, silo, tokens, steps, loss, norm, cosine, down_bytes, up_bytes, train_s, wait_s, ..., and
            refused, the reason why its answer did not count.
            `scores`: round (that the measured state had behind it), source, loss, bits_per_byte, perplexity, ...

    Raises:
        ConfigError: there is no such table.
    """
    import pandas

    if of not in _FIRST:
        raise ConfigError(f'no table "{of}"{nearest(of, list(_FIRST))}')
    rows = {"rounds": _rounds, "silos": _silos, "scores": _scores}[of](records)
    table = pandas.DataFrame(list(rows))
    return table if len(table.columns) else pandas.DataFrame(columns=pandas.Index(_FIRST[of]))


def _rounds(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        if record["event"] == "round":
            row = {key: value for key, value in record.items() if not isinstance(value, dict | list)}
            row |= {f"{way}_bytes": sent for way, sent in record["sent_bytes"].items()}
            row |= {"refused": len(record["refused"]), "away": len(record.get("away", {}))}
            yield _without(row, "event", "run") | {"bits_per_byte": record.get("mean", {}).get("bits_per_byte")}


def _silos(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    for record in records:
        if record["event"] != "round":
            continue
        for name, silo in record["silos"].items():
            flat = {key: value for key, value in silo.items() if not isinstance(value, dict | list)}
            seconds = {f"{what}_s": s for what, s in silo.get("seconds", {}).items()}
            yield {"round": record["round"], "silo": name, **flat, **seconds, "refused": ""}
        for name, why in record["refused"].items():
            yield {"round": record["round"], "silo": name, "refused": why}


def _scores(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    # A run that was finished and went on has measured one state twice: the last time counts.
    rows = {
        (measured(record), source): score
        for record in records
        for source, score in sorted(record.get("scores", {}).items())
    }
    for (round, source), score in rows.items():
        yield {"round": round, "source": source, **score}


def _without(row: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys}
