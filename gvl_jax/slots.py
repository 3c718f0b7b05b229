"""Rows of slots in the middle of their work: prompts enter free rows, tokens are decoded, completions leave.

The host's half of `decoding`. Whoever feeds it decides which prompts enter and when: the sampler has a list of them,
a server a queue without end.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from gvl_jax.config import Sampling
from gvl_jax.data.packing import Place
from gvl_jax.decoding import RUNNING, Vocabulary, begin, decode, empty_state, grow, insert, stop
from gvl_jax.guard.closing import Closing
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.types import Array, Rollout


class Entry(NamedTuple):
    """A prompt that takes a row."""

    name: Any  # comes back with its completions
    place: Place  # in what `prefill` gave
    after: int  # M-RoPE position of the first completion token
    keys: np.ndarray  # u32[group_size, 2] of its completions
    budget: int  # tokens of a completion, at most
    has_response: bool  # for the forced close
    fast: bool  # no reasoning: the prompt ends with `Closing.opening`


def cache_sizes(first: int, longest: int, budget: int) -> list[int]:
    """Columns that caches have, one after the other, until a completion of `longest` tokens fits; at most `budget`."""
    sizes = [first]
    while sizes[-1] < min(longest, budget):
        sizes.append(min(2 * sizes[-1], budget))
    return sizes


class Slots:
    """B rows of R slots. sizes: what the longest prompt in the rows is rounded up to when they are read; columns: of
    the caches at first; chunk: tokens between two looks of the host: then slots are refilled, and caches grow."""

    def __init__(
        self,
        params: dict,
        shared: Any,
        config: QwenVLConfig,
        vocab: Vocabulary,
        closing: Closing | None,
        sampling: Sampling,
        *,
        rows: int,
        slots: int,
        sizes: Sequence[int],
        columns: int,
        chunk: int,
    ):
        self.params, self.shared, self.config, self.vocab = params, shared, config, vocab
        self.closing, self.sampling, self.sizes, self.chunk = closing, sampling, sorted(sizes), chunk
        self.columns, self.longest = columns, sampling.max_new_tokens
        self.state = empty_state(config, rows, slots, max(sizes), columns, sampling.max_new_tokens)
        self.entries: list[Entry | None] = [None] * rows
        self.begun = np.zeros(rows, int)  # completions of a row's prompt that have begun
        self.done: list[dict[int, tuple]] = [{} for _ in range(rows)]  # those that are complete, by their number
        self.number = np.full((rows, slots), -1)  # which completion stands in a slot; -1: none
        self.lengths = np.zeros((rows, slots), int)
        self.slot_steps = self.used_steps = 0  # steps of slots so far: computed, and by running ones

    @property
    def free(self) -> list[int]:
        """Rows without a prompt."""
        return [row for row, entry in enumerate(self.entries) if entry is None]

    @property
    def unbegun(self) -> bool:
        """Whether a prompt has completions that wait for a slot."""
        return any(
            entry is not None and begun < len(entry.keys) for entry, begun in zip(self.entries, self.begun, strict=True)
        )

    def enter(self, entries: Sequence[Entry], kept: tuple[Array, Any]) -> None:
        """Put prompts of one micro-batch into free rows. kept: what `prefill` gave.

        A fixed number at a time: one shape for any number."""
        rows, free = len(self.entries), self.free
        few, length = max(1, rows // 4), kept[0].shape[1]
        for first in range(0, len(entries), few):
            table = np.zeros((4, few), np.int32)
            table[0], table[2] = rows, 1
            for column, entry in enumerate(entries[first : first + few]):
                row, place = free.pop(0), entry.place
                self.entries[row], self.begun[row], self.done[row] = entry, 0, {}
                table[:, column] = row, place.row * length + place.start, place.length, entry.after
            self.state = insert(self.state, *table, *kept)

    def leave(self, gone: Callable[[Any], bool]) -> None:
        """Give up the prompts whose name is `gone`, and free their rows."""
        rows = [row for row, entry in enumerate(self.entries) if entry is not None and gone(entry.name)]
        if rows:
            slots = np.zeros(self.number.shape, bool)
            slots[rows], self.number[rows] = True, -1
            self.state = stop(self.state, slots)
            for row in rows:
                self.entries[row] = None

    def begin(self) -> bool:
        """Give the idle slots of every prompt its next completions. → whether any slot has work."""
        fresh, keys = np.zeros(self.number.shape, bool), np.zeros((*self.number.shape, 2), np.uint32)
        budget, node, response = np.zeros((3, *self.number.shape), np.int32)
        for row, entry in enumerate(self.entries):
            if entry is None:
                continue
            for slot in np.flatnonzero(self.number[row] < 0)[: len(entry.keys) - self.begun[row]]:
                self.number[row, slot], fresh[row, slot] = self.begun[row], True
                keys[row, slot], budget[row, slot] = entry.keys[self.begun[row]], entry.budget
                response[row, slot] = entry.has_response
                if entry.fast and self.closing:
                    node[row, slot] = self.closing.fast[int(entry.has_response)]
                self.begun[row] += 1
        if fresh.any():
            self.state = begin(self.state, fresh, keys, budget, node, response)
            self.lengths = np.where(fresh, 0, self.lengths)
        return bool((self.number >= 0).any())

    def grow(self) -> None:
        """Twice the columns, up to those of the longest completion: a new shape."""
        self.columns = cache_sizes(self.columns, self.columns + 1, self.longest)[-1]
        self.state = grow(self.state, columns=self.columns)

    def rehearse(self, kept: tuple[Array, Any]) -> None:
        """Compile all that a prompt needs from entering to leaving. kept: what `prefill` gave; the rows are empty, and
        will be."""
        slots, length = self.number.shape[1], kept[0].shape[1]
        entry = Entry(None, Place(0, 0, 0, length), length, np.zeros((slots, 2), np.uint32), 1, False, False)
        for _ in range(2):  # the arrays of a new state and those that were computed may be placed otherwise
            self.enter([entry], kept)
            self.begin()
            self.step(0)
            self.leave(lambda name: True)

    def step(self, ends: int) -> tuple[list[Any], Rollout] | None:
        """Decode a chunk of tokens, or fewer once `ends` more slots are done. → the prompts that are complete, which
        leave their rows, with their completions."""
        live = self.number >= 0
        budget = max(entry.budget for entry in self.entries if entry is not None)
        while self.columns < min(budget, self.lengths[live].max() + self.chunk):
            self.grow()
        most = max(entry.place.length for entry in self.entries if entry is not None)
        sampling, before = self.sampling, self.lengths
        self.state, steps = decode(
            self.params, self.shared, self.state, self.vocab, self.closing, np.float32(sampling.temperature),
            np.int32(min(live.size, (~live).sum() + ends)), config=self.config, steps=self.chunk,
            length=next(size for size in self.sizes if size >= most), top_p=sampling.top_p, top_k=sampling.top_k,
            greedy=sampling.temperature == 0,
        )  # fmt: skip
        state = self.state
        self.lengths, stopped, steps = jax.device_get((state.lengths, state.stopped, steps))
        self.slot_steps += live.size * int(steps)
        self.used_steps += int((self.lengths - before)[live].sum())
        ended = live & (stopped != RUNNING)
        if not ended.any():
            return None
        arrays = jax.device_get((state.tokens, state.logprobs, state.lengths, state.stopped, state.scores))
        for row, slot in zip(*np.nonzero(ended), strict=True):
            self.done[row][int(self.number[row, slot])] = tuple(array[row, slot] for array in arrays)
            self.number[row, slot] = -1
        names, groups = [], []
        for row, entry in enumerate(self.entries):
            if entry is not None and len(self.done[row]) == len(entry.keys):
                names.append(entry.name)
                groups.append([self.done[row][number] for number in range(len(entry.keys))])
                self.entries[row] = None
        if not names:
            return None
        return names, Rollout(*(np.stack([[one[k] for one in group] for group in groups]) for k in range(5)))
