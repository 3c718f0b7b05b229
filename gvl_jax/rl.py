"""Online RL (PAPER §5-7): groups of rollouts on shared prompts, length-aware rewards, a clip that closes.

One step: sample a group of completions for every prompt, reward them, turn rewards into group advantages, and make
one or more clipped updates. A prompt is encoded once, pictures included, for its whole group: in the rollout, in
the scoring of the old log-probs, and in the update with its gradient.
"""

import functools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from sklearn.metrics import f1_score

from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import ConfigError, Rl
from gvl_jax.data.images import open_image
from gvl_jax.data.loader import SampleRejected, step_count, steps, to_example
from gvl_jax.data.packing import batch_prompts
from gvl_jax.data.records import load_records
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.guard.mixing import mixed_set
from gvl_jax.guard.reward import RewardParts, length_aware_reward
from gvl_jax.losses import clip_schedule, group_advantages, policy_loss
from gvl_jax.metrics import MetricsWriter, progress, timed
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve, save_params
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.optim import apply_updates, learning_rate, optimizer, split_trained
from gvl_jax.run_folder import append_rows, keep_rows, open_run, sample_row
from gvl_jax.sampler import BUDGET, Sampler, completion_logprobs, score
from gvl_jax.types import Batch, Example, Remat, Sample, Vision


class Group(NamedTuple):
    """One prompt with its completions, rewarded."""

    sample: Sample
    prompt: Example
    tokens: np.ndarray  # i32[R, J]
    logprobs: np.ndarray  # f32[R, J] by the sampler
    lengths: np.ndarray  # i32[R]
    stopped: np.ndarray  # i32[R]
    texts: list[str]
    rewards: list[RewardParts]
    advantages: np.ndarray  # f32[R]


class Completions(NamedTuple):
    """The completions of a micro-batch of prompts, as the loss reads them."""

    tokens: np.ndarray  # i32[B, R, J]
    mask: np.ndarray  # bool[B, R, J]
    advantages: np.ndarray  # f32[B, R]
    sampled: np.ndarray  # f32[B, R, J] the sampler's log-probs
    old_logprobs: np.ndarray  # f32[B, R, J] of the policy that sampled; not read if the policy in training is that one
    on_policy: np.ndarray  # bool[] it is: the first update of a step


@functools.partial(jax.jit, static_argnames=("model_config", "remat", "mean"), donate_argnames=("grads",))
def accumulate(
    trained, frozen, grads, batch: Batch, done: Completions, temperature, banned, clip, total,
    *, model_config: QwenVLConfig, remat: Remat, mean: str,
):  # fmt: skip
    """Add the policy gradient of one micro-batch. clip and temperature are arrays. → (grads, metrics)."""

    def loss_of(trained):
        model = bind(model_config, trained | frozen)
        logprobs, entropy = completion_logprobs(
            model, batch, done.tokens, temperature, banned, done.mask, entropy=True, remat=remat
        )
        # The ratio of the first update is exactly 1. Log-probs of another pass differ in the last bits, which a
        # nearly closed clip would take for a change of policy.
        old = jnp.where(done.on_policy, jax.lax.stop_gradient(logprobs), done.old_logprobs)
        loss, metrics = policy_loss(
            logprobs,
            old,
            done.advantages,
            done.mask,
            clip_low=clip,
            clip_high=clip,
            mean=mean,
            total=total,
        )
        gap = jnp.where(done.mask & done.on_policy, jnp.abs(logprobs - done.sampled), 0.0).sum()
        return loss, metrics | {"gap": gap, "entropy": entropy.sum()}

    (loss, metrics), new = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return jax.tree.map(jnp.add, grads, new), metrics | {"loss": loss}


