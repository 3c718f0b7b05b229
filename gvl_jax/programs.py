"""The jitted functions of a stage as one call of each is made on a TPU slice, with shapes in place of arrays.

They are the largest calls that a config's buckets allow: what fits with them fits.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gvl_jax import cost, decoding, rl, sft
from gvl_jax.config import Rl, Sft
from gvl_jax.data.packing import UNIT, Layout, blank
from gvl_jax.groups import completion_bucket, completions
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.model import abstract_params
from gvl_jax.optim import optimizer, split_trained, update
from gvl_jax.sampler import CHUNK, score
from gvl_jax.sharding import AXES, abstract, apart, shardings


class Program(NamedTuple):
    """One compiled function of a stage, as one call of it is made."""

    name: str
    function: Any  # jitted
    args: tuple  # of shapes, with their placement
    static: dict[str, Any]
    held: int  # bytes per chip that are alive meanwhile and no argument: the optimizer's state, caches
    flops: float  # per chip, by formula
    reads: float  # bytes of HBM per chip, at least
    size: str | None  # the setting that its temporaries grow with
    donated: Any = ()  # the arguments whose memory the result takes


def bytes_of(tree: Any) -> int:
    """Of a tree of shapes, on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def shaped(mesh: Mesh, tree: Any, dtype=None) -> Any:
    """Parameters or an optimizer's state as shapes, placed as they are in training."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=where),
        tree,
        shardings(mesh, tree),
    )


class Stage(NamedTuple):
    """What the programs of a stage share."""

    config: Sft | Rl
    model: QwenVLConfig
    mesh: Mesh
    layout: Layout
    params: dict
    trained: dict
    frozen: dict
    opt_state: Any

    @property
    def reads(self) -> float:
        """Bytes of HBM of a micro-batch per chip: all weights in every pass, the gradient read and written."""
        weights = cost.itemsize(self.model) * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.params))
        passes = cost.TRAIN + (self.config.remat == "layers")
        return passes * weights / self.mesh.shape["tensor"] + 2 * bytes_of(self.trained)

    def per_chip(self, flops: float) -> float:
        """Of one part of the rows, which the tensor axis shares."""
        return flops / self.mesh.shape["tensor"]


def stage_of(config: Sft | Rl, model: QwenVLConfig, mesh: Mesh, shared: int) -> Stage:
    params = shaped(mesh, abstract_params(model), jnp.float32)
    trained, frozen = split_trained(params, config.trained)
    opt_state = shaped(mesh, jax.eval_shape(optimizer(config.optim).init, trained))
    layout = Layout(model.image_token_id, config.buckets.patches, model.vision.window_size, (0,) * shared)
    return Stage(config, model, mesh, layout, params, trained, frozen, opt_state)


def everywhere(mesh: Mesh, array: Any) -> Any:
    """An argument that all chips have."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def update_program(stage: Stage) -> Program:
    args = (stage.trained, stage.opt_state, stage.trained, everywhere(stage.mesh, np.float32(0)))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(stage.trained))
    reads = 2.0 * bytes_of(args)  # all four are read and written, the gradient as zeros
    return Program(
        "update", update, args, {"optim": stage.config.optim, "mesh": stage.mesh}, bytes_of(stage.frozen),
        12.0 * size / stage.mesh.size, reads, None, args[:3],
    )  # fmt: skip


def sft_programs(stage: Stage) -> list[Program]:
    """A micro-batch with the largest bucket of pictures, and the update."""
    config, mesh, patches = stage.config, stage.mesh, max(stage.config.buckets.patches)
    assert isinstance(config, Sft)
    shared = len(stage.layout.shared)
    batch = abstract(mesh, blank(config.rows, config.max_length - shared, patches, stage.layout))
    args = (stage.trained, stage.frozen, stage.trained, batch, everywhere(mesh, np.float32(0)))
    static = {"model_config": stage.model, "remat": config.remat, "mesh": mesh}
    forward = cost.prefill(stage.model, config.rows, config.max_length - shared, (patches,), shared)
    work = cost.train(stage.model, forward, forward.tokens, remat=config.remat == "layers")
    one = Program(
        f"accumulate {config.rows} rows, {patches} patches", sft.accumulate, args, static, bytes_of(stage.opt_state),
        stage.per_chip(work.flops), stage.reads, "rows", stage.trained,
    )  # fmt: skip
    return [one, update_program(stage)]


class Rollout(NamedTuple):
    """The sampler's shapes, of one part of the rows."""

    copy: dict  # of the parameters, on the devices of the part
    tokens: int  # of a prompt, without the instruction
    completion: int  # tokens, of the largest bucket that is needed
    pictures: tuple[int, ...]  # patches for which the vision tower runs
    training: int  # bytes per chip of what is trained, which stays


def sampling_shapes(stage: Stage) -> Rollout:
    config, model, mesh = stage.config, stage.model, stage.mesh
    assert isinstance(config, Rl)
    alone = Mesh(mesh.devices.reshape(-1, mesh.shape["tensor"])[0].reshape(1, 1, -1), AXES)
    budget = config.sampling.max_new_tokens
    return Rollout(
        shaped(alone, jax.eval_shape(apart, stage.params), jnp.dtype(model.dtype)),
        max(config.buckets.prompt) - len(stage.layout.shared),
        completion_bucket(config, budget),
        () if config.trained == "language" else (max(config.buckets.patches),),
        bytes_of((stage.params, stage.opt_state, stage.trained)),
    )


