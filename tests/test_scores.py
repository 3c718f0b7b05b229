"""Evaluation: hand-computed measures, parse failures, means, intervals, baselines."""

import json

import numpy as np
import pytest
from hostile import COMPLETIONS

from gvl_jax.guard.prompt import answer_text
from gvl_jax.guard.scores import Row, evaluate

H, U = "harmful", "unharmful"


def row(gold, said, **fields):
    """A record with a gold request label only."""
    return Row(answer_text("R", said, None), gold, None, **fields)


def line(table, **wanted):
    found = [entry for entry in table if all(entry[key] == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, found)
    return found[0]


SIX = [row(H, H), row(H, H), row(H, U), row(U, H), row(U, U), row(U, U)]
MODEL = {"predictor": "model", "task": "request", "benchmark": ""}


@pytest.mark.parametrize("rule", ["strict", "reference"])
def test_measures_by_hand(rule):
    found = line(evaluate(SIX, rule), **MODEL)
    assert found["rule"] == rule and found["n"] == 6
    expected = {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "fpr": 1 / 3, "balanced_accuracy": 2 / 3}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["parse_failures"] == 0.0
    assert [found[name] for name in ("auroc", "auprc", "brier", "ece", "mean_tokens")] == [None] * 5


@pytest.mark.parametrize("rule", ["strict", "reference"])
def test_parse_failures_are_wrong_and_counted_apart(rule):
    """Neither side profits: a failure is a miss for harmful gold and a false alarm for unharmful gold."""
    failures = [Row("no verdict", H, None), Row("", U, None)]
    found = line(evaluate([*SIX, *failures], rule), **MODEL)
    assert found["parse_failures"] == 2 / 8
    assert (found["precision"], found["recall"], found["fpr"]) == pytest.approx((2 / 4, 2 / 4, 2 / 4))


def test_hostile_completions_are_always_wrong_under_strict():
    for gold in (H, U):
        table = evaluate([Row(text, gold, None) for text in COMPLETIONS.values()], "strict")
        found = line(table, **MODEL)
        assert found["parse_failures"] == 1.0
        assert (found["recall"], found["fpr"]) == ((0.0, None) if gold == H else (None, 1.0))


def test_cut_completions_fail_under_strict_only():
    rows = [SIX[0]._replace(finished=False), SIX[4]]
    assert line(evaluate(rows, "strict"), **MODEL)["parse_failures"] == 0.5
    assert line(evaluate(rows, "reference"), **MODEL)["parse_failures"] == 0.0


def test_reference_scores_each_label_alone():
    table = evaluate([Row("Request: harmful", H, H), Row("Response: None", U, U)], "reference")
    for task in ("request", "response"):
        found = line(table, **MODEL | {"task": task})
        assert found["parse_failures"] == 0.5
    assert line(table, **MODEL)["recall"] == 1.0
    assert line(table, **MODEL | {"task": "response"})["fpr"] == 0.0


def test_missing_gold_is_not_scored_and_a_none_answer_is_unharmful():
    rows = [Row(answer_text("R", H, None), H, None), Row(answer_text("R", H, None), None, H)]
    table = evaluate(rows, "strict")
    assert line(table, **MODEL)["n"] == 1
    found = line(table, **MODEL | {"task": "response"})
    assert (found["n"], found["recall"], found["parse_failures"]) == (1, 0.0, 0.0)


def test_no_rows_no_lines():
    assert evaluate([], "strict") == []
    assert evaluate([Row("", None, None)], "strict") == []


def test_undefined_measures_are_none_never_zero():
    positives = line(evaluate([row(H, H), row(H, U)], "strict"), **MODEL)
    assert (positives["recall"], positives["fpr"], positives["balanced_accuracy"]) == (0.5, None, None)
    negatives = line(evaluate([row(U, H), row(U, U)], "strict"), **MODEL)
    assert [negatives[name] for name in ("f1", "precision", "recall", "f1_low", "f1_high")] == [None] * 5
    assert negatives["fpr"] == 0.5


def test_scores_by_hand():
    scored = [row(g, U, request_score=s) for g, s in ((H, 0.9), (H, 0.4), (U, 0.6), (U, 0.1))]
    found = line(evaluate([*scored, row(H, U)], "strict"), **MODEL)  # the last has no score
    assert found["auroc"] == 3 / 4
    assert found["auprc"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.36 + 0.36 + 0.01) / 4)
    assert found["ece"] == pytest.approx((0.1 + 0.6 + 0.6 + 0.1) / 4)


