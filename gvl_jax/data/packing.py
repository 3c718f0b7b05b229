"""Examples → micro-batches of fixed shape: packed rows, one patch buffer in window order, images gathered by index."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from gvl_jax.data.images import FACTOR, MERGE, PATCH_VALUES, patch_coords, window_order
from gvl_jax.types import Batch, Example, Vision

UNIT = MERGE**2  # patches of a merged token
CALL = 128  # tokens that are computed about as fast as all weights are read
BUCKET_STEP = 64  # proposed buckets are multiples of it


class Layout(NamedTuple):
    """What packing must know of the model and of the run."""

    image_pad: int  # the placeholder's id
    patch_buckets: tuple[int, ...]  # sizes P of the patch buffer
    window: int = 112  # pixels of an attention window's side, from the model's config
    shared: tuple[int, ...] = ()  # ids that every example begins with: taken off the rows, computed once a micro-batch

    @property
    def side(self) -> int:
        """Merged tokens of a window's side."""
        return self.window // FACTOR

    @property
    def slots(self) -> int:
        """Patches of a whole window: U."""
        return UNIT * self.side**2

    def windows(self, patches: int) -> int:
        """Windows W of a buffer of `patches`. Those at an image's edge are not full: pictures of 64 to 1,024 merged
        tokens need 16 % more than whole windows would, so a quarter more is kept, and four for a buffer of small ones.
        """
        return 5 * patches // (4 * self.slots) + 4

    def size(self, patches: int, windows: int) -> int:
        """Patches of the smallest buffer that holds them and has the windows."""
        return max(patches, -(-4 * self.slots * (windows - 4) // 5)) if patches else 0

    def bucket(self, patches: int, windows: int) -> int:
        """The smallest bucket that holds them; 0 for no patches. Raises ValueError if none does."""
        for size in (0, *sorted(self.patch_buckets)):
            if self.size(patches, windows) <= size:
                return size
        largest = max(self.patch_buckets)
        raise ValueError(
            f"got {patches} patches in {windows} windows, the largest bucket holds {largest} in "
            f"{self.windows(largest)}; lower images.max_pixels or raise buckets.patches"
        )

    def possible(self, tokens: int) -> list[int]:
        """The buckets that pictures in `tokens` can need. A window takes a token at least, and three where it is a
        picture of its own: with the tokens before and after it."""
        most, sizes = self.size(UNIT * tokens, tokens // min(3, self.side)), sorted(self.patch_buckets)
        return [size for size, smaller in zip(sizes, (0, *sizes), strict=False) if smaller < most]


def tail_rows(rows: int) -> int:
    """Rows of the small micro-batches of text that end a step: a quarter of `rows`.

    Without them half a micro-batch of every step is empty: 6 % of the tokens at 11 micro-batches a step.
    """
    return max(1, rows // 4)


def pack(
    examples: Sequence[Example], *, rows: int, length: int, layout: Layout, tail: int | None = None
) -> list[Batch]:
    """Every example exactly once, whole, in micro-batches of shape [rows, length] or, with `tail`, of text in
    [tail, length]; see `assign`. What `layout.shared` takes off the examples does not count for `length`.

    Raises ValueError if an example is longer than a row or its images exceed the largest bucket: such examples are
    shrunk or rejected before.
    """
    own = [_without_shared(example, layout) for example in examples]
    return [
        _assemble([[own[i] for i in row] for row in micro_batch], len(micro_batch), length, layout)
        for micro_batch in assign(own, rows=rows, length=length, layout=layout, tail=tail)
    ]


def pack_prompts(prompts: Sequence[Example], *, rows: int, length: int, layout: Layout) -> Batch:
    """One prompt a row, in order, right-padded to `length`; rows after the last prompt are empty (segment 0)."""
    return _assemble([[_without_shared(prompt, layout)] for prompt in prompts], rows, length, layout)


def _without_shared(example: Example, layout: Layout) -> Example:
    S = len(layout.shared)
    if tuple(example.tokens[:S].tolist()) != layout.shared or example.loss_mask[:S].any():
        raise ValueError(f"an example does not begin with the {S} shared tokens of the instruction, or learns them")
    return example._replace(
        tokens=example.tokens[S:], loss_mask=example.loss_mask[S:], positions=example.positions[:, S:]
    )


def batch_prompts(
    prompts: Sequence[Example], *, rows: int, lengths: Sequence[int], layout: Layout
) -> Iterator[tuple[list[int], Batch]]:
    """Prompts of like length together, at most `rows` a micro-batch: (their indices, the micro-batch).

    Its rows have the smallest of `lengths` that holds the longest prompt, less what is shared. Text-only prompts go by
    themselves, so that the vision tower does not run for them. Raises ValueError for a prompt over all `lengths`.
    """
    largest = max(layout.patch_buckets)
    capacity = np.array([rows, largest, layout.windows(largest)])

    def length_of(i: int) -> int:
        fitting = [length for length in sorted(lengths) if len(prompts[i].tokens) <= length]
        if not fitting:
            raise ValueError(f"prompt {i} has {len(prompts[i].tokens)} tokens, buckets.prompt end at {max(lengths)}")
        return fitting[0]

    groups: dict[tuple[int, bool], list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: (len(prompts[i].tokens), i)):
        groups.setdefault((length_of(i), len(prompts[i].grids) > 0), []).append(i)
    for (length, _), members in sorted(groups.items()):
        sizes = np.array([(1, len(prompts[i].patches), _windows(prompts[i], layout)) for i in members])
        for chosen in _first_fit(list(range(len(members))), sizes, capacity):
            indices = [members[c] for c in chosen]
            chosen_prompts, own = [prompts[i] for i in indices], length - len(layout.shared)
            yield indices, pack_prompts(chosen_prompts, rows=rows, length=own, layout=layout)


class Place(NamedTuple):
    """Where a prompt stands in packed rows."""

    prompt: int  # its number
    row: int
    start: int
    length: int  # its tokens there, without the instruction


def pack_queue(
    prompts: Sequence[Example], *, rows: int, length: int, layout: Layout
) -> Iterator[tuple[list[Place], Batch]]:
    """Prompts in packed rows, as `pack` does it: micro-batches of shape [rows, length] and where each prompt stands."""
    own = [_without_shared(prompt, layout) for prompt in prompts]
    for members in assign(own, rows=rows, length=length, layout=layout):
        places = []
        for row, indices in enumerate(members):
            start = 0
            for index in indices:
                places.append(Place(index, row, start, len(own[index].tokens)))
                start += places[-1].length
        yield places, _assemble([[own[i] for i in indices] for indices in members], rows, length, layout)


def cheapest_length(prompts: Sequence[Example], lengths: Sequence[int], layout: Layout) -> int:
    """Of the `lengths` that hold each prompt, the one whose single rows of `pack_queue` compute least: tokens and
    padding, a merged token counted like a token, and a call of the model like CALL of them."""
    own = [_without_shared(prompt, layout) for prompt in prompts]
    sizes = example_sizes(own, layout)

    def cost(length: int) -> int:
        calls = assign(own, rows=1, length=length, layout=layout)
        pictures = sum(layout.bucket(*sizes[members, 1:].sum(axis=0)) for (members,) in calls)
        return (CALL + length) * len(calls) + pictures // UNIT

    return min((length for length in sorted(lengths) if length >= sizes[:, 0].max()), key=cost)


def assign(
    examples: Sequence[Example], *, rows: int, length: int, layout: Layout, tail: int | None = None
) -> list[list[list[int]]]:
    """Which example stands where: micro-batches of rows of indices into `examples`; an empty row is []. Deterministic.

    Rows are filled first-fit, the longest example first; those with images before the others, which fill their gaps.
    Rows with images then fill micro-batches up to a bucket of patches, rows of text complete these, and what is left
    of the text makes micro-batches of its own, for which the vision tower does not run. Of the buckets the one that
    computes least is filled, a merged token counted like a token.

    tail: rows of the last micro-batches of text, where these need fewer than `rows`.
    """
    largest = max(layout.patch_buckets)
    capacity = np.array([length, largest, layout.windows(largest)])
    sizes = example_sizes(examples, layout)
    for i, size in enumerate(sizes):
        if np.any(size > capacity):
            raise ValueError(
                f"example {i} does not fit: got tokens, patches, windows = {size.tolist()}, one row holds "
                f"{capacity.tolist()}; shrink its images, reject it, or raise max_length or buckets.patches"
            )
    order = sorted(range(len(examples)), key=lambda i: (sizes[i, 1] == 0, -sizes[i, 0], i))
    packed = [*_first_fit(order, sizes, capacity), []]  # the last one is the empty row
    sums = np.array([sizes[row].sum(axis=0) for row in packed], np.int64)

    def cost(plan: list[list[int]]) -> int:
        patches = sum(layout.bucket(*sums[members, 1:].sum(axis=0)) for members in plan)
        return length * sum(map(len, plan)) + patches // UNIT

    buckets = [size for size in sorted(layout.patch_buckets) if np.all(sums[:, 1:] <= (size, layout.windows(size)))]
    plan = min((_fill(sums, rows, tail or rows, (size, layout.windows(size))) for size in buckets), key=cost)
    return [[packed[row] for row in members] for members in plan]


def _fill(sums: np.ndarray, rows: int, tail: int, limit: tuple[int, int]) -> list[list[int]]:
    """Micro-batches of rows whose tokens, patches and windows are `sums`, with at most `limit` patches and windows."""
    *filled, empty = range(len(sums))
    images = sorted((row for row in filled if sums[row, 1]), key=lambda row: (-sums[row, 1], row))
    text = [row for row in filled if not sums[row, 1]]
    needs = np.column_stack([np.ones(len(sums), np.int64), sums[:, 1:]])
    plan = _first_fit(images, needs, np.array([rows, *limit]))
    for members in plan:
        count = rows - len(members)
        members += [*text[:count], *[empty] * (count - len(text))]
        del text[:count]
    while text:
        size = tail if -(-len(text) // tail) * tail < rows else rows
        plan.append([*text[:size], *[empty] * (size - len(text))])
        del text[:size]
    return plan


def propose_patch_buckets(patches: Sequence[int], count: int = 4) -> tuple[int, ...]:
    """The `count` sizes, the largest need among them, with the least padding for micro-batches of so many `patches`
    (without images: 0). Multiples of 64, found by dynamic programming over the distinct needs: exact."""
    rounded = [-(-need // BUCKET_STEP) * BUCKET_STEP for need in patches if need]
    sizes, times = np.unique(np.array(rounded, np.int64), return_counts=True)
    before = np.concatenate([[0], np.cumsum(times)])  # micro-batches that need less than size i
    # total[j]: patches of the buffers, at best, if the micro-batches below size j have the buckets chosen so far
    total, chosen = np.where(before, np.inf, 0.0), []
    for _ in range(min(count, len(sizes))):
        with_size = total[:-1, None] + sizes * (before[1:] - before[:-1, None])  # [from, to]: one bucket sizes[to]
        with_size[np.tril_indices(len(sizes), -1)] = np.inf
        chosen.append(with_size.argmin(axis=0))
        total = np.concatenate([[np.inf], with_size.min(axis=0)])
    buckets, end = [], len(sizes)
    for start in reversed(chosen):
        buckets.append(int(sizes[end - 1]))
        end = int(start[end - 1])
    return tuple(sorted(buckets))


def _first_fit(order: list[int], sizes: np.ndarray, capacity: np.ndarray) -> list[list[int]]:
    """Bins of indices: each goes into the first bin where every one of its sizes i[n, k] still fits capacity i[k]."""
    bins: list[list[int]] = []
    free = np.empty((len(order), len(capacity)), np.int64)
    for i in order:
        fits = np.all(free[: len(bins)] >= sizes[i], axis=1)
        chosen = int(fits.argmax()) if fits.any() else len(bins)
        if chosen == len(bins):
            bins.append([])
            free[chosen] = capacity
        bins[chosen].append(i)
        free[chosen] -= sizes[i]
    return bins


def example_sizes(examples: Sequence[Example], layout: Layout) -> np.ndarray:
    """i64[n, 3]: tokens, patches and windows of each."""
    return np.array([(len(e.tokens), len(e.patches), _windows(e, layout)) for e in examples], np.int64).reshape(-1, 3)


def _windows(example: Example, layout: Layout) -> int:
    side = MERGE * layout.side
    return sum(-(-int(rows) // side) * -(-int(columns) // side) for _, rows, columns in example.grids)


def blank(rows: int, length: int, patches: int, layout: Layout) -> Batch:
    """A micro-batch of this shape without content: what its compilation needs. patches 0: of text only."""
    return Batch(
        tokens=np.zeros((rows, length), np.int32),
        loss_mask=np.zeros((rows, length), bool),
        positions=np.zeros((3, rows, length), np.int32),
        segments=np.zeros((rows, length), np.int32),
        image_index=np.full((rows, length), -1, np.int32),
        vision=_blank_vision(patches, layout) if patches else None,
        shared=np.array(layout.shared, np.int32) if layout.shared else None,
    )


def fitted(batch: Batch | None, shape: Sequence[int], layout: Layout, merged: np.ndarray | None = None) -> Batch:
    """A micro-batch (None: nothing) padded to a shape (patches, rows, length) at least as large as `shape_of` it.

    merged: any Example.merged, if the pictures of a run come so: what stands for none at all is like it."""
    patches, rows, length = shape
    if batch is None:
        batch = blank(rows, length, 0, layout)
    if batch.vision is None and patches and merged is not None:
        batch = batch._replace(vision=merged[:0])
    below = ((0, rows - batch.tokens.shape[0]), (0, length - batch.tokens.shape[1]))
    vision = batch.vision
    if vision is None and patches:
        vision = _blank_vision(patches, layout)
    elif isinstance(vision, Vision) and len(vision.patches) < patches:
        empty = _blank_vision(patches, layout)
        for old, new in zip(vision, empty, strict=True):
            new[: len(old)] = old
        empty.windows[empty.windows == len(vision.patches)] = patches
        vision = empty
    elif vision is not None and not isinstance(vision, Vision):
        vision = np.pad(vision, ((0, patches // UNIT - len(vision)), (0, 0)))
    return Batch(
        np.pad(batch.tokens, below), np.pad(batch.loss_mask, below), np.pad(batch.positions, ((0, 0), *below)),
        np.pad(batch.segments, below), np.pad(batch.image_index, below, constant_values=-1), vision, batch.shared,
    )  # fmt: skip


def shape_of(batch: Batch) -> tuple[int, int, int]:
    """(patches, rows, length) of a micro-batch: how two are compared that are computed at the same time."""
    seen = batch.vision
    patches = 0 if seen is None else len(seen.patches) if isinstance(seen, Vision) else UNIT * len(seen)
    return patches, *batch.tokens.shape


def in_rounds(batches: Sequence[Any], parts: int, shape: Callable[[Any], tuple[int, ...]]) -> list[tuple[tuple, list]]:
    """Micro-batches that `parts` devices compute at the same time: (their common shape, up to `parts` of them), the
    largest first, so that those of a round are alike and nobody waits long."""
    ordered = sorted(batches, key=shape, reverse=True)
    rounds = [ordered[first : first + parts] for first in range(0, len(ordered), parts)]
    return [(tuple(max(sizes) for sizes in zip(*map(shape, some), strict=True)), some) for some in rounds]


def _blank_vision(patches: int, layout: Layout) -> Vision:
    return Vision(
        patches=np.zeros((patches, PATCH_VALUES), np.uint8),
        coords=np.zeros((patches, 2), np.int32),
        image=np.zeros(patches, np.int32),
        windows=np.full((layout.windows(patches), layout.slots), patches, np.int32),
        slots=np.zeros(patches, np.int32),
    )


def _assemble(packed: Sequence[Sequence[Example]], rows: int, length: int, layout: Layout) -> Batch:
    if len(packed) > rows:
        raise ValueError(f"got {len(packed)} rows, expected at most {rows}; raise `prompts` or split them")
    batch = blank(rows, length, 0, layout)
    for row, members in enumerate(packed):
        if (total := sum(len(example.tokens) for example in members)) > length:
            raise ValueError(f"row {row} has {total} tokens, expected at most {length}; use a longer bucket")
        start = 0
        for segment, example in enumerate(members, start=1):
            _check(example, layout.image_pad)
            span = slice(start, start + len(example.tokens))
            batch.tokens[row, span] = example.tokens
            batch.loss_mask[row, span] = example.loss_mask
            batch.positions[:, row, span] = example.positions
            batch.segments[row, span] = segment
            start = span.stop

    seen = [example for members in packed for example in members if len(example.grids)]
    if not seen:
        return batch
    vision: Vision | np.ndarray
    if seen[0].merged is None:
        vision, merged_index = pack_vision([(example.patches, example.grids) for example in seen], layout)
    else:  # the tower has been there
        merged = np.concatenate([example.merged for example in seen if example.merged is not None])
        merged_index = np.arange(len(merged), dtype=np.int32)
        size = layout.bucket(UNIT * len(merged), 0) // UNIT
        vision = np.pad(merged, ((0, size - len(merged)), (0, 0)))
    batch.image_index[(batch.tokens == layout.image_pad) & (batch.segments > 0)] = merged_index
    return batch._replace(vision=vision)


def _check(example: Example, image_pad: int) -> None:
    merged, grid_patches = int(np.sum(example.tokens == image_pad)), _patches(example.grids)
    if merged * UNIT != grid_patches or len(example.patches) != grid_patches:
        raise ValueError(
            f"got {merged} image placeholders and {len(example.patches)} patches for grids "
            f"{example.grids.tolist()}, expected {grid_patches // UNIT} and {grid_patches}"
        )
    if example.loss_mask[:1].any():
        raise ValueError("loss_mask is True on the first token, which nothing predicts; a prompt must precede it")


def _patches(grids: np.ndarray) -> int:
    return int(np.prod(grids, axis=1).sum())


def pack_vision(images: Sequence[tuple[np.ndarray, np.ndarray]], layout: Layout) -> tuple[Vision, np.ndarray]:
    """(patches u8[p, C], grids i32[n, 3]) of each example → one buffer of the smallest bucket that holds them, in
    window order, and i32[ΣM]: for each placeholder, image after image in reading order, where its merged token
    stands in the window-ordered buffer of merged tokens.

    Raises ValueError if a grid is not a still picture of whole merge blocks, disagrees with its patches, or if
    nothing fits.
    """
    pictures = []
    for patches, grids in images:
        if _patches(grids) != len(patches):
            raise ValueError(f"grids {grids.tolist()} need {_patches(grids)} patches, got {len(patches)}")
        start = 0
        for grid in grids:
            if grid[0] != 1 or grid[1] % MERGE or grid[2] % MERGE:
                raise ValueError(f"grid {grid.tolist()} is not (1, even, even); resize to a multiple of 28 pixels")
            end = start + int(grid.prod())
            pictures.append((patches[start:end], grid, *window_order(grid, layout.side)))
            start = end

    window_sizes = np.array([UNIT * len(window) for *_, windows in pictures for window in windows])
    used = int(window_sizes.sum())
    vision = _blank_vision(layout.bucket(used, len(window_sizes)), layout)
    window = np.repeat(np.arange(len(window_sizes)), window_sizes)  # of each patch
    place = np.arange(used) - np.repeat(np.cumsum(window_sizes) - window_sizes, window_sizes)  # in its window
    vision.slots[:used] = window * layout.slots + place
    vision.windows.reshape(-1)[vision.slots[:used]] = np.arange(used)
    merged_index, start = [], 0
    for number, (patches, grid, order, _) in enumerate(pictures, start=1):
        span = slice(start, start + len(patches))
        # A merged token's four patches are one item, copied once: with mode="raise" numpy would go through a buffer.
        four = patches.reshape(len(order), -1)
        np.take(four, order, axis=0, out=vision.patches[span].reshape(four.shape), mode="clip")
        vision.coords[span] = patch_coords(grid).reshape(len(order), -1)[order].reshape(-1, 2)
        vision.image[span] = number
        merged_index.append(start // UNIT + np.argsort(order))  # the inverse permutation
        start = span.stop
    return vision, np.concatenate(merged_index).astype(np.int32)


def padding(batch: Batch) -> dict[str, float]:
    """Shares of the batch that are padding: of its tokens and, where it has images, of its patch buffer."""
    shares = {"padding_tokens": float(np.mean(batch.segments == 0))}
    if batch.vision is not None:
        shares["padding_patches"] = float(np.mean(batch.vision.image == 0))
    return shares
