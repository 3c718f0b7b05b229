"""Completions of prompts: rows and slots that are refilled as they finish, texts, and the log-probs of training.

What is compiled stands in `decoding`; `Sampler` feeds it prompts of any length and number.
"""

import copy
import functools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gvl_jax.config import Buckets, Sampling
from gvl_jax.data.packing import Layout, fitted, pack_queue
from gvl_jax.decoding import (
    BUDGET,
    CUT,
    Vocabulary,
    begin,
    decode,
    empty_state,
    insert,
    instruction,
    prefill,
    vocabulary,
)  # fmt: skip
from gvl_jax.guard.closing import Closing
from gvl_jax.guard.prompt import instruction_ids
from gvl_jax.losses import token_logprobs
from gvl_jax.metrics import progress
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.sharding import on_copy
from gvl_jax.slots import Entry, Slots, cache_sizes
from gvl_jax.types import Batch, Example, Remat, Rollout

CHUNK = 64  # tokens between two looks of the host: then slots are refilled, and caches grow


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
    """One prompt per row of `batch`, R completions of each, until all have stopped: the sampler without its queue.

    keys: u32[B, R, 2], see `completion_keys`. Empty rows (segment 0) stay empty.
    """
    B, R = keys.shape[:2]
    S = batch.tokens.shape[1]
    shared = None if batch.shared is None else instruction(params, batch.shared, config=config)
    state = empty_state(config, B, R, S, max_new_tokens, max_new_tokens)
    mask = np.greater(batch.segments, 0)
    after = np.where(mask, batch.positions, -1).max((0, 2)) + 1
    kept = prefill(params, batch, shared, config=config)
    state = insert(state, np.arange(B), np.arange(B) * S, mask.sum(1), after, *kept)
    fresh = np.broadcast_to(mask.any(1)[:, None], (B, R))
    budget, nowhere = np.full((B, R), max_new_tokens, np.int32), np.zeros((B, R), np.int32)
    state, _ = decode(
        params, shared, begin(state, fresh, keys, budget, nowhere, nowhere), vocab, None, temperature,
        np.int32(B * R), config=config, steps=max_new_tokens, top_p=top_p, top_k=top_k, greedy=greedy,
    )  # fmt: skip
    return Rollout(state.tokens, state.logprobs, state.lengths, state.stopped, state.scores)


def completion_logprobs(
    model, batch: Batch, tokens, temperature, banned, mask=None, *, entropy: bool = False, remat: Remat = "none"
):
    """log-probs f32[B, R, J] of completions i32[B, R, J], each given its row's prompt and its own earlier tokens.

    The training forward: for what `generate` drew these are its log-probs. The prompt is computed once for its R
    completions, pictures included, so B·S + B·R·J tokens in place of B·R·(S + J). mask bool[B, R, J]: the tokens
    wanted, the others are 0. entropy: also that of each distribution.
    """
    last, prompt = model.prefill(batch, remat=remat)
    # with the last token too, though nothing follows it: XLA compiles five times as long for 3,071 as for 3,072 on TPUs
    hidden = model.extend(tokens, prompt, remat=remat)
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1, last.shape[-1]))
    hidden = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)
    options = dict(temperature=temperature, banned=banned, entropy=entropy)
    return token_logprobs(hidden, model.head_kernel(), tokens, mask, **options)


@on_copy
@functools.partial(jax.jit, static_argnames=("config",))
def score(params, batch: Batch, tokens, temperature, banned, mask=None, *, config: QwenVLConfig):
    """`completion_logprobs` compiled, without gradient."""
    return completion_logprobs(bind(config, params), batch, tokens, temperature, banned, mask)


def completion_keys(seed: int, step: int, names: Sequence[int], group_size: int) -> np.ndarray:
    """Random keys u32[n, R, 2]: a completion's draw depends on (seed, step, its prompt's name, its number)."""
    base = jax.random.fold_in(jax.random.key(seed), step)
    per_prompt = jax.vmap(jax.random.fold_in, (None, 0))(base, np.asarray(names, np.uint32))
    return np.asarray(jax.random.key_data(jax.vmap(lambda key: jax.random.split(key, group_size))(per_prompt)))


