"""The model against transformers, fp32, on random tiny configs: one table of cases, one tolerance for all."""

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from gvl_jax.data.images import to_patches
from gvl_jax.data.packing import Layout, pack
from gvl_jax.guard.prompt import mrope_positions
from gvl_jax.models.qwen_vl.config import from_hf
from gvl_jax.models.qwen_vl.hub import load_params
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.types import Example

IMAGE, START, END, VOCAB = 90, 91, 92, 97
SIDES = [(28, 28), (700, 140), (56, 84), (140, 112), (28, 196), (168, 168), (84, 252), (252, 28)]


def draw(seed: int) -> tuple[Qwen2_5_VLForConditionalGeneration, dict]:
    """A random tiny config: head ratios, tied or not, window sizes, which ViT blocks are full, RoPE sections."""
    rng = np.random.default_rng(seed)
    key_heads = int(rng.choice([1, 2, 3]))
    heads = key_heads * int(rng.choice([1, 2, 3]))
    head_dim = int(rng.choice([8, 12, 16]))
    first = int(rng.integers(1, head_dim // 2 - 1))
    second = int(rng.integers(1, head_dim // 2 - first))
    depth = int(rng.integers(2, 6))
    vision_heads = int(rng.choice([1, 2, 4]))
    tied = bool(rng.integers(2))
    full = sorted(rng.choice(depth, rng.integers(1, depth), replace=False).tolist())
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCAB,
            hidden_size=heads * head_dim,
            intermediate_size=int(rng.integers(16, 64)),
            num_hidden_layers=int(rng.integers(1, 4)),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e6, mrope_section=[first, second, head_dim // 2 - first - second]
            ),
        ),
        vision_config=dict(
            depth=depth,
            hidden_size=vision_heads * int(rng.choice([8, 16])),
            intermediate_size=int(rng.integers(16, 64)),
            num_heads=vision_heads,
            out_hidden_size=heads * head_dim,
            window_size=int(rng.choice([56, 112, 168])),
            fullatt_block_indexes=full,
        ),
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    reference = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():  # default init is 0.02 and zero biases: too tame to notice a mistake
        for parameter in reference.parameters():
            parameter.mul_(3.0).add_(0.02 * torch.randn_like(parameter))
    return reference, config.to_dict()


def example(rng, images: int) -> Example:
    """Random text around `images` pictures of random noise."""
    tokens, patches, grids = list(rng.integers(0, 80, rng.integers(2, 9))), [], []
    for _ in range(images):
        height, width = SIDES[rng.integers(len(SIDES))]
        p, grid = to_patches_of(rng, height, width)
        tokens += [START, *[IMAGE] * (len(p) // 4), END, *rng.integers(0, 80, rng.integers(1, 6))]
        patches.append(p)
        grids.append(grid)
    tokens = np.array(tokens, np.int32)
    grids = np.array(grids, np.int32).reshape(-1, 3)
    mask = np.arange(len(tokens)) > 0
    flat = np.concatenate(patches) if patches else np.zeros((0, 1176), np.float32)
    return Example(tokens, mask, mrope_positions(tokens == IMAGE, grids), flat, grids)


def to_patches_of(rng, height: int, width: int):
    from PIL import Image

    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return to_patches(Image.fromarray(pixels), 28 * 28, 1024 * 1024)


def inputs_of(e: Example) -> dict:
    tokens = torch.tensor(e.tokens)[None].long()
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    inputs["mm_token_type_ids"] = (tokens == IMAGE).int()  # without it transformers uses 1-D positions
    if len(e.grids):
        inputs |= dict(pixel_values=torch.tensor(e.patches), image_grid_thw=torch.tensor(e.grids).long())
    return inputs


def reference_logits(reference, e: Example) -> np.ndarray:
    with torch.no_grad():
        return reference(**inputs_of(e)).logits[0].numpy()


@pytest.mark.parametrize("seed", range(24))
def test_logits_equal_transformers_packed_and_with_any_number_of_images(seed, tmp_path):
    reference, raw = draw(seed)
    reference.save_pretrained(tmp_path)
    config = from_hf(raw)
    params = load_params(tmp_path, config)
    rng = np.random.default_rng(seed)
    examples = [example(rng, images) for images in (0, 1, 3)]
    length = max(len(e.tokens) for e in examples) + min(len(e.tokens) for e in examples) + 3
    batches = pack(
        examples,
        rows=2,
        length=length,
        layout=Layout(IMAGE, (4096, 8192), config.vision.window_size),
    )
    forward = jax.jit(lambda params, batch: (lambda m: m(batch) @ m.head_kernel())(bind(config, params)))
    seen = set()
    for batch in batches:
        logits = np.asarray(forward(params, batch))
        for i, e in enumerate(examples):
            for row in range(len(batch.tokens)):
                for segment in range(1, batch.segments[row].max() + 1):
                    at = batch.segments[row] == segment
                    if at.sum() == len(e.tokens) and np.array_equal(batch.tokens[row][at], e.tokens):
                        np.testing.assert_allclose(logits[row][at], reference_logits(reference, e), atol=1e-4, rtol=0)
                        seen.add(i)
    assert seen == {0, 1, 2}
