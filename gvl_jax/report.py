"""One self-contained HTML page from a run folder: scores, curves, sampled judgements, settings.

Whatever came from records, models or logs is untrusted: it is escaped, and the page forbids scripts and loads nothing.
"""

import base64
import io
import json
import math
import re
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image, ImageOps

FILES = ("config.yaml", "metrics.jsonl", "scores.json", "samples.jsonl")
MAX_SAMPLES = 50  # judgements shown of a run, the newest
MAX_PICTURES = 8  # pictures shown of a judgement
MAX_POINTS = 400  # points of a curve; longer logs are averaged
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
details:not(.text) { margin-top: 2rem; }
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


def write_report(run_dir: str | Path) -> Path:
    """Writes run_dir/report.html, a section for run_dir and for each of its subfolders that hold a run, oldest first.

    A run is a folder with any of: config.yaml; metrics.jsonl {"step", "time", name: number}; scores.json, a list of
    rows; samples.jsonl {"step", "id", "request", "response", "images", "request_label", "response_label",
    "completion", "verdict": {"request", "response", "status"}, "reward"}.

    Raises:
        FileNotFoundError: there is no run in the folder.
    """
    folder = Path(run_dir)
    candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    runs = [run for run in candidates if any((run / name).is_file() for name in FILES)]
    if not runs:
        raise FileNotFoundError(
            f"{folder} holds no run: expected {', '.join(FILES)} in it or in its subfolders; "
            "give the output folder of a stage"
        )
    runs.sort(key=_started)
    name, sections = folder.resolve().name, "".join(_section(run) for run in runs)
    links = "".join(f'<li><a href="#{escape(_anchor(run))}">{escape(run.resolve().name)}</a></li>' for run in runs)
    nav = f'<nav aria-label="Runs"><ul>{links}</ul></nav>' if len(runs) > 1 else ""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Report of {escape(name)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>Report of {escape(name)}</h1>{nav}</header>\n<main>{sections}</main></body></html>\n"
    )
    path = folder / "report.html"
    path.write_bytes(page.encode("utf-8", "replace"))  # JSON text may hold lone surrogates
    return path


def _started(run: Path) -> tuple[float, str]:
    times = [row["time"] for row in _rows(run / "metrics.jsonl")[0] if _is_number(row.get("time"))]
    return times[0] if times else min((run / n).stat().st_mtime for n in FILES if (run / n).is_file()), run.name