class Completion(NamedTuple):
    """One completion as text."""

    text: str
    finished: bool  # not by running out of tokens
    tokens: int
    cut: bool = False  # the forced close came before its reasoning ended by itself
    scores: tuple[float, float] = (0.0, 0.0)  # P(harmful) of request and response, where a forced close decided


class Sampler:
    """Compiled functions with everything that stays the same in a stage: shapes, tables, settings.

    closing: reasoning ends at `</think>`, or in time for the budget, and a result block with its scores is forced.
    ahead: a call compiles what it may need before it begins, with progress: for stages, which need it in the end.
    """

    def __init__(
        self,
        tokenizer,
        model_config: QwenVLConfig,
        buckets: Buckets,
        sampling: Sampling,
        rows: int,
        *,
        slots: int | None = None,
        closing: Closing | None = None,
        ahead: bool = False,
    ):
        self.tokenizer, self.model_config, self.buckets, self.sampling = tokenizer, model_config, buckets, sampling
        self.rows, self.slots = rows, slots  # prompts decoded together, completions of each at a time (None: all)
        size = model_config.text.vocab_size
        self.closing = closing
        self.vocabulary = vocabulary(tokenizer, size, b"</think>" if closing else b"</result>")
        shared = tuple(instruction_ids(tokenizer))
        self.layout = Layout(tokenizer.image_pad, buckets.patches, model_config.vision.window_size, shared)
        self.slot_steps = self.used_steps = 0  # of slots since the last call began: computed, and by running ones
        self.ahead = ahead
        self.compiled: set[tuple[int, int, int]] = set()  # tokens of a prompt, slots of a row, columns; or 0, patches

    def __call__(
        self,
        params: dict | Sequence[dict],
        prompts: Sequence[Example],
        *,
        group_size: int = 1,
        seed: int = 0,
        step: int = 0,
        names: Sequence[int] | None = None,
        has_response: Sequence[bool] | None = None,
        budgets: Sequence[int] | None = None,
        fast: bool = False,
    ) -> Iterator[tuple[list[int], Rollout]]:
        """Completions of all prompts, those that are finished first: (indices of prompts, Rollout of host arrays).

        params: those of the model; or several `copies` on devices of their own, each of which takes its share.

        Prompts are computed in packed rows. One that finishes makes room for the next, so a long answer holds up its
        own slot alone. The draws of a prompt depend on (seed, step, its name) alone; names default to the
        indices. budgets: tokens of each prompt's completions, at most; none given: `sampling.max_new_tokens`.
        has_response, fast: for the forced close; fast: no reasoning, the labels and nothing else.
        """
        self.slot_steps = self.used_steps = 0
        keys = completion_keys(seed, step, range(len(prompts)) if names is None else names, group_size)
        answered = np.zeros(len(prompts), bool) if has_response is None else np.array(has_response, bool)
        limits = np.full(len(prompts), self.sampling.max_new_tokens) if budgets is None else np.array(budgets, int)
        if fast:
            assert self.closing is not None
            prompts = [extended(prompt, self.closing.opening) for prompt in prompts]
            limits = np.minimum(limits, self.closing.length)
        several = list(params) if not isinstance(params, dict) else [params]
        if not prompts:
            return
        most = max(len(prompt.tokens) for prompt in prompts)
        bucket = next((size for size in self.buckets.prompt if size >= most), None)
        if bucket is None:
            raise ValueError(
                f"a prompt has {most} tokens, buckets.prompt end at {max(self.buckets.prompt)}; raise them"
            )
        S = bucket - len(self.layout.shared)
        if self.ahead:
            self._compile(several, prompts, S, min(self.slots or group_size, group_size), int(limits.max()))
        if len(several) > 1:
            yield from self._at_once(several, S, prompts, keys, limits, answered, fast)
        else:
            yield from self._refilled(several[0], S, prompts, keys, limits, answered, fast)

    def _compile(self, several: list[dict], prompts: Sequence[Example], S: int, R: int, longest: int) -> None:
        """What such prompts may need and no call before did: each number of patches, and caches of every length up to
        that of the longest completion. On all copies at once, by rows without content."""
        rows, pictured = max(1, self.rows // 8), any(len(prompt.grids) for prompt in prompts)
        merged = next((prompt.merged for prompt in prompts if prompt.merged is not None), None)
        budget, lock = self.sampling.max_new_tokens, threading.Lock()
        sizes = (0, *(self.layout.possible(rows * S) if pictured else ()))
        new = [patches for patches in sizes if (S, 0, patches) not in self.compiled]
        caches = cache_sizes(min(CHUNK, budget), longest, budget)
        if {(S, R, columns) for columns in caches} <= self.compiled:
            caches = []
        if not (new or caches):
            return

        def rehearse(params: dict) -> None:
            with jax.default_device(_device(params)) if len(several) > 1 else nullcontext():  # as they are called later
                shared = instruction(params, np.array(self.layout.shared, np.int32), config=self.model_config)
                for patches in new or [0]:
                    batch = fitted(None, (patches, rows, S), self.layout, merged)
                    kept = prefill(params, batch, shared, config=self.model_config)
                    said(f"prompts of {S} tokens with {patches} patches")
                if caches:
                    slots = self.slots_for(params, shared, R, (S,), caches[0], CHUNK)
                for columns in caches:
                    if slots.columns < columns:
                        slots.grow()
                    slots.rehearse(kept)
                    said(f"answers of up to {columns} tokens")

        total = len(several) * (len(new or [0]) + len(caches))
        with progress(total, "compile") as advance, ThreadPoolExecutor(len(several)) as pool:

            def said(note: str) -> None:
                with lock:
                    advance(note=note)

            list(pool.map(rehearse, several))
        self.compiled |= {(S, 0, patches) for patches in new} | {(S, R, columns) for columns in caches}

    def _at_once(self, several: list[dict], S: int, prompts: Sequence[Example], keys, limits, answered, fast: bool):
        """A thread for each copy of the model: no device waits for another."""
        finished: queue.SimpleQueue = queue.SimpleQueue()
        stop = threading.Event()

        def work(number: int, params: dict) -> None:
            mine = list(range(number, len(prompts), len(several)))
            one = copy.copy(self)
            try:
                with jax.default_device(_device(params)):
                    shares = [prompts[i] for i in mine], keys[mine], limits[mine], answered[mine]
                    for indices, rollout in one._refilled(params, S, *shares, fast, stop) if mine else ():
                        finished.put(([mine[i] for i in indices], rollout))
                finished.put(one)
            except BaseException as error:  # the reader raises it
                finished.put(error)

        threads = [threading.Thread(target=work, args=one, daemon=True) for one in enumerate(several)]
        for thread in threads:
            thread.start()
        left = len(several)
        try:
            while left:
                item = finished.get()
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Sampler):
                    left -= 1
                    self.slot_steps += item.slot_steps
                    self.used_steps += item.used_steps
                else:
                    yield item
        finally:  # a thread that still decodes would hold up the end of the process
            stop.set()
            for thread in threads:
                thread.join()

    def _prefilled(self, params, shared, prompts: Sequence[Example], S: int) -> Iterator[tuple]:
        """Prompts one after the other, computed in packed micro-batches when the first of one is asked for."""
        for places, batch in pack_queue(prompts, rows=max(1, self.rows // 8), length=S, layout=self.layout):
            kept = prefill(params, batch, shared, config=self.model_config)
            for place in places:
                yield place, kept

    def slots_for(self, params, shared, slots: int, sizes: Sequence[int], columns: int, chunk: int) -> Slots:
        """Empty rows; see `Slots`. shared: what `instruction` gave."""
        return Slots(
            params, shared, self.model_config, self.vocabulary, self.closing, self.sampling, rows=self.rows,
            slots=slots, sizes=sizes, columns=columns, chunk=chunk,
        )  # fmt: skip

    def _refilled(self, params, S: int, prompts: Sequence[Example], keys, limits, answered, fast: bool, stop=None):
        """S: tokens of a row of prompts; stop: an Event that ends it."""
        B, group_size, budget = self.rows, keys.shape[1], self.sampling.max_new_tokens
        R = min(self.slots or group_size, group_size)
        shared = instruction(params, np.array(self.layout.shared, np.int32), config=self.model_config)
        slots = self.slots_for(params, shared, R, (S,), min(CHUNK, budget), CHUNK)
        line = self._prefilled(params, shared, prompts, S)
        waiting = next(line, None)
        while not (stop and stop.is_set()):
            while waiting is not None and (free := len(slots.free)):  # those of one micro-batch enter together
                kept = waiting[1]
                entering: list[Entry] = []
                while waiting is not None and len(entering) < free and waiting[1] is kept:
                    place, i = waiting[0], waiting[0].prompt
                    after = int(prompts[i].positions.max()) + 1
                    entering.append(Entry(i, place, after, keys[i], int(limits[i]), bool(answered[i]), fast))
                    waiting = next(line, None)
                slots.enter(entering, kept)
            if not slots.begin():
                return
            more = waiting is not None or slots.unbegun
            finished = slots.step(max(1, B * R // 8) if more else B * R)
            self.slot_steps, self.used_steps = slots.slot_steps, slots.used_steps
            if finished:
                yield finished

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

    def completions(self, rollout: Rollout) -> list[list[Completion]]:
        """The completions as text [B][R]."""
        return [
            [
                Completion(text, bool(end != BUDGET), int(tokens), bool(end == CUT), (float(pair[0]), float(pair[1])))
                for text, end, tokens, pair in zip(*group, strict=True)
            ]
            for group in zip(self.texts(rollout), rollout.stopped, rollout.lengths, rollout.scores, strict=True)
        ]

    def complete(
        self,
        params,
        prompts: Sequence[Example],
        *,
        names: Sequence[int] | None = None,
        has_response: Sequence[bool] | None = None,
        budgets: Sequence[int] | None = None,
        fast: bool = False,
        **options,
    ) -> list[list[Completion]]:
        """Completions as above, as text: the group of each prompt, in the order of the prompts. Those of like length
        are computed together, so that short ones are not read as long ones."""
        groups: dict[int, list[Completion]] = {}
        opening = len(self.closing.opening) if fast and self.closing else 0
        enough = self.rows * (1 if isinstance(params, dict) else len(params))
        for members in self._alike([len(prompt.tokens) + opening for prompt in prompts], enough):

            def of(values: Sequence | None, members=members) -> list | None:
                return None if values is None else [values[i] for i in members]

            chosen = [prompts[i] for i in members]
            each: dict[str, Any] = {"has_response": of(has_response), "budgets": of(budgets)}
            for places, rollout in self(params, chosen, names=of(names) or members, fast=fast, **each, **options):
                groups.update(zip([members[place] for place in places], self.completions(rollout), strict=True))
        return [groups[index] for index in range(len(prompts))]

    def _alike(self, lengths: Sequence[int], enough: int) -> list[list[int]]:
        """The prompts of one bucket, where they and the longer ones are `enough` to fill the rows of all copies."""
        groups, rest = [], sorted(range(len(lengths)), key=lambda i: lengths[i])
        for size in self.buckets.prompt:
            count = sum(lengths[i] <= size for i in rest)
            if min(count, len(rest) - count) >= enough:
                groups.append(sorted(rest[:count]))
                rest = rest[count:]
        return [*groups, sorted(rest)] if rest else groups


def _device(params: dict) -> jax.Device:
    return min(jax.tree.leaves(params)[0].devices(), key=lambda device: device.id)


def extended(prompt: Example, ids: Sequence[int]) -> Example:
    """A prompt with the beginning of its answer."""
    count = len(ids)
    after = prompt.positions.max() + 1 + np.broadcast_to(np.arange(count, dtype=np.int32), (3, count))
    return prompt._replace(
        tokens=np.append(prompt.tokens, np.array(ids, np.int32)),
        loss_mask=np.append(prompt.loss_mask, np.zeros(count, bool)),
        positions=np.concatenate([prompt.positions, after], axis=1),
    )
