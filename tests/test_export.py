"""`gvl convert from-run` beside a run that may still be at work."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_models import tiny_config, tiny_params

from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import ConfigError, Mesh, Optim, Sft
from gvl_jax.export import export
from gvl_jax.models.qwen_vl.hub import save_params
from gvl_jax.optim import begin, split_trained
from gvl_jax.settings import dump
from gvl_jax.sharding import make_mesh


@pytest.fixture
def run(tmp_path):
    """A run that trains the decoder alone: checkpoints of steps 1 and 2, both of other weights than its model's."""
    config, run = tiny_config(), tmp_path / "run"
    save_params(tmp_path / "base", tiny_params(config), config, dtype="float32")
    run.mkdir()
    settings = Sft(model=str(tmp_path / "base"), train=("x",), output=str(run), trained="language", dtype="float32")
    (run / "config.yaml").write_text(dump(settings))
    checkpoints = Checkpoints(run)
    for step in (1, 2):
        trained, _ = split_trained(tiny_params(config, seed=step), "language")
        checkpoints.save(step, begin(Optim(), trained, make_mesh(Mesh(1)))[0], {"step": step})
    checkpoints.close()
    return run


def test_what_was_trained_comes_from_the_checkpoint_and_what_was_frozen_from_the_model(run, tmp_path):
    assert (export(run, tmp_path / "out"), export(run, tmp_path / "first", step=1)) == (2, 1)
    base, out, first = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out", "first"))
    assert base.keys() == out.keys() == first.keys()
    for name in base:
        frozen = name.startswith("visual.")
        assert np.array_equal(base[name], out[name]) == np.array_equal(first[name], out[name]) == frozen, name
    save_params(tmp_path / "second", tiny_params(tiny_config(), seed=2), tiny_config(), dtype="float32")
    second = load_file(tmp_path / "second" / "model.safetensors")
    assert all(np.array_equal(second[name], out[name]) for name in out if not name.startswith("visual."))


def test_an_export_changes_nothing_of_the_run(run, tmp_path, caplog):
    """The run is saving step 7, and its retention is removing step 2."""
    saving = run / "checkpoints" / "7.orbax-checkpoint-tmp"
    (saving / "state").mkdir(parents=True)
    (saving / "state" / "half").write_text("of an array")
    (run / "checkpoints" / "2" / "state" / "_METADATA").unlink()
    before = sorted(run.rglob("*"))
    assert export(run, tmp_path / "out") == 1
    assert sorted(run.rglob("*")) == before
    assert "2 is damaged" in caplog.text


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="is a run of another stage"):
        export(tmp_path, tmp_path / "out")
