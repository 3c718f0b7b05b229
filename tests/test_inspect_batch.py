"""scripts/inspect_batch.py: the usage without a config file, and the samples and rows that SFT itself would take."""

import importlib.util
import json
from pathlib import Path

import pytest
from tiny_models import write_checkpoint

from gvl_jax.data.corpora import open_corpus
from gvl_jax.data.prepared import prepare

ROOT = Path(__file__).resolve().parent.parent
REASONING = "# Task 1\n## Reasoning Step 1: Seen.\n# Task 1 Conclusion\nRequest: unharmful"
FLAGS = ["--max-length", "2048", "--global-batch", "8", "--rows", "2"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model, and two files of records."""
    folder = tmp_path_factory.mktemp("inspected")
    write_checkpoint(folder, REASONING, 300)
    for name in ("often", "rare"):
        record = {"request": name, "request_label": "unharmful", "reasoning": REASONING}
        lines = [json.dumps({"id": f"{name}{i}", **record}) + "\n" for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def shown(work, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("inspect_batch", ROOT / "scripts" / "inspect_batch.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.chdir(work)

    def show(*args):
        script.main([*args, *FLAGS])
        return capsys.readouterr().out

    return show


def test_a_model_and_records_are_enough_also_as_a_prepared_folder(shown, work):
    prepare(open_corpus("jsonl", str(work / "often.jsonl")), work / "prepared")
    once = shown("--model", "model", "--records", "often.jsonl")
    assert once.count("── segment") == 8 and "⟦" in once
    assert shown("--model", "model", "--records", "prepared").count("── segment") == 8


def test_weights_decide_what_is_drawn(shown):
    said = shown("--model", "model", "--records", "often.jsonl", "rare.jsonl", "--train-weights", "7", "1")
    assert said.count("often") > said.count("rare")
