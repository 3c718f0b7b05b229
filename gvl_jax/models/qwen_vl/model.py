"""Qwen2.5-VL: the vision tower and the decoder joined. Jitted code works on plain dicts of arrays, see `bind`."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from gvl_jax.models.qwen_vl.attention import Prompt
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.layers import Linear
from gvl_jax.models.qwen_vl.text import Decoder, DecoderLayer
from gvl_jax.models.qwen_vl.vision import VisionTower
from gvl_jax.sharding import whole
from gvl_jax.types import Batch, Remat, Vision

NOTHING = Prompt(None, None, None, None)  # before a row


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

    def _inputs(self, batch: Batch, remat: Remat):
        merged = batch.vision
        if isinstance(merged, Vision):
            merged = self.visual(merged, self.config.dtype, remat=remat)
        return self.embed(batch.tokens, batch.image_index, merged)

    def instruction(self, tokens, *, remat: Remat = "none"):
        """Keys and values (k, v) [L, K, S0, H] of what every prompt begins with, tokens i32[S0]."""
        S = len(tokens)
        order = jnp.broadcast_to(jnp.arange(S), (3, 1, 1, S))
        one = jnp.ones((1, 1, S), jnp.int32)
        _, (k, v) = self.text.extend(self.embed(tokens)[None, None], order, one, NOTHING, keep=True, remat=remat)
        return k[:, :, 0, 0], v[:, :, 0, 0]

    def rows(self, batch: Batch, instruction=None, *, keep: bool = False, remat: Remat = "none"):
        """Packed rows → hidden [B, T, D], and the Prompt of every row if kept.

        instruction: what `instruction` gave for `batch.shared`, if it is known."""
        x, mask = self._inputs(batch, remat), batch.segments > 0
        # a picture ends lower than its number of tokens: the next position follows the largest so far
        length = jnp.where(mask[None], batch.positions, -1).max((0, 2)) + 1
        if batch.shared is not None and instruction is None:
            instruction = self.instruction(batch.shared, remat=remat)
        before = NOTHING._replace(instruction=instruction)
        hidden, kept = self.text.extend(
            x[:, None], batch.positions[:, :, None], batch.segments[:, None], before, keep=keep, remat=remat
        )
        if not keep:
            return hidden[:, 0], None
        return hidden[:, 0], Prompt(kept[0][:, :, :, 0], kept[1][:, :, :, 0], mask, length, instruction)

    def __call__(self, batch: Batch, *, remat: Remat = "none"):
        """Packed rows → hidden [B, T, D]; multiply by `head_kernel()` for logits."""
        return self.rows(batch, remat=remat)[0]

    def prefill(self, batch: Batch, *, remat: Remat = "none"):
        """One prompt per row → hidden of its last token [B, D], and the Prompt that completions share."""
        hidden, prompt = self.rows(batch, keep=True, remat=remat)
        last = jnp.maximum((batch.segments > 0).sum(1) - 1, 0)
        return jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0], prompt

    def extend(self, tokens, prompt: Prompt, *, remat: Remat = "none"):
        """Completions i32[B, R, J] of shared prompts → hidden [B, R, J, D], each token computed once."""
        assert prompt.length is not None
        steps = jnp.arange(tokens.shape[2])
        positions = jnp.broadcast_to(prompt.length[:, None, None] + steps[None, None], (3, *tokens.shape))
        own = jnp.ones((1, 1, tokens.shape[2]), jnp.int32)  # one segment
        return self.text.extend(self.embed(tokens), positions, own, prompt, remat=remat)[0]

    def head_kernel(self):
        """[D, V]: the untied head, or the embedding turned."""
        if self.config.text.tie_word_embeddings:
            return self.text.embed.embedding[...].T
        return self.head.kernel[...]


@functools.cache
def _abstract(config: QwenVLConfig, apart: bool = False):
    def model():
        made = QwenVL(config, rngs=nnx.Rngs(0))
        if apart:
            layers = [DecoderLayer(config.text, rngs=nnx.Rngs(0)) for _ in range(config.text.num_hidden_layers)]
            made.text.layers = nnx.List(layers)
        return made

    return nnx.split(nnx.eval_shape(model))


def bind(config: QwenVLConfig, params: dict) -> QwenVL:
    """A plain dict of arrays → the module that computes with them, its layers stacked or `apart`. Free inside jit: it
    happens while tracing."""
    graph, state = _abstract(config, 0 in params["text"]["layers"])
    state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one is never written
    nnx.replace_by_pure_dict(state, whole(params, config.dtype))
    return nnx.merge(graph, state)


def abstract_params(config: QwenVLConfig) -> dict:
    """The parameter tree as shapes: what a checkpoint must hold."""
    return nnx.to_pure_dict(_abstract(config)[1])


@functools.partial(jax.jit, static_argnames="config")
def _init(key, config: QwenVLConfig) -> dict:
    return nnx.to_pure_dict(nnx.state(QwenVL(config, rngs=nnx.Rngs(key))))


def init_params(config: QwenVLConfig, seed: int) -> dict:
    """Random parameters, fp32."""
    return _init(jax.random.key(seed), config)
