"""The command as people mistype it: one clear line, the right exit code, nothing written."""

import os
import shutil
import sys

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint

from gvl_jax.cli import VERBS, main
from gvl_jax.config import Sft
from gvl_jax.run_folder import Stopped
from gvl_jax.settings import dump, load


def gvl(*args) -> int:
    """The exit code, also where the argument parser exits by itself."""
    try:
        return main([str(arg) for arg in args])
    except SystemExit as stop:
        return 0 if stop.code is None else stop.code


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A whole checkpoint, of one layer."""
    return write_checkpoint(tmp_path_factory.mktemp("cli"), "Is it harmful?", 300)


@pytest.fixture
def work(tmp_path, model, monkeypatch):
    """A working directory with what the cases below name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"request": "Hi", "request_label": "unharmful"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"request": "Hi", "request_label": "safe"}\n')
    (tmp_path / "m").symlink_to(model)
    for name, lost in (("no_weights", "model.safetensors"), ("no_config", "config.json")):
        shutil.copytree(model, tmp_path / name)
        (tmp_path / name / lost).unlink()
    for name, text in {
        "key.yaml": "epocs: 2\n",
        "nested.yaml": "optim: {peek_lr: 1.0e-5}\n",
        "type.yaml": "epochs: two\n",
        "yaml.yaml": "a: [\n",
        "contradiction.yaml": "group_size: 1\n",
        "divide.yaml": "prompts_per_step: 10\nprompts_per_update: 4\n",
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


SFT = "sft --model {m} --train {t} --output run --dtype float32"
GOOD = SFT.format(m="m", t="good.jsonl")
WRONG = {
    "no verb": ("", 2, ""),
    "unknown verb": ("modarate m", 2, "unknown verb 'modarate'; did you mean moderate?"),
    "a verb like no other": ("xyz", 2, "unknown verb 'xyz'; expected one of demo, sft"),
    "unknown key": ("sft key.yaml", 2, "key.yaml: unknown key epocs; did you mean epochs?"),
    "unknown nested key": ("sft nested.yaml", 2, "unknown key optim.peek_lr; did you mean optim.peak_lr?"),
    "a key of a wrong type": ("sft type.yaml", 2, "epochs: got 'two' (str), expected int"),
    "not YAML": ("sft yaml.yaml", 2, "yaml.yaml: not valid YAML"),
    "no such config": ("rl none.yaml", 2, "none.yaml: cannot be read"),
    "contradiction in a file": ("rl contradiction.yaml", 2, "group_size is 1, expected at least 2"),
    "numbers that do not divide": ("rl divide.yaml", 2, "prompts_per_step 10 is no multiple of prompts_per_update 4"),
    "contradiction in flags": ("mine --sampling.temperature 0", 2, "sampling.temperature is 0 with samples 4"),
    "a file and a record": ("moderate m --input good.jsonl --request Hi", 2, "input is set and so is request"),
    "wrong flag": ("sft --epocs 2", 2, "--epochs"),
    "wrong flag of a script verb": ("demo --seed 2 --nonsense", 2, "--nonsense"),
    "flag without its value": ("eval --limit", 2, "--limit"),
    "model not set": ("sft --train good.jsonl --output run", 2, "model is not set"),
    "data not set": ("eval --model m --output run", 2, "data is not set"),
    "output not set": (
        "rl --model m --train good.jsonl",
        2,
        "output is not set; give it in the YAML file or as --output",
    ),
    "nothing to judge": ("moderate m", 2, "nothing to judge"),
    "no model to judge with": ("moderate --request Hi", 2, "model is not set"),
    "no such model": (SFT.format(m="./nowhere", t="good.jsonl"), 1, "./nowhere is not a directory"),
    "model without weights": (SFT.format(m="no_weights", t="good.jsonl"), 1, "found: no weights"),
    "model without config": (SFT.format(m="no_config", t="good.jsonl"), 1, "config.json does not exist"),
    "guard without weights": ("moderate no_weights --request Hi", 1, "found: no weights"),
    "no such records": (SFT.format(m="m", t="none.jsonl"), 1, "no such records file: none.jsonl"),
    "no records": (SFT.format(m="m", t="empty.jsonl"), 1, "empty.jsonl: holds no records"),
    "bad records": (SFT.format(m="m", t="bad.jsonl"), 1, "key 'request_label': got 'safe', expected harmful"),
    "nothing to learn": (GOOD, 1, "samples of the first step were rejected, the first: no reasoning"),
    "too few prompts": (
        "rl --model m --train good.jsonl --output run",
        2,
        "1 prompts, mixes included, do not make one step",
    ),
    "no such input": ("moderate m --input none.jsonl", 1, "no such records file: none.jsonl"),
    "no records to judge": ("moderate m --input empty.jsonl", 2, "empty.jsonl is empty"),
    "no run to report": ("report no_weights", 1, "no_weights holds no run"),
    "conversion onto itself": ("convert to-hf m no_weights", 1, "no_weights exists and is not empty"),
    "conversion without weights": ("convert from-hf no_weights out", 1, "found: no weights"),
    "half a conversion": ("convert to-hf m", 2, "target"),
    "data of no kind": ("data", 2, "verb"),
}


@pytest.mark.parametrize("command, code, said", WRONG.values(), ids=WRONG)
def test_wrong_usage_is_one_clear_line_and_the_right_exit_code(command, code, said, work, capsys):
    assert gvl(*command.split()) == code
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())  # the flag parser draws boxes
    assert said in err and "Traceback" not in err
    assert not any((work / name).exists() for name in ("run/model", "out"))


