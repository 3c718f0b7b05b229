"""Pixels, sizes, windows and coordinates against transformers: equal, not close."""

import jax
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from gvl_jax.bench.theirs import pixel_values
from gvl_jax.data.images import ImageRejected, open_image, patch_coords, smart_resize, to_patches, window_order
from gvl_jax.models.qwen_vl.vision import normalised

MODES = ["RGB", "L", "P", "1", "CMYK", "RGBA", "LA"]
BOUNDS = [(56 * 56, 28 * 28 * 1280), (32 * 32, 768 * 768), (262_144, 400_000), (28 * 28, 28 * 28 * 20)]
RNG = np.random.default_rng(0)
SIZES = [(1, 1), (28, 28), (27, 29), (3, 500), (1000, 6), (14, 14)]
SIZES += [tuple(map(int, np.exp(RNG.uniform(1.5, 6.7, 2)))) for _ in range(25)]


def picture(width: int, height: int, mode: str, seed: int) -> Image.Image:
    """Smooth colours with noise on them: bicubic overshoots at edges, and rounds."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
    pixels = np.asarray(coarse).astype(int) + rng.integers(-40, 41, (height, width, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    if "A" in mode:
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), np.uint8)))
    return image


@pytest.mark.parametrize("case", range(len(SIZES)))
def test_patches_equal_the_reference_processor_bit_for_bit(case):
    (width, height), mode, (low, high) = SIZES[case], MODES[case % len(MODES)], BOUNDS[case % len(BOUNDS)]
    image = picture(width, height, mode, case)
    shown = open_image(image)
    # Alpha is ours (on white; the reference drops it); every other mode is converted by the reference itself.
    processor = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)
    reference = processor(shown if "A" in mode else image, return_tensors="np")
    patches, grid = to_patches(shown, low, high)
    np.testing.assert_array_equal(pixel_values(patches), reference["pixel_values"], strict=True)
    ours = np.asarray(jax.jit(normalised, static_argnums=1)(patches, 2))
    np.testing.assert_allclose(ours, reference["pixel_values"], atol=5e-7, rtol=0)
    np.testing.assert_array_equal(grid, reference["image_grid_thw"][0])


def test_the_smart_resize_equals_the_reference_for_all_sizes_and_bounds():
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(20_000):
        height, width = map(int, np.exp(rng.uniform(0, 9, 2)))
        low, high = map(int, np.exp(rng.uniform(0, 16, 2)))
        try:
            expected = reference_smart_resize(height, width, 28, low, high)
        except ValueError:
            refused += 1
            with pytest.raises(ImageRejected):
                smart_resize(height, width, 28, low, high)
            continue
        assert smart_resize(height, width, 28, low, high) == expected
    assert refused


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (10, 12), (16, 16), (2, 62), (50, 6), (18, 34)])
def test_windows_and_coordinates_equal_the_reference(grid):
    grid = np.array([1, *grid])
    index, borders = get_vision_window_index(torch.tensor(grid)[None], 2, 112, 14)
    order, windows = window_order(grid, 4)
    np.testing.assert_array_equal(order, index)
    np.testing.assert_array_equal(np.cumsum([4 * len(window) for window in windows]), borders[1:])
    np.testing.assert_array_equal(patch_coords(grid), get_vision_position_ids(torch.tensor(grid)[None], 2))
