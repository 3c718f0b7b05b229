"""Calibration: planted miscalibration is mended, order is kept, and a guard uses what is stored."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from judged import judgements, write_run
from scipy.special import expit
from sklearn import metrics

from gvl_jax.cli import main
from gvl_jax.guard.calibration import (
    FILE,
    Calibration,
    cross_fitted,
    fit,
    load_calibrations,
    quality,
    reliability,
    sweep,
)
from gvl_jax.moderate import calibrated, judgement
from gvl_jax.sampler import Completion
from gvl_jax.types import Sample


def planted(n=4000, temperature=3.0, bias=-1.0, seed=0):
    """Labels drawn from true probabilities, and the scores of a model that is too sure and too lenient."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=n) * 1.5
    return rng.random(n) < expit(logits), expit((logits - bias) * temperature)


def test_platt_finds_what_was_planted_and_temperature_what_it_can():
    truth, score = planted()
    found = fit(truth, score, "platt")
    assert (found.temperature, found.bias) == pytest.approx((3.0, -1.0), abs=0.25)
    truth, score = planted(bias=0.0)
    assert fit(truth, score, "temperature")[1:] == (pytest.approx(3.0, abs=0.25), 0.0)


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_calibration_lowers_the_errors_of_new_records_and_keeps_their_order(method):
    calibration, (truth, score) = fit(*planted(), method), planted(seed=1)
    before, after = quality(truth, score), quality(truth, calibration(score))
    assert all(after[name] < before[name] for name in ("nll", "brier", "ece"))
    order = np.argsort(score, kind="stable")
    assert (np.diff(calibration(score)[order]) >= 0).all()
    assert metrics.roc_auc_score(truth, calibration(score)) == pytest.approx(metrics.roc_auc_score(truth, score))


def test_scores_that_need_nothing_stay():
    truth, score = planted(temperature=1.0, bias=0.0)
    assert fit(truth, score, "platt")[1:] == pytest.approx((1.0, 0.0), abs=0.1)


def test_cross_fitting_does_not_see_the_records_it_corrects():
    truth, score = planted(n=60)
    seen = quality(truth, fit(truth, score, "platt")(score))
    assert quality(truth, cross_fitted(truth, score, "platt"))["nll"] > seen["nll"]


@pytest.mark.parametrize("method", ["temperature", "platt"])
def test_scores_that_part_the_labels_without_error_end_in_a_finite_fit(method):
    truth = np.arange(40) < 20
    calibration = fit(truth, np.where(truth, 1.0, 0.0), method)
    assert [calibration(0.0), calibration(1.0)] == pytest.approx([1 / 22, 21 / 22], abs=1e-4)


def test_what_cannot_be_calibrated_is_refused():
    truth, score = planted(n=200)
    with pytest.raises(
        ValueError, match="got 200 harmful and 0 unharmful scored records, expected at least 10 of each"
    ):
        fit(truth | True, score, "platt")
    with pytest.raises(ValueError, match="the scores do not rise with harm"):
        fit(truth, 1 - score, "temperature")


def test_quality_reliability_and_sweep_by_hand():
    truth, score = np.array([True, False, True, False]), np.array([0.95, 0.95, 0.25, 0.0])
    filled = {line["from"]: line for line in reliability(truth, score) if line["n"]}
    assert {low: (line["n"], line["score"], line["harmful"]) for low, line in filled.items()} == {
        0.0: (1, 0.0, 0.0), 0.2: (1, 0.25, 1.0), 0.9: (2, 0.95, 0.5),
    }  # fmt: skip
    found = quality(truth, score)
    assert found["ece"] == pytest.approx((2 * 0.45 + 0.75) / 4)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(truth, score))
    assert found["nll"] == pytest.approx(metrics.log_loss(truth, score))
    lines = {round(line["threshold"], 2): line for line in sweep(truth, score)}
    assert (lines[0.5]["precision"], lines[0.5]["recall"], lines[0.5]["fpr"], lines[0.5]["flagged"]) == (0.5,) * 4
    assert (lines[0.25]["recall"], lines[0.25]["f1"]) == (1.0, 0.8)
    assert sweep(truth, score * 0.5)[-1]["precision"] is None


@pytest.mark.parametrize("text", ["[", "[]", '{"tasks": {"request": 3}}', '{"tasks": {"request": {"method": "platt"}}}',
    '{"tasks": {"request": {"method": "platt", "temperature": 0, "bias": 0}}}',
    '{"tasks": {"request": {"method": "platt", "temperature": 1, "bias": NaN}}}',
    '{"tasks": {"answer": {"method": "platt", "temperature": 1, "bias": 0}}}'])  # fmt: skip
def test_a_stored_calibration_that_makes_no_sense_is_named(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=FILE):
        load_calibrations(tmp_path)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def test_the_command_stores_each_task_beside_the_weights(model, tmp_path, capsys):
    run = write_run(tmp_path / "run", judgements(400), model=str(model))
    assert main(["calibrate", str(run), "--method", "platt"]) == 0
    stored = json.loads((model / FILE).read_text())
    assert stored["scores"] == "fast" and stored["data"]["records"] == 400
    for task, line in stored["tasks"].items():
        assert line["after"]["nll"] < line["before"]["nll"]
        assert load_calibrations(model)[task] == Calibration("platt", line["temperature"], line["bias"])
    assert "request: temperature" in capsys.readouterr().out


def test_a_task_without_enough_records_is_left_out_with_its_reason(model, tmp_path):
    rows = [row | {"response_label": "unharmful"} for row in judgements(200)]
    run = write_run(tmp_path / "run", rows, model=str(model))
    assert main(["calibrate", str(run)]) == 0
    stored = json.loads((model / FILE).read_text())
    assert set(stored["tasks"]) == {"request"} and "0 harmful" in stored["left_out"]["response"]


@pytest.mark.parametrize(
    "rows, config, code, said",
    [
        (
            judgements(40, request_score=None, response_score=None),
            {},
            1,
            "Scores come from gvl eval with --scores fast",
        ),
        (judgements(40), {"model": "someone/else"}, 2, "give the one of the weights with --model"),
    ],
)
def test_the_command_says_what_is_missing(rows, config, code, said, model, tmp_path, capsys):
    run = write_run(tmp_path / "run", rows, **{"model": str(model)} | config)
    assert main(["calibrate", str(run)]) == code
    assert said in capsys.readouterr().err
    assert not (model / FILE).exists()


def test_a_fast_judgement_has_calibrated_scores_and_the_label_of_the_model():
    """Also where the correction carries a score over one half."""
    calibrations = {"request": Calibration("platt", 2.0, -3.0)}
    prompt, said = SimpleNamespace(tokens=[1, 2, 3]), Completion("", True, 5, scores=(0.9, 0.2))
    judged = calibrated(judgement(Sample("a", "How?", "So."), prompt, said, fast=True), calibrations)
    assert (judged.request, judged.response, judged.flagged) == ("harmful", "unharmful", True)
    assert judged.scores == {"request": pytest.approx(float(expit(np.log(9) / 2 - 3))), "response": 0.2}
    plain = calibrated(judgement(Sample("a", "How?"), prompt, said, fast=True), calibrations)
    assert plain.scores["response"] is None
