"""The vision tower: patches in window order → one vector per merged (2x2) patch, in the decoder's width."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from gvl_jax.models.qwen_vl.attention import attend, attend_in_segments
from gvl_jax.models.qwen_vl.config import VisionConfig
from gvl_jax.models.qwen_vl.layers import Linear, RMSNorm, gated_mlp, scan_layers, stack
from gvl_jax.models.qwen_vl.rope import rotate, vision_angles
from gvl_jax.types import Remat, Vision

NORM_EPSILON = 1e-6  # fixed in the reference, not in its config
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, R G B
STD = (0.26862954, 0.26130258, 0.27577711)


def normalised(levels, frames: int):
    """u8[P, C] → f32[P, frames · C]: what the reference's image processor makes of a still picture, a film of so many
    equal frames, but for two roundings (5e-7)."""
    mean, std = np.array(MEAN, np.float32)[None, :, None, None], np.array(STD, np.float32)[None, :, None, None]
    values = (levels.reshape(len(levels), len(MEAN), 1, -1).astype(jnp.float32) / 255 - mean) / std
    return jnp.repeat(values, frames, axis=2).reshape(len(levels), -1)


class VisionBlock(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        heads = (config.num_heads, width // config.num_heads)
        self.norm1 = RMSNorm(width, NORM_EPSILON)
        self.q = Linear((width,), heads, bias=True, rngs=rngs)
        self.k = Linear((width,), heads, bias=True, rngs=rngs)
        self.v = Linear((width,), heads, bias=True, rngs=rngs)
        self.o = Linear(heads, (width,), bias=True, rngs=rngs)
        self.norm2 = RMSNorm(width, NORM_EPSILON)
        self.gate = Linear((width,), (hidden,), bias=True, rngs=rngs)
        self.up = Linear((width,), (hidden,), bias=True, rngs=rngs)
        self.down = Linear((hidden,), (width,), bias=True, rngs=rngs)

    def __call__(self, x, angles, attend_where):
        h = self.norm1(x)
        q, k, v = rotate(self.q(h), angles), rotate(self.k(h), angles), self.v(h)
        x = x + self.o(attend_where(q, k, v))
        return x + gated_mlp(self, self.norm2(x))


class Merger(nnx.Module):
    """Four neighbouring patches → one token of the decoder."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.norm = RMSNorm(config.hidden_size, NORM_EPSILON)
        self.fc1 = Linear((self.width,), (self.width,), bias=True, rngs=rngs)
        self.fc2 = Linear((self.width,), (config.out_hidden_size,), bias=True, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x).reshape(-1, self.width)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear((config.patch_dim,), (config.hidden_size,), bias=False, rngs=rngs)
        self.blocks = stack(lambda rngs: VisionBlock(config, rngs=rngs), config.depth, rngs)
        self.merger = Merger(config, rngs=rngs)

    def __call__(self, vision: Vision, dtype, *, remat: Remat = "none"):
        """→ [M, D] in window order. Padding patches give finite values that no token reads."""
        x = self.patch_embed(normalised(vision.patches, self.config.temporal_patch_size).astype(dtype))
        angles = vision_angles(vision.coords, self.config.hidden_size // self.config.num_heads)
        filled = (vision.windows < len(vision.patches))[:, None, None, :]

        def in_image(q, k, v):
            return attend_in_segments(q, k, v, vision.image)

        def in_window(q, k, v):
            q, k, v = (jnp.take(a, vision.windows, axis=0, mode="fill", fill_value=0) for a in (q, k, v))
            out = attend(q, k, v, filled)
            return out.reshape(-1, *out.shape[2:])[vision.slots]

        def body(block, x, is_full):
            return block(x, angles, lambda q, k, v: lax.cond(is_full, in_image, in_window, q, k, v)), None

        # One scan over all blocks: a scan for each run of a kind would cut the weights, and their gradient, out of the
        # stack, and compile the products eight times.
        full = np.isin(np.arange(self.config.depth), self.config.fullatt_block_indexes)
        x, _ = scan_layers(self.blocks, x, body, full, remat=remat)
        return self.merger(x)
