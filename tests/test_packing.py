from itertools import combinations

import jax
import numpy as np
import pytest
import tiny_models

from gvl_jax.buckets import propose
from gvl_jax.data.images import patch_coords, smart_resize
from gvl_jax.data.packing import (
    Layout,
    assign,
    blank,
    cheapest_length,
    example_sizes,
    fitted,
    in_rounds,
    pack,
    pack_prompts,
    pack_queue,
    pack_vision,
    padding,
    propose_patch_buckets,
    shape_of,
    tail_rows,
)
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.types import Example

PAD_ID = 7  # stands for image_pad
BUCKETS = (256, 1024, 4096)
LAYOUT = Layout(PAD_ID, BUCKETS)


def example(rng: np.random.Generator, text: int, *grids: tuple[int, int]) -> Example:
    """`text` tokens in all, the images' placeholders somewhere among them; every patch is different."""
    grid = np.array([(1, *g) for g in grids], np.int32).reshape(-1, 3)
    tokens = rng.integers(10, 10**6, text)
    for _, rows, columns in grid:
        at = rng.integers(1, len(tokens) + 1)
        tokens = np.insert(tokens, at, np.full(rows * columns // 4, PAD_ID))
        tokens = np.append(tokens, 8)
    count = int(grid.prod(axis=1).sum())
    return Example(
        tokens=tokens.astype(np.int32),
        loss_mask=np.arange(len(tokens)) >= len(tokens) // 2,
        positions=rng.integers(0, 99, (3, len(tokens))).astype(np.int32),
        patches=rng.integers(0, 256, (count, 588), np.uint8),
        grids=grid,
    )


def corpus(seed: int, count: int = 25) -> list[Example]:
    rng = np.random.default_rng(seed)
    side = lambda: 2 * int(rng.integers(1, 13))  # noqa: E731
    return [
        example(rng, int(rng.integers(4, 90)), *[(side(), side()) for _ in range(rng.choice([0, 0, 1, 2]))])
        for _ in range(count)
    ]


def segments_of(batch):
    """(row, slice) of each example in a batch, in row-major order."""
    for row, segments in enumerate(batch.segments):
        for segment in range(1, segments.max() + 1):
            where = np.flatnonzero(segments == segment)
            assert np.array_equal(where, np.arange(where[0], where[-1] + 1))
            yield row, slice(where[0], where[-1] + 1)


def packed(examples, **changes):
    options = dict(rows=3, length=512, layout=LAYOUT) | changes
    return pack(examples, **options)


@pytest.mark.parametrize("options", [{}, {"tail": 1}, {"tail": 2}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_every_example_comes_back_whole_and_once(seed, options):
    examples = corpus(seed)
    batches = packed(examples, **options)
    by_text = {e.tokens.tobytes(): e for e in examples}
    assert len(by_text) == len(examples)
    for batch in batches:
        rows = 3 if batch.vision else len(batch.tokens)
        assert rows in (3, options.get("tail", 3))
        assert batch.tokens.shape == batch.segments.shape == batch.image_index.shape == (rows, 512)
        assert batch.positions.shape == (3, rows, 512)
        image = 0
        for row, span in segments_of(batch):
            original = by_text.pop(batch.tokens[row, span].tobytes())
            np.testing.assert_array_equal(batch.loss_mask[row, span], original.loss_mask)
            np.testing.assert_array_equal(batch.positions[:, row, span], original.positions)
            # Placeholder j shows the four patches of merged token j, with their coordinates, from the right image.
            index = batch.image_index[row, span]
            np.testing.assert_array_equal(index >= 0, original.tokens == PAD_ID)
            if not len(original.grids):
                continue
            four = 4 * index[index >= 0][:, None] + np.arange(4)
            np.testing.assert_array_equal(batch.vision.patches[four.reshape(-1)], original.patches)
            coords = np.concatenate([patch_coords(grid) for grid in original.grids])
            np.testing.assert_array_equal(batch.vision.coords[four.reshape(-1)], coords)
            owner = np.repeat(np.arange(len(original.grids)) + image + 1, original.grids.prod(axis=1))
            np.testing.assert_array_equal(batch.vision.image[four.reshape(-1)], owner)
            image += len(original.grids)
        empty = batch.segments == 0
        assert not batch.tokens[empty].any() and not batch.loss_mask[empty].any()
        assert (batch.image_index[empty] == -1).all() and not batch.positions[:, empty].any()
    assert not by_text


@pytest.mark.parametrize("seed", range(4))
def test_every_patch_has_one_slot_beside_the_patches_of_its_window_only(seed):
    for batch in packed(corpus(seed)):
        if (vision := batch.vision) is None:
            continue
        size = len(vision.patches)
        assert size in BUCKETS and vision.windows.shape == (5 * size // 256 + 4, 64)
        real = np.flatnonzero(vision.image)
        flat = vision.windows.reshape(-1)
        np.testing.assert_array_equal(np.sort(flat[flat < size]), real)
        np.testing.assert_array_equal(flat[vision.slots[real]], real)
        assert (flat <= size).all()
        home = np.column_stack([vision.image, vision.coords // 8])  # an 8x8 tile of an image is a window
        homes = [{tuple(home[patch]) for patch in window if patch < size} for window in vision.windows]
        used = [tiles for tiles in homes if tiles]
        assert all(len(tiles) == 1 for tiles in used)
        assert len(set.union(*used)) == len(used)
        padded = vision.image == 0
        assert not vision.patches[padded].any() and not vision.coords[padded].any() and not vision.slots[padded].any()


def test_packing_is_deterministic():
    first, second = packed(corpus(3)), packed(corpus(3))
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_rows_are_nearly_full():
    rng = np.random.default_rng(0)
    examples = [example(rng, int(n)) for n in np.exp(rng.normal(5.5, 0.6, 600)).clip(20, 2048)]
    rows = [row for batch in assign(examples, rows=8, length=2048, layout=LAYOUT) for row in batch if row]
    fewest = -(-sum(len(e.tokens) for e in examples) // 2048)
    assert len(rows) <= fewest + 1


def test_text_fills_the_gaps_of_image_rows_and_has_micro_batches_of_its_own():
    rng = np.random.default_rng(0)
    pictures = [example(rng, 40, (16, 16)) for _ in range(4)]
    text = [example(rng, 100) for _ in range(20)]
    batches = packed(text + pictures, rows=2, length=256)
    assert [batch.vision is not None for batch in batches].count(True) == 1
    plain = [batch for batch in batches if batch.vision is None]
    assert plain and all((batch.image_index == -1).all() for batch in plain)


def test_patches_of_a_micro_batch_never_exceed_the_largest_bucket():
    rng = np.random.default_rng(0)
    examples = [example(rng, 5, (30, 32)) for _ in range(9)]  # 960 patches each
    batches = packed(examples, rows=8, length=300, layout=LAYOUT._replace(patch_buckets=(1024, 2048)))
    assert [len(batch.vision.patches) for batch in batches] == [2048] * 4 + [1024]


def test_a_thin_picture_takes_the_bucket_that_has_its_windows():
    rng = np.random.default_rng(0)
    thin = example(rng, 5, (2, 128))  # 256 patches in 16 windows of 16
    assert len(pack_vision([(thin.patches, thin.grids)], LAYOUT)[0].patches) == 1024
    square = example(rng, 5, (16, 16))  # 256 patches in 4 windows of 64
    assert len(pack_vision([(square.patches, square.grids)], LAYOUT)[0].patches) == 256


@pytest.mark.parametrize(
    "texts, pictures, expected",
    [
        ([100], [], 128),
        ([120, 100], [], 128),
        ([120, 100, 110], [], 512),  # one call, or three of 128
        ([300], [], 512),  # what holds the longest
        ([500, 500, 500], [], 1536),
        ([500, 100], [], 512),
        ([60, 60], [(32, 32)], 512),
    ],
)
def test_a_turns_prompts_take_the_rows_that_compute_least(texts, pictures, expected):
    rng = np.random.default_rng(0)
    prompts = [example(rng, text) for text in texts] + [example(rng, 8, grid) for grid in pictures]
    lengths = (128, 512, 1536)
    length = cheapest_length(prompts, lengths, LAYOUT)

    def cost(length):
        batches = [batch for _, batch in pack_queue(prompts, rows=1, length=length, layout=LAYOUT)]
        patches = [0 if batch.vision is None else len(batch.vision.patches) for batch in batches]
        return sum(128 + length + patch // 4 for patch in patches)

    assert cost(length) == min(cost(one) for one in lengths if one >= max(len(p.tokens) for p in prompts))
    assert length == expected


def test_no_examples_make_no_batches():
    assert packed([]) == []


def test_what_does_not_fit_is_an_error_that_says_how_much():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"example 1 does not fit.*\[513, 0, 0\].*\[512, 4096, 84\]"):
        packed([example(rng, 5), example(rng, 513)])
    big = example(rng, 5, (80, 80))
    with pytest.raises(ValueError, match=r"example 0 does not fit.*6400"):
        packed([big], length=4096)
    with pytest.raises(ValueError, match="6400 patches in 100 windows.*4096 in 84.*max_pixels"):
        pack_vision([(big.patches, big.grids)], LAYOUT)


def test_placeholders_must_match_the_grids():
    good = example(np.random.default_rng(0), 9, (4, 6))
    with pytest.raises(ValueError, match="got 5 image placeholders.*expected 6 and 24"):
        packed([good._replace(tokens=np.where(np.cumsum(good.tokens == PAD_ID) == 1, 9, good.tokens))])
    with pytest.raises(ValueError, match="20 patches"):
        packed([good._replace(patches=good.patches[:20])])
    with pytest.raises(ValueError, match="multiple of 28"):
        odd = good._replace(grids=np.array([[1, 3, 8]], np.int32))
        packed([odd])
    with pytest.raises(ValueError, match="first token"):
        packed([good._replace(loss_mask=np.ones(len(good.tokens), bool))])


def test_prompts_stand_one_a_row_and_missing_rows_are_empty():
    prompts = corpus(5, count=3)
    batch = pack_prompts(prompts, rows=5, length=300, layout=LAYOUT)
    for row, prompt in enumerate(prompts):
        count = len(prompt.tokens)
        np.testing.assert_array_equal(batch.tokens[row, :count], prompt.tokens)
        np.testing.assert_array_equal(batch.segments[row], np.arange(300) < count)
    assert not batch.segments[3:].any()
    with pytest.raises(ValueError, match="got 3 rows, expected at most 2"):
        pack_prompts(prompts, rows=2, length=300, layout=LAYOUT)
    with pytest.raises(ValueError, match="expected at most 4"):
        pack_prompts(prompts, rows=5, length=4, layout=LAYOUT)


def test_a_padding_id_equal_to_the_placeholder_is_no_placeholder():
    one = example(np.random.default_rng(0), 9, (4, 6))
    zero = one._replace(tokens=np.where(one.tokens == PAD_ID, 0, one.tokens))
    (batch,) = packed([zero], layout=LAYOUT._replace(image_pad=0))
    assert (batch.image_index >= 0).sum() == 6


def test_padding_shares_are_counted():
    rng = np.random.default_rng(0)
    (batch,) = packed([example(rng, 24, (8, 8))], rows=1, length=100)  # 24 + 16 placeholders + 1
    assert padding(batch) == {"padding_tokens": 0.59, "padding_patches": 0.75}
    (batch,) = packed([example(rng, 25)], rows=1, length=100)
    assert padding(batch) == {"padding_tokens": 0.75}


# ------------------------------------------------------------------------------- how much of what is computed is waste


def realistic(seed: int, count: int, length: int) -> list[Example]:
    """Examples of the paper's lengths: 300 to 2,000 tokens of text; in half of them a picture of 64 to 1,024 merged
    tokens, shrunk to what the row has left. Arrays without memory: only their sizes are real."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        tokens = int(np.exp(rng.normal(6.5, 0.5)).clip(300, min(2000, length)))
        merged, aspect, room = (
            np.exp(rng.uniform(*np.log([64, 1024]))),
            np.exp(rng.normal(0, 0.35)),
            length - tokens - 2,
        )
        grids = np.zeros((0, 3), np.int32)
        if rng.random() < 0.5 and room >= 16:
            side = 28 * np.sqrt(merged * aspect)
            height, width = smart_resize(int(side), int(side / aspect), 28, 28**2, min(room, 1024) * 28**2)
            grids = np.array([[1, height // 14, width // 14]], np.int32)
        patches = int(grids.prod(axis=1).sum())
        tokens += patches // 4 + 2 * len(grids)
        shape = lambda *sizes: np.broadcast_to(np.int32(0), sizes)  # noqa: E731
        examples.append(Example(shape(tokens), shape(tokens), shape(3, tokens), shape(patches, 588), grids))
    return examples


def loads(examples: list[Example], micro_batch: list[list[int]]) -> np.ndarray:
    """i64[rows, 3]: tokens, patches and windows of its rows."""
    of = [
        (len(e.tokens), len(e.patches), sum(-(-h // 8) * -(-w // 8) for _, h, w in e.grids.tolist())) for e in examples
    ]
    return np.array([np.sum([of[i] for i in row] or [(0, 0, 0)], axis=0) for row in micro_batch])


def waste(plans, length: int, layout: Layout) -> np.ndarray:
    """Padding shares of (tokens, patches, windows) over (examples, micro-batches of a step)."""
    real, computed = np.zeros(3), np.zeros(3)
    for examples, plan in plans:
        for micro_batch in plan:
            need = loads(examples, micro_batch).sum(axis=0)
            size = layout.bucket(*need[1:])
            real += need
            computed += len(micro_batch) * length, size, layout.windows(size) if size else 0
    return 1 - real / computed


@pytest.mark.parametrize("length", [2048, 4096])
def test_steps_of_the_papers_lengths_are_at_most_5_percent_padding_in_tokens_and_10_in_patches(length):
    """192 samples a step, 8 rows; the buckets are proposed from other steps than those that are judged."""
    plan = lambda step, layout: assign(step, rows=8, length=length, layout=layout, tail=tail_rows(8))  # noqa: E731
    seen, judged = ([realistic(seed, 192, length) for seed in range(first, first + 8)] for first in (0, 100))
    layout = Layout(PAD_ID, tuple(propose(seen, 8, length, LAYOUT, count=4)["patches"]))
    assert len(layout.patch_buckets) <= 5 and max(layout.patch_buckets) >= 4 * length  # any row fits
    tokens, patches, windows = waste([(step, plan(step, layout)) for step in judged], length, layout)
    assert tokens <= 0.05 and patches <= 0.10 and windows <= 0.20


def test_a_small_last_micro_batch_holds_the_rest_of_the_text():
    rng = np.random.default_rng(0)
    examples = [example(rng, 100) for _ in range(11)]
    rows = lambda **options: [len(b.tokens) for b in packed(examples, rows=8, length=100, **options)]  # noqa: E731
    assert rows() == [8, 8]
    assert rows(tail=2) == [8, 2, 2]
    assert rows(tail=4) == [8, 4]
    examples += [example(rng, 100) for _ in range(4)]
    assert rows(tail=2) == [8, 8]  # four small ones would compute as much
    assert [tail_rows(8), tail_rows(64), tail_rows(2), tail_rows(1)] == [2, 16, 1, 1]


def test_a_micro_batch_with_images_has_all_rows_whatever_the_tail():
    rng = np.random.default_rng(0)
    (batch,) = packed([example(rng, 20, (8, 8)), example(rng, 20)], rows=4, length=40, tail=1)
    assert len(batch.tokens) == 4


def test_micro_batches_fill_the_bucket_that_computes_least():
    rng = np.random.default_rng(0)
    examples = [example(rng, 5, (16, 16)) for _ in range(12)] + [
        example(rng, 70) for _ in range(12)
    ]  # 256 patches each
    sizes = lambda *buckets: [  # noqa: E731
        len(batch.vision.patches) if batch.vision else 0
        for batch in packed(examples, rows=6, length=70, layout=Layout(PAD_ID, buckets))
    ]
    assert sizes(1024, 2048) == [1024, 1024, 1024, 0]  # 6 rows with pictures, 1,536 patches, would take 2,048 twice
    assert sizes(1536, 2048) == [1536, 1536, 0, 0]


@pytest.mark.parametrize("rows, parts, count", [(4, 8, 768), (8, 8, 1536), (4, 4, 192)])
def test_what_devices_compute_at_the_same_time_is_alike(rows, parts, count):
    """What all compute over what they would, each with its own bucket: at most 5 % more."""
    length = 2048
    layout = Layout(PAD_ID, tuple(rows * size for size in (512, 1024, 2048, 4096, 8192)))
    step = realistic(0, count, length)
    sizes = []
    for micro in assign(step, rows=rows, length=length, layout=layout, tail=tail_rows(rows)):
        need = example_sizes([step[i] for row in micro for i in row], layout)[:, 1:].sum(axis=0)
        sizes.append((layout.bucket(*need), len(micro), length))
    rounds = in_rounds(sizes, parts, lambda size: size)
    assert len(rounds) == -(-len(sizes) // parts) and sum(len(some) for _, some in rounds) == len(sizes)
    cost = lambda size: size[0] / 4 + size[1] * length  # noqa: E731
    assert sum(cost(shape) * len(some) for shape, some in rounds) <= 1.05 * sum(map(cost, sizes))


def test_a_micro_batch_that_is_padded_to_a_larger_shape_computes_the_same():
    config = tiny_models.tiny_config()
    where = tiny_models.layout(config, 96, 192, 256)
    seen = tiny_models.example(np.random.default_rng(0), 2, [(56, 84), (28, 56)])
    (small,) = pack([seen], rows=1, length=64, layout=where)
    large = fitted(small, (256, 3, 80), where)
    assert shape_of(small) == (96, 1, 64) and shape_of(large) == (256, 3, 80)
    described = lambda b: [(x.shape, x.dtype) for x in (*b[:5], *b.vision)]  # noqa: E731
    assert described(large) == described(blank(3, 80, 256, where)) == described(fitted(None, (256, 3, 80), where))
    model = bind(config, tiny_models.tiny_params(config))
    hidden = [np.asarray(jax.jit(lambda b: model(b))(b)) for b in (small, large)]
    used = np.asarray(small.segments[0]) > 0
    np.testing.assert_allclose(hidden[1][0, :64][used], hidden[0][0][used], atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_no_other_buckets_have_less_padding_than_those_proposed(seed):
    rng = np.random.default_rng(seed)
    needs = rng.integers(0, 900, 30)
    needs[:3] = 0
    rounded = {-(-int(need) // 64) * 64 for need in needs if need}
    total = lambda buckets: sum(min(b for b in buckets if b >= need) for need in needs if need)  # noqa: E731
    for count in (1, 2, 3):
        proposed = propose_patch_buckets(needs, count)
        assert len(proposed) == count and max(proposed) == max(rounded)
        others = (c for c in combinations(sorted(rounded), count) if max(c) == max(rounded))
        assert total(proposed) == min(map(total, others))
    assert propose_patch_buckets([100, 100, 0], 4) == (128,)
    assert propose_patch_buckets([0]) == ()


def test_a_blank_micro_batch_has_the_shapes_and_types_of_a_real_one():
    rng = np.random.default_rng(0)
    layout = LAYOUT._replace(shared=(3, 4))
    real = example(rng, 20, (8, 8))
    real = real._replace(
        tokens=np.append([3, 4], real.tokens).astype(np.int32), positions=np.pad(real.positions, ((0, 0), (2, 0))),
        loss_mask=np.append([False] * 2, real.loss_mask),
    )  # fmt: skip
    (batch,) = packed([real], layout=layout)
    described = lambda b: [(x.shape, x.dtype) for x in (*b[:5], *b.vision, b.shared)]  # noqa: E731
    assert described(blank(3, 512, 256, layout)) == described(batch)
    assert blank(3, 512, 0, layout).vision is None
