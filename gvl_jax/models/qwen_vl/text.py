"""The decoder: packed rows, prompts that are kept as a cache, and completions that continue a shared prompt."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gvl_jax.models.qwen_vl.attention import Prompt, attend, attend_after_prompt, packed_mask
from gvl_jax.models.qwen_vl.config import TextConfig
from gvl_jax.models.qwen_vl.layers import Linear, RMSNorm, gated_mlp, scan_layers, stack
from gvl_jax.models.qwen_vl.rope import mrope_angles, rotate


class DecoderLayer(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, hidden, H = config.hidden_size, config.intermediate_size, config.head_dim
        heads, key_heads = (config.num_attention_heads, H), (config.num_key_value_heads, H)
        self.norm1 = RMSNorm(width, config.rms_norm_eps)
        self.q = Linear((width,), heads, bias=True, rngs=rngs)
        self.k = Linear((width,), key_heads, bias=True, rngs=rngs)
        self.v = Linear((width,), key_heads, bias=True, rngs=rngs)
        self.o = Linear(heads, (width,), bias=False, rngs=rngs)
        self.norm2 = RMSNorm(width, config.rms_norm_eps)
        self.gate = Linear((width,), (hidden,), bias=False, rngs=rngs)
        self.up = Linear((width,), (hidden,), bias=False, rngs=rngs)
        self.down = Linear((hidden,), (width,), bias=False, rngs=rngs)

    def __call__(self, x, angles, attend_where):
        """attend_where(q, k, v) → (attention output, whatever the caller keeps of k and v)."""
        h = self.norm1(x)
        q, k, v = rotate(self.q(h), angles), rotate(self.k(h), angles), self.v(h)
        out, kept = attend_where(q, k, v)
        x = x + self.o(out)
        return x + gated_mlp(self, self.norm2(x)), kept


class Embedding(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape) * config.hidden_size**-0.5)


class Decoder(nnx.Module):
    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, rngs=rngs)
        self.layers = stack(lambda rngs: DecoderLayer(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def _angles(self, positions):
        return mrope_angles(positions, self.config.head_dim, self.config.rope_theta, self.config.mrope_section)

    def __call__(self, x, positions, segments, *, keep: bool = False, remat: bool = False):
        """x [B, T, D], positions i32[3, B, T], segments i32[B, T] → hidden [B, T, D]; keep: (k, v) [L, B, T, K, H]."""
        angles, mask = self._angles(positions), packed_mask(segments)[:, None]

        def body(layer, x, _):
            return layer(x, angles, lambda q, k, v: (attend(q, k, v, mask), (k, v) if keep else None))

        x, kept = scan_layers(self.layers, x, body, remat=remat)
        return self.norm(x), kept

    def extend(self, x, positions, mask, prompt: Prompt, *, keep: bool = False, remat: bool = False):
        """Rows that continue a shared prompt, all tokens at once: x [B, R, J, D], positions i32[3, B, R, J], mask
        bool[B, R, J, J] among a row's own tokens → hidden [B, R, J, D], (k, v) [L, B, R, J, K, H] if kept."""
        angles = self._angles(positions)

        def body(layer, x, shared):
            def attend_where(q, k, v):
                return attend_after_prompt(q, *shared, prompt.mask, k, v, mask), (k, v) if keep else None

            return layer(x, angles, attend_where)

        x, kept = scan_layers(self.layers, x, body, (prompt.k, prompt.v), remat=remat)
        return self.norm(x), kept

    def decode(self, x, prompt: Prompt, cache, step):
        """Token `step` of every completion: x [B, R, D], cache (k, v) [L, B, R, J, K, H] → hidden [B, R, D], cache.

        The cache is carried through the layers and written in place; slots after `step` are masked.
        """
        x = x[:, :, None]
        positions = jnp.broadcast_to(prompt.length[:, None, None] + step, x.shape[:3])
        angles = self._angles(jnp.broadcast_to(positions, (3, *positions.shape)))
        written = (jnp.arange(cache[0].shape[3]) <= step)[None, None, None]

        def body(layer, carry, scanned):
            x, cache = carry
            index, shared = scanned

            def attend_where(q, k, v):
                at = (index, 0, 0, step, 0, 0)
                new = tuple(lax.dynamic_update_slice(c, a[None], at) for c, a in zip(cache, (k, v), strict=True))
                own = tuple(lax.dynamic_index_in_dim(c, index, keepdims=False) for c in new)
                return attend_after_prompt(q, *shared, prompt.mask, *own, written), new

            return layer(x, angles, attend_where), None

        indexes = jnp.arange(self.config.num_hidden_layers)
        (x, cache), _ = scan_layers(self.layers, (x, cache), body, (indexes, (prompt.k, prompt.v)))
        return self.norm(x)[:, :, 0], cache
