"""The page around the charts: its look in light and dark, its tables and sections. HTML strings; no script, no link.

`STYLE` is scoped to `.dept-report`, so that the same charts stand in a notebook without changing it. A drawing's frame
has classes of its own names instead: where one is shown in another's place (`sharing`), it has left its page.
"""

import re
from collections.abc import Iterable, Sequence

from dept_ray.draws import checksum
from dept_ray.study.charts import FRAME, MARKS, escaped

_LIGHT = """
--ink:#1c2024;--dim:#5c6670;--faint:#e3e7ea;--paper:#fff;--panel:#f7f8fa;--good:#dff2e3;--bad:#c62828;--wait:#ccd3d9;
--away:#e4e8eb;--h0:#2563b0;--h1:#c2560a;--h2:#1a7f53;--h3:#b0308f;--h4:#867000;--h5:#6b46c1;
--h6:#0b7480;--h7:#6f5f50"""
_DARK = """
--ink:#e6e9ec;--dim:#9aa5af;--faint:#2c343b;--paper:#14181b;--panel:#1b2024;--good:#1d3f2a;--bad:#ff7b72;--wait:#414b54;
--away:#2a3238;--h0:#74abf5;--h1:#f0923f;--h2:#4cc38a;--h3:#e884cf;--h4:#d3b13c;--h5:#b197fc;
--h6:#4fc6d4;--h7:#bba995"""
_HUES = "".join(f".dept-report .c{n}{{--c:var(--h{n})}}" for n in range(8))
STYLE = f"""
.dept-report{{{_LIGHT};color:var(--ink);background:var(--paper);color-scheme:light dark;
font:14px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;padding:1px 24px 32px}}
@media (prefers-color-scheme:dark){{.dept-report{{{_DARK}}}}}
.dept-report h1{{font-size:24px;margin:24px 0 4px}} .dept-report h2{{font-size:18px;margin:36px 0 8px}}
.dept-report h3{{font-size:14px;margin:12px 0 4px}} .dept-report p{{margin:4px 0;max-width:100ch}}
.dept-report .dim{{color:var(--dim)}} .dept-report .bad{{color:var(--bad)}}
.dept-report .tiles{{display:flex;flex-wrap:wrap;gap:10px;margin:14px 0}}
.dept-report .tile{{background:var(--panel);border-radius:8px;padding:8px 14px}}
.dept-report .tile b{{display:block;font-size:20px;font-weight:600}}
.dept-report .side{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:18px 28px;
align-items:start;margin-bottom:18px}} .dept-report .side>*{{min-width:0}}
.dept-report .wide{{overflow-x:auto}}
.dept-report table{{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:6px 0}}
.dept-report th,.dept-report td{{padding:3px 14px 3px 0;text-align:right;vertical-align:top;background:none;
border-bottom:1px solid var(--faint)}}
.dept-report th{{color:var(--dim);font-weight:500;vertical-align:bottom}}
.dept-report .words td,.dept-report .words th,.dept-report td:first-child,.dept-report th:first-child{{text-align:left}}
.dept-report td.best{{font-weight:700;background:var(--good);padding-left:8px}}
.dept-report summary{{cursor:pointer;color:var(--dim)}}
.dept-report svg{{display:block;font-size:12px;font-family:inherit;fill:var(--ink);width:100%;max-width:var(--wide);
min-width:calc(var(--wide)/2)}} .dept-report svg .title{{font-size:14px;font-weight:600}}
.dept-tick,.dept-label{{fill:var(--dim);font-size:11px}} .dept-grid{{stroke:var(--faint);fill:none}}
.dept-axis{{stroke:var(--dim);fill:none}}
.dept-report .mean{{--c:var(--ink)}}
{_HUES}
.dept-report .line{{stroke:var(--c);fill:none;stroke-width:1.8;stroke-linejoin:round}}
.dept-report .mean .line{{stroke-width:3}}
.dept-report .dash1 .line{{stroke-dasharray:7 3}} .dept-report .dash2 .line{{stroke-dasharray:2 3}}
.dept-report .dots{{stroke:var(--c);stroke-width:4.8;stroke-linecap:round}} .dept-report .fill{{fill:var(--c)}}
.dept-report .line,.dept-report .dots,.dept-report .leader{{pointer-events:none}}
.dept-report .tips{{fill:none;pointer-events:all}} .dept-report .tips path:hover{{fill:var(--panel)}}
.dept-report svg g .name{{fill:var(--c,var(--ink))}}
.dept-report .leader{{stroke:var(--dim);fill:none;stroke-width:.7;stroke-dasharray:1 2}}
.dept-train{{stroke:var(--h0)}} .dept-score{{stroke:var(--h2)}} .dept-send{{stroke:var(--h1)}}
.dept-load{{stroke:var(--h5)}} .dept-wait{{stroke:var(--wait)}} .dept-refused{{stroke:var(--bad)}}
.dept-away{{stroke:var(--away)}}
.dept-train,.dept-score,.dept-send,.dept-load,.dept-wait,.dept-refused,.dept-away{{stroke-width:14}}
"""


