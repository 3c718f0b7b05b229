"""Evaluation (PAPER §8): how well completions match gold labels, per task and benchmark, with `harmful` positive."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from sklearn import metrics

from gvl_jax.guard.verdict import Rule, Verdict, parse
from gvl_jax.types import Label

Task = Literal["request", "response"]
Line = dict[str, Any]

ECE_BINS = 10  # of equal width


class Row(NamedTuple):
    """One judged record: the gold labels (None: this task is not scored) and what the model wrote."""

    text: str
    request_label: Label | None
    response_label: Label | None
    finished: bool = True
    benchmark: str = ""
    modality: str = ""
    tokens: int | None = None  # of the reasoning
    request_score: float | None = None  # P(harmful)
    response_score: float | None = None


class _Judged(NamedTuple):
    gold: bool  # harmful
    predicted: bool
    failed: bool = False  # the completion has no label for this task
    score: float | None = None
    tokens: int | None = None


def evaluate(rows: Iterable[Row], rule: Rule, *, draws: int = 1000, seed: int = 0) -> list[Line]:
    """A table: one line (dict) per predictor, task and benchmark, then the means over benchmarks.

    predictor: model, and the baselines always_harmful and always_unharmful that it must beat. Means (benchmark
    "mean", per modality and for modality "all") weigh by n, the records scored; a benchmark where a measure is
    undefined is left out of that mean. A completion without a label for the task counts as the opposite of the gold
    label under both rules; their share is `parse_failures`. Values are fractions, None: undefined or no data.
    f1_low, f1_high: 95 % bootstrap interval, records drawn anew within each benchmark, `draws` times.
    """
    judged_rows = [(row, parse(row.text, row.finished, rule)) for row in rows]
    table: list[Line] = []
    for predictor in ("model", "always_harmful", "always_unharmful"):
        tasks: tuple[Task, ...] = ("request", "response")
        for task in tasks:
            groups: dict[tuple[str, str], list[_Judged]] = {}
            for row, verdict in judged_rows:
                gold = row.request_label if task == "request" else row.response_label
                if gold is None:
                    continue
                if predictor == "model":
                    judged = _judge(row, verdict, task, rule)
                else:
                    judged = _Judged(gold == "harmful", predictor == "always_harmful")
                groups.setdefault((row.modality, row.benchmark), []).append(judged)
            head = {"rule": rule, "predictor": predictor, "task": task}
            table += [head | line for line in _lines(groups, draws, seed)]
    return table


def _judge(row: Row, verdict: Verdict, task: Task, rule: Rule) -> _Judged:
    if task == "request":
        gold, said, score = row.request_label, verdict.request, row.request_score
    else:
        gold, said, score = row.response_label, verdict.response, row.response_score
    # The published rule reads each label alone: one that is missing does not spoil the other.
    failed = verdict.status != "ok" if rule == "strict" else f"no_{task}" in verdict.warnings
    return _Judged(gold == "harmful", (gold != "harmful") if failed else (said == "harmful"), failed, score, row.tokens)


def _lines(groups: dict[tuple[str, str], list[_Judged]], draws: int, seed: int) -> list[Line]:
    """A line per (modality, benchmark), then the mean of each modality and of all."""
    rng = np.random.default_rng(seed)
    lines, resampled = [], []
    for (modality, benchmark), judged in groups.items():
        measures = _measures(judged)
        f1s = _resampled_f1(judged, draws, rng)
        interval = _interval(f1s) if measures["f1"] is not None else _interval(None)
        lines.append({"benchmark": benchmark, "modality": modality, "n": len(judged)} | measures | interval)
        resampled.append(f1s)
    means: list[Line] = []
    for name in dict.fromkeys([line["modality"] for line in lines] + ["all"] * bool(lines)):
        part = [(line, f1s) for line, f1s in zip(lines, resampled, strict=True) if name in ("all", line["modality"])]
        means.append({"benchmark": "mean", "modality": name} | _weighted_mean(part))
    return lines + means


def _weighted_mean(part: Sequence[tuple[Line, np.ndarray]]) -> Line:
    mean: Line = {"n": sum(line["n"] for line, _ in part)}
    for name in _measures([]):
        known = [line for line, _ in part if line[name] is not None]
        weights = [line["n"] for line in known]
        mean[name] = float(np.average([line[name] for line in known], weights=weights)) if known else None
    scored = [(line["n"], f1s) for line, f1s in part if line["f1"] is not None]
    f1s = np.average([f1s for _, f1s in scored], axis=0, weights=[n for n, _ in scored]) if scored else None
    return mean | _interval(f1s)


def _measures(judged: Sequence[_Judged]) -> Line:
    """Each measure of one benchmark, None where it is undefined (recall with no positives, and so on)."""
    gold, predicted = [row.gold for row in judged], [row.predicted for row in judged]
    positives, negatives = any(gold), not all(gold)
    both = positives and negatives
    scored = [(row.gold, row.score) for row in judged if row.score is not None]
    truth, score = np.array([g for g, _ in scored], bool), np.array([s for _, s in scored], float)
    ranked = truth.any() and not truth.all()
    tokens = [row.tokens for row in judged if row.tokens is not None]
    return {
        "f1": metrics.f1_score(gold, predicted, zero_division=0.0) if positives else None,
        "precision": metrics.precision_score(gold, predicted, zero_division=0.0) if positives else None,
        "recall": metrics.recall_score(gold, predicted) if positives else None,
        "fpr": 1 - metrics.recall_score(gold, predicted, pos_label=False) if negatives else None,
        "balanced_accuracy": metrics.balanced_accuracy_score(gold, predicted) if both else None,
        "auroc": metrics.roc_auc_score(truth, score) if ranked else None,
        "auprc": metrics.average_precision_score(truth, score) if ranked else None,
        "brier": float(np.mean((score - truth) ** 2)) if scored else None,
        "ece": _calibration_error(truth, score) if scored else None,
        "parse_failures": float(np.mean([row.failed for row in judged])) if judged else None,
        "mean_tokens": float(np.mean(tokens)) if tokens else None,
    }


def _calibration_error(truth: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error: |share of harmful - mean score| of each bin, weighted by its records."""
    bins = np.minimum((score * ECE_BINS).astype(int), ECE_BINS - 1)
    return float(np.abs(np.bincount(bins, truth - score)).sum() / len(score))


def _resampled_f1(judged: Sequence[_Judged], draws: int, rng: np.random.Generator) -> np.ndarray:
    """f64[draws] F1 of resampled records. It depends on the confusion counts alone, and those are multinomial."""
    counts = metrics.confusion_matrix(
        [row.gold for row in judged], [row.predicted for row in judged], labels=[False, True]
    ).ravel()
    _, false_pos, false_neg, true_pos = rng.multinomial(len(judged), counts / counts.sum(), size=draws).T
    return 2 * true_pos / np.maximum(2 * true_pos + false_pos + false_neg, 1)


def _interval(f1s: np.ndarray | None) -> Line:
    low, high = (None, None) if f1s is None else (float(value) for value in np.percentile(f1s, (2.5, 97.5)))
    return {"f1_low": low, "f1_high": high}
