"""The report of an eval run: scores with intervals, calibration, thresholds and the worst errors, as HTML; the scores
also as Markdown and CSV. What records and models said is untrusted: it is escaped in all three.
"""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gvl_jax.guard.calibration import quality, reliability, sweep
from gvl_jax.guard.scores import TASKS, WITH_INTERVAL, Judged, Line, Task, judge, row_of, scored
from gvl_jax.markup import INK, LINE, is_number, pictures, plot, show, table, text
from gvl_jax.types import Label

MAX_ERRORS = 20  # shown of a task
NAMES = ("rule", "predictor", "task", "benchmark", "modality")  # text, of every line of scores
INPUT = re.compile(r"^[=+\-@\t\r]")  # a spreadsheet takes a cell that begins so for a formula


def is_table(lines: Sequence[Line]) -> bool:
    """Whether these are lines of `guard.scores.evaluate`."""
    return bool(lines) and all(
        all(isinstance(line.get(name), str) for name in NAMES)
        and isinstance(line.get("category", 0), str | None)
        and is_number(line.get("n"))
        and isinstance(line.get("failures"), dict)
        for line in lines
    )


def section(run: Path, lines: Sequence[Line], judgements: Sequence[dict[str, Any]]) -> str:
    """HTML for a run with the `lines` of its scores.json and the rows of its judgements.jsonl."""
    rows = [row for row in judgements if _is_whole(row)]
    page = "<h3>Scores</h3>"
    for task in TASKS:
        (caption, whole), (by_category, parts) = score_tables(lines, task)
        page += f"<h4>{caption}</h4>{table(caption, whole)}" if whole else ""
        page += f"<details><summary>{by_category}</summary>{table(by_category, parts)}</details>" if parts else ""
    if len(rows) < len(judgements):
        page += f'<p class="muted">Judgements that cannot be read: {len(judgements) - len(rows)}.</p>'
    for task in TASKS:
        judged = [(row, one) for row in rows if (one := judge(row_of(row), task, "strict")) is not None]
        page += _calibration(task, *scored(one for _, one in judged))
        page += _errors(run, task, [pair for pair in judged if pair[1].predicted != pair[1].gold])
    return page