def document(title: str, body: str) -> str:
    """A whole page: it opens without a network."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escaped(title)}</title><style>html,body{{margin:0}}{STYLE}</style></head>"
        f'<body class="dept-report">{body}</body></html>\n'
    )


def fragment(body: str) -> str:
    """The same as a part of another page, such as a notebook's."""
    return f'<style>{STYLE}</style><div class="dept-report">{body}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False, joined: bool = False) -> str:
    """A table of plain text. A cell that begins with ★ is the best of its row's or column's rivals.

    Args:
        head: column names.
        rows: of as many cells.
        words: all columns are words; else all but the first are figures.
        joined: say once, over all columns but the first, what a row says in each of them.
    """
    cells = "".join(f"<th>{escaped(name)}</th>" for name in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        if joined and len(row) > 2 and len(set(row[1:])) == 1:
            one = f'<td colspan="{len(row) - 1}">{escaped(row[1])}</td>'
            lines.append(f"<tr><td>{escaped(row[0])}</td>{one}</tr>")
            continue
        marked = (
            f"<td{' class=' + chr(34) + 'best' + chr(34) if c[:1] == BEST else ''}>{escaped(c)}</td>" for c in row
        )
        lines.append(f"<tr>{''.join(marked)}</tr>")
    kind = ' class="words"' if words else ""
    return f'<div class="wide"><table{kind}>{"".join(lines)}</table></div>'


BEST = "★"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """Figures to remember: (what, figure)."""
    boxes = "".join(
        f'<div class="tile"><b>{escaped(figure)}</b><span class="dim">{escaped(what)}</span></div>'
        for what, figure in figures
    )
    return f'<div class="tiles">{boxes}</div>'


def sharing(drawings: Iterable[str]) -> list[str]:
    """Drawings beside each other, in which a frame that stood before is shown again instead of written again."""
    there: dict[str, str] = {}

    def once(found: re.Match[str]) -> str:
        frame = found[1]
        if frame in there:
            return f'<use href="#{there[frame]}"/>{MARKS}'
        there[frame] = f"frame-{checksum(frame.encode())[:12]}"
        return f'<g id="{there[frame]}">{frame}</g>{MARKS}'

    return [re.sub(f"{FRAME}(.+?)</g>{MARKS}", once, drawn, count=1, flags=re.DOTALL) for drawn in drawings]


def beside(parts: Iterable[str]) -> str:
    """Parts next to each other, as far as there is room."""
    return f'<div class="side">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def wide(part: str) -> str:
    """What is scrolled where there is no room."""
    return f'<div class="wide">{part}</div>'


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escaped(text)}</h{level}>"


def words(text: str, kind: str = "dim") -> str:
    """A paragraph."""
    return f'<p class="{kind}">{escaped(text)}</p>'


def folded(summary: str, body: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"
