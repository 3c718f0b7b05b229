"""Completions: the prompts' keys and values once, a group of rollouts on each, and a stop that reads bytes.

`generate` is one compiled function per shape; `Sampler` feeds it prompts of any length.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gvl_jax.config import Buckets, Sampling
from gvl_jax.data.packing import Layout, batch_prompts
from gvl_jax.guard.prompt import instruction_ids
from gvl_jax.losses import token_logprobs
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.types import Array, Batch, Example, Rollout

RUNNING, END_TOKEN, VERDICT, BUDGET = range(4)  # why a completion stopped
VERDICT_END = b"</result>"


class Vocabulary(NamedTuple):
    """What the sampler knows of each id."""

    banned: Array  # bool[V] never drawn: vision ids, role markers, ids without a token
    end: Array  # bool[V] ends a completion
    transition: Array  # u8[states, V] the automaton that reads `VERDICT_END` in the bytes of the tokens


def vocabulary(tokenizer, vocab_size: int) -> Vocabulary:
    """Tables for `generate`, from the bytes of every token.

    The automaton's state is how many bytes of `VERDICT_END` have just been read, so a tag that is split over
    tokens in any way is seen, and one that is whole inside a token too. Its last state is final.
    """
    pieces = tokenizer.token_bytes()
    banned = np.ones(vocab_size, bool)
    banned[: len(pieces)] = False
    banned[list(tokenizer.banned_ids)] = True
    end = np.zeros(vocab_size, bool)
    end[[tokenizer.im_end, tokenizer.end_of_text]] = True

    final = len(VERDICT_END)
    byte_step = np.zeros((final + 1, 256), np.uint8)
    for state in range(final):
        for byte in range(256):
            read = VERDICT_END[:state] + bytes([byte])
            byte_step[state, byte] = next(n for n in range(state + 1, -1, -1) if read.endswith(VERDICT_END[:n]))
    byte_step[final] = final
    transition = np.repeat(np.arange(final + 1, dtype=np.uint8)[:, None], vocab_size, 1)
    for token, piece in enumerate(pieces):
        if not end[token]:
            states = np.arange(final + 1)
            for byte in piece:
                states = byte_step[states, byte]
            transition[:, token] = states
    return Vocabulary(banned, end, transition)


def truncate(logits, top_p: float, top_k: int):
    """Mask all but the top_k ids, then all but the fewest ids whose probabilities reach top_p. logits f32[..., V].

    Ids as likely as the last one kept stay too. No sort: the least probability kept is found by bisection over the
    bits of a float, whose order is that of the numbers, so 31 sums over the vocabulary give it exactly.
    """
    if top_k:
        kth = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        probs = jax.nn.softmax(logits, -1)
        bits = lax.bitcast_convert_type(probs, jnp.int32)

        def halve(_, bounds):
            low, high = bounds  # the ids at `low` and above reach top_p, those at `high` and above do not
            middle = low + (high - low) // 2
            enough = jnp.where(bits >= middle, probs, 0.0).sum(-1, keepdims=True) >= top_p
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)
        low, _ = lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, np.float32(1.01).view(np.int32))))
        logits = jnp.where(bits >= low, logits, -jnp.inf)
    return logits


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "top_p", "top_k", "greedy"))
def generate(
    params,
    batch: Batch,
    keys,
    temperature,
    vocab: Vocabulary,
    *,
    config: QwenVLConfig,
    max_new_tokens: int,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
) -> Rollout:
    """Prefill one prompt per row of `batch`, then decode R completions of each until all have stopped.

    keys: random keys [B, R], one per completion; the draw depends on the key and the step alone, never on what
    else is in the batch. A completion stops at an end token, when `</result>` is complete, or at the budget.
    log-probs are those of softmax(logits / temperature) over allowed ids, before top-p and top-k; greedy ones of
    temperature 1. Empty rows (segment 0) stop at once.
    """
    model = bind(config, params)
    B, R = keys.shape
    head = model.head_kernel().astype(config.dtype)
    last, prompt = model.prefill(batch)
    scale = 1.0 if greedy else temperature

    def draw(hidden, step):
        logits = jnp.matmul(hidden, head, preferred_element_type=jnp.float32) / scale
        logits = jnp.where(vocab.banned[None, None], -jnp.inf, logits)
        choice = logits
        if not greedy:
            noise = jax.vmap(jax.vmap(lambda k: jax.random.gumbel(jax.random.fold_in(k, step), logits.shape[-1:])))(
                keys
            )
            choice = truncate(logits, top_p, top_k) + noise
        token = jnp.argmax(choice, -1)
        chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
        return token.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, -1)

    def running(state):
        return (state["step"] < max_new_tokens) & jnp.any(state["stopped"] == RUNNING)

    def body(state):
        step, live = state["step"], state["stopped"] == RUNNING
        token, logprob = draw(state["hidden"], step)
        read = jnp.asarray(vocab.transition)[state["read"], token]
        stopped = jnp.where(read == len(VERDICT_END), VERDICT, RUNNING)
        stopped = jnp.where(jnp.asarray(vocab.end)[token], END_TOKEN, stopped)
        hidden, cache = model.decode(token, prompt, state["cache"], step)
        return {
            "step": step + 1,
            "hidden": hidden,
            "cache": cache,
            "read": jnp.where(live, read, state["read"]),
            "stopped": jnp.where(live, stopped, state["stopped"]),
            "lengths": state["lengths"] + live,
            "tokens": lax.dynamic_update_slice(state["tokens"], jnp.where(live, token, 0)[..., None], (0, 0, step)),
            "logprobs": lax.dynamic_update_slice(
                state["logprobs"], jnp.where(live, logprob, 0.0)[..., None], (0, 0, step)
            ),
        }

    empty = jnp.broadcast_to(~prompt.mask.any(1)[:, None], (B, R))
    state = {
        "step": jnp.zeros((), jnp.int32),
        "hidden": jnp.broadcast_to(last[:, None], (B, R, last.shape[-1])),
        "cache": model.empty_cache(B, R, max_new_tokens),
        "read": jnp.zeros((B, R), jnp.uint8),
        "stopped": jnp.where(empty, BUDGET, RUNNING),
        "lengths": jnp.zeros((B, R), jnp.int32),
        "tokens": jnp.zeros((B, R, max_new_tokens), jnp.int32),
        "logprobs": jnp.zeros((B, R, max_new_tokens), jnp.float32),
    }
    state = lax.while_loop(running, body, state)
    stopped = jnp.where(state["stopped"] == RUNNING, BUDGET, state["stopped"])
    return Rollout(state["tokens"], state["logprobs"], state["lengths"], stopped)


def completion_logprobs(model, batch: Batch, tokens, temperature, banned, *, remat: bool = False):
    """log-probs f32[B, R, J] of completions i32[B, R, J], each given its row's prompt and its own earlier tokens.

    The training forward: for what `generate` drew these are its log-probs. The prompt is computed once for its R
    completions, pictures included, so B·S + B·R·J tokens in place of B·R·(S + J).
    """
    last, prompt = model.prefill(batch, remat=remat)
    hidden = model.extend(tokens[:, :, :-1], prompt, remat=remat)
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1, last.shape[-1]))
    hidden = jnp.concatenate([first, hidden], axis=2)
    return token_logprobs(hidden, model.head_kernel(), tokens, temperature=temperature, banned=banned)


@functools.partial(jax.jit, static_argnames=("config",))
def score(params, batch: Batch, tokens, temperature, banned, *, config: QwenVLConfig):
    """`completion_logprobs` compiled, without gradient."""
    return completion_logprobs(bind(config, params), batch, tokens, temperature, banned)


def completion_keys(seed: int, step: int, names: Sequence[int], rows: int, group_size: int):
    """Random keys [rows, group_size]: a completion's draw depends on (seed, step, its prompt's name, its number)."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    padded = np.zeros(rows, np.uint32)
    padded[: len(names)] = names
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(base, padded)
    return jax.vmap(lambda key: jax.random.split(key, group_size))(per_prompt)


