"""Attention, in the three shapes the model needs. Softmax in fp32, masked rows stay finite, GQA by head groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gvl_jax.types import Array

MASKED = -1e30  # not -inf: a row with no key left stays finite
QUERIES = 1024  # patches whose scores over all patches exist at a time


class Prompt(NamedTuple):
    """What the completions of B prompts share: the keys and values of the prompt, once."""

    k: Array  # [L, B, S, K, H]
    v: Array  # [L, B, S, K, H]
    mask: Array  # bool[B, S] False on padding
    length: Array  # i32[B] M-RoPE position of the first completion token


def attend(q, k, v, mask):
    """q [B, T, N, H], k and v [B, S, K, H], mask bool broadcastable to [B, 1, T, S] → [B, T, N, H]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attend_in_segments(q, k, v, segments):
    """Full attention inside each segment: q, k, v [P, N, H], segments i32[P] → [P, N, H].

    QUERIES at a time: a picture of 4 megapixels has 21,400 patches, whose [N, P, P] scores would take 29 GB.
    """
    P = len(segments)
    if P <= QUERIES:
        return attend(q[None], k[None], v[None], (segments[:, None] == segments[None, :])[None, None])[0]
    padding = -P % QUERIES
    q = jnp.pad(q, ((0, padding), (0, 0), (0, 0))).reshape(-1, 1, QUERIES, *q.shape[1:])
    own = jnp.pad(segments, (0, padding)).reshape(-1, QUERIES)

    @jax.checkpoint
    def some(block):
        q, own = block
        return attend(q, k[None], v[None], (own[:, None] == segments[None, :])[None, None])[0]

    return lax.map(some, (q, own)).reshape(-1, *v.shape[1:])[:P]


def packed_mask(segments):
    """segments i32[..., T] → bool[..., T, T]: a token sees its own segment up to itself. Padding sees padding."""
    same = segments[..., :, None] == segments[..., None, :]
    return same & jnp.broadcast_to(jnp.tri(segments.shape[-1], dtype=bool), same.shape)


def attend_after_prompt(q, prompt_k, prompt_v, prompt_mask, k, v, mask):
    """Completions attend to their shared prompt and to themselves, in one softmax.

    q [B, R, J, N, H]; prompt_k and prompt_v [B, S, K, H], prompt_mask bool[B, S]; k and v [B, R, I, K, H] the
    completions' own keys, mask bool broadcastable to [B, R, J, I]. Returns [B, R, J, N, H].
    """
    B, R, J, N, H = q.shape
    S, K = prompt_k.shape[1:3]
    # heads first: plain matrix products, whose gradients are plain matrix products too (2x on a CPU)
    q = q.reshape(B, R, J, K, N // K, H).transpose(0, 3, 1, 4, 2, 5)
    prompt_k, prompt_v = (a.transpose(0, 2, 1, 3) for a in (prompt_k, prompt_v))
    k, v = (a.transpose(0, 3, 1, 2, 4) for a in (k, v))
    to_prompt = jnp.einsum("bkrgjh,bksh->bkrgjs", q, prompt_k, preferred_element_type=jnp.float32)
    to_own = jnp.einsum("bkrgjh,bkrih->bkrgji", q, k, preferred_element_type=jnp.float32)
    scale = H**-0.5  # on the fp32 scores: a bfloat16 q would round once more
    to_prompt = jnp.where(prompt_mask[:, None, None, None, None, :], to_prompt * scale, MASKED)
    to_own = jnp.where(mask[:, None, :, None], to_own * scale, MASKED)
    highest = lax.stop_gradient(jnp.maximum(to_prompt.max(-1), to_own.max(-1)))[..., None]
    to_prompt, to_own = jnp.exp(to_prompt - highest), jnp.exp(to_own - highest)
    out = jnp.einsum(
        "bkrgjs,bksh->bkrgjh", to_prompt.astype(v.dtype), prompt_v, preferred_element_type=jnp.float32
    ) + jnp.einsum("bkrgji,bkrih->bkrgjh", to_own.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = out / (to_prompt.sum(-1) + to_own.sum(-1))[..., None]
    return out.astype(v.dtype).transpose(0, 2, 4, 1, 3, 5).reshape(B, R, J, N, H)
