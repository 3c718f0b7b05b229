"""Pieces of a page: tables, plots, folded texts, thumbnails. All of them escape what they are given."""

import base64
import io
import json
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gvl_jax.data.images import ImageRejected, open_image

MAX_PICTURES = 8  # pictures shown of a record
CUT = 240  # characters of a text before it folds
THUMBNAIL = 160  # pixels, the longer side
INK, RULE, LINE = "#010203", "#040506", "#070809"  # stand for the page's colours while matplotlib draws

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1c1d21; --muted: #5f636d; --rule: #e3e3df;
  --accent: #2f5fd0; --right: #1a6b3c; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --paper: #15161a; --ink: #e7e7e4; --muted: #a0a4ae; --rule: #2f3138;
  --accent: #8ab0ff; --right: #7fd3a0; --wrong: #ff9d94; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 3rem clamp(1rem, 4vw, 3rem) 5rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2.1rem; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 1rem; }
h2 { font-size: 1.5rem; letter-spacing: -.01em; margin: 4rem 0 .75rem; padding-top: 1.5rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1.05rem; margin: 2.5rem 0 .75rem; }
h4 { font-size: .8rem; font-weight: 600; letter-spacing: .06em; color: var(--muted); margin: 1.75rem 0 .5rem; }
a { color: var(--accent); } nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; list-style: none; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 0; }
dt { font-size: .8rem; color: var(--muted); } dd { margin: 0; font-variant-numeric: tabular-nums; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1.5rem 2rem; }
figure { margin: 0; min-width: 0; } figure svg { width: 100%; height: auto; display: block; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: .875rem; overflow-wrap: anywhere; }
figcaption span, .muted { color: var(--muted); font-variant-numeric: tabular-nums; }
figcaption span { flex: none; } .muted { font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .5rem 1.25rem .5rem 0; border-bottom: 1px solid var(--rule); }
thead th { font-size: .8rem; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 600; } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.samples { width: 100%; min-width: 56rem; table-layout: fixed; }
.samples td, .samples tbody th { padding: 1rem 1.5rem 1rem 0; }
.samples p, .samples details { margin: 0 0 .75rem; }
.samples .label { display: block; margin: 0; font-size: .8rem; color: var(--muted); font-weight: 400; }
section > details { margin-top: 2rem; } .error { padding: .5rem 0; border-bottom: 1px solid var(--rule); }
.error[open] { padding-bottom: 1.5rem; } .error > p, .error > details { margin: .5rem 0 .5rem 1rem; }
.error .label { margin-bottom: 0; font-size: .8rem; color: var(--muted); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 .75rem; } img { border-radius: 4px; max-width: 100%;
  height: auto; }
.right, .wrong { font-weight: 600; } .right { color: var(--right); } .wrong { color: var(--wrong); }
summary { cursor: pointer; } .text > summary .less, .text[open] > summary .cut { display: none; }
.text[open] > summary .less { display: inline; color: var(--muted); }
pre { overflow-x: auto; padding: 1rem 0; font: .85rem/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 0; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; }
@media print { body { max-width: none; padding: 0; } h2 { break-before: page; } }
"""


def plot(draw: Callable[[Axes], Any], spoken: str, size: tuple[float, float] = (3.4, 1.7)) -> str:
    """An SVG that takes its colours and font from the page. `draw` uses LINE and INK; spoken: what it shows."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gvl", "font.size": 8, "axes.linewidth": 0.6}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(length=0, labelcolor=INK, pad=4)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.yaxis.get_offset_text().set_color(INK)
        axes.set_axisbelow(True)
        draw(axes)
        buffer = io.StringIO()
        unstamped = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unstamped)
    svg = buffer.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"|font-family: [^;"]*; |<style.*?</style>', "", svg[svg.index("<svg") :])
    for stand_in, colour in ((INK, "currentColor"), (RULE, "var(--rule)"), (LINE, "var(--accent)")):
        svg = svg.replace(stand_in, colour)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(spoken)}" ', 1)


def table(caption: str, rows: list[dict[str, Any]]) -> str:
    """The columns are the rows' keys; the first names the row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(row.get(c) is None or is_number(row.get(c)) for row in rows)}

    def cell(row: dict[str, Any], column: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        tag, scope = ("th", ' scope="row"') if column == columns[0] else ("td", "")
        return f"<{tag}{scope}{kind}>{escape(show(row.get(column)))}</{tag}>"

    head = "".join(f'<th scope="col"{" class=number" if c in numeric else ""}>{escape(c)}</th>' for c in columns)
    body = "".join(f"<tr>{''.join(cell(row, c) for c in columns)}</tr>" for row in rows)
    return scroll(caption, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scroll(label: str, table: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def text(value: object) -> str:
    """Text as it is, folded when it is long."""
    text = show(value)
    if len(text) <= CUT:
        return f'<p class="text" dir="auto">{escape(text)}</p>'
    return (
        f'<details class="text" dir="auto"><summary><span class="cut">{escape(text[:CUT])}…</span>'
        f'<span class="less">show less</span></summary>{escape(text)}</details>'
    )


def pictures(run: Path, sources: object, name: object) -> str:
    """Thumbnails of a record's pictures, out of sight until they are asked for."""
    if not isinstance(sources, list) or not sources:
        return ""
    shown = "".join(_picture(run, one, f"Picture {i} of {name}") for i, one in enumerate(sources[:MAX_PICTURES], 1))
    more = f'<span class="muted">and {len(sources) - MAX_PICTURES} more</span>' if len(sources) > MAX_PICTURES else ""
    count = f"{len(sources)} picture{'s' if len(sources) > 1 else ''}"
    return f'<details class="hidden"><summary>{count}</summary><div class="pictures">{shown}{more}</div></details>'


def _picture(run: Path, source: object, alt: str) -> str:
    """An <img> with the thumbnail in it, or a note. The guard's own limits and decoders."""
    try:
        thumbnail = open_image(run / str(source))
    except ImageRejected as error:
        note = "file missing" if error.reason == "missing" else f"not readable ({error.reason})"
        return f'<span class="muted">{escape(alt)}: {note}</span>'
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    thumbnail.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = thumbnail.size
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/webp;base64,{data}">'


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not so for NaN


def show(value: Any) -> str:
    """A number with 3 digits, nothing as a dash, anything else as text."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
