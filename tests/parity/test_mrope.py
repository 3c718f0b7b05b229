"""Our M-RoPE positions are those of transformers, for text and images."""

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from gvl_jax.guard.prompt import mrope_positions


@pytest.fixture(scope="module")
def reference():
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    with torch.device("meta"):
        return Qwen2_5_VLModel(config)


@pytest.mark.parametrize("seed", range(20))
def test_positions_equal_transformers(reference, seed):
    rng = np.random.default_rng(seed)
    count = seed % 5  # images
    grids = np.stack([np.ones(count, int), *(2 * rng.integers(1, 12, (2, count)))], axis=1).astype(np.int32)
    is_image = np.zeros(rng.integers(1, 9), bool)
    for grid in grids:
        is_image = np.concatenate([is_image, np.ones(grid.prod() // 4, bool), np.zeros(rng.integers(1, 30), bool)])
    expected, _ = reference.get_rope_index(
        torch.zeros(1, len(is_image), dtype=torch.long),
        mm_token_type_ids=torch.tensor(is_image[None].astype(np.int32)),
        image_grid_thw=torch.tensor(grids) if count else None,
    )
    assert np.array_equal(mrope_positions(is_image, grids), expected[:, 0].numpy())