def test_calibration_error_compares_means_of_a_bin():
    rows = [row(g, U, request_score=0.75) for g in (H, H, H, U)]
    assert line(evaluate(rows, "strict"), **MODEL)["ece"] == pytest.approx(0.0)
    rows = [row(H, H, request_score=1.0), row(U, U, request_score=0.0)]
    assert line(evaluate(rows, "strict"), **MODEL)["ece"] == 0.0


def test_means_weigh_by_scored_records_per_modality_and_for_all():
    rows = [r._replace(benchmark="A", modality="text", tokens=100) for r in SIX]
    rows += [row(H, H, benchmark="B", modality="text", tokens=40), row(U, U, benchmark="B", modality="text")]
    rows += [row(H, U, benchmark="C", modality="image", tokens=10)] * 2
    rows += [row(U, U, benchmark="D", modality="image")]  # no positives: no F1
    table = evaluate(rows, "strict")
    mean = {"predictor": "model", "task": "request", "benchmark": "mean"}
    text, image, total = (line(table, **mean, modality=name) for name in ("text", "image", "all"))
    assert text["f1"] == pytest.approx((6 * 2 / 3 + 2 * 1) / 8)
    assert (image["f1"], image["fpr"]) == (0.0, 0.0)
    assert total["f1"] == pytest.approx((6 * 2 / 3 + 2 * 1 + 2 * 0) / 10)
    assert (text["n"], image["n"], total["n"]) == (8, 3, 11)
    assert total["mean_tokens"] == pytest.approx((6 * 100 + 2 * 40 + 2 * 10) / 10)


def test_baselines_stand_beside_the_model():
    table = evaluate(SIX, "strict")
    always = line(table, **MODEL | {"predictor": "always_harmful"})
    assert (always["recall"], always["fpr"], always["f1"]) == pytest.approx((1.0, 1.0, 2 / 3))
    never = line(table, **MODEL | {"predictor": "always_unharmful"})
    assert (never["recall"], never["fpr"], never["f1"]) == (0.0, 0.0, 0.0)


def test_interval_is_that_of_resampled_records():
    rng = np.random.default_rng(0)
    gold, said = rng.random(300) < 0.4, rng.random(300) < 0.5
    names = {True: H, False: U}
    rows = [row(names[g], names[s]) for g, s in zip(gold.tolist(), said.tolist(), strict=True)]
    found = line(evaluate(rows, "strict"), **MODEL)
    f1s = []
    for _ in range(4000):
        index = rng.integers(300, size=300)
        hit = (gold & said)[index].sum()
        f1s.append(2 * hit / (gold[index].sum() + said[index].sum()))
    assert (found["f1_low"], found["f1_high"]) == pytest.approx(np.percentile(f1s, (2.5, 97.5)), abs=0.015)
    assert found["f1_low"] < found["f1"] < found["f1_high"]


def test_intervals_repeat_with_the_seed_and_narrow_with_the_records():
    def width(rows, seed=0):
        found = line(
            evaluate(rows, "strict", seed=seed), predictor="model", task="request", benchmark="mean", modality="all"
        )
        return found["f1_high"] - found["f1_low"]

    assert width(SIX * 5) == width(SIX * 5)
    assert width(SIX * 5) != width(SIX * 5, seed=1)
    assert width(SIX * 50) < width(SIX * 5) / 2


def test_table_is_plain_json():
    rows = [r._replace(tokens=3, request_score=0.5, response_label=H) for r in SIX]
    assert json.loads(json.dumps(evaluate(rows, "strict"))) == evaluate(rows, "strict")
