"""`gvl convert from-run`: a checkpoint of a run of sft or rl as a model directory, as the run itself exports one."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import yaml

from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import ConfigError, Mesh, Rl, Sft
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve, save_params
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.optim import begin, split_trained
from gvl_jax.settings import load
from gvl_jax.sharding import make_mesh, shardings


def export(run: Path, target: Path, step: int | None = None) -> int:
    """Write the model of checkpoint `step` (none given: the newest) to `target`. → the step.

    The run may be at work meanwhile: nothing of it is changed. Raises ConfigError: `run` is no run of sft or rl;
    CheckpointError: there is no such checkpoint; HubError: the model it began with is gone, or `target` is in use.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run} has no config.yaml; expected the run folder of gvl sft or gvl rl")
    settings = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    kind: type[Sft] | type[Rl] = Rl if "group_size" in settings else Sft
    if not {"train", "optim"} <= set(settings):
        raise ConfigError(f"{run} is a run of another stage; expected one of gvl sft or gvl rl")
    config = load(kind, str(file), [])
    source = resolve(config.model)
    model_config = replace(load_config(source), dtype=config.dtype)
    mesh = make_mesh(Mesh(1))
    shapes = abstract_params(model_config)
    trained, frozen = split_trained(shapes, config.trained)
    like = jax.eval_shape(lambda trained: begin(config.optim, trained, mesh)[0], trained)
    with closing(Checkpoints(run, config.checkpoints, read_only=True)) as checkpoints:
        state, meta = checkpoints.restore(like, step)
    if frozen:  # in no checkpoint: as the run began
        params = load_params(source, model_config, dtype=np.float32, shardings=shardings(mesh, shapes))
        frozen = split_trained(params, config.trained)[1]
    save_params(target, state["trained"] | frozen, model_config, dtype=config.dtype, source=source)
    return int(meta["step"])
