"""What each stage computes and keeps, by formula from the model's shape. Numbers only: no arrays, no clock.

A multiply-add is 2 FLOPs. Attention counts every query-key pair that is computed, those that a mask hides included.
Norms, rotary embeddings, softmax and activations are left out: under 2 % at the widths of 3B and 7B.
"""

from typing import NamedTuple

from gvl_jax.models.qwen_vl.attention import BLOCK
from gvl_jax.models.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig

TRAIN = 3  # passes of a training step: forward, gradient of the inputs, gradient of the weights
HEAD_TRAIN = 4  # the head's logits are computed again in the backward pass, so that they never exist whole


class Work(NamedTuple):
    """One repetition of a stage."""

    tokens: int  # that went through the decoder, padding included
    flops: float
    kv_bytes: int  # keys and values kept at the end
    bytes_read: float  # weights and cache that decoding must read, once a step; 0 where nothing is decoded

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        tokens, flops, kept, read = (a + b for a, b in zip(self, other, strict=True))
        return Work(int(tokens), flops, int(kept), read)


def layer_weights(text: TextConfig) -> int:
    """Weights of one decoder layer that a token is multiplied with."""
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads  # q and o, k and v
    return text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)


def decoder_flops(text: TextConfig, tokens: int, pairs: int) -> float:
    """`tokens` through all layers, with `pairs` query-key pairs a head."""
    attention = 4 * text.num_attention_heads * text.head_dim * pairs  # scores, and the sum over values
    return text.num_hidden_layers * (2.0 * tokens * layer_weights(text) + attention)


def head_flops(text: TextConfig, tokens: int) -> float:
    """Logits of `tokens` over the vocabulary."""
    return 2.0 * tokens * text.hidden_size * text.vocab_size


def vision_flops(vision: VisionConfig, patches: int) -> float:
    """One picture: windows in most blocks, all patches in the listed ones."""
    width, merged_width = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    window = (vision.window_size // vision.patch_size) ** 2
    full = len(vision.fullatt_block_indexes)
    pairs = patches * (full * patches + (vision.depth - full) * window)
    blocks = vision.depth * (4 * width * width + 3 * width * vision.intermediate_size)
    merger = merged_width * (merged_width + vision.out_hidden_size) / vision.spatial_merge_size**2
    return 2.0 * patches * (vision.patch_dim * width + blocks + merger) + 4.0 * width * pairs


def kv_bytes(config: QwenVLConfig, tokens: int) -> int:
    """Keys and values of `tokens` in all layers."""
    text = config.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens * itemsize(config)


def itemsize(config: QwenVLConfig) -> int:
    return {"float32": 4, "bfloat16": 2}[config.dtype]


def decode_weight_bytes(config: QwenVLConfig) -> int:
    """Weights that one decoding step reads: all layers and the head."""
    text = config.text
    weights = text.num_hidden_layers * layer_weights(text) + text.hidden_size * text.vocab_size
    return weights * itemsize(config)


def row_pairs(length: int, block: int = BLOCK) -> int:
    """Query-key pairs of a row of `length` tokens: a block of queries at a time, over the keys up to its last."""
    ends = [*range(block, length, block), length]
    return sum((end - start) * end for start, end in zip([0, *ends], ends, strict=False))


def rows(
    config: QwenVLConfig, count: int, length: int, patches: tuple[int, ...] = (), before: int = 0, *,
    block: int = BLOCK,
) -> Work:  # fmt: skip
    """`count` rows of `length` tokens that see `before` others, which are there already, and the pictures; no logits.

    patches: of every picture. block: of queries, see `row_pairs`; for another library that of a whole row.
    """
    tokens = count * length
    flops = decoder_flops(config.text, tokens, tokens * before + count * row_pairs(length, block))
    flops += sum(vision_flops(config.vision, p) for p in patches)
    return Work(tokens, flops, kv_bytes(config, tokens), 0.0)


def prefill(config: QwenVLConfig, count: int, length: int, patches: tuple[int, ...] = (), shared: int = 0) -> Work:
    """As `rows`, with the `shared` tokens that they all begin with, computed once."""
    return rows(config, 1, shared) + rows(config, count, length, patches, shared)


def groups(
    config: QwenVLConfig, count: int, length: int, patches: tuple[int, ...], shared: int, group_size: int, answer: int
) -> Work:
    """`prefill`, and `group_size` completions of `answer` tokens on each row, all tokens at once; no logits."""
    own = count * group_size * answer
    flops = decoder_flops(config.text, own, own * (shared + length) + count * group_size * row_pairs(answer))
    return prefill(config, count, length, patches, shared) + Work(own, flops, kv_bytes(config, own), 0.0)


def decode(config: QwenVLConfig, prompts: int, group_size: int, prompt: int, new: int) -> Work:
    """`new` tokens of `group_size` completions on each of `prompts` prompts, whose keys and values are there."""
    text, completions = config.text, prompts * group_size
    own = new * (new + 1) // 2
    flops = decoder_flops(text, completions * new, completions * (new * prompt + own))
    flops += head_flops(text, completions * new)
    read = new * (decode_weight_bytes(config) + kv_bytes(config, prompts * prompt)) + kv_bytes(
        config, completions * own
    )
    return Work(completions * new, flops, kv_bytes(config, completions * new), read)


def rollout(config: QwenVLConfig, prompt: int, patches: tuple[int, ...], group_size: int, new: int, *, shared: bool):
    """A group of completions of one prompt. shared: P + G·R tokens in place of G·(P + R). → Work"""
    if shared:
        return prefill(config, 1, prompt, patches) + decode(config, 1, group_size, prompt, new)
    return prefill(config, group_size, prompt, patches * group_size) + decode(config, group_size, 1, prompt, new)


def train(config: QwenVLConfig, forward: Work, head_tokens: int, *, remat: bool, head_passes: int = HEAD_TRAIN) -> Work:
    """A training step on what `forward` computes, with logits of `head_tokens`. remat: the layers run once more."""
    flops = forward.flops * (TRAIN + remat) + head_passes * head_flops(config.text, head_tokens)
    return Work(forward.tokens, flops, 0, 0.0)


def update(
    config: QwenVLConfig,
    prompt: int,
    patches: tuple[int, ...],
    group_size: int,
    answer: int,
    *,
    shared: bool,
    remat: bool,
) -> Work:
    """The RL update of one group: the training forward of a prompt and its completions, and the gradient."""
    prompts = 1 if shared else group_size
    forward = prefill(config, prompts, prompt, patches * prompts)
    own = group_size * answer
    pairs = own * prompt + group_size * row_pairs(answer)
    forward += Work(own, decoder_flops(config.text, own, pairs), 0, 0.0)
    return train(config, forward, own, remat=remat)


def sharded(config: QwenVLConfig, parameters: int, devices: int) -> dict[str, float]:
    """Weights, gradient and two moments in fp32 over `devices`: bytes held by one, and bytes one receives in a step
    (weights gathered for the forward and for the backward pass, gradients reduced and scattered)."""
    others = (devices - 1) / devices
    return {
        "state": 16 * parameters / devices,
        "received": others * parameters * (2 * itemsize(config) + 4),
    }
