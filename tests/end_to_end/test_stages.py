"""Every stage by its command, on 64 records and a model of one layer: what a run leaves, and resuming it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny_models import tiny_params

from gvl_jax import evaluate, mine, rl, sft
from gvl_jax.cli import AGAIN, main
from gvl_jax.data import embedded, tiny
from gvl_jax.data.corpora import open_corpus
from gvl_jax.data.prepared import prepare
from gvl_jax.data.records import load_records
from gvl_jax.guard.prompt import answer_text
from gvl_jax.losses import clip_schedule
from gvl_jax.models.qwen_vl.hub import load_config, save_params

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
COMMON = {
    "dtype": "float32",
    "mesh": {"data": 1},
    "images": {"min_pixels": 784, "max_pixels": 7056},
    "buckets": {"prompt": [192], "completion": [16], "patches": [1024]},
}
SFT = COMMON | {"epochs": 1, "global_batch": 16, "rows": 4, "max_length": 384, "save_every": 2}
SFT |= {"optim": {"peak_lr": 1e-3, "warmup_steps": 2}}
MINE = COMMON | {"samples": 4, "size": 26, "prompts": 4}
MINE |= {"sampling": {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0}}  # the shapes of RL: compiled once
RL = COMMON | {"group_size": 4, "prompts_per_step": 8, "prompts_per_update": 8, "prompts": 4, "rows": 4}
RL |= {"max_length": 200, "save_every": 1, "optim": {"peak_lr": 1e-3}}
RL |= {"sampling": {"max_new_tokens": 16, "temperature": 1.2}}
EVAL = COMMON | {"prompts": 1, "scores": "fast", "sampling": {"temperature": 0, "max_new_tokens": 16}}


def command(verb: str, output: Path, settings: dict) -> list[str]:
    """The arguments of `gvl`, with a config file written for them."""
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings | {"output": str(output)}))
    return [verb, str(file)]


def log(run: Path) -> list[dict]:
    """The metrics of a run but for what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")} for row in rows]


