"""Supervised fine-tuning on reasoning (PAPER §3): cross-entropy on the answer, images and all in packed rows.

A step is a set of samples. It is packed into as many micro-batches of one fixed shape as it needs, and the loss
divides by the step's own count of answer tokens, so packing changes no number.
"""

import functools
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import Sft
from gvl_jax.data.loader import SampleRejected, step_count, steps, to_example
from gvl_jax.data.packing import Layout, blank, pack, tail_rows
from gvl_jax.data.records import load_records
from gvl_jax.data.tokenizer import Tokenizer, load_tokenizer
from gvl_jax.guard.prompt import answer_text, instruction_ids
from gvl_jax.losses import next_token_logprobs, sft_loss
from gvl_jax.metrics import CompileCounter, MetricsWriter, compile_ahead, progress, throughput, timed
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve, save_params
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.optim import apply_updates, learning_rate, optimizer, split_trained
from gvl_jax.run_folder import open_run
from gvl_jax.types import Batch, Example, Remat, Sample


@functools.partial(jax.jit, static_argnames=("model_config", "remat"), donate_argnames=("grads",))
def accumulate(trained, frozen, grads, batch: Batch, total, *, model_config: QwenVLConfig, remat: Remat):
    """Add the gradient of one micro-batch. → (grads, its share of the loss)."""

    def loss_of(trained):
        model = bind(model_config, trained | frozen)
        hidden = model(batch, remat=remat)
        logprobs = next_token_logprobs(hidden, model.head_kernel(), batch.tokens, batch.loss_mask)
        return sft_loss(logprobs, batch.loss_mask, total)

    loss, new = jax.value_and_grad(loss_of)(trained)
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


def packed(
    built: list[Example | SampleRejected], *, rows: int, length: int, layout: Layout, groups: int
) -> tuple[list[Batch], list[SampleRejected]]:
    """A step as the device gets it, and what was rejected of it."""
    examples = [one for one in built if isinstance(one, Example)]
    batches = pack(examples, rows=rows, length=length, layout=layout, tail=tail_rows(rows, groups), groups=groups)
    return batches, [one for one in built if isinstance(one, SampleRejected)]


def run(config: Sft) -> Path:
    """Train, checkpoint, export. → the exported model's directory, `output`/model.

    Raises ConfigError, HubError, CheckpointError, ValueError (records) with one line each; FloatingPointError when the
    loss is not finite.
    """
    folder = open_run(config, "model", "train", "output")
    target = folder / "model"
    if target.exists():
        return target

    # ---------------------------------------------------------------- data
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    samples = [sample for path in config.train for sample in load_records(path)][: config.limit]

    # ---------------------------------------------------------------- model and optimizer
    model_config = replace(load_config(source), dtype=config.dtype)
    shared = tuple(instruction_ids(tokenizer))
    layout = Layout(tokenizer.image_pad, config.buckets.patches, model_config.vision.window_size, shared)
    length = config.max_length - len(shared)  # of a row, without the instruction
    params = jax.tree.map(jnp.asarray, load_params(source, model_config, dtype=np.float32))
    trained, frozen = split_trained(params, config.trained)
    state = {"trained": trained, "opt_state": optimizer(config.optim).init(trained)}
    zeros = jax.jit(functools.partial(jax.tree.map, jnp.zeros_like))

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def update(trained, opt_state, grads, rate):
        """→ also zeros, in the memory of the gradients, for the next step's."""
        return *apply_updates(config.optim, trained, opt_state, grads, rate), zeros(grads)

    # ---------------------------------------------------------------- where a killed run goes on
    total_steps = step_count(len(samples), config.global_batch, config.epochs)
    checkpoints = Checkpoints(folder)
    start = 0
    if checkpoints.latest() is not None:
        state, meta = checkpoints.restore(state)
        start = meta["step"]
    metrics = MetricsWriter(folder, resume_step=start - 1 if start else None)

    # ---------------------------------------------------------------- input, prepared ahead of the loop
    groups = jax.device_count() if config.rows % jax.device_count() == 0 else 1
    todo = steps(
        samples, functools.partial(build, config, tokenizer), per_step=config.global_batch, epochs=config.epochs,
        seed=config.seed, start=start, workers=config.workers,
        finish=functools.partial(packed, rows=config.rows, length=length, layout=layout, groups=groups),
    )  # fmt: skip

    # ---------------------------------------------------------------- every shape that will come, compiled
    compiles = CompileCounter()
    buckets = config.buckets.patches if any(sample.images for sample in samples) else ()
    shapes = {(tail_rows(config.rows, groups), 0), *((config.rows, patches) for patches in (0, *buckets))}
    micro_step, update = compiles.watch(accumulate, expected=len(shapes)), compiles.watch(update)
    static = {"model_config": model_config, "remat": config.remat}
    grads, one = zeros(state["trained"]), np.float32(1)
    calls = {
        f"{rows} rows, {patches} patches": (
            micro_step, (state["trained"], frozen, grads, blank(rows, length, patches, layout), one), static
        )
        for rows, patches in sorted(shapes)
    }  # fmt: skip
    compile_ahead(calls | {"update": (update, (state["trained"], state["opt_state"], grads, one), {})})

    # ---------------------------------------------------------------- loop
    rejected: Counter[str] = Counter()
    with progress(total_steps, "sft", initial=start) as advance:
        read_at = time.monotonic()

        def read(step: int, scalars: dict, tokens: int, slots: int) -> None:
            """Log a step: waits for the device, and raises if the loss is not finite."""
            nonlocal read_at
            loss, before = float(scalars["train/loss"]), read_at
            read_at = time.monotonic()
            scalars |= throughput(tokens, max(slots, 1), read_at - before)
            metrics.write(step, scalars | {"perf/compiles": compiles.total})
            advance(note=f"loss {loss:.3f}")

        unread = None  # the last step: read when the device has the next one to compute, so that it never waits
        for step, (waited, (batches, refused)) in enumerate(timed(todo), start):
            rejected.update(one.reason for one in refused)
            if not batches and not step:
                raise ValueError(f"all {len(refused)} samples of the first step were rejected, the first: {refused[0]}")
            total = np.float32(sum(int(batch.loss_mask.sum()) for batch in batches))
            loss = jnp.zeros(())
            for batch in batches:
                grads, share = micro_step(state["trained"], frozen, grads, batch, total, **static)
                loss = loss + share
            rate = learning_rate(config.optim, step, total_steps)
            state["trained"], state["opt_state"], grad_norm, grads = update(
                state["trained"], state["opt_state"], grads, np.float32(rate)
            )
            scalars = {"train/loss": loss, "train/learning_rate": rate, "train/grad_norm": grad_norm}
            scalars |= {f"data/rejected_{reason}": count for reason, count in rejected.items()}
            scalars["perf/input_seconds"] = waited
            tokens = sum(int((batch.segments > 0).sum()) + len(shared) for batch in batches)
            slots = sum(batch.tokens.size + len(shared) for batch in batches)
            if unread:
                read(*unread)
            unread = (step, scalars, tokens, slots)
            if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
                read(*unread)
                unread = None
                checkpoints.save(step + 1, state, {"step": step + 1})
                read_at = time.monotonic()
    checkpoints.close()
    metrics.close()
    compiles.close()

    # ---------------------------------------------------------------- export
    save_params(target, state["trained"] | frozen, model_config, dtype=config.dtype, source=source)
    return target