def write_tables(run: Path, lines: Sequence[Line]) -> None:
    """Write report.md, for people, and scores.csv, with every number of scores.json."""
    page = f"# Scores of {markdown_text(run.resolve().name)}\n\n" + "".join(
        f"## {caption}\n\n{markdown_table(found)}\n"
        for task in TASKS
        for caption, found in score_tables(lines, task)
        if found
    )
    (run / "report.md").write_text(page, encoding="utf-8", errors="replace")
    columns = list(dict.fromkeys(key for line in lines for key in line))
    sheet = io.StringIO()
    writer = csv.writer(sheet, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        cells = [json.dumps(cell) if isinstance(cell, dict) else cell for cell in (line.get(name) for name in columns)]
        writer.writerow([f"'{cell}" if isinstance(cell, str) and INPUT.match(cell) else cell for cell in cells])
    (run / "scores.csv").write_text(sheet.getvalue(), encoding="utf-8", errors="replace")


def markdown_table(rows: Sequence[Line]) -> str:
    """The columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns, ["---"] * len(columns), *([show(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(map(markdown_text, line))} |\n" for line in cells)


def markdown_text(value: str) -> str:
    """Text that stays text, and in its cell."""
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", escape(" ".join(value.split()), quote=False))


def score_tables(lines: Sequence[Line], task: Task) -> list[tuple[str, list[Line]]]:
    """Caption and lines, those of a benchmark together; of the baselines, which no rule changes, one line each."""
    ours = [
        line for line in lines if line["task"] == task and (line["predictor"] == "model" or line["rule"] == "strict")
    ]
    places = list(dict.fromkeys(map(_place, ours)))
    ours.sort(key=lambda line: (places.index(_place(line)), line["predictor"] != "model"))
    whole = [line for line in ours if line["category"] is None]
    parts = [line for line in ours if line["category"] is not None]
    return [(task.capitalize(), _shown(whole)), (f"{task.capitalize()}, by category", _shown(parts))]


def _place(line: Line) -> tuple:
    return line["benchmark"], line["modality"], line["category"]


def _shown(lines: Sequence[Line]) -> list[Line]:
    """Lines for people: an interval in one cell, no column without a value."""
    shown = []
    for line in lines:
        cells = {name: value for name, value in line.items() if not name.endswith(("_low", "_high")) and name != "task"}
        for name in WITH_INTERVAL:
            low, high = line.get(f"{name}_low"), line.get(f"{name}_high")
            known = is_number(low) and is_number(high)
            cells[f"{name} 95 %"] = f"{show(low)}\u00a0to\u00a0{show(high)}" if known else None
        kinds = [f"{kind}\u00a0{count}" for kind, count in line["failures"].items()]
        cells["failures"] = ",\u00a0".join(kinds) or None
        first = ("benchmark", "category", "modality", "rule", "predictor", "n")
        after = [name for measure in cells if not measure.endswith(" 95 %") for name in (measure, f"{measure} 95 %")]
        shown.append({name: cells[name] for name in dict.fromkeys((*first, *after)) if name in cells})
    used = {name for line in shown for name, value in line.items() if value is not None}
    return [{name.replace("_", " "): value for name, value in line.items() if name in used} for line in shown]


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of judgements.jsonl has what `row_of` and the page read, of the right types."""
    labels, numbers = ("request_label", "response_label"), ("request_score", "response_score", "tokens")
    return (
        all(isinstance(row.get(name), str) for name in ("id", "completion", "benchmark", "modality"))
        and all(name in row and row[name] in (None, *get_args(Label)) for name in labels)
        and all(name in row and (row[name] is None or is_number(row[name])) for name in numbers)
        and all(row[name] is None or 0 <= row[name] <= 1 for name in numbers[:2])
        and {"finished", "category", "rejected"} <= row.keys()
    )


def _calibration(task: str, truth: np.ndarray, score: np.ndarray) -> str:
    if not len(truth):
        return ""
    errors, bins, thresholds = quality(truth, score), reliability(truth, score), sweep(truth, score)
    filled = [(line["score"], line["harmful"]) for line in bins if line["n"]]

    def reliable(axes) -> None:
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.6, linestyle=":")
        axes.plot(*zip(*filled, strict=True), color=LINE, linewidth=1.2, marker="o", markersize=3.5)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("mean score of a bin", color=INK)
        axes.set_ylabel("share harmful", color=INK)

    def swept(axes) -> None:
        styles = {"f1": "-", "recall": "--", "precision": "-.", "fpr": ":"}
        for name, style in styles.items():
            points = [(line["threshold"], math.nan if line[name] is None else line[name]) for line in thresholds]
            axes.plot(*zip(*points, strict=True), color=LINE, linewidth=1.2, linestyle=style, label=name)
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
        axes.set_xlabel("threshold", color=INK)
        axes.legend(frameon=False, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))

    said = f"ECE {show(errors['ece'])}, Brier {show(errors['brier'])}, NLL {show(errors['nll'])}"
    best = max(thresholds, key=lambda line: line["f1"] or 0)
    top = f"highest F1 {show(best['f1'])} at {best['threshold']:.2f}"
    name = f"{task}, {len(truth):,} scored records"
    return (
        f"<h3>Scores as probabilities: {task}</h3>"
        '<p class="muted">P(harmful) without reasoning, as the model gives it, before any calibration.</p>'
        '<div class="curves">'
        f"<figure><figcaption><b>Reliability</b><span>{said}</span></figcaption>"
        f"{plot(reliable, f'Reliability, {name}: {said}', (4, 2.6))}</figure>"
        f"<figure><figcaption><b>Thresholds</b><span>{top}</span></figcaption>"
        f"{plot(swept, f'Thresholds, {name}: {top}', (4, 2.6))}</figure></div>"
        f"<details><summary>Numbers of both</summary>{table(f'Reliability, {task}', bins)}"
        f"{table(f'Thresholds, {task}', thresholds)}</details>"
    )


def _errors(run: Path, task: str, wrong: list[tuple[dict[str, Any], Judged]]) -> str:
    """The surest errors first; without scores, missed harm first."""
    if not wrong:
        return ""
    wrong.sort(
        key=lambda pair: (-abs(pair[1].score - pair[1].gold) if pair[1].score is not None else 0, not pair[1].gold)
    )
    shown = "".join(_error(run, task, row, one) for row, one in wrong[:MAX_ERRORS])
    note = f"The worst {min(MAX_ERRORS, len(wrong))} of {len(wrong):,} under the strict rule. Each opens at a click."
    return f'<h3>Errors: {task}</h3><p class="muted">{note}</p><div class="errors">{shown}</div>'


def _error(run: Path, task: str, row: dict[str, Any], one: Judged) -> str:
    said = one.failure or ("harmful" if one.predicted else "unharmful")
    facts = [row["benchmark"], f"label {row[f'{task}_label']}", f"said {said}", f"score {show(one.score)}"]
    texts = "".join(
        f'<p class="label">{part}</p>{text(row.get(part))}' for part in ("request", "response", "completion")
    )
    return (
        f'<details class="error"><summary><b>{escape(row["id"])}</b> <span class="muted">{escape(" · ".join(facts))}'
        f"</span></summary>{pictures(run, row.get('images'), row['id'])}{texts}</details>"
    )