def rows(file: Path) -> list[dict]:
    """Judgements but for the paths of the pictures, which count from the run folder."""
    return [json.loads(line) | {"images": None} for line in file.read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The corpus, each file with one record whose picture is lost, and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("stages")
    embedded.write(folder / "data", train=(24, 16, 24), heldout=(8, 6, 8))
    for name, place in (("train", 20), ("heldout", 0)):
        with (folder / "data" / f"{name}.jsonl").open("r+") as file:
            lines = file.readlines()
            lost = json.loads(lines[place]) | {"id": "lost", "images": ["images/lost.png"]}
            file.seek(0)
            file.writelines([*lines[:place], json.dumps(lost) + "\n", *lines[place:]])
    pictured = [line for line in lines if json.loads(line).get("images")][:3]
    (folder / "data" / "pictured.jsonl").write_text("".join(pictured))
    prepare(open_corpus("jsonl", str(folder / "data" / "pictured.jsonl")), folder / "pictured")
    files = folder / "files"
    tiny.write_tiny(files, tiny.training_texts(load_records(folder / "data" / "train.jsonl")))
    raw = json.loads((files / "config.json").read_text())
    raw["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    raw["text_config"]["layer_types"] = ["full_attention"]
    raw["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 2]
    raw["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 16, "intermediate_size": 24}
    raw["vision_config"] |= {"num_heads": 2, "out_hidden_size": 32}
    (files / "config.json").write_text(json.dumps(raw))
    config = load_config(files)
    save_params(folder / "base", tiny_params(config), config, dtype="float32", source=files)
    return folder


@pytest.fixture(scope="module")
def settings(folder):
    """What each stage is given: the pipeline as a user would chain it."""
    train, heldout = [str(folder / "data" / "train.jsonl")], [str(folder / "data" / "heldout.jsonl")]
    return {
        "sft": SFT | {"model": str(folder / "base"), "train": train},
        "mine": MINE | {"model": str(folder / "sft" / "model"), "train": train},
        "rl": RL | {"model": str(folder / "sft" / "model"), "train": [str(folder / "mine" / "hard.jsonl")]},
        "eval": EVAL | {"model": str(folder / "rl" / "model"), "data": [*heldout, str(folder / "pictured")]},
    }


@pytest.fixture(scope="module")
def runs(folder, settings):
    """All stages, one after the other, none stopped."""
    for verb, given in settings.items():
        assert main(command(verb, folder / verb, given)) == 0, verb
    assert main(["report", str(folder)]) == 0
    return folder


# ---------------------------------------------------------------------------------------------------- what a run leaves


def test_run_folders_hold_what_the_documents_say(runs):
    files = {
        "sft": ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "model/model.safetensors"),
        "mine": ("config.yaml", "metrics.jsonl", "tensorboard", "attempts.jsonl", "hard.jsonl", "suspects.jsonl"),
        "rl": ("config.yaml", "metrics.jsonl", "checkpoints", "samples.jsonl", "model/tokenizer.json",
               "mixed_examples.jsonl"),
        "eval": ("config.yaml", "metrics.jsonl", "judgements.jsonl", "samples.jsonl", "scores.json", "report.md"),
    }  # fmt: skip
    missing = [
        f"{stage}/{name}" for stage, names in files.items() for name in names if not (runs / stage / name).exists()
    ]
    assert not missing
    page = (runs / "report.html").read_text()
    assert all(f">{stage}</h2>" in page for stage in files)


def test_eval_scores_every_record_and_its_tools_read_what_it_wrote(runs, tmp_path, capsys):
    judgements = [json.loads(line) for line in (runs / "eval" / "judgements.jsonl").read_text().splitlines()]
    lost, *judged = judgements
    table = json.loads((runs / "eval" / "scores.json").read_text())
    assert (lost["rejected"], lost["tokens"], lost["request_score"]) == ("missing", None, None)
    assert sum(line["failures"].get("rejected", 0) for line in table if line["benchmark"] == "heldout") > 0
    assert all(0 < row["request_score"] < 1 for row in judged)
    assert [row["response_score"] is None for row in judged] == [not row["response"] for row in judged]
    assert all(line["auroc"] is not None for line in table if line["predictor"] == "model" and line["n"] > 3)
    (logged,) = [json.loads(line) for line in (runs / "eval" / "metrics.jsonl").read_text().splitlines()]
    assert logged["perf/records_per_second"] > 0 and logged["perf/generated_tokens_per_second"] > 0
    assert "Scores as probabilities: response" in (runs / "report.html").read_text()
    pictured = [row for row in judgements if row["benchmark"] == "pictured"]
    assert len(pictured) == 3
    for row in pictured:
        assert row["images"] and all((runs / "eval" / path).is_file() for path in row["images"])
    capsys.readouterr()
    assert main(["eval", "compare", str(runs / "eval"), str(runs / "eval"), "--json"]) == 0
    assert {line["difference"] for line in json.loads(capsys.readouterr().out)["result"]} <= {0.0, None}
    assert main(["card", *(str(runs / stage) for stage in ("sft", "rl", "eval")), "--output", str(tmp_path)]) == 0
    assert "model-index:" in (tmp_path / "README.md").read_text()


def test_sft_logs_how_long_it_waited_for_input(runs):
    for line in (runs / "sft" / "metrics.jsonl").read_text().splitlines():
        assert 0 <= json.loads(line)["perf/input_seconds"]


def test_the_logged_numbers_have_their_names_and_are_finite(runs):
    sft, (mined,), rl_steps = (log(runs / stage) for stage in ("sft", "mine", "rl"))
    assert [row["step"] for row in sft] == [0, 1, 2, 3, 4]
    assert set(sft[-1]) == {"step", "train/loss", "train/learning_rate", "train/grad_norm", "data/rejected_missing"}
    assert sft[-1]["train/loss"] < sft[0]["train/loss"]
    assert mined == {
        "step": 0, "mine/items": 64, "mine/hard": 64, "mine/kept": 26, "mine/suspects": 0, "mine/right": 0.0,
        "data/rejected_missing": 1,
    }  # fmt: skip
    assert [row["step"] for row in rl_steps] == [0, 1, 2, 3]
    assert set(rl_steps[0]) == {
        "step", "reward/total", "reward/safety", "reward/format", "reward/request", "reward/response", "reward/length",
        "rollout/tokens", "rollout/tokens_p50", "rollout/tokens_p95", "rollout/tokens_p99", "rollout/tokens_p100",
        "rollout/idle_share", "rollout/truncated", "rollout/useful_groups", "rollout/f1_request",
        "rollout/f1_response", "train/clip", "train/tokens",
        "train/sampler_gap", "train/loss", "train/grad_norm", "train/ratio", "train/ratio_max", "train/clipped",
        "train/approx_kl", "train/entropy", "train/learning_rate",
    }  # fmt: skip
    assert all(np.isfinite(value) for row in [*sft, *rl_steps] for value in row.values())


def test_rl_sees_the_papers_clip_a_first_ratio_of_one_and_no_gap_to_the_sampler(runs):
    steps = log(runs / "rl")
    for row in steps:
        assert row["train/clip"] == pytest.approx(float(clip_schedule(row["step"] + 1, len(steps), 0.2)), abs=1e-9)
        assert row["train/sampler_gap"] <= 1e-4
        assert row["rollout/useful_groups"] > 0
    assert [steps[0][name] for name in ("train/ratio", "train/ratio_max")] == [1, 1]
    assert steps[-1]["train/clip"] == 0


def test_the_exported_model_loads_in_transformers_whole(runs):
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(runs / "rl" / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    trained = model.model.language_model.layers[0].mlp.up_proj.weight.detach().numpy()
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(runs / "base")
    assert not np.array_equal(trained, base.model.language_model.layers[0].mlp.up_proj.weight.detach().numpy())
    assert AutoTokenizer.from_pretrained(runs / "rl" / "model").encode("harmful")


def test_the_exported_model_moderates(runs, tmp_path):
    rows = tmp_path / "out.jsonl"
    given = ["--input", str(runs / "data" / "heldout.jsonl"), "--output", str(rows), "--dtype", "float32"]
    given += ["--reasoning-budget", "8", "--buckets.prompt", "192", "--buckets.patches", "1024", "--max-pixels", "7056"]
    assert main(["moderate", str(runs / "rl" / "model"), *given]) == 0
    judged = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["id"] for row in judged] == [sample.id for sample in load_records(runs / "data" / "heldout.jsonl")]
    assert all(row["flagged"] for row in judged)  # too little training for a verdict


def test_a_finished_stage_is_not_run_again(runs, settings):
    before = {
        path: path.stat().st_mtime_ns for stage in settings for path in (runs / stage).rglob("*") if path.is_file()
    }
    for verb, given in settings.items():
        assert main(command(verb, runs / verb, given)) == 0
    settled = {path: time for path, time in before.items() if path.name != "config.yaml"}
    assert {path: path.stat().st_mtime_ns for path in settled} == settled


def test_buckets_are_proposed_for_the_data_of_a_config(folder, settings, tmp_path, capsys):
    args = ["data", *command("buckets", tmp_path / "sft", settings["sft"]), "--steps", "3", "--count", "2"]
    assert main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["now"]["patches"] == [1024] and len(found["proposed"]["patches"]) <= 3
    assert found["proposed"]["cost"] < found["now"]["cost"]
    assert 0 < found["proposed"]["padding_patches"] < found["now"]["padding_patches"] < 1
    assert main(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"buckets: {{patches: {found['proposed']['patches']}}}"


def test_a_loss_that_is_not_finite_stops_sft_before_its_checkpoint(folder, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sft, "learning_rate", lambda *_: np.nan)  # the weights after step 0, and so the loss of step 1
    assert main(command("sft", tmp_path / "sft", settings["sft"])) == 1
    assert "step 1: train/loss = nan" in capsys.readouterr().err
    assert [row["train/loss"] is None for row in log(tmp_path / "sft")] == [False, True]
    assert not list((tmp_path / "sft" / "checkpoints").iterdir())  # one was due after step 1


# --------------------------------------------------------------------------------------------------------------- resume

KILL = """
import os, sys
import jax
from gvl_jax import sft
from gvl_jax.cli import AGAIN, main

jax.config.update("jax_num_cpu_devices", 8)  # as in this process: the last bits depend on how work is split

class Killed(sft.MetricsWriter):
    def write(self, step, metrics):
        if step == 3:
            os._exit(9)
        super().write(step, metrics)

class Saved(sft.Checkpoints):
    def save(self, *args):
        super().save(*args)
        self._manager.wait_until_finished()

sft.Checkpoints = Saved
sft.MetricsWriter = Killed
main(sys.argv[1:])
"""


def test_sft_that_was_killed_goes_on_to_the_same_bits(runs, settings, tmp_path):
    args = command("sft", tmp_path / "sft", settings["sft"])
    killed = subprocess.run([sys.executable, "-c", KILL, *args], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert [row["step"] for row in log(tmp_path / "sft")] == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "sft").iterdir() if path.is_dir()) == ["checkpoints", "tensorboard"]
    assert [path.name for path in (tmp_path / "sft" / "checkpoints").iterdir()] == ["2"]
    assert main(args) == 0
    assert weights(tmp_path / "sft") == weights(runs / "sft")
    assert [row["train/loss"] for row in log(tmp_path / "sft")] == [row["train/loss"] for row in log(runs / "sft")]


def test_sft_goes_on_with_another_mesh_to_the_same_weights(runs, settings, tmp_path, monkeypatch):
    class Interrupted(sft.MetricsWriter):
        def write(self, step, metrics):
            super().write(step, metrics)
            if step == 2:
                raise KeyboardInterrupt

    on_four = [
        *command("sft", tmp_path / "sft", settings["sft"]),
        "--mesh.data",
        "2",
        "--mesh.fsdp",
        "2",
        "--rows",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(sft, "MetricsWriter", Interrupted)
        assert main(on_four) == 130
    assert main(command("sft", tmp_path / "sft", settings["sft"])) == 0
    ours, alone = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "sft", runs / "sft"))
    assert max(np.abs(ours[name] - alone[name]).max() for name in alone) < 1e-6


def test_a_checkpoint_of_a_run_is_exported_as_the_run_exports_its_last(runs, tmp_path, capsys):
    for stage in ("sft", "rl"):
        assert main(["convert", "from-run", str(runs / stage), str(tmp_path / stage)]) == 0
        assert (tmp_path / stage / "model.safetensors").read_bytes() == weights(runs / stage)
    assert main(["convert", "from-run", str(runs / "sft"), str(tmp_path / "none"), "--step", "77"]) == 1
    assert main(["convert", "from-run", str(runs / "eval"), str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint in" in said and "expected one of gvl sft or gvl rl" in said


def test_rl_that_was_interrupted_goes_on_to_the_same_bits(runs, settings, tmp_path, monkeypatch, capsys):
    class Saved(rl.Checkpoints):
        def save(self, *args):
            super().save(*args)
            self._manager.wait_until_finished()

    class Interrupted(rl.MetricsWriter):
        def write(self, step, metrics):
            super().write(step, metrics)
            if step == 2:
                raise KeyboardInterrupt

    args = command("rl", tmp_path / "rl", settings["rl"])
    with monkeypatch.context() as patch:
        patch.setattr(rl, "Checkpoints", Saved)
        patch.setattr(rl, "MetricsWriter", Interrupted)
        assert main(args) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "rl" / "checkpoints").iterdir()) == ["1", "2"]
    assert main(args) == 0
    assert weights(tmp_path / "rl") == weights(runs / "rl")
    assert log(tmp_path / "rl") == log(runs / "rl")
    assert rows(tmp_path / "rl" / "samples.jsonl") == rows(runs / "rl" / "samples.jsonl")


@pytest.mark.parametrize("stage, module", [("sft", sft), ("rl", rl)])
def test_sigterm_saves_says_so_with_its_code_and_the_run_goes_on_to_the_same_bits(
    stage, module, runs, settings, tmp_path, monkeypatch, capsys
):
    class Asked(module.MetricsWriter):
        def write(self, step, metrics):
            super().write(step, metrics)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    args = command(stage, tmp_path / stage, settings[stage] | {"save_every": 9})
    with monkeypatch.context() as patch:
        patch.setattr(module, "MetricsWriter", Asked)
        assert main(args) == AGAIN
    said = capsys.readouterr().err
    assert "the same command goes on from there" in said.splitlines()[-1] and "Traceback" not in said
    saved, parts = {"sft": ("3", 0), "rl": ("2", 1)}[stage]  # a step of SFT is logged while the next one is computed
    assert [path.name for path in (tmp_path / stage / "checkpoints").iterdir() if path.name.isdigit()] == [saved]
    assert len(list((tmp_path / stage).rglob("*.npz"))) == parts  # what RL has of the step that was broken off
    assert main(args) == 0
    assert weights(tmp_path / stage) == weights(runs / stage)
    assert [row["train/loss"] for row in log(tmp_path / stage)] == [row["train/loss"] for row in log(runs / stage)]


@pytest.mark.parametrize("stage, module, log_name, result", [
    ("mine", mine, "attempts.jsonl", "hard.jsonl"), ("eval", evaluate, "judgements.jsonl", "scores.json"),
])  # fmt: skip
def test_judging_that_was_interrupted_goes_on_to_the_same_bytes(
    stage, module, log_name, result, runs, settings, tmp_path, monkeypatch
):
    calls = []

    def append_rows(path, judged):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(path)
        write(path, judged)

    write = module.append_rows
    args = command(stage, runs / f"{stage}_again", settings[stage])
    with monkeypatch.context() as patch:
        patch.setattr(module, "append_rows", append_rows)
        assert main(args) == 130
    log_file, whole = runs / f"{stage}_again" / log_name, (runs / stage / log_name).read_bytes()
    written = log_file.read_bytes()
    assert whole.startswith(written) and 0 < len(written) < len(whole)
    log_file.write_bytes(written[: -len(written) // 4])  # as a kill leaves it: a chunk and a half, cut inside a line
    assert main(args) == 0
    assert log_file.read_bytes() == whole
    assert (runs / f"{stage}_again" / result).read_bytes() == (runs / stage / result).read_bytes()


# ----------------------------------------------------------------------------------------------------------- invariance


def test_other_rows_give_the_same_losses(runs, settings, tmp_path):
    assert main(command("sft", tmp_path / "sft", settings["sft"] | {"rows": 2, "max_length": 320})) == 0
    ours, theirs = ([row["train/loss"] for row in log(run / "sft")] for run in (tmp_path, runs))
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- to look at


def test_a_packed_row_can_be_read(folder, settings, capsys):
    spec = importlib.util.spec_from_file_location("inspect_batch", ROOT / "scripts" / "inspect_batch.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    _, config = command("sft", folder / "looked_at", settings["sft"])
    script.main([config])
    shown = capsys.readouterr().out
    samples = {sample.id: sample for sample in load_records(folder / "data" / "train.jsonl")}
    learned = [f"⟦{answer_text(s.reasoning, s.request_label, s.response_label)}<|im_end|>⟧" for s in samples.values()]
    assert shown.count("── segment") == sum(answer in shown for answer in set(learned)) > 0
    for tokens, rows, columns in re.findall(r"<\|image_pad\|>×(\d+) \(grid 1×(\d+)×(\d+)\)", shown):
        assert 4 * int(tokens) == int(rows) * int(columns)
    assert "<|image_pad|>×" in shown and "<|image_pad|><|image_pad|>" not in shown
    with pytest.raises(SystemExit, match="row 99: the first step has"):
        script.main([config, "--row", "99"])
