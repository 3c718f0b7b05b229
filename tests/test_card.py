"""Cards say what the run folders say, mark what they do not say as unknown, and overwrite nothing."""

import json
import re

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from judged import judgements, write_run

from gvl_jax.cli import main
from gvl_jax.guard.calibration import FILE

BASE = "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture
def runs(tmp_path):
    """Prepared data, a training run on it and on a bare file, and evals of its model and of another one."""
    manifest = {
        "settings": {"source": "someone/corpus", "revision": "abc123", "licence": "mit", "name": "corpus"},
        "rows": 10, "rejected": {"no_verdict": 2},
        "splits": {"text": {"rows": 10, "rejected": 2, "modality": {"text": 10}, "request_label": {"harmful": 4},
                            "response_label": {"None": 10}, "shards": []}},
    }  # fmt: skip
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "sft" / "model").mkdir(parents=True)
    settings = {"model": BASE, "train": [str(tmp_path / "corpus"), "<img src=x>.jsonl"], "optim": {"peak_lr": 5e-5}}
    (tmp_path / "sft" / "config.yaml").write_text(yaml.safe_dump(settings))
    write_run(tmp_path / "eval", judgements(200), model=str(tmp_path / "sft" / "model"))
    write_run(tmp_path / "base", judgements(200, 0.6), model=BASE)
    return tmp_path


def card(runs, *names, code=0):
    folders = [str(runs / name) for name in names]
    assert main(["card", *folders, "--output", str(runs / "out")]) == code
    return [(runs / "out" / name).read_text() for name in ("README.md", "DATA_CARD.md")] if code == 0 else None


def test_the_model_card_has_the_results_of_its_own_model_for_the_hub(runs):
    model, _ = card(runs, "sft", "eval", "base")
    front = ModelCard(model).data
    assert (front.base_model, front.license, front.pipeline_tag) == (BASE, "unknown", "image-text-to-text")
    table = json.loads((runs / "eval" / "scores.json").read_text())
    ours = [
        round(line["f1"], 4) for line in table
        if line["predictor"] == "model" and line["rule"] == "strict"
        and (line["benchmark"] != "mean" or line["modality"] == "all")
    ]  # fmt: skip
    assert [result.metric_value for result in front.eval_results] == ours
    assert len({result.unique_identifier for result in front.eval_results}) == len(ours) == 6
    assert "### base, of Qwen/Qwen2.5-VL-3B-Instruct" in model  # shown, and not taken for its own
    for words in ("peak_lr: 5.0e-05", "| always\\_harmful |", "## Limits", "## Known bypasses", "95 % intervals"):
        assert words in model, words


def test_the_data_card_follows_the_manifest_and_says_what_is_unknown(runs):
    model, data = card(runs, "sft", "eval")
    assert "| corpus | someone/corpus | abc123 | mit | 10 | no\\_verdict 2 |" in data
    assert "&lt;img src=x&gt;.jsonl: origin, licence and counts unknown" in data and "<img" not in data
    assert DatasetCard(data).data.license == "unknown"  # of one of the two
    assert "&lt;img" in model
    share = sum(row["request_label"] == "harmful" for row in judgements(200) if row["benchmark"] == "Set0") / 100
    assert re.search(rf"\| Set0 \| request \| text \| 100 \| {share:.3f} \|", data)


def test_a_benchmark_has_its_origin_and_a_file_of_its_name_has_none(runs):
    rows = judgements(200, benchmark="XSTest")
    run = write_run(runs / "of_hub", rows, model=BASE)
    (run / "benchmarks.json").write_text(json.dumps({"XSTest": "/cache/datasets--Paul--XSTest/snapshots/c0ffee"}))
    assert re.search(r"\| XSTest \| request .* \| Paul/XSTest \| c0ffee \| cc-by-4.0 \|", card(runs, "of_hub")[1])
    write_run(runs / "of_file", rows, model=BASE)
    assert re.search(r"\| XSTest \| request .* \| unknown \| unknown \| unknown \|", card(runs, "of_file")[1])


def test_what_was_not_given_is_unknown_or_not_measured(runs):
    model, _ = card(runs, "sft")
    assert "Not measured: no run of eval was given." in model and "scores are not calibrated" in model
    assert ModelCard(model).data.eval_results is None
    model, data = card(runs, "base")
    assert "Unknown: no run of sft or rl was given." in model
    assert "Unknown: no run of sft or rl, and no prepared data, was given." in data


def test_a_stored_calibration_is_shown(runs):
    (runs / "sft" / "model" / "config.json").write_text("{}")
    assert main(["calibrate", str(runs / "eval")]) == 0
    stored = json.loads((runs / "sft" / "model" / FILE).read_text())["tasks"]["request"]
    assert f"| request | temperature | {stored['temperature']:.3f} |" in card(runs, "sft", "eval")[0]


def test_a_file_of_somebody_else_is_not_overwritten_and_its_own_is(runs, capsys):
    card(runs, "sft")
    card(runs, "sft", "eval")
    (runs / "out" / "README.md").write_text("Mine.")
    card(runs, "sft", code=1)
    assert "README.md exists and gvl card did not write it" in capsys.readouterr().err
    assert (runs / "out" / "README.md").read_text() == "Mine."


def test_a_folder_that_is_no_run_is_named(runs, capsys):
    (runs / "empty").mkdir()
    card(runs, "empty", code=1)
    assert "empty holds no finished run: expected scores.json, model/" in capsys.readouterr().err
    assert not (runs / "out").exists()
