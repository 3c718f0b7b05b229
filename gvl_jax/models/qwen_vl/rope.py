"""Rotary positions: two axes in the vision tower, three in the decoder (M-RoPE). Angles and rotation in fp32."""

import jax.numpy as jnp
import numpy as np


def frequencies(width: int, theta: float) -> np.ndarray:
    """f32[width // 2]: theta^(-2i / width)."""
    return 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / width)


def vision_angles(coords, head_dim: int, theta: float = 10_000.0):
    """coords i32[P, 2] (row, column) → f32[P, head_dim // 2]: half turns with the row, half with the column."""
    angles = jnp.multiply.outer(coords.astype(jnp.float32), frequencies(head_dim // 2, theta))
    return angles.reshape(len(coords), head_dim // 2)


def mrope_angles(positions, head_dim: int, theta: float, section: tuple[int, ...]):
    """positions i32[3, ...] (time, height, width) → f32[..., head_dim // 2].

    `section` says how many frequencies each axis owns: [16, 24, 24] in the released checkpoints.
    """
    axis = np.repeat(np.arange(3), section)
    turned = jnp.moveaxis(positions[axis], 0, -1).astype(jnp.float32)  # [..., head_dim // 2], each by its own axis
    return turned * jnp.broadcast_to(frequencies(head_dim, theta), turned.shape)


def rotate(x, angles):
    """x [..., heads, H], angles f32[..., H // 2] → x turned; feature i is paired with feature i + H/2."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
