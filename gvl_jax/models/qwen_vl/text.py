"""The decoder: packed rows, prompts that are kept as a cache, and completions that continue a shared prompt."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from gvl_jax.models.qwen_vl.attention import Prompt, attend_after, heads_first, in_rows
from gvl_jax.models.qwen_vl.config import TextConfig
from gvl_jax.models.qwen_vl.layers import Linear, RMSNorm, gated_mlp, scan_layers, stack
from gvl_jax.models.qwen_vl.rope import mrope_angles, rotate
from gvl_jax.types import Remat


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

    def extend(self, x, positions, segments, prompt: Prompt, *, keep: bool = False, remat: Remat = "none"):
        """Rows, which may continue a shared prompt, all tokens at once: x [B, R, J, D], positions i32[3, B, R, J],
        segments i32, broadcastable to [B, R, J] → hidden [B, R, J, D], (k, v) [L, K, B, R, J, H] if kept."""
        angles, attend_own = self._angles(positions), in_rows(segments)
        before = (None if prompt.k is None else (prompt.k, prompt.v), prompt.instruction)

        def body(layer, x, before):
            own_prompt, instruction = before
            seen = None if own_prompt is None else (*own_prompt, prompt.mask)

            def attend_where(q, k, v):
                k, v = heads_first(k), heads_first(v)
                return attend_own(q, k, v, seen, instruction), (k, v) if keep else None

            return layer(x, angles, attend_where)

        x, kept = scan_layers(self.layers, x, body, before, remat=remat)
        return self.norm(x), kept

    def each(self) -> list[DecoderLayer]:
        """The layers one by one, for `decode`: a scan would copy each layer's weights and cache at every token. A stack
        is cut, which is a second copy; `sharding.copies` holds them apart."""
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        graph, weights = nnx.split(self.layers)
        return [
            nnx.merge(graph, jax.tree.map(lambda w, i=i: w[i], weights)) for i in range(self.config.num_hidden_layers)
        ]

    def decode(self, x, layers: list[DecoderLayer], prompts: list, positions, mask, caches: list, column):
        """One more token of every completion: x [B, R, D], positions i32[B, R] → hidden [B, R, D], caches.

        Of each layer: prompts (k, v, mask), instruction as `attend_after` takes them, and caches (k, v)
        [K, B, R, J, H], in which `column` is written; mask bool[B, R, J] the columns a completion sees, that one too.
        """
        angles = self._angles(jnp.broadcast_to(positions[..., None], (3, *positions.shape, 1)))
        x, new = x[:, :, None], []
        for layer, (prompt, instruction), cache in zip(layers, prompts, caches, strict=True):

            def attend_where(q, k, v, cache=cache, prompt=prompt, instruction=instruction):
                k, v = (
                    lax.dynamic_update_slice(old, heads_first(a), (0, 0, 0, column, 0))
                    for old, a in zip(cache, (k, v), strict=True)
                )
                return attend_after(q, k, v, mask[:, :, None], prompt, instruction), (k, v)

            x, kept = layer(x, angles, attend_where)
            new.append(kept)
        return self.norm(x)[:, :, 0], new
