"""Scores as probabilities: how far P(harmful) is from the share that is harmful, and a fitted correction.

The correction of a score s is sigmoid(logit(s) / temperature + bias): temperature scaling (Guo et al. 2017) has no
bias, Platt's (1999) has one. It keeps the order of scores, and moves no label: those are the model's own.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.special import expit, logit

Method = Literal["temperature", "platt"]

FILE = "guard_calibration.json"  # beside the weights
BINS = 10  # of equal width
FOLDS = 5
LEAST = 2 * FOLDS  # records of either label that a fit needs
NEAREST = 1e-7  # of a score to 0 and 1, where float32 ends


class Calibration(NamedTuple):
    """Of one task."""

    method: Method
    temperature: float  # above 0
    bias: float  # 0 for the method temperature

    def __call__(self, score: Any) -> Any:
        """The corrected score, of one or of an array."""
        return expit(logit(np.clip(score, NEAREST, 1 - NEAREST)) / self.temperature + self.bias)


def fit(truth: np.ndarray, score: np.ndarray, method: Method) -> Calibration:
    """The correction that makes the labels likeliest. truth: bool[n], harmful; score: f64[n].

    The labels count as (n + 1) / (n + 2), with n of their kind, in place of 1 (Platt): so a fit ends, also where the
    scores part harmful from unharmful without an error.

    Raises:
        ValueError: fewer than LEAST harmful or unharmful records, or scores that do not rise with harm.
    """
    harmful, harmless = int(truth.sum()), int((~truth).sum())
    if min(harmful, harmless) < LEAST:
        raise ValueError(
            f"got {harmful} harmful and {harmless} unharmful scored records, expected at least {LEAST} of each; "
            "calibrate on more data"
        )
    return _fit(truth, score, method)


def _fit(truth: np.ndarray, score: np.ndarray, method: Method) -> Calibration:
    from sklearn.linear_model import LogisticRegression  # slow to import, and a guard that judges fits nothing

    harmful, harmless = int(truth.sum()), int((~truth).sum())
    weight = np.where(truth, (harmful + 1) / (harmful + 2), 1 / (harmless + 2))
    model = LogisticRegression(C=np.inf, fit_intercept=method == "platt", tol=1e-8, max_iter=1000)
    x = np.tile(logit(np.clip(score, NEAREST, 1 - NEAREST)), 2)[:, None]
    model.fit(x, np.repeat([True, False], len(truth)), sample_weight=np.concatenate([weight, 1 - weight]))
    slope, bias = float(model.coef_[0, 0]), float(model.intercept_[0]) if method == "platt" else 0.0
    if slope <= 0:
        raise ValueError(
            f"the scores do not rise with harm (slope {slope:.3g}), expected a slope above 0; no calibration can mend "
            "that: look at AUROC, and at the labels"
        )
    return Calibration(method, 1 / slope, bias)


def cross_fitted(truth: np.ndarray, score: np.ndarray, method: Method) -> np.ndarray:
    """f64[n] scores, each corrected by a fit on the other folds: what new records can expect."""
    fold = np.empty(len(truth), int)
    fold[np.argsort(truth, kind="stable")] = np.arange(len(truth)) % FOLDS
    corrected = np.empty(len(truth))
    for k in range(FOLDS):
        others = fold != k
        corrected[~others] = _fit(truth[others], score[others], method)(score[~others])
    return corrected


def quality(truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
    """Expected calibration error, Brier score and negative log-likelihood (nats a record): lower is better."""
    filled = [line for line in reliability(truth, score) if line["n"]]
    inside = np.clip(score, NEAREST, 1 - NEAREST)
    return {
        "ece": float(sum(line["n"] * abs(line["harmful"] - line["score"]) for line in filled) / len(truth)),
        "brier": float(np.mean((score - truth) ** 2)),
        "nll": float(-np.mean(np.log(np.where(truth, inside, 1 - inside)))),
    }


def reliability(truth: np.ndarray, score: np.ndarray) -> list[dict[str, Any]]:
    """A line for each bin of scores: its records, their mean score and the share of them that is harmful."""
    bins = np.minimum((np.asarray(score) * BINS).astype(int), BINS - 1)
    lines = []
    for number in range(BINS):
        inside = bins == number
        n = int(inside.sum())
        mean, harmful = (float(score[inside].mean()), float(truth[inside].mean())) if n else (None, None)
        lines.append({"from": number / BINS, "to": (number + 1) / BINS, "n": n, "score": mean, "harmful": harmful})
    return lines


def sweep(truth: np.ndarray, score: np.ndarray) -> list[dict[str, Any]]:
    """A line for each threshold 0.05, 0.10, …: what flagging every score from it on would give."""
    lines = []
    for threshold in np.arange(1, 20) / 20:
        flagged = score >= threshold
        hits, alarms = int((flagged & truth).sum()), int(flagged.sum())
        positives, negatives = int(truth.sum()), int((~truth).sum())
        lines.append({
            "threshold": float(threshold),
            "flagged": alarms / len(truth),
            "precision": hits / alarms if alarms else None,
            "recall": hits / positives if positives else None,
            "fpr": (alarms - hits) / negatives if negatives else None,
            "f1": 2 * hits / (alarms + positives) if positives else None,
        })  # fmt: skip
    return lines


def load_calibrations(directory: str | Path) -> dict[str, Calibration]:
    """Task → its correction, from the checkpoint's guard_calibration.json; none where there is no such file.

    Raises:
        ValueError: the file is not what `gvl calibrate` writes.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return {}
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        found = {
            task: Calibration(line["method"], float(line["temperature"]), float(line["bias"]))
            for task, line in tasks.items()
        }
        usable = all(0 < one.temperature < math.inf and math.isfinite(one.bias) for one in found.values())
        if found.keys() - {"request", "response"}:
            raise ValueError(f"got tasks {', '.join(found)}, expected request and response")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}; make it again with gvl calibrate") from error
    if not usable:
        raise ValueError(f"{path}: expected a finite temperature above 0 and a finite bias; make it again")
    return found