def run(config: Rl) -> Path:
    """Train, checkpoint, export. → the exported model's directory, `output`/model."""
    folder = open_run(config, "model", "train", "output")
    target = folder / "model"
    if target.exists():
        return target

    # ---------------------------------------------------------------- data
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    samples = [sample for path in config.train for sample in load_records(path)][: config.limit]
    samples = mixed_set(samples, config.mixed_share, config.seed, open_image)

    def build(sample: Sample) -> tuple[Sample, Example] | SampleRejected:
        if config.blank_image_for_text and not sample.images:
            sample = sample._replace(images=(Image.new("RGB", (1, 1), "white"),))
        try:
            return sample, to_example(sample, tokenizer, config.images, max(config.buckets.prompt))
        except SampleRejected as rejection:
            return rejection

    # ---------------------------------------------------------------- model and optimizer
    model_config = replace(load_config(source), dtype=config.dtype)
    sampler = Sampler(tokenizer, model_config, config.buckets, config.sampling, config.prompts, slots=config.slots)
    params = jax.tree.map(jnp.asarray, load_params(source, model_config, dtype=np.float32))
    trained, frozen = split_trained(params, config.trained)
    state = {"trained": trained, "opt_state": optimizer(config.optim).init(trained)}
    update = jax.jit(functools.partial(apply_updates, config.optim), donate_argnums=(0, 1))

    # ---------------------------------------------------------------- where a killed run goes on
    total_steps = step_count(len(samples), config.prompts_per_step, config.epochs, whole=True)
    if not total_steps:
        raise ConfigError(
            f"{len(samples)} prompts, mixes included, do not make one step: prompts_per_step is "
            f"{config.prompts_per_step}; lower it, or give more data"
        )
    checkpoints = Checkpoints(folder)
    start = 0
    if checkpoints.latest() is not None:
        state, meta = checkpoints.restore(state)
        start = meta["step"]
    metrics = MetricsWriter(folder, resume_step=start - 1 if start else None)
    keep_rows(folder / "samples.jsonl", lambda row: row["step"] < start)

    # ---------------------------------------------------------------- loop
    rejected: Counter[str] = Counter()
    todo = steps(
        samples,
        build,
        per_step=config.prompts_per_step,
        epochs=config.epochs,
        seed=config.seed,
        start=start,
        whole=True,
        workers=config.workers,
    )
    with progress(total_steps, "rl", initial=start) as advance:
        for step, (waited, built) in enumerate(timed(todo), start):
            began = time.monotonic()
            rejected.update(one.reason for one in built if isinstance(one, SampleRejected))
            pairs = [one for one in built if not isinstance(one, SampleRejected)]
            if not pairs:
                raise ValueError(f"step {step}: all {len(built)} prompts were rejected, the first one: {built[0]}")
            if config.trained == "language":
                pairs = looked_at(config, sampler, frozen | state["trained"], pairs)
            groups = _roll_out(config, sampler, state["trained"] | frozen, pairs, step)
            rolled = time.monotonic()

            clip = np.float32(config.epsilon)
            if config.clip == "dynamic":
                clip = clip_schedule(step + 1, total_steps, config.epsilon)
            rate = learning_rate(config.optim, step, total_steps)
            parts = [
                groups[i : i + config.prompts_per_update] for i in range(0, len(groups), config.prompts_per_update)
            ]
            # All old log-probs come from the policy that sampled: before the first update, which needs none.
            params = state["trained"] | frozen
            scored = [list(_scored(config, sampler, params, part, first=not i)) for i, part in enumerate(parts)]
            sums: list[dict] = []
            for part, micro_batches in zip(parts, scored, strict=True):
                grads = jax.tree.map(jnp.zeros_like, state["trained"])
                total = len(part) * config.group_size
                if config.loss_mean == "token":
                    total = sum(int(group.lengths.sum()) for group in part)
                for batch, done in micro_batches:
                    grads, seen = accumulate(
                        state["trained"], frozen, grads, batch, done, np.float32(config.sampling.temperature),
                        sampler.vocabulary.banned, clip, np.float32(total),
                        model_config=model_config, remat=config.remat, mean=config.loss_mean,
                    )  # fmt: skip
                    sums.append(seen)
                if micro_batches:  # groups of equal rewards have no gradient
                    state["trained"], state["opt_state"], norm = update(
                        state["trained"], state["opt_state"], grads, np.float32(rate)
                    )
                    sums[-1] = sums[-1] | {"grad_norm": norm}
            scalars = _summary(groups, jax.device_get(sums), len(scored[0]), clip)
            scalars |= {"train/learning_rate": rate, "perf/rollout_seconds": rolled - began}
            scalars |= {"rollout/idle_share": 1 - sampler.used_steps / sampler.slot_steps}
            scalars |= {"perf/update_seconds": time.monotonic() - rolled, "perf/input_seconds": waited}
            scalars |= {f"data/rejected_{reason}": count for reason, count in rejected.items()}
            metrics.write(step, scalars)
            append_rows(folder / "samples.jsonl", (_row(step, group, folder) for group in groups[:4]))
            if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
                checkpoints.save(step + 1, state, {"step": step + 1})
            advance(note=f"reward {scalars['reward/total']:.3f} right {scalars['reward/safety']:.3f}")
    checkpoints.close()
    metrics.close()

    # ---------------------------------------------------------------- export
    save_params(target, state["trained"] | frozen, model_config, dtype=config.dtype, source=source)
    return target


