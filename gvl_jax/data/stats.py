"""What is in a data set: tokens, pictures, reasoning steps and labels, as numbers and as one picture of plots."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gvl_jax.config import Images
from gvl_jax.data.images import ImageRejected, open_image, picture_tokens
from gvl_jax.data.prepared import in_order, modality, text_tokens
from gvl_jax.data.tokenizer import Tokenizer
from gvl_jax.types import Sample

STEP = re.compile(r"(?im)^\W*(?:reasoning )?step \d+")  # "## Reasoning Step 3"


class Sizes(NamedTuple):
    """One sample in numbers."""

    modality: str
    request_label: str
    response_label: str
    text: int  # tokens of prompt and answer without pictures; characters of what was written if there is no tokenizer
    picture_tokens: int
    pictures: int
    steps: int
    unreadable: int  # pictures that do not open


def sizes(sample: Sample, tokenizer: Tokenizer | None, images: Images) -> Sizes:
    """images: the bounds of the resize, which decide the tokens of a picture."""
    tokens = unreadable = 0
    for source in sample.images:
        try:
            tokens += picture_tokens(open_image(source), images.min_pixels, images.max_pixels)
        except ImageRejected:
            unreadable += 1
    if tokenizer is None:
        text = sum(len(part or "") for part in (sample.request, sample.response, sample.reasoning))
    else:
        text = text_tokens(sample, tokenizer) - len(sample.images)
    return Sizes(
        modality(sample), sample.request_label or "none", sample.response_label or "none", text, tokens,
        len(sample.images), len(STEP.findall(sample.reasoning or "")), unreadable,
    )  # fmt: skip


def collect(
    samples: Iterable[Sample], tokenizer: Tokenizer | None = None, images: Images | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Sizes]:  # fmt: skip
    """The sizes of all samples; a sample itself is not kept."""
    rows = []
    for row in in_order(lambda sample: sizes(sample, tokenizer, images or Images()), samples):
        rows.append(row)
        advance(1)
    return rows


def summary(rows: Sequence[Sizes]) -> dict[str, dict[str, Any]]:
    """A line for each modality, and one for all."""
    groups = {"all": list(rows)}
    for row in rows:
        groups.setdefault(row.modality, []).append(row)
    return {name: _line(group) for name, group in groups.items()}


def _line(rows: Sequence[Sizes]) -> dict[str, Any]:
    line: dict[str, Any] = {"samples": len(rows)}
    for name in ("request_label", "response_label"):
        counts = Counter(getattr(row, name) for row in rows)
        line[name] = {label: counts[label] for label in ("harmful", "unharmful", "none")}
    for name in ("text", "picture_tokens", "pictures", "steps"):
        values = np.array([getattr(row, name) for row in rows])
        line[name] = {"sum": int(values.sum()), "mean": float(values.mean()), "p95": float(np.percentile(values, 95))}
    return line | {"unreadable_pictures": sum(row.unreadable for row in rows)}


def table(lines: dict[str, dict[str, Any]], unit: str) -> str:
    """For people. unit: of text, tokens or characters."""
    titles = ("", "samples", "request h/u/none", "response h/u/none", f"{unit} mean/p95", "picture tokens mean/p95",
              "pictures", "steps mean/p95")  # fmt: skip
    rows: list[tuple[str, ...]] = [titles]
    for name, line in lines.items():
        labels = ("/".join(map(str, line[key].values())) for key in ("request_label", "response_label"))
        spread = [f"{line[key]['mean']:.1f}/{line[key]['p95']:.0f}" for key in ("text", "picture_tokens", "steps")]
        rows.append((name, str(line["samples"]), *labels, *spread[:2], str(line["pictures"]["sum"]), spread[2]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def plot(rows: Sequence[Sizes], unit: str, path: Path) -> None:
    """Six plots by modality, as a PNG file; picture tokens are those of samples with pictures."""
    from matplotlib.figure import Figure  # without pyplot: no window system is asked for

    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    kinds = sorted({row.modality for row in rows})
    for axis, name in zip(axes[:4], ("text", "picture_tokens", "pictures", "steps"), strict=True):
        shown = [row for row in rows if row.pictures or name != "picture_tokens"]
        values = [[getattr(row, name) for row in shown if row.modality == kind] for kind in kinds]
        top = max((max(part, default=0) for part in values), default=0)
        axis.hist(values, bins=np.arange(top + 2) - 0.5 if top < 30 else 40, stacked=True, label=kinds)
        axis.set_xlabel({"text": unit, "steps": "reasoning steps"}.get(name, name.replace("_", " ")))
        axis.set_ylabel("samples")
    for axis, name in zip(axes[4:], ("request_label", "response_label"), strict=True):
        below = np.zeros(3)
        for kind in kinds:
            counts = Counter(getattr(row, name) for row in rows if row.modality == kind)
            bars = np.array([counts[label] for label in ("harmful", "unharmful", "none")])
            axis.bar(("harmful", "unharmful", "none"), bars, bottom=below, label=kind)
            below += bars
        axis.set_xlabel(name.replace("_", " "))
    axes[0].legend()
    figure.savefig(path, format="png", dpi=100)
