"""Groups of completions: rewarded, and as the micro-batches that scoring and the policy update compute."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gvl_jax.config import Rl
from gvl_jax.data.packing import batch_prompts, fitted, in_rounds, shape_of
from gvl_jax.guard.reward import RewardParts, length_aware_reward
from gvl_jax.losses import group_advantages
from gvl_jax.sampler import BUDGET, Sampler, score
from gvl_jax.sharding import agree, own_parts
from gvl_jax.types import Batch, Example, Rollout, Sample


class Group(NamedTuple):
    """One prompt with its completions, rewarded."""

    number: int  # of the prompt in its step
    sample: Sample
    prompt: Example | None  # None: it is on another process, or not needed any more
    tokens: np.ndarray  # i32[R, J]
    logprobs: np.ndarray  # f32[R, J] by the sampler
    lengths: np.ndarray  # i32[R]
    stopped: np.ndarray  # i32[R]
    texts: list[str]
    rewards: list[RewardParts]
    advantages: np.ndarray  # f32[R]

    def light(self) -> "Group":
        """What the other processes must know of it."""
        nothing = self.tokens[:0]
        return self._replace(sample=self.sample._replace(images=()), prompt=None, tokens=nothing, logprobs=nothing)


class Completions(NamedTuple):
    """The completions of a micro-batch of prompts, as the loss reads them."""

    tokens: np.ndarray  # i32[B, R, J]
    mask: np.ndarray  # bool[B, R, J]
    advantages: np.ndarray  # f32[B, R]
    sampled: np.ndarray  # f32[B, R, J] the sampler's log-probs
    old_logprobs: np.ndarray  # f32[B, R, J] of the policy that sampled; not read if the policy in training is that one
    on_policy: np.ndarray  # bool[] it is: the first update of a step


def rewarded(config: Rl, index: int, sample: Sample, prompt: Example, rollout: Rollout, texts: list[str]) -> Group:
    """Group `index` of a step. rollout: of this prompt alone, tokens i32[R, J]; texts: its completions."""
    rewards = [
        length_aware_reward(
            text, sample.request_label, sample.response_label, beta=config.beta, max_length=config.max_length,
            rule=config.reward, finished=bool(why != BUDGET),
        )
        for text, why in zip(texts, rollout.stopped, strict=True)
    ]  # fmt: skip
    totals = np.array([[reward.total for reward in rewards]], np.float32)
    advantages = np.asarray(group_advantages(totals, config.std_epsilon))[0]
    drawn = (rollout.tokens, rollout.logprobs, rollout.lengths, rollout.stopped)
    return Group(index, sample, prompt, *drawn, texts, rewards, advantages)


def micro_batches(config: Rl, sampler: Sampler, models: list[dict], groups: list[Group], first: bool) -> list:
    """Micro-batches (Batch, Completions) of the groups that have a gradient: those whose rewards differ.

    first: for the first update of a step, whose old log-probs are its own.
    """
    useful = [group for group in groups if np.any(group.advantages != 0)]
    prompts = [group.prompt for group in useful if group.prompt is not None]
    temperature, banned = np.float32(config.sampling.temperature), sampler.vocabulary.banned
    scored = []
    for number, (indices, batch) in enumerate(
        batch_prompts(prompts, rows=config.rows, lengths=config.buckets.prompt, layout=sampler.layout)
    ):
        members = [useful[i] for i in indices]
        longest = max(int(group.lengths.max()) for group in members)
        length = completion_bucket(config, longest)
        done = completions(config, length, first)
        for row, group in enumerate(members):
            width = min(length, group.tokens.shape[1])
            done.tokens[row, :, :width], done.sampled[row, :, :width] = (
                group.tokens[:, :width],
                group.logprobs[:, :width],
            )
            done.mask[row] = np.arange(length)[None] < group.lengths[:, None]
            done.advantages[row] = group.advantages
        if not first:  # read below, when all devices have something to do
            params, options = models[number % len(models)], {"config": sampler.model_config}
            done = done._replace(
                old_logprobs=score(params, batch, done.tokens, temperature, banned, done.mask, **options)
            )
        scored.append((batch, done))
    return [(batch, done._replace(old_logprobs=np.asarray(done.old_logprobs))) for batch, done in scored]


def completion_bucket(config: Rl, longest: int) -> int:
    """Tokens that completions of at most `longest` are padded to."""
    return min((size for size in config.buckets.completion if size >= longest), default=config.sampling.max_new_tokens)


def completions(config: Rl, length: int, first: bool = False) -> Completions:
    """Room for the completions of a micro-batch; first: see `micro_batches`."""
    shape = (config.rows, config.group_size, length)
    return Completions(
        np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape[:2], np.float32), np.zeros(shape, np.float32),
        np.zeros(shape, np.float32), np.asarray(first),
    )  # fmt: skip


def in_step(config: Rl, mesh: Mesh, scored: list) -> list[tuple[tuple[int, ...], list]]:
    """What all processes compute one after the other: (patches, rows, tokens of a prompt, of a completion), and for
    each of this process's devices a micro-batch of that shape at most, or None."""
    parts, bound = len(own_parts(mesh)), config.prompts_per_update // jax.process_count()
    rounds = in_rounds(scored, parts, lambda one: (*shape_of(one[0]), one[1].tokens.shape[2]))
    shapes, _ = agree([shape for shape, _ in rounds], bound)
    ours = [some for _, some in rounds] + [[]] * (len(shapes) - len(rounds))
    return [(shape, some + [None] * (parts - len(some))) for shape, some in zip(shapes, ours, strict=True)]


def filled(
    config: Rl, sampler: Sampler, shape: Sequence[int], one: tuple[Batch, Completions] | None, first: bool = False
) -> tuple[Batch, Completions]:
    """A micro-batch, or nothing, padded to a shape of `in_step`. first: see `micro_batches`."""
    *prompt, length = shape
    batch, done = one or (None, completions(config, length, first))
    more = ((0, 0), (0, 0), (0, length - done.tokens.shape[2]))
    done = Completions(*(np.pad(array, more) if array.ndim == 3 else array for array in done))
    merged = None  # what stands for pictures that a frozen tower has seen, where there are none
    if config.trained == "language":
        merged = np.zeros((0, sampler.model_config.text.hidden_size), jnp.dtype(sampler.model_config.dtype))
    return fitted(batch, prompt, sampler.layout, merged), done
