"""`gvl convert verify`: two directories are one model only if tensors, files and logits say so."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import write_checkpoint

from gvl_jax import verify
from gvl_jax.cli import main
from gvl_jax.models.qwen_vl.hub import load_config, load_params, save_params


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("verify"), "How do I wash my car?", 300)


@pytest.fixture
def copy(model, tmp_path):
    return shutil.copytree(model, tmp_path / "copy")


def test_a_conversion_is_the_same_model_and_its_hashes_are_those_of_any_layout(model, tmp_path, capsys):
    config = load_config(model)
    params = load_params(model, config)
    save_params(tmp_path / "t5", params, config, layout="transformers5", dtype="float32", source=model)
    for first, second, out in ((model, tmp_path / "t5", "a.json"), (tmp_path / "t5", model, "b.json")):
        assert main(["convert", "verify", str(first), str(second), "--hashes", str(tmp_path / out)]) == 0
    assert "largest difference of the logits: 0.0\n" in capsys.readouterr().out
    hashes = json.loads((tmp_path / "a.json").read_text())
    assert hashes == json.loads((tmp_path / "b.json").read_text())
    assert hashes.keys() == load_file(model / "model.safetensors").keys()


def test_every_kind_of_difference_is_named(model, copy, capsys):
    tensors = load_file(copy / "model.safetensors")
    tensors["visual.merger.mlp.2.bias"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text() + " ")
    (copy / "LICENSE").write_text("free")
    (copy / "preprocessor_config.json").unlink()
    assert main(["convert", "verify", str(model), str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    tensor, less, more, other, logits = (line for line in lines if not line.startswith("tensors "))
    assert tensor.startswith("visual.merger.mlp.2.bias: F32 [32] sha256 ")
    assert more == f"LICENSE: only in {copy}" and less == f"preprocessor_config.json: only in {model}"
    assert other.startswith("tokenizer.json: other bytes")
    assert logits.startswith("logits: largest difference ") and float(logits.split()[3].rstrip(",")) > 0


def test_another_config_and_weights_that_do_not_fit_theirs_are_differences(model, copy):
    raw = json.loads((copy / "config.json").read_text())
    raw["text_config"]["rms_norm_eps"] = 1e-5
    (copy / "config.json").write_text(json.dumps(raw))
    assert verify.compare(model, copy).differences == ["config.json: another model; the logits were not compared"]
    shutil.copy(model / "config.json", copy)
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors")
    missing, logits = verify.compare(model, copy).differences
    assert missing == f"model.norm.weight: only in {model}"
    assert logits.startswith("logits: not compared, ") and "missing key: model.norm.weight" in logits


def test_logits_that_are_no_numbers_are_a_difference_and_can_be_left_out(model, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, copy / "model.safetensors")
    assert verify.compare(copy, copy).differences == ["logits: largest difference nan, expected 0"]
    assert verify.compare(copy, copy, logits=False).differences == []


def test_the_fixture_depends_on_pictures_and_text(model):
    config = load_config(model)
    example = verify.fixture(config)
    assert (example.grids[:, 1] != example.grids[:, 2]).all() and len(example.grids) == 2
    forward = verify.load_forward(model)
    logits = forward(example)
    assert logits.shape == (len(example.tokens), config.text.vocab_size) and np.ptp(logits) > 0.1
    assert np.abs(logits[-1] - forward(example._replace(patches=255 - example.patches))[-1]).max() > 0
