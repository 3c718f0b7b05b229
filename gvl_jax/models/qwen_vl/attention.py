"""Attention, in the three shapes the model needs. Softmax in fp32, masked rows stay finite, GQA by head groups.

Through XLA, but on TPUs for the rows and pictures of a training step and of a sampler's copy, which are the splash
kernel's.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gvl_jax.models.qwen_vl import splash
from gvl_jax.sharding import alone_on_tpu
from gvl_jax.types import Array

MASKED = -1e30  # not -inf: a row with no key left stays finite
QUERIES = 1024  # patches whose scores over all patches exist at a time
BLOCK = 256  # tokens of a row whose scores are computed together, over the keys up to the last of them


class Prompt(NamedTuple):
    """What the completions of B prompts share: keys and values of the prompt, and of what all prompts begin with."""

    k: Array | None  # [L, K, B, S, H]; None: no prompt, at most the instruction
    v: Array | None
    mask: Array | None  # bool[B, S] False on padding
    length: Array | None  # i32[B] M-RoPE position of the first completion token
    instruction: tuple[Array, Array] | None = None  # (k, v) [L, K, S0, H] of the instruction, for all B prompts


def attend(q, k, v, mask):
    """q [B, T, N, H], k and v [B, S, K, H], mask bool broadcastable to [B, 1, T, S] → [B, T, N, H]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def attend_in_segments(q, k, v, segments):
    """Full attention inside each segment: q, k, v [P, N, H], segments i32[P] → [P, N, H].

    QUERIES at a time: a picture of 4 megapixels has 21,400 patches, whose [N, P, P] scores would take 29 GB.
    """
    if alone_on_tpu():
        return splash.attend_in_segments(q, k, v, segments)
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


def packed_mask(segments, first: int = 0):
    """segments i32[..., T] → bool[..., T - first, T]: a token, from the `first` on, sees its own segment up to itself.
    Padding sees padding."""
    T = segments.shape[-1]
    same = segments[..., first:, None] == segments[..., None, :]
    return same & jnp.broadcast_to(jnp.tri(T - first, T, first, dtype=bool), same.shape)


def heads_first(a):
    """[..., T, K, H] → [K, ..., T, H]: how keys and values are kept, so that attention is plain matrix products."""
    return jnp.moveaxis(a, -2, 0)


def in_rows(segments):
    """segments i32, broadcastable to [B, R, J] → `attend_after` for rows whose tokens see their own segment up to
    themselves: attend(q, k, v, prompt, instruction)."""
    if alone_on_tpu():
        return lambda q, k, v, *before: splash.attend_after(q, k, v, segments, *before)
    J = segments.shape[-1]
    blocks = [(first, min(first + BLOCK, J)) for first in range(0, J, BLOCK)]
    masks = [packed_mask(segments[..., :stop], first) for first, stop in blocks]

    def attend(q, k, v, *before):  # of a long row little more than half of the pairs
        return jnp.concatenate(
            [
                attend_after(q[:, :, first:stop], k[..., :stop, :], v[..., :stop, :], mask, *before)
                for (first, stop), mask in zip(blocks, masks, strict=True)
            ],
            axis=2,
        )

    return attend


def attend_after(q, k, v, mask, prompt=None, instruction=None):
    """Rows attend to themselves, to the prompt that R rows share, and to the instruction that all share: one softmax.

    q [B, R, J, N, H]; own k and v [K, B, R, I, H], mask bool broadcastable to [B, R, J, I]; prompt (k, v, mask)
    [K, B, S, H] twice and bool[B, S]; instruction (k, v) [K, S0, H]. → [B, R, J, N, H].
    """
    B, R, J, N, H = q.shape
    K = k.shape[0]
    q = q.reshape(B, R, J, K, N // K, H).transpose(3, 0, 1, 4, 2, 5)  # [K, B, R, G, J, H]
    parts = [("kbrih", k, v, mask[None, :, :, None])]
    if prompt is not None:
        parts.append(("kbih", prompt[0], prompt[1], prompt[2][None, :, None, None, None]))
    if instruction is not None:
        parts.append(("kih", *instruction, True))
    scores = []
    for axes, key, _, seen in parts:
        score = jnp.einsum(f"kbrgjh,{axes}->kbrgji", q, key, preferred_element_type=jnp.float32)
        # scaled in fp32: a bfloat16 q would round once more
        scores.append(jnp.where(seen, score * H**-0.5, MASKED))
    highest = lax.stop_gradient(functools.reduce(jnp.maximum, [score.max(-1, keepdims=True) for score in scores]))
    out, total = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    for (axes, _, value, _), score in zip(parts, scores, strict=True):
        weight = jnp.exp(score - highest)
        total = total + weight.sum(-1, keepdims=True)
        out = out + jnp.einsum(
            f"kbrgji,{axes}->kbrgjh", weight.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
    return (out / total).astype(v.dtype).transpose(1, 2, 4, 0, 3, 5).reshape(B, R, J, N, H)