def _anchor(run: Path) -> str:
    return "run-" + re.sub(r"\W+", "-", run.resolve().name)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines are none (a kill cuts the last one short)."""
    rows, bad = [], 0
    for line in _read(path).split("\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad


def _section(run: Path) -> str:
    metrics, bad_metrics = _rows(run / "metrics.jsonl")
    samples, bad_samples = _rows(run / "samples.jsonl")
    config = _read(run / "config.yaml")
    bad = {"metrics.jsonl": bad_metrics, "samples.jsonl": bad_samples}
    notes = [f"Unreadable lines left out of {name}: {count}." for name, count in bad.items() if count]
    anchor = escape(_anchor(run))
    return (
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(run.resolve().name)}</h2>'
        + _facts(config, metrics)
        + "".join(f'<p class="muted">{note}</p>' for note in notes)
        + _scores(run / "scores.json")
        + _curves(metrics)
        + _samples(run, samples)
        + (f"<details><summary>Settings</summary><pre>{escape(config)}</pre></details>" if config else "")
        + "</section>\n"
    )


def _facts(config: str, metrics: list[dict[str, Any]]) -> str:
    try:
        settings = yaml.safe_load(config)
    except yaml.YAMLError:
        settings = None
    facts = {"Model": settings.get("model")} if isinstance(settings, dict) else {}
    steps = [row["step"] for row in metrics if _is_number(row.get("step"))]
    times = [row["time"] for row in metrics if _is_number(row.get("time"))]
    if steps:
        facts["Last step"] = f"{max(steps):,}"
    if times:
        facts["First step at"] = f"{datetime.fromtimestamp(times[0], UTC):%Y-%m-%d %H:%M} UTC"
    if len(times) > 1:
        facts["From first to last step"] = str(timedelta(seconds=round(times[-1] - times[0])))
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(str(fact))}</dd></div>" for name, fact in facts.items() if fact)
    return f"<dl>{items}</dl>" if items else ""


def _scores(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        rows = json.loads(_read(path))
    except ValueError as error:
        return f'<h3>Scores</h3><p class="muted">scores.json is not JSON: {escape(str(error))}</p>'
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return f"<h3>Scores</h3>{_table('Scores', rows)}" if rows else '<h3>Scores</h3><p class="muted">No rows.</p>'


def _table(caption: str, rows: list[dict[str, Any]]) -> str:
    """The columns are the rows' keys; the first names the row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numeric = {c for c in columns if all(row.get(c) is None or _is_number(row.get(c)) for row in rows)}

    def cell(row: dict[str, Any], column: str) -> str:
        kind = ' class="number"' if column in numeric else ""
        tag, scope = ("th", ' scope="row"') if column == columns[0] else ("td", "")
        return f"<{tag}{scope}{kind}>{escape(_show(row.get(column)))}</{tag}>"

    head = "".join(f'<th scope="col"{" class=number" if c in numeric else ""}>{escape(c)}</th>' for c in columns)
    body = "".join(f"<tr>{''.join(cell(row, c) for c in columns)}</tr>" for row in rows)
    return _scroll(caption, f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def _scroll(label: str, table: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{table}</div>'


def _curves(metrics: list[dict[str, Any]]) -> str:
    """A small plot for each metric that was logged more than once, under its prefix; the others in a table."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name not in ("step", "time") and _is_number(value) and _is_number(row.get("step")):
                series.setdefault(name, []).append((row["step"], value))
    groups: dict[str, str] = {}
    for name, points in series.items():
        if len(points) > 1:
            group, short = name.split("/", 1) if "/" in name else ("", name)
            groups[group] = groups.get(group, "") + _figure(name, short, np.array(points, float))
    once = [{"metric": name, "step": p[0][0], "value": p[0][1]} for name, p in series.items() if len(p) == 1]
    plots = "".join(
        (f"<h4>{escape(group)}</h4>" if group else "") + f'<div class="curves">{figures}</div>'
        for group, figures in groups.items()
    )
    return (f"<h3>Curves</h3>{plots}" if plots else "") + (
        f"<h3>Logged once</h3>{_table('Metrics logged once', once)}" if once else ""
    )


def _figure(name: str, short: str, points: np.ndarray) -> str:
    """points: f64[n, 2], step and value."""
    first, last, low, high = points[0, 1], points[-1, 1], points[:, 1].min(), points[:, 1].max()
    spoken = (
        f"{name}, steps {points[0, 0]:.0f} to {points[-1, 0]:.0f}: from {_show(first)} to {_show(last)}, "
        f"lowest {_show(low)}, highest {_show(high)}"
    )
    svg = _plot(points).replace("<svg ", f'<svg role="img" aria-label="{escape(spoken)}" ', 1)
    return (
        f"<figure><figcaption><b>{escape(short)}</b><span>{_show(first)} → {_show(last)}</span></figcaption>"
        f"{svg}</figure>"
    )


def _plot(points: np.ndarray) -> str:
    """An SVG that takes its colours and font from the page. points: f64[n, 2]."""
    size = math.ceil(len(points) / MAX_POINTS)
    x, y = np.array([points[i : i + size].mean(axis=0) for i in range(0, len(points), size)]).T
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gvl", "font.size": 8, "axes.linewidth": 0.6}):
        figure = Figure(figsize=(3.4, 1.7), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, y, color=LINE, linewidth=1.2, marker="o", markersize=3.5, markeredgewidth=0, markevery=[-1])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(length=0, labelcolor=INK, pad=4)
        axes.locator_params(axis="x", nbins=4, integer=True)
        axes.locator_params(axis="y", nbins=4)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.yaxis.get_offset_text().set_color(INK)
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        unstamped = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=unstamped)
    svg = buffer.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"|font-family: [^;"]*; |<style.*?</style>', "", svg[svg.index("<svg") :])
    for stand_in, colour in ((INK, "currentColor"), (RULE, "var(--rule)"), (LINE, "var(--accent)")):
        svg = svg.replace(stand_in, colour)
    return svg


def _samples(run: Path, rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    rows = sorted(rows, key=lambda row: row["step"] if _is_number(row.get("step")) else -1, reverse=True)
    newest = rows[:MAX_SAMPLES]
    note = f'<p class="muted">The newest {len(newest)} of {len(rows):,}.</p>' if len(rows) > len(newest) else ""
    widths = "".join(f'<col style="width: {share}%">' for share in (12, 40, 30, 18))
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("Sample", "Input", "Completion", "Verdict"))
    table = (
        f'<table class="samples"><colgroup>{widths}</colgroup><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(_sample(run, row) for row in newest)}</tbody></table>"
    )
    return f"<h3>Judgements</h3>{note}{_scroll('Judgements', table)}"


def _sample(run: Path, row: dict[str, Any]) -> str:
    images = row["images"] if isinstance(row.get("images"), list) else []
    pictures = "".join(
        _picture(run, image, f"Picture {i} of {row.get('id')}") for i, image in enumerate(images[:MAX_PICTURES], 1)
    )
    if len(images) > MAX_PICTURES:
        pictures += f'<span class="muted">and {len(images) - MAX_PICTURES} more</span>'
    verdict = row["verdict"] if isinstance(row.get("verdict"), dict) else {}
    judged = "".join(_judged(part, verdict.get(part), row.get(f"{part}_label")) for part in ("request", "response"))
    return (
        f'<tr><th scope="row"><span class="text">{escape(_show(row.get("id")))}</span>'
        f'<span class="label">step {escape(_show(row.get("step")))}</span></th><td>'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + "".join(f'<p class="label">{part}</p>{_text(row.get(part))}' for part in ("request", "response"))
        + f"</td><td>{_text(row.get('completion'))}</td><td>{judged}"
        f'<p><span class="label">status</span>{escape(_show(verdict.get("status")))}</p>'
        f'<p><span class="label">reward</span>{escape(_show(row.get("reward")))}</p></td></tr>'
    )


def _judged(part: str, verdict: object, label: object) -> str:
    """Right or wrong in a word, not in colour alone."""
    if verdict is None and label is None:
        return f'<p><span class="label">{part}</span>—</p>'
    if label is None:
        mark = '<span class="muted">no label</span>'
    elif verdict == label:
        mark = '<span class="right">right</span>'
    else:
        mark = f'<span class="wrong">wrong</span>, label {escape(_show(label))}'
    return f'<p><span class="label">{part}</span>{escape(_show(verdict))}: {mark}</p>'


def _text(value: object) -> str:
    """Text as it is, folded when it is long."""
    text = _show(value)
    if len(text) <= CUT:
        return f'<p class="text" dir="auto">{escape(text)}</p>'
    return (
        f'<details class="text" dir="auto"><summary><span class="cut">{escape(text[:CUT])}…</span>'
        f'<span class="less">show less</span></summary>{escape(text)}</details>'
    )


def _picture(run: Path, source: object, alt: str) -> str:
    """An <img> with the thumbnail in it, or a note. Only regular files are opened."""
    try:
        path = run / str(source)
        if not path.is_file():
            return f'<span class="muted">{escape(alt)}: file missing</span>'
        with Image.open(path) as image:
            thumbnail = ImageOps.exif_transpose(image).convert("RGBA")
        thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        thumbnail.save(buffer, "WEBP", quality=80)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f'<span class="muted">{escape(alt)}: not readable ({type(error).__name__})</span>'
    data = base64.b64encode(buffer.getvalue()).decode()
    width, height = thumbnail.size
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="data:image/webp;base64,{data}">'


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # not so for NaN


def _show(value: Any) -> str:
    """A number with 3 digits, nothing as a dash, anything else as text."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.3f}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
