"""Qwen2.5-VL: the vision tower and the decoder joined. Jitted code works on plain dicts of arrays, see `bind`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gvl_jax.models.qwen_vl.attention import Prompt
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.layers import Linear
from gvl_jax.models.qwen_vl.text import Decoder
from gvl_jax.models.qwen_vl.vision import VisionTower
from gvl_jax.types import Batch


class QwenVL(nnx.Module):
    def __init__(self, config: QwenVLConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.visual = VisionTower(config.vision, rngs=rngs)
        self.text = Decoder(config.text, rngs=rngs)
        if not config.text.tie_word_embeddings:
            self.head = Linear((config.text.hidden_size,), (config.text.vocab_size,), bias=False, rngs=rngs)

    def embed(self, tokens, image_index=None, merged=None):
        """tokens i32[...] → [..., D]; where image_index >= 0 the merged patch [M, D] stands in for the token."""
        x = self.text.embed.embedding[...].astype(self.config.dtype)[tokens]
        if merged is None:
            return x
        return jnp.where((image_index >= 0)[..., None], merged[jnp.maximum(image_index, 0)], x)

    def _inputs(self, batch: Batch, remat: bool):
        merged = None if batch.vision is None else self.visual(batch.vision, self.config.dtype, remat=remat)
        return self.embed(batch.tokens, batch.image_index, merged)

    def __call__(self, batch: Batch, *, remat: bool = False):
        """Packed rows → hidden [B, T, D]; multiply by `head_kernel()` for logits."""
        x = self._inputs(batch, remat)
        return self.text(x, batch.positions, batch.segments, remat=remat)[0]

    def prefill(self, batch: Batch, *, remat: bool = False):
        """One prompt per row → hidden of its last token [B, D], and the Prompt that completions share."""
        x, positions = self._inputs(batch, remat), batch.positions
        hidden, (k, v) = self.text(x, positions, batch.segments, keep=True, remat=remat)
        mask = batch.segments > 0
        last = jnp.maximum(mask.sum(1) - 1, 0)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
        # a picture ends lower than its number of tokens: the next position follows the largest so far
        length = jnp.where(mask[None], positions, -1).max((0, 2)) + 1
        return hidden, Prompt(k, v, mask, length)

    def extend(self, tokens, prompt: Prompt, *, remat: bool = False):
        """Completions i32[B, R, J] of shared prompts → hidden [B, R, J, D], each token computed once."""
        return self.text.extend(self.embed(tokens), prompt, remat=remat)

    def decode(self, tokens, prompt: Prompt, cache, step):
        """The `step`-th token of every completion, i32[B, R] → hidden [B, R, D] and the cache with it."""
        return self.text.decode(self.embed(tokens), prompt, cache, step)

    def empty_cache(self, prompts: int, rollouts: int, length: int):
        """Keys and values of completions: a pair of zeros [L, B, R, J, K, H]."""
        text = self.config.text
        shape = (text.num_hidden_layers, prompts, rollouts, length, text.num_key_value_heads, text.head_dim)
        return jnp.zeros(shape, self.config.dtype), jnp.zeros(shape, self.config.dtype)

    def head_kernel(self):
        """[D, V]: the untied head, or the embedding turned."""
        if self.config.text.tie_word_embeddings:
            return self.text.embed.embedding[...].T
        return self.head.kernel[...]


@functools.cache
def _abstract(config: QwenVLConfig):
    return nnx.split(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))


def bind(config: QwenVLConfig, params: dict) -> QwenVL:
    """A plain dict of arrays → the module that computes with them. Free inside jit: it happens while tracing."""
    graph, state = _abstract(config)
    state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one is never written
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: QwenVLConfig) -> dict:
    """The parameter tree as shapes: what a checkpoint must hold."""
    return nnx.to_pure_dict(_abstract(config)[1])


def init_params(config: QwenVLConfig, seed: int) -> dict:
    """Random parameters, fp32."""
    return jax.jit(lambda: nnx.to_pure_dict(nnx.state(QwenVL(config, rngs=nnx.Rngs(seed)))))()
