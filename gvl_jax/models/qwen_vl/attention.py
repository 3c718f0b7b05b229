"""Attention, in the three shapes the model needs. Softmax in fp32, masked rows stay finite, GQA by head groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gvl_jax.types import Array

MASKED = -1e30  # not -inf: a row with no key left stays finite


class Prompt(NamedTuple):
    """What the completions of B prompts share: the keys and values of the prompt, once."""

    k: Array  # [L, B, S, K, H]
    v: Array  # [L, B, S, K, H]
    mask: Array  # bool[B, S] False on padding
    length: Array  # i32[B] M-RoPE position of the first completion token


def attend(q, k, v, mask):
    """q [B, T, N, H], k and v [B, S, K, H], mask bool broadcastable to [B, 1, T, S] → [B, T, N, H]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def packed_mask(segments):
    """segments i32[B, T] → bool[B, 1, T, T]: a token sees its own segment up to itself. Padding sees padding."""
    order = jnp.arange(segments.shape[1])
    causal = order[:, None] >= order[None, :]
    return ((segments[:, :, None] == segments[:, None, :]) & causal[None])[:, None]


def attend_after_prompt(q, prompt_k, prompt_v, prompt_mask, k, v, mask):
    """Completions attend to their shared prompt and to themselves, in one softmax.

    q [B, R, J, N, H]; prompt_k and prompt_v [B, S, K, H], prompt_mask bool[B, S]; k and v [B, R, I, K, H] the
    completions' own keys, mask bool broadcastable to [B, R, J, I]. Returns [B, R, J, N, H].
    """
    B, R, J, N, H = q.shape
    S, K = prompt_k.shape[1:3]
    q = q.reshape(B, R, J, K, N // K, H)
    scale = H**-0.5
    to_prompt = jnp.einsum("brjkgh,bskh->bkgrjs", q, prompt_k, preferred_element_type=jnp.float32) * scale
    to_own = jnp.einsum("brjkgh,brikh->bkgrji", q, k, preferred_element_type=jnp.float32) * scale
    to_prompt = jnp.where(prompt_mask[:, None, None, None, None, :], to_prompt, MASKED)
    to_own = jnp.where(mask[:, None, None], to_own, MASKED)
    weights = jax.nn.softmax(jnp.concatenate([to_prompt, to_own], -1), -1).astype(v.dtype)
    out = jnp.einsum("bkgrjs,bskh->brjkgh", weights[..., :S], prompt_v)
    out = out + jnp.einsum("bkgrji,brikh->brjkgh", weights[..., S:], v)
    return out.reshape(B, R, J, N, H)
