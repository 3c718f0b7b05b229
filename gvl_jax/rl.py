"""Online RL (PAPER §5-7): groups of rollouts on shared prompts, length-aware rewards, a clip that closes.

One step: sample a group of completions for every prompt, reward them, turn rewards into group advantages, and make
one or more clipped updates. A prompt is encoded once, pictures included, for its whole group: in the rollout, in
the scoring of the old log-probs, and in the update with its gradient.
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image
from sklearn.metrics import f1_score

from gvl_jax import cost
from gvl_jax.checkpoint import Checkpoints
from gvl_jax.config import ConfigError, Rl
from gvl_jax.data.loader import SampleRejected, step_count, steps, to_example
from gvl_jax.data.packing import batch_prompts
from gvl_jax.data.prepared import load_samples
from gvl_jax.data.records import picture_paths, to_record
from gvl_jax.data.tokenizer import load_tokenizer
from gvl_jax.groups import Completions, Group, filled, in_step, micro_batches, rewarded
from gvl_jax.guard.mixing import mix, mixed_set
from gvl_jax.guard.reward import RewardParts
from gvl_jax.losses import clip_schedule, policy_loss
from gvl_jax.metrics import CompileCounter, MetricsWriter, compile_ahead, progress, timed
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.hub import load_config, load_params, resolve, save_params
from gvl_jax.models.qwen_vl.model import abstract_params, bind
from gvl_jax.optim import begin, learning_rate, split_trained, update
from gvl_jax.run_folder import (
    Stopped,
    append_rows,
    done_already,
    keep_rows,
    open_run,
    replace_text,
    sample_row,
    stopping,
)
from gvl_jax.sampler import BUDGET, Sampler, completion_logprobs
from gvl_jax.sharding import (
    abstract,
    copies,
    exchange,
    gather,
    make_mesh,
    on_copy,
    place,
    shardings,
    value_and_grad,
)
from gvl_jax.types import Batch, Example, Remat, Rollout, Sample, Vision

MIXES_SHOWN = 20  # in mixed_examples.jsonl, with their pictures as they were before merging
KEEP_EVERY = 10.0  # seconds between two writes of what is finished of a rollout


@functools.partial(jax.jit, static_argnames=("model_config", "remat", "mean", "mesh"), donate_argnames=("grads",))
def accumulate(
    trained, frozen, grads, batch: Batch, done: Completions, temperature, banned, clip, total,
    *, model_config: QwenVLConfig, remat: Remat, mean: str, mesh: Mesh | None = None,
):  # fmt: skip
    """Add the policy gradient of one micro-batch, a part of it on each part of the mesh. clip and temperature are
    arrays. → (grads, metrics of each part)."""

    def loss_of(params, rows, rest):
        (batch, done), (temperature, banned, clip, total) = rows, rest
        logprobs, entropy = completion_logprobs(
            bind(model_config, params), batch, done.tokens, temperature, banned, done.mask, entropy=True, remat=remat
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
        return loss, metrics | {"gap": gap, "entropy": entropy.sum(), "loss": jax.lax.stop_gradient(loss)}

    rest = (temperature, banned, clip, total)
    _, metrics, new = value_and_grad(loss_of, mesh, trained, frozen, (batch, done), rest)
    return jax.tree.map(jnp.add, grads, new), metrics


def run(config: Rl) -> Path:
    """Train, checkpoint, export. → the exported model's directory, `output`/model."""
    folder = open_run(config, "model", "train", "output")
    target = folder / "model"
    if done_already(target):
        return target

    # ---------------------------------------------------------------- data
    source = resolve(config.model)
    tokenizer = load_tokenizer(source)
    given = load_samples(config.train, config.limit)
    samples = mixed_set(given, config.mixed_share, config.seed, config.mix_images)

    def build(sample: Sample) -> tuple[Sample, Example] | SampleRejected:
        if config.blank_image_for_text and not sample.images:
            sample = sample._replace(images=(Image.new("RGB", (1, 1), "white"),))
        try:
            return sample, to_example(sample, tokenizer, config.images, max(config.buckets.prompt))
        except SampleRejected as rejection:
            return rejection

    # ---------------------------------------------------------------- model and optimizer
    mesh = make_mesh(config.mesh)
    me, processes = jax.process_index(), jax.process_count()
    if config.prompts_per_update % processes:
        raise ConfigError(f"prompts_per_update {config.prompts_per_update} does not divide by {processes} processes")
    model_config = replace(load_config(source), dtype=config.dtype)
    sampler = Sampler(
        tokenizer, model_config, config.buckets, config.sampling, config.prompts, slots=config.slots, ahead=True
    )
    where = shardings(mesh, abstract_params(model_config))
    params = load_params(source, model_config, dtype=np.float32, shardings=where)
    trained, frozen = split_trained(params, config.trained)
    state, grads = begin(config.optim, trained, mesh)
    del params, trained

    # ---------------------------------------------------------------- where a killed run goes on
    total_steps = step_count(len(samples), config.prompts_per_step, config.epochs, whole=True)
    if not total_steps:
        raise ConfigError(
            f"{len(samples)} prompts, mixes included, do not make one step: prompts_per_step is "
            f"{config.prompts_per_step}; lower it, or give more data"
        )
    checkpoints = Checkpoints(folder, config.checkpoints, config.keep, config.keep_best)
    start = 0
    if checkpoints.latest() is not None:
        state, meta = checkpoints.restore(state)
        start = meta["step"]
    metrics = MetricsWriter(folder, resume_step=start - 1 if start else None)
    if me == 0:
        keep_rows(folder / "samples.jsonl", lambda row: row["step"] < start)
        mixes = [to_record(mix(given[a], given[b], "both"), folder) for a, b in samples.pairs[:MIXES_SHOWN]]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in mixes]
        replace_text(folder / "mixed_examples.jsonl", "".join(lines))

    # ---------------------------------------------------------------- loop
    rejected: Counter[str] = Counter()
    rewards: list[float] = []  # since the last checkpoint
    buckets, compiles = config.buckets, CompileCounter()
    possible = len(buckets.prompt) * (len(buckets.completion) + 1) * (len(buckets.patches) + 1)
    micro_step = compiles.watch(accumulate, expected=possible)
    compiled: set[tuple[int, ...]] = set()  # shapes of micro-batches
    static = {"model_config": model_config, "remat": config.remat, "mean": config.loss_mean, "mesh": mesh}
    todo = steps(
        samples,
        build,
        per_step=config.prompts_per_step,
        epochs=config.epochs,
        seed=config.seed,
        start=start,
        whole=True,
        workers=config.workers,
        share=(me, processes),
    )
    with closing(checkpoints), stopping() as asked, progress(total_steps, "rl", initial=start) as advance:
        for step, (waited, built) in enumerate(timed(todo), start):
            began = time.monotonic()
            rejected.update(one.reason for one in built if isinstance(one, SampleRejected))
            prompts = {me + i * processes: one for i, one in enumerate(built) if not isinstance(one, SampleRejected)}
            models = copies(mesh, state["trained"] | frozen, config.dtype)
            if config.trained == "language":
                prompts = looked_at(config, sampler, models, prompts)
            ours = _roll_out(config, sampler, models, prompts, step, checkpoints, asked)
            if exchange(np.array([asked()])).any():
                if step and checkpoints.latest() != step:
                    checkpoints.save(step, state, {"step": step}, float(np.mean(rewards)))
                raise Stopped(f"saved after step {step} of {total_steps}, with what is finished of the next")
            groups = sorted(gather([group.light() for group in ours]), key=lambda group: group.number)
            if not groups:
                raise ValueError(f"step {step}: all {len(built)} prompts were rejected, the first one: {built[0]}")
            rolled = time.monotonic()

            clip = np.float32(config.epsilon)
            if config.clip == "dynamic":
                clip = clip_schedule(step + 1, total_steps, config.epsilon)
            rate = learning_rate(config.optim, step, total_steps)
            parts = range(config.prompts_per_step // config.prompts_per_update)
            in_part = [[group for group in ours if group.number // config.prompts_per_update == i] for i in parts]
            # All old log-probs come from the policy that sampled: before the first update, which needs none.
            scored = [micro_batches(config, sampler, models, part, first=not i) for i, part in enumerate(in_part)]
            del models
            rounds = [in_step(config, mesh, one) for one in scored]
            rest = (np.float32(config.sampling.temperature), sampler.vocabulary.banned, clip)
            new = {shape for some in rounds for shape, _ in some} - compiled
            if new:  # those of a step together, before it: of the buckets' many combinations few occur
                one = np.float32(1)
                compile_ahead({
                    f"{patches} patches, {rows} x {width} + {length} tokens": (micro_step, (
                        state["trained"], frozen, grads,
                        *abstract(mesh, filled(config, sampler, (patches, rows, width, length), None)), *rest, one,
                    ), static)
                    for patches, rows, width, length in sorted(new)
                })  # fmt: skip
                compiled |= new
            sums: list[list[dict]] = []
            for i in parts:
                lengths = [group.lengths for group in groups if group.number // config.prompts_per_update == i]
                total = sum(int(one.sum()) if config.loss_mean == "token" else len(one) for one in lengths)
                sums.append([])
                for shape, some in rounds[i]:
                    inputs = place(mesh, [filled(config, sampler, shape, one, first=not i) for one in some])
                    grads, seen = micro_step(
                        state["trained"], frozen, grads, *inputs, *rest, np.float32(total), **static
                    )
                    sums[i].append(seen)
                if sums[i]:  # groups of equal rewards have no gradient
                    state["trained"], state["opt_state"], norm, grads = update(
                        state["trained"], state["opt_state"], grads, np.float32(rate), optim=config.optim, mesh=mesh
                    )
                    sums[i][-1] |= {"grad_norm": norm}
            scalars = _summary(groups, jax.device_get(sums), clip)
            scalars |= {"train/learning_rate": rate, "perf/rollout_seconds": rolled - began}
            scalars |= {"rollout/idle_share": 1 - sampler.used_steps / max(1, sampler.slot_steps)}
            seconds, parallel = time.monotonic() - rolled, mesh.size // config.mesh.tensor
            computed = _computed(config, sampler, [shape for some in rounds for shape, _ in some])
            scalars |= {
                "perf/update_seconds": seconds,
                "perf/update_padding_share": 1 - scalars.get("train/tokens", 0.0) / max(1, parallel * computed.tokens),
                "perf/update_tflops_per_device": computed.flops / config.mesh.tensor / seconds / 1e12,
                "perf/input_seconds": waited,
            }
            scalars |= {f"data/rejected_{reason}": count for reason, count in rejected.items()}
            metrics.write(step, scalars | {"perf/compiles": compiles.total})
            metrics.histogram(step, "rollout/lengths", np.concatenate([group.lengths for group in groups]))
            rewards.append(scalars["reward/total"])
            if me == 0:
                append_rows(folder / "samples.jsonl", (_row(step, group, folder) for group in ours[:4]))
            if (step + 1) % config.save_every == 0 or step + 1 == total_steps:
                checkpoints.save(step + 1, state, {"step": step + 1}, float(np.mean(rewards)))
                rewards.clear()
            advance(note=f"reward {scalars['reward/total']:.3f} right {scalars['reward/safety']:.3f}")
    metrics.close()
    compiles.close()

    # ---------------------------------------------------------------- export
    save_params(target, state["trained"] | frozen, model_config, dtype=config.dtype, source=source)
    return target


@on_copy
@functools.partial(jax.jit, static_argnames=("model_config",))
def look(params, vision: Vision, *, model_config: QwenVLConfig):
    """What the vision tower makes of the pictures of a micro-batch."""
    return bind(model_config, params).visual(vision, model_config.dtype)


def looked_at(config: Rl, sampler: Sampler, models: list[dict], prompts: dict) -> dict[int, tuple[Sample, Example]]:
    """The prompts with what a frozen tower makes of their pictures: once for rollout, scoring and all updates."""
    seen = dict(prompts)
    with_pictures = [index for index, (_, prompt) in prompts.items() if len(prompt.grids)]
    examples, lengths = [prompts[index][1] for index in with_pictures], config.buckets.prompt
    batches = batch_prompts(examples, rows=config.rows, lengths=lengths, layout=sampler.layout)
    for number, (places, batch) in enumerate(batches):
        params = models[number % len(models)]
        merged = np.asarray(look(params, batch.vision, model_config=sampler.model_config))
        for row, place_ in enumerate(places):
            at, (sample, prompt) = batch.image_index[row], prompts[with_pictures[place_]]
            seen[with_pictures[place_]] = (sample, prompt._replace(merged=merged[at[at >= 0]]))
    return seen


def _roll_out(
    config: Rl, sampler: Sampler, models: list[dict], prompts: dict[int, tuple[Sample, Example]], step: int,
    checkpoints: Checkpoints, asked: Callable[[], bool],
) -> list[Group]:  # fmt: skip
    """A rewarded group for every prompt of this process, in their order: what a killed run has finished of this step,
    and the rest anew. Asked to stop: those that are finished, which are kept.

    The rest has the same prompts and keys, but other neighbours: in fp32 its tokens are those that it would have had,
    in bfloat16 a rounding may send a draw another way."""
    groups: dict[int, Group] = {}

    def add(indices: Iterable[int], rollout: Rollout) -> None:
        for row, (index, texts) in enumerate(zip(indices, sampler.texts(rollout), strict=True)):
            if index in prompts:  # else it is another process's
                groups[index] = rewarded(config, index, *prompts[index], Rollout(*(a[row] for a in rollout)), texts)

    for part in checkpoints.parts(step):
        add(part.pop("index").tolist(), Rollout(**part))
    left = [index for index in prompts if index not in groups]
    fresh: list[tuple[list[int], Rollout]] = []
    saved_at = time.monotonic()
    rollouts = sampler(
        models, [prompts[index][1] for index in left], group_size=config.group_size, seed=config.seed, step=step,
        names=left,
    )  # fmt: skip
    for places, rollout in rollouts:
        fresh.append(([left[place_] for place_ in places], rollout))
        add(*fresh[-1])
        if asked() or time.monotonic() - saved_at > KEEP_EVERY:
            arrays = {name: np.concatenate([getattr(one, name) for _, one in fresh]) for name in Rollout._fields}
            indices = np.array([index for some, _ in fresh for index in some])
            checkpoints.keep_part(step, int(indices[0]), {"index": indices, **arrays})
            fresh, saved_at = [], time.monotonic()
        if asked():
            break
    return [groups[index] for index in prompts if index in groups]


def _summary(groups: list[Group], sums: list[list[dict]], clip) -> dict[str, float]:
    """One step's metrics: rewards over all completions, ratios over the tokens that were trained.

    sums: of each update, of each of its micro-batches, a number for each part of the mesh. In the first update sampler
    and trainer agree but for rounding: train/sampler_gap is their mean |difference| of log-probs.
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
    every = [one for of_update in sums for one in of_update]
    if every:

        def total(name: str, of: list[dict] = every) -> float:
            return float(sum(one[name].sum() for one in of))

        tokens = total("tokens")
        summary |= {
            "train/sampler_gap": total("gap", sums[0]) / max(1.0, total("tokens", sums[0])),
            "train/tokens": tokens,
            "train/loss": total("loss"),
            "train/grad_norm": float(np.mean([one["grad_norm"] for one in every if "grad_norm" in one])),
            "train/clip": float(every[0]["clip_low"][0]),  # as the loss saw it
            "train/ratio": total("ratio") / tokens,
            "train/ratio_max": max(float(one["ratio_max"].max()) for one in every),
            "train/clipped": total("clipped") / tokens,
            "train/approx_kl": total("approx_kl") / tokens,
            "train/entropy": total("entropy") / tokens,
        }
    return summary


def _computed(config: Rl, sampler: Sampler, shapes: list[tuple[int, ...]]) -> cost.Work:
    """What each part of the rows computes in micro-batches of these shapes: tokens of completions, padding included,
    and FLOPs without what is computed again."""
    model, shared, done = sampler.model_config, len(sampler.layout.shared), cost.Work(0, 0.0, 0, 0.0)
    for patches, rows, width, length in shapes:
        pictures = (patches,) if config.trained == "all" else ()
        forward = cost.groups(model, rows, width, pictures, shared, config.group_size, length)
        own = rows * config.group_size * length
        done += cost.train(model, forward, own, remat=False)._replace(tokens=own)
    return done


def _row(step: int, group: Group, folder: Path) -> dict:
    """The first completion of a group, for the report."""
    images = picture_paths(group.sample, folder)
    return sample_row(group.sample, group.texts[0], bool(group.stopped[0] != BUDGET), images) | {
        "step": step,
        "reward": group.rewards[0].total,
    }