@pytest.mark.parametrize("command", [GOOD, "sft key.yaml", SFT.format(m="./nowhere", t="good.jsonl")])
def test_errors_of_ours_are_a_single_line(command, work, capsys):
    assert gvl(*command.split()) > 0
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_with_other_settings_is_refused_and_named(work, capsys):
    (work / "run").mkdir()
    (work / "run" / "config.yaml").write_text(dump(load(Sft, None, GOOD.split()[1:])))
    (work / "run" / "metrics.jsonl").touch()
    assert gvl(*GOOD.split(), "--epochs", "5", "--optim.peak-lr", "1e-3") == 2
    assert "run holds a run with other settings (epochs, optim); use another output" in capsys.readouterr().err
    assert yaml.safe_load((work / "run" / "config.yaml").read_text())["epochs"] == 3
    assert gvl(*GOOD.split(), "--resume", "never") == 2
    assert "run holds a run and resume is 'never'" in capsys.readouterr().err


def test_a_mistake_that_was_corrected_does_not_block_the_output(work, capsys):
    """The settings were written, but nothing has been done with them."""
    assert gvl(*SFT.format(m="./nowhere", t="good.jsonl").split()) == 1
    assert gvl(*GOOD.split()) == 1
    assert "holds a run" not in capsys.readouterr().err


PEER = "INTERNAL: Connection closed by peer [10.0.0.2]:34567"
AGAIN = {
    "stopped": (Stopped("saved after step 3 of 9"), 4, 75),
    "another process has gone": (jax.errors.JaxRuntimeError(PEER), 4, 76),
    "there is no other process": (jax.errors.JaxRuntimeError(PEER), 1, 1),
    "out of memory": (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 4, 1),
    "an error of ours": (ValueError("step 0: all prompts were rejected"), 4, 1),
}


@pytest.mark.parametrize("error, processes, code", AGAIN.values(), ids=AGAIN)
def test_launchers_are_told_to_start_again_what_may_go_better(error, processes, code, monkeypatch, capsys):
    def stage(args):
        raise error

    monkeypatch.setitem(VERBS, "sft", stage)
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(os, "_exit", sys.exit)
    assert gvl("sft") == code
    said = capsys.readouterr().err
    assert str(error) in said and ("the same command goes on from there" in said) == (code > 1)


def test_an_error_is_told_although_jax_is_broken(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax", None)  # importing it is an ImportError
    monkeypatch.delitem(sys.modules, "gvl_jax.run_folder")
    assert gvl("report", "nowhere") == 1
    assert capsys.readouterr().err.startswith("gvl report: nowhere holds no run")


@pytest.mark.parametrize("verb", [*VERBS, "convert to-hf", "data embedded"])
def test_every_verb_has_help(verb, capsys):
    assert gvl(*verb.split(), "--help") == 0
    out, err = capsys.readouterr()
    assert "usage" in out and not err


@pytest.mark.parametrize("command", [
    GOOD, "mine --model m --train good.jsonl --output run", "rl --model m --train good.jsonl --output run",
    "eval --model m --data good.jsonl --output run", "moderate m --input good.jsonl --output run",
])  # fmt: skip
def test_a_dry_run_shows_the_settings_and_writes_nothing(command, work, capsys):
    before = sorted(work.rglob("*"))
    assert gvl(*command.split(), "--dry-run") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"], shown["output"]) == ("m", "run")
    assert sorted(work.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------- convert, data


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_conversion_there_and_back_is_byte_equal_and_a_difference_is_seen(dtype, model, tmp_path, capsys):
    first, there, back = tmp_path / "first", tmp_path / "there", tmp_path / "back"
    assert gvl("convert", "from-hf", model, first, "--dtype", dtype) == 0
    assert gvl("convert", "to-hf", first, there, "--layout", "transformers5") == 0
    assert gvl("convert", "from-hf", there, back) == 0
    assert contents(first) == contents(back)
    assert any(name.startswith("model.language_model.") for name in load_file(there / "model.safetensors"))

    tensors = load_file(there / "model.safetensors")
    name = "model.language_model.norm.weight"
    tensors[name] = np.nextafter(tensors[name], 2).astype(tensors[name].dtype) if dtype == "float32" else -tensors[name]
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert gvl("convert", "verify", first, there) == 1
    named = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if not line.startswith("tensors ")]
    assert named[0] == "model.norm.weight" and named[1:] in ([], ["logits"])  # and nothing else


def test_conversion_keeps_every_bit_unless_told(model, tmp_path):
    assert gvl("convert", "from-hf", model, tmp_path / "same") == 0
    assert contents(tmp_path / "same") == contents(model)


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_twice(tmp_path):
    for name in ("one", "two"):
        assert gvl("data", "embedded", tmp_path / name, "--seed", "3") == 0
    one, two = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two and len(one) > 4000