@functools.partial(jax.jit, static_argnames=("model_config",))
def look(params, vision: Vision, *, model_config: QwenVLConfig):
    """What the vision tower makes of the pictures of a micro-batch."""
    return bind(model_config, params).visual(vision, model_config.dtype)


def looked_at(config: Rl, sampler: Sampler, params, pairs: list[tuple[Sample, Example]]) -> list:
    """The pairs with what a frozen tower makes of their pictures: once for rollout, scoring and all updates."""
    seen = list(pairs)
    with_pictures = [number for number, (_, prompt) in enumerate(pairs) if len(prompt.grids)]
    prompts, lengths = [pairs[number][1] for number in with_pictures], config.buckets.prompt
    for indices, batch in batch_prompts(prompts, rows=config.prompts, lengths=lengths, layout=sampler.layout):
        merged = np.asarray(look(params, batch.vision, model_config=sampler.model_config))
        for row, index in enumerate(indices):
            at, (sample, prompt) = batch.image_index[row], pairs[with_pictures[index]]
            seen[with_pictures[index]] = (sample, prompt._replace(merged=merged[at[at >= 0]]))
    return seen


def _roll_out(config: Rl, sampler: Sampler, params, pairs: list[tuple[Sample, Example]], step: int) -> list[Group]:
    """A rewarded group for every prompt, in the order of `pairs`."""
    groups: dict[int, Group] = {}
    prompts = [prompt for _, prompt in pairs]
    for indices, rollout in sampler(params, prompts, group_size=config.group_size, seed=config.seed, step=step):
        for row, (index, texts) in enumerate(zip(indices, sampler.texts(rollout), strict=True)):
            sample, prompt = pairs[index]
            stopped = rollout.stopped[row]
            rewards = [
                length_aware_reward(
                    text, sample.request_label, sample.response_label, beta=config.beta, max_length=config.max_length,
                    rule=config.reward, finished=bool(why != BUDGET),
                )
                for text, why in zip(texts, stopped, strict=True)
            ]  # fmt: skip
            totals = np.array([[reward.total for reward in rewards]], np.float32)
            advantages = np.asarray(group_advantages(totals, config.std_epsilon))[0]
            drawn = (rollout.tokens[row], rollout.logprobs[row], rollout.lengths[row], stopped)
            groups[index] = Group(sample, prompt, *drawn, texts, rewards, advantages)
    return [groups[index] for index in range(len(pairs))]