def prompts(stage: Stage, count: int, tokens: int) -> Any:
    """A micro-batch of prompts; if the vision tower is frozen, with what `rl.look` made of their pictures."""
    patches = max(stage.config.buckets.patches)
    batch = blank(count, tokens, patches, stage.layout)
    if stage.config.trained == "language":
        merged = np.zeros((patches // UNIT, stage.model.text.hidden_size), jnp.dtype(stage.model.dtype))
        return batch._replace(vision=merged)
    return batch


def local(tree: Any) -> Any:
    """Arrays of a sampler, as the compiler places them on the devices of its part."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), tree)


def rollout_programs(stage: Stage) -> list[Program]:
    """What the sampler runs, its caches at their longest."""
    config, model, text = stage.config, stage.model, stage.model.text
    assert isinstance(config, Rl)
    copy, S, J, pictures, training = sampling_shapes(stage)
    B, R = config.prompts, min(config.slots or config.group_size, config.group_size)
    budget = config.sampling.max_new_tokens
    shared, patches, weights = len(stage.layout.shared), max(config.buckets.patches), bytes_of(copy)
    few = max(1, B // 8)

    state = jax.eval_shape(functools.partial(decoding.empty_state, model, B, R, S, budget, budget))
    opening = local(np.zeros(shared, np.int32))
    kept = jax.eval_shape(functools.partial(decoding.instruction, config=model), copy, opening)
    banned, states = local(np.zeros(text.vocab_size, bool)), len(b"</result>") + 1
    vocab = decoding.Vocabulary(banned, banned, local(np.zeros((states, text.vocab_size), np.uint8)))
    prefilled = cost.rows(model, few, S, pictures, shared)
    token = cost.decoder_flops(text, B * R, B * R * (S + shared + budget)) + cost.head_flops(text, B * R)
    cached = cost.kv_bytes(model, B * S + B * R * budget) / stage.mesh.shape["tensor"]
    programs = []
    if config.trained == "language":
        vision = local(blank(B, S, patches, stage.layout).vision)
        programs.append(Program(
            f"look {patches} patches", rl.look, (copy, vision), {"model_config": model}, training,
            stage.per_chip(cost.vision_flops(model.vision, patches)), bytes_of(copy["visual"]), "patches",
        ))  # fmt: skip
    return [
        *programs,
        Program(
            f"prefill {few} x {S} tokens", decoding.prefill, (copy, local(prompts(stage, few, S)), kept),
            {"config": model}, training + bytes_of(state), stage.per_chip(prefilled.flops), weights, "prompts",
        ),
        Program(
            f"decode {B} x {R} slots, {budget} columns (bound: a token)", decoding.decode,
            (copy, kept, state, vocab, None, local(np.float32(0)), local(np.int32(0))),
            {"config": model, "steps": CHUNK, "top_p": config.sampling.top_p, "top_k": config.sampling.top_k},
            training, stage.per_chip(token), weights + cached, "prompts", state,
        ),
    ]  # fmt: skip


def rl_programs(stage: Stage) -> list[Program]:
    """Rollout, scoring (if a rollout is used for several updates), a micro-batch of the update, and the update."""
    config, model, mesh = stage.config, stage.model, stage.mesh
    assert isinstance(config, Rl)
    copy, S, J, pictures, training = sampling_shapes(stage)
    B, R, shared = config.rows, config.group_size, len(stage.layout.shared)
    own, V = B * R * J, model.text.vocab_size
    forward = cost.groups(model, B, S, pictures, shared, R, J)
    work = cost.train(model, forward, own, remat=config.remat == "layers")
    batch, done = prompts(stage, B, S), completions(config, J)
    programs = rollout_programs(stage)
    if config.prompts_per_step > config.prompts_per_update:
        heat, banned = local(np.float32(0)), local(np.zeros(V, bool))
        args: tuple = (copy, local(batch), local(done.tokens), heat, banned, local(done.mask))
        programs.append(Program(
            f"score {B} x {R} x {J} tokens", score, args, {"config": model}, training,
            stage.per_chip(forward.flops + cost.head_flops(model.text, own)), bytes_of(copy), "rows",
        ))  # fmt: skip
    number, banned = everywhere(mesh, np.float32(0)), everywhere(mesh, np.zeros(V, bool))
    args = (
        stage.trained, stage.frozen, stage.trained, abstract(mesh, batch), abstract(mesh, done), number, banned,
        number, number,
    )  # fmt: skip
    static = {"model_config": model, "remat": config.remat, "mean": config.loss_mean, "mesh": mesh}
    programs.append(Program(
        f"accumulate {B} x {R} x {J} tokens", rl.accumulate, args, static, bytes_of(stage.opt_state),
        stage.per_chip(work.flops), stage.reads, "rows", stage.trained,
    ))  # fmt: skip
    return [*programs, update_program(stage)]
