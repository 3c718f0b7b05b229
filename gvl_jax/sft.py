"""Supervised fine-tuning on reasoning (PAPER §3): cross-entropy on the answer, images and all in packed rows.

A step is a set of samples. It is packed into as many micro-batches of one fixed shape as it needs, and the loss
divides by the step's own count of answer tokens, so packing changes no number.
"""

import functools
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gvl_jax import cost
from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import ConfigError, Sft
from gvl_jax.data.loader import SampleRejected, step_count, steps, to_example
from gvl_jax.data.packing import Layout, fitted, in_rounds, pack, shape_of, tail_rows
from gvl_jax.data.prepared import load_samples
from gvl_jax.data.tokenizer import Tokenizer, load_tokenizer
from gvl_jax.guard.prompt import answer_text, instruction_ids
from gvl_jax.losses import next_token_logprobs, sft_loss
from gvl_jax.metrics import CompileCounter, MetricsWriter, compile_ahead, progress, throughput, timed
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve, save_params
from gvl_jax.models.qwen_vl.model import abstract_params, bind
from gvl_jax.optim import begin, learning_rate, split_trained, update
from gvl_jax.run_folder import Stopped, done_already, open_run, stopping
from gvl_jax.sharding import agree, make_mesh, own_parts, place, shardings, value_and_grad
from gvl_jax.types import Batch, Example, Remat, Sample


@functools.partial(jax.jit, static_argnames=("model_config", "remat", "mesh"), donate_argnames=("grads",))
def accumulate(
    trained, frozen, grads, batch: Batch, total, *, model_config: QwenVLConfig, remat: Remat, mesh: Mesh | None = None
):
    """Add the gradient of one micro-batch, a part of it on each part of the mesh. → (grads, its share of the loss)."""

    def loss_of(params, batch, total):
        model = bind(model_config, params)
        hidden = model(batch, remat=remat)
        logprobs = next_token_logprobs(hidden, model.head_kernel(), batch.tokens, batch.loss_mask)
        return sft_loss(logprobs, batch.loss_mask, total), ()

    loss, _, new = value_and_grad(loss_of, mesh, trained, frozen, batch, total)
    return jax.tree.map(jnp.add, grads, new), loss


def build(config: Sft, tokenizer: Tokenizer, sample: Sample) -> Example | SampleRejected:
    """What is learned of a sample: its prompt and the answer, or why there is nothing to learn."""
    try:
        if sample.request_label is None:
            raise SampleRejected("no_label", "no request_label: nothing to learn")
        if config.reasoning and not sample.reasoning:
            raise SampleRejected("no_reasoning", "no reasoning: train with reasoning false, or synthesise it")
        reasoning = sample.reasoning if config.reasoning else None
        try:
            answer = answer_text(reasoning, sample.request_label, sample.response_label)
        except ValueError as error:
            raise SampleRejected("bad_reasoning", str(error)) from error
        return to_example(sample, tokenizer, config.images, config.max_length, answer)
    except SampleRejected as rejection:
        return rejection


class Step(NamedTuple):
    """What this process reads of a step."""

    rounds: list[tuple[tuple, list[Batch]]]  # see `in_rounds`
    counts: tuple[int, int, int]  # answer tokens, tokens, samples rejected
    rejected: list[SampleRejected]


def packed(built: list[Example | SampleRejected], *, rows: int, length: int, layout: Layout, parts: int) -> Step:
    """Micro-batches for `parts` devices, and what was rejected."""
    examples = [one for one in built if isinstance(one, Example)]
    rejected = [one for one in built if isinstance(one, SampleRejected)]
    batches = pack(examples, rows=rows, length=length, layout=layout, tail=tail_rows(rows))
    answers = sum(int(batch.loss_mask.sum()) for batch in batches)
    tokens = sum(int((batch.segments > 0).sum()) + len(layout.shared) for batch in batches)
    return Step(in_rounds(batches, parts, shape_of), (answers, tokens, len(rejected)), rejected)