class Completion(NamedTuple):
    """One completion as text."""

    text: str
    finished: bool  # stopped by itself, not by the budget
    tokens: int


class Sampler:
    """`generate` with everything that stays the same in a stage: shapes, tables, settings."""

    def __init__(self, tokenizer, model_config: QwenVLConfig, buckets: Buckets, sampling: Sampling, rows: int):
        self.tokenizer, self.model_config, self.buckets, self.sampling, self.rows = (
            tokenizer, model_config, buckets, sampling, rows,
        )  # fmt: skip
        self.vocabulary = vocabulary(tokenizer, model_config.text.vocab_size)
        shared = tuple(instruction_ids(tokenizer))
        self.layout = Layout(tokenizer.image_pad, buckets.patches, model_config.vision.window_size, shared)

    def __call__(
        self,
        params,
        prompts: Sequence[Example],
        *,
        group_size: int = 1,
        seed: int = 0,
        step: int = 0,
        names: Sequence[int] | None = None,
    ) -> Iterator[tuple[list[int], Rollout]]:
        """Completions of all prompts, a micro-batch at a time: (indices of its prompts, Rollout of host arrays).

        Micro-batches come shortest prompts first. The draws of a prompt depend on (seed, step, its name) alone;
        names default to the indices.
        """
        for indices, batch in batch_prompts(prompts, rows=self.rows, lengths=self.buckets.prompt, layout=self.layout):
            rollout = generate(
                params,
                batch,
                completion_keys(seed, step, [i if names is None else names[i] for i in indices], self.rows, group_size),
                np.float32(self.sampling.temperature),
                self.vocabulary,
                config=self.model_config,
                max_new_tokens=self.sampling.max_new_tokens,
                top_p=self.sampling.top_p,
                top_k=self.sampling.top_k,
                greedy=self.sampling.temperature == 0,
            )
            host = jax.device_get(rollout)
            yield indices, Rollout(*(array[: len(indices)] for array in host))

    def score(self, params, prompts: Sequence[Example], completions: Sequence[Sequence[Sequence[int]]]) -> list:
        """Log-probs of given completions under softmax(logits) over allowed ids: prompts [B], ids [B][R][any length],
        R the same for all → [B] lists of R arrays f32[length]. Raises ValueError for one over all buckets."""
        scored: dict[int, list[np.ndarray]] = {}
        for indices, batch in batch_prompts(prompts, rows=self.rows, lengths=self.buckets.prompt, layout=self.layout):
            longest = max(len(ids) for index in indices for ids in completions[index])
            length = next((size for size in sorted(self.buckets.completion) if size >= longest), None)
            if length is None:
                raise ValueError(f"a completion has {longest} tokens, buckets.completion end below; raise them")
            tokens = np.zeros((self.rows, len(completions[0]), length), np.int32)
            for row, index in enumerate(indices):
                for number, ids in enumerate(completions[index]):
                    tokens[row, number, : len(ids)] = ids
            logprobs = np.asarray(
                score(params, batch, tokens, np.float32(1), self.vocabulary.banned, config=self.model_config)
            )
            for row, index in enumerate(indices):
                scored[index] = [logprobs[row, number, : len(ids)] for number, ids in enumerate(completions[index])]
        return [scored[index] for index in range(len(prompts))]

    def texts(self, rollout: Rollout) -> list[list[str]]:
        """The completions' text [B][R], without the end token."""
        ends = {self.tokenizer.im_end, self.tokenizer.end_of_text}
        return [
            [
                self.tokenizer.decode([t for t in tokens[:length].tolist() if t not in ends])
                for tokens, length in zip(*prompt, strict=True)
            ]
            for prompt in zip(rollout.tokens, rollout.lengths, strict=True)
        ]

    def complete(self, params, prompts: Sequence[Example], **options) -> list[list[Completion]]:
        """As above, as text: the group of each prompt, in the order of the prompts."""
        groups: dict[int, list[Completion]] = {}
        for indices, rollout in self(params, prompts, **options):
            for row, (index, texts) in enumerate(zip(indices, self.texts(rollout), strict=True)):
                ends = zip(texts, rollout.stopped[row], rollout.lengths[row], strict=True)
                groups[index] = [Completion(text, bool(why != BUDGET), int(tokens)) for text, why, tokens in ends]
        return [groups[index] for index in range(len(prompts))]