def _scored(config: Rl, sampler: Sampler, params, groups: list[Group], first: bool) -> Iterator:
    """Micro-batches (Batch, Completions) of the groups that have a gradient: those whose rewards differ.

    first: for the first update of a step, whose old log-probs are its own.
    """
    useful = [group for group in groups if np.any(group.advantages != 0)]
    prompts = [group.prompt for group in useful]
    temperature = np.float32(config.sampling.temperature)
    for indices, batch in batch_prompts(
        prompts, rows=config.prompts, lengths=config.buckets.prompt, layout=sampler.layout
    ):
        members = [useful[i] for i in indices]
        longest = max(int(group.lengths.max()) for group in members)
        length = min((size for size in config.buckets.completion if size >= longest), default=longest)
        shape = (config.prompts, config.group_size, length)
        tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        advantages, sampled, old = (
            np.zeros(shape[:2], np.float32),
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
        )
        for row, group in enumerate(members):
            width = min(length, group.tokens.shape[1])
            tokens[row, :, :width], sampled[row, :, :width] = group.tokens[:, :width], group.logprobs[:, :width]
            mask[row] = np.arange(length)[None] < group.lengths[:, None]
            advantages[row] = group.advantages
        if not first:
            banned = sampler.vocabulary.banned
            old = np.asarray(score(params, batch, tokens, temperature, banned, mask, config=sampler.model_config))
        yield batch, Completions(tokens, mask, advantages, sampled, old, np.asarray(first))


def _summary(groups: list[Group], sums: list[dict], on_policy: int, clip) -> dict[str, float]:
    """One step's metrics: rewards over all completions, ratios over the tokens that were trained.

    sums: of every micro-batch; the first `on_policy` of them are the first update's, where sampler and trainer agree
    but for rounding: train/sampler_gap is their mean |difference| of log-probs.
    """
    rewards = [reward for group in groups for reward in group.rewards]
    summary = {f"reward/{name}": float(np.mean([getattr(r, name) for r in rewards])) for name in RewardParts._fields}
    lengths = np.concatenate([group.lengths for group in groups])
    summary |= {
        "rollout/tokens": float(lengths.mean()),
        **{f"rollout/tokens_p{share}": float(np.percentile(lengths, share)) for share in (50, 95, 99, 100)},
        "rollout/truncated": float(np.mean(np.concatenate([group.stopped for group in groups]) == BUDGET)),
        "rollout/useful_groups": float(np.mean([np.any(group.advantages != 0) for group in groups])),
        "train/clip": float(np.asarray(clip)),
    }
    for task in ("request", "response"):
        gold = [getattr(group.sample, f"{task}_label") == "harmful" for group in groups for _ in group.rewards]
        right = [getattr(reward, task) == 1 for reward in rewards]  # a completion without a verdict is wrong
        said = [label == is_right for label, is_right in zip(gold, right, strict=True)]
        summary[f"rollout/f1_{task}"] = float(f1_score(gold, said, zero_division=0.0))
    if sums:
        first = sums[:on_policy]
        tokens = sum(float(s["tokens"]) for s in sums)
        summary |= {
            "train/sampler_gap": sum(float(s["gap"]) for s in first) / max(1, sum(float(s["tokens"]) for s in first)),
            "train/loss": sum(float(s["loss"]) for s in sums),
            "train/grad_norm": float(np.mean([s["grad_norm"] for s in sums if "grad_norm" in s])),
            "train/clip": float(sums[0]["clip_low"]),  # as the loss saw it
            "train/ratio": sum(float(s["ratio"]) for s in sums) / tokens,
            "train/ratio_max": max(float(s["ratio_max"]) for s in sums),
            "train/clipped": sum(float(s["clipped"]) for s in sums) / tokens,
            "train/approx_kl": sum(float(s["approx_kl"]) for s in sums) / tokens,
            "train/entropy": sum(float(s["entropy"]) for s in sums) / tokens,
        }
    return summary


def _row(step: int, group: Group, folder: Path) -> dict:
    """The first completion of a group, for the report."""
    return sample_row(group.sample, group.texts[0], bool(group.stopped[0] != BUDGET), folder) | {
        "step": step,
        "reward": group.rewards[0].total,
    }