def run(config: Sft) -> Path:
    """Train, checkpoint, export. → the exported model's directory, `output`/model.

    Raises ConfigError, HubError, CheckpointError, ValueError (records) with one line each; FloatingPointError when the
    loss is not finite.
    """
    folder = open_run(config, "model", "train", "output")
    target = folder / "model"
    if done_already(target):
        return target

    # ---------------------------------------------------------------- data
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    samples = load_samples(config.train, config.limit)

    # ---------------------------------------------------------------- model and optimizer
    mesh = make_mesh(config.mesh)
    parts, processes = own_parts(mesh), jax.process_count()
    if config.global_batch % processes:
        raise ConfigError(f"global_batch {config.global_batch} does not divide by {processes} processes")
    model_config = replace(load_config(source), dtype=config.dtype)
    shared = tuple(instruction_ids(tokenizer))
    layout = Layout(tokenizer.image_pad, config.buckets.patches, model_config.vision.window_size, shared)
    length = config.max_length - len(shared)  # of a row, without the instruction
    where = shardings(mesh, abstract_params(model_config))
    params = load_params(source, model_config, dtype=np.float32, shardings=where)
    trained, frozen = split_trained(params, config.trained)
    state, grads = begin(config.optim, trained, mesh)
    del params, trained

    # ---------------------------------------------------------------- where a killed run goes on
    total_steps = step_count(len(samples), config.global_batch, config.epochs)
    checkpoints = Checkpoints(folder, config.checkpoints, config.keep, config.keep_best)
    start = 0
    if checkpoints.latest() is not None:
        state, meta = checkpoints.restore(state)
        start = meta["step"]
    metrics = MetricsWriter(folder, resume_step=start - 1 if start else None)

    # ---------------------------------------------------------------- input, prepared ahead of the loop
    todo = timed(steps(
        samples, functools.partial(build, config, tokenizer), per_step=config.global_batch, epochs=config.epochs,
        seed=config.seed, start=start, workers=config.workers, share=(jax.process_index(), processes),
        mixture=list(zip(samples.parts, config.train_weights, strict=False)),
        finish=functools.partial(packed, rows=config.rows, length=length, layout=layout, parts=len(parts)),
    ))  # fmt: skip

    # ---------------------------------------------------------------- every shape that will come, compiled
    compiles = CompileCounter()
    buckets = config.buckets.patches if any(sample.images for sample in samples) else ()
    shapes = {(0, tail_rows(config.rows), length), *((patches, config.rows, length) for patches in (0, *buckets))}
    micro_step, step_update = compiles.watch(accumulate, expected=len(shapes)), compiles.watch(update)
    static = {"model_config": model_config, "remat": config.remat, "mesh": mesh}
    in_update: dict[str, Any] = {"optim": config.optim, "mesh": mesh}

    def placed(shape: tuple, some: list[Batch]) -> Batch:
        padded = [fitted(batch, shape, layout) for batch in some]
        return place(mesh, padded + [fitted(None, shape, layout)] * (len(parts) - len(padded)))

    one = np.float32(1)
    calls = {
        f"{rows} rows, {patches} patches": (
            micro_step, (state["trained"], frozen, grads, placed((patches, rows, width), []), one), static
        )
        for patches, rows, width in sorted(shapes)
    }  # fmt: skip
    compile_ahead(calls | {"update": (step_update, (state["trained"], state["opt_state"], grads, one), in_update)})

    # ---------------------------------------------------------------- loop
    rejected: Counter[str] = Counter()
    with closing(checkpoints), stopping() as asked, progress(total_steps, "sft", initial=start) as advance:
        read_at = time.monotonic()
        losses: list[float] = []  # since the last checkpoint

        def read(step: int, scalars: dict, tokens: int, slots: int, flops: float) -> None:
            """Log a step: waits for the device, and raises if the loss is not finite."""
            nonlocal read_at
            loss, before = float(scalars["train/loss"]), read_at
            read_at = time.monotonic()
            losses.extend([loss] if tokens else [])
            scalars |= throughput(tokens, max(slots, 1), flops, read_at - before)
            metrics.write(step, scalars | {"perf/compiles": compiles.total})
            advance(note=f"loss {loss:.3f}")

        unread = None  # the last step: read when the device has the next one to compute, so that it never waits
        for step in range(start, total_steps):
            waited, ours = next(todo, (0.0, Step([], (0, 0, 0), [])))  # the last step may have nothing for this process
            rejected.update(one.reason for one in ours.rejected)
            needs = [shape for shape, _ in ours.rounds]
            rounds, (answers, tokens, refused, stop) = agree(
                needs, config.global_batch // processes, *ours.counts, asked()
            )
            if stop:
                if unread:
                    read(*unread)
                if step and checkpoints.latest() != step:
                    checkpoints.save(step, state, {"step": step}, -float(np.mean(losses or [np.inf])))
                raise Stopped(f"saved after step {step} of {total_steps}")
            if not rounds and not step:
                first = next(iter(ours.rejected), "on another process")
                raise ValueError(f"all {refused} samples of the first step were rejected, the first: {first}")
            loss = jnp.zeros(())
            for number, shape in enumerate(rounds):
                batch = placed(shape, ours.rounds[number][1] if number < len(ours.rounds) else [])
                grads, share = micro_step(state["trained"], frozen, grads, batch, np.float32(answers), **static)
                loss = loss + share
            rate, grad_norm = learning_rate(config.optim, step, total_steps), jnp.zeros(())
            if rounds:  # else every sample was rejected
                state["trained"], state["opt_state"], grad_norm, grads = step_update(
                    state["trained"], state["opt_state"], grads, np.float32(rate), **in_update
                )
            scalars = {"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": grad_norm}
            scalars |= {f"data/rejected_{reason}": count for reason, count in rejected.items()}
            scalars["perf/input_seconds"] = waited
            work = [cost.prefill(model_config, rows, width, (patches,), len(shared)) for patches, rows, width in rounds]
            slots = sum(one.tokens for one in work) * mesh.size // config.mesh.tensor
            forward = sum((one.flops for one in work), 0.0) * mesh.size / config.mesh.tensor
            flops = cost.train(model_config, cost.Work(slots, forward, 0, 0.0), answers, remat=False).flops
            if unread:
                read(*unread)
            unread = (step, scalars, tokens, slots, flops)
            if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
                read(*unread)
                unread = None
                checkpoints.save(step + 1, state, {"step": step + 1}, -float(np.mean(losses or [np.inf])))
                losses.clear()
                read_at = time.monotonic()
    metrics.close()
    compiles.close()

    # ---------------------------------------------------------------- export
    save_params(target, state["trained"] | frozen, model_config, dtype=config.dtype, source=source)
    return target
