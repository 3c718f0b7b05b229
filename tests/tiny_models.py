"""Tiny models and examples for tests: random ones that transformers has too, and fixed ones of our own."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from gvl_jax.bench.theirs import pixel_values
from gvl_jax.data import tiny
from gvl_jax.data.images import to_patches
from gvl_jax.data.packing import Layout
from gvl_jax.guard.prompt import mrope_positions
from gvl_jax.models.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig
from gvl_jax.models.qwen_vl.hub import load_config, save_params
from gvl_jax.models.qwen_vl.model import abstract_params
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


def example(rng, images: int, sides=SIDES) -> Example:
    """Random text around `images` pictures of random noise; every token but the first is predicted."""
    tokens, patches, grids = list(rng.integers(0, 80, rng.integers(2, 9))), [], []
    for _ in range(images):
        height, width = sides[rng.integers(len(sides))]
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        p, grid = to_patches(Image.fromarray(pixels), 28 * 28, 1024 * 1024)
        tokens += [START, *[IMAGE] * (len(p) // 4), END, *rng.integers(0, 80, rng.integers(1, 6))]
        patches.append(p)
        grids.append(grid)
    tokens = np.array(tokens, np.int32)
    grids = np.array(grids, np.int32).reshape(-1, 3)
    mask = np.arange(len(tokens)) > 0
    flat = np.concatenate(patches) if patches else np.zeros((0, 588), np.uint8)
    return Example(tokens, mask, mrope_positions(tokens == IMAGE, grids), flat, grids)


def continued(prompt: Example, completion) -> Example:
    """The prompt and a completion as one example, of which the completion is predicted."""
    tokens = np.concatenate([prompt.tokens, completion]).astype(np.int32)
    mask = np.arange(len(tokens)) >= len(prompt.tokens)
    return prompt._replace(tokens=tokens, loss_mask=mask, positions=mrope_positions(tokens == IMAGE, prompt.grids))


def inputs_of(e: Example) -> dict:
    """The example as transformers takes it."""
    tokens = torch.tensor(e.tokens)[None].long()
    inputs = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    inputs["mm_token_type_ids"] = (tokens == IMAGE).int()  # without it transformers uses 1-D positions
    if len(e.grids):
        inputs |= dict(pixel_values=torch.tensor(pixel_values(e.patches)), image_grid_thw=torch.tensor(e.grids).long())
    return inputs


def reference_logits(reference, e: Example) -> np.ndarray:
    """By transformers in fp64: in fp32 it is three times as far from these as we are, up to 9e-5."""
    inputs = inputs_of(e)
    torch.set_default_dtype(torch.float64)
    try:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            return copy.deepcopy(reference).double()(**inputs).logits[0].numpy()
    finally:
        torch.set_default_dtype(torch.float32)


def tiny_config(tied: bool = False, dtype: str = "float32") -> QwenVLConfig:
    """Two query heads to a key head, and both kinds of vision blocks."""
    return QwenVLConfig(
        vision=VisionConfig(
            depth=3, hidden_size=16, intermediate_size=24, num_heads=2, patch_size=14, spatial_merge_size=2,
            temporal_patch_size=2, window_size=56, fullatt_block_indexes=(2,), out_hidden_size=32,
        ),
        text=TextConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-6, rope_theta=1e4, mrope_section=(2, 1, 1),
            tie_word_embeddings=tied,
        ),
        image_token_id=IMAGE, vision_start_token_id=START, vision_end_token_id=END, dtype=dtype,
    )  # fmt: skip


def tiny_params(config: QwenVLConfig, seed: int = 0) -> dict[str, Any]:
    """Every parameter random: biases are not 0, scales are not 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, abstract):
        kind = path[-1].key
        values = 0.15 * rng.standard_normal(abstract.shape, np.float32)
        return jax.numpy.asarray(values + (kind == "scale"))

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def layout(config: QwenVLConfig, *buckets: int) -> Layout:
    return Layout(IMAGE, buckets, config.vision.window_size)


def write_checkpoint(folder: Path, text: str, vocab_size: int) -> Path:
    """A whole checkpoint of one layer with random weights, and a tokenizer trained on `text`. → its directory."""
    tiny.write_tiny(folder / "files", [text], vocab_size)
    raw = json.loads((folder / "files" / "config.json").read_text())
    raw["text_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    raw["text_config"]["layer_types"] = ["full_attention"]
    raw["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 2]
    raw["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0], "hidden_size": 16, "intermediate_size": 24}
    raw["vision_config"] |= {"num_heads": 2, "out_hidden_size": 32}
    (folder / "files" / "config.json").write_text(json.dumps(raw))
    config = load_config(folder / "files")
    save_params(folder / "model", tiny_params(config), config, dtype="float32", source=folder / "files")
    return folder / "model"
