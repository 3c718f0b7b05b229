"""Examples → micro-batches of fixed shape: packed rows, one patch buffer in window order, images gathered by index."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gvl_jax.data.images import FACTOR, MERGE, PATCH_VALUES, patch_coords, window_order
from gvl_jax.types import Batch, Example, Vision

UNIT = MERGE**2  # patches of a merged token


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
        """Windows W of a buffer of `patches`: twice what whole ones need, as those at an image's edge are not full."""
        return max(1, 2 * patches // self.slots)


def pack(examples: Sequence[Example], *, rows: int, length: int, layout: Layout) -> list[Batch]:
    """Every example exactly once, whole, in as few micro-batches of shape [rows, length] as first-fit-decreasing finds;
    the last rows may be empty. What `layout.shared` takes off the examples does not count for `length`.

    Raises ValueError if an example is longer than a row or its images exceed the largest bucket: such examples are
    shrunk or rejected before.
    """
    own = [_without_shared(example, layout) for example in examples]
    return [
        _assemble([[own[i] for i in row] for row in micro_batch], rows, length, layout)
        for micro_batch in assign(own, rows=rows, length=length, layout=layout)
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
    for (length, _), members in groups.items():
        sizes = np.array([(1, len(prompts[i].patches), _windows(prompts[i], layout)) for i in members])
        for chosen in _first_fit(list(range(len(members))), sizes, capacity):
            indices = [members[c] for c in chosen]
            chosen_prompts, own = [prompts[i] for i in indices], length - len(layout.shared)
            yield indices, pack_prompts(chosen_prompts, rows=rows, length=own, layout=layout)


def assign(examples: Sequence[Example], *, rows: int, length: int, layout: Layout) -> list[list[list[int]]]:
    """Which example stands where: micro-batches of rows of indices into `examples`. Deterministic.

    Examples with images are placed first and text fills their gaps; the rest of the text gets rows, and if possible
    micro-batches, of its own, for which the vision tower does not run.
    """
    largest = max(layout.patch_buckets)
    capacity = np.array([length, largest, layout.windows(largest)])
    sizes = np.array([(len(e.tokens), len(e.patches), _windows(e, layout)) for e in examples]).reshape(-1, 3)
    for i, size in enumerate(sizes):
        if np.any(size > capacity):
            raise ValueError(
                f"example {i} does not fit: got tokens, patches, windows = {size.tolist()}, one row holds "
                f"{capacity.tolist()}; shrink its images, reject it, or raise max_length or buckets.patches"
            )
    order = sorted(range(len(examples)), key=lambda i: (sizes[i, 1] == 0, -sizes[i, 0], i))
    packed_rows = _first_fit(order, sizes, capacity)

    row_sizes = np.array([(1, *sizes[row, 1:].sum(axis=0)) for row in packed_rows]).reshape(-1, 3)
    row_capacity = np.array([rows, *capacity[1:]])
    row_order = sorted(range(len(packed_rows)), key=lambda r: (-row_sizes[r, 1], r))
    return [[packed_rows[r] for r in batch] for batch in _first_fit(row_order, row_sizes, row_capacity)]


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


def _windows(example: Example, layout: Layout) -> int:
    side = MERGE * layout.side
    return sum(-(-int(rows) // side) * -(-int(columns) // side) for _, rows, columns in example.grids)


def _assemble(packed: Sequence[Sequence[Example]], rows: int, length: int, layout: Layout) -> Batch:
    if len(packed) > rows:
        raise ValueError(f"got {len(packed)} rows, expected at most {rows}; raise `prompts` or split them")
    tokens = np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), bool)
    positions = np.zeros((3, rows, length), np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row, members in enumerate(packed):
        if (total := sum(len(example.tokens) for example in members)) > length:
            raise ValueError(f"row {row} has {total} tokens, expected at most {length}; use a longer bucket")
        start = 0
        for segment, example in enumerate(members, start=1):
            _check(example, layout.image_pad)
            span = slice(start, start + len(example.tokens))
            tokens[row, span] = example.tokens
            loss_mask[row, span] = example.loss_mask
            positions[:, row, span] = example.positions
            segments[row, span] = segment
            start = span.stop

    image_index = np.full((rows, length), -1, np.int32)
    vision = None
    images = [(example.patches, example.grids) for members in packed for example in members if len(example.grids)]
    if images:
        vision, merged_index = pack_vision(images, layout)
        image_index[(tokens == layout.image_pad) & (segments > 0)] = merged_index
    shared = np.array(layout.shared, np.int32) if layout.shared else None
    return Batch(tokens, loss_mask, positions, segments, image_index, vision, shared)


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
    """(patches f32[p, C], grids i32[n, 3]) of each example → one buffer of the smallest bucket that holds them, in
    window order, and i32[ΣM]: for each placeholder, image after image in reading order, where its merged token
    stands in the window-ordered buffer of merged tokens.

    Raises ValueError if a grid is not a still picture of whole merge blocks, disagrees with its patches, or if
    nothing fits.
    """
    patches_in, coords_in, owner_in, merged_index, window_sizes = [], [], [], [], []
    merged_count = image_count = 0
    for patches, grids in images:
        if _patches(grids) != len(patches):
            raise ValueError(f"grids {grids.tolist()} need {_patches(grids)} patches, got {len(patches)}")
        start = 0
        for grid in grids:
            if grid[0] != 1 or grid[1] % MERGE or grid[2] % MERGE:
                raise ValueError(f"grid {grid.tolist()} is not (1, even, even); resize to a multiple of 28 pixels")
            order, windows = window_order(grid, layout.side)
            count = UNIT * len(order)
            image_count += 1
            patches_in.append(_reorder(patches[start : start + count], order))
            coords_in.append(_reorder(patch_coords(grid), order))
            owner_in.append(np.full(count, image_count, np.int32))
            window_sizes += [UNIT * len(window) for window in windows]
            merged_index.append(merged_count + np.argsort(order))  # the inverse permutation
            merged_count += len(order)
            start += count

    used = UNIT * merged_count
    size = _bucket(used, len(window_sizes), layout)
    sizes = np.array(window_sizes)
    window = np.repeat(np.arange(len(sizes)), sizes)  # of each patch
    place = np.arange(used) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of each patch in its window
    slots = np.zeros(size, np.int32)
    slots[:used] = window * layout.slots + place
    table = np.full((layout.windows(size), layout.slots), size, np.int32)
    table.reshape(-1)[slots[:used]] = np.arange(used)
    vision = Vision(
        patches=_padded(np.concatenate(patches_in), size, PATCH_VALUES),
        coords=_padded(np.concatenate(coords_in), size, 2),
        image=np.concatenate([*owner_in, np.zeros(size - used, np.int32)]),
        windows=table,
        slots=slots,
    )
    return vision, np.concatenate(merged_index).astype(np.int32)


def _reorder(patches: np.ndarray, order: np.ndarray) -> np.ndarray:
    return patches.reshape(len(order), UNIT, -1)[order].reshape(patches.shape)


def _padded(values: np.ndarray, size: int, width: int) -> np.ndarray:
    padded = np.zeros((size, width), values.dtype)
    padded[: len(values)] = values
    return padded


def _bucket(patches: int, windows: int, layout: Layout) -> int:
    for size in sorted(layout.patch_buckets):
        if patches <= size and windows <= layout.windows(size):
            return size
    largest = max(layout.patch_buckets)
    raise ValueError(
        f"got {patches} patches in {windows} windows, the largest bucket holds {largest} in "
        f"{layout.windows(largest)}; lower images.max_pixels or raise buckets.patches"
    )


def padding(batch: Batch) -> dict[str, float]:
    """Shares of the batch that are padding: of its tokens and, where it has images, of its patch buffer."""
    shares = {"padding_tokens": float(np.mean(batch.segments == 0))}
    if batch.vision is not None:
        shares["padding_patches"] = float(np.mean(batch.vision.image == 0))
    return shares
