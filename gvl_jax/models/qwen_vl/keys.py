"""The key table: where every tensor of a checkpoint goes. Load, save and their checks are all derived from it.

Two key layouts hold the same tensors: "hub" (visual.*, model.*, lm_head.*), which Qwen publishes and transformers
saves, and "transformers5" (model.visual.*, model.language_model.*, lm_head.*), transformers' module names since 4.52.
"""

from math import prod
from typing import Literal, NamedTuple

from gvl_jax.models.qwen_vl.config import QwenVLConfig

Layout = Literal["hub", "transformers5"]


class Weight(NamedTuple):
    """One stored tensor and the parameter it holds, or the several it fuses along its rows.

    A stored matrix is [outputs, inputs], ours is [inputs, outputs]; a bias, a scale or an embedding has no inputs.
    """

    key: str  # in the hub layout; {} stands for the layer
    stored: tuple[int, ...]
    paths: tuple[str, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    layers: int  # 0: not stacked

    @property
    def shape(self) -> tuple[int, ...]:
        """Of each parameter."""
        return (*((self.layers,) if self.layers else ()), *self.inputs, *self.outputs)

    @property
    def keys(self) -> list[str]:
        return [self.key.format(layer) for layer in range(self.layers or 1)]


def table(config: QwenVLConfig) -> list[Weight]:
    """Every stored tensor of a Qwen2.5-VL checkpoint."""

    def linear(key: str, paths: list[str], inputs: tuple, outputs: tuple, layers: int = 0, bias: bool = True):
        rows = len(paths) * prod(outputs)
        kernels, biases = (tuple(f"{path}/{name}" for path in paths) for name in ("kernel", "bias"))
        yield Weight(f"{key}.weight", (rows, prod(inputs)), kernels, inputs, outputs, layers)
        if bias:
            yield Weight(f"{key}.bias", (rows,), biases, (), outputs, layers)

    def norm(key: str, path: str, width: int, layers: int = 0) -> Weight:
        return Weight(f"{key}.weight", (width,), (f"{path}/scale",), (), (width,), layers)

    v, t = config.vision, config.text
    E, F, L = v.hidden_size, v.intermediate_size, v.depth
    heads = (v.num_heads, v.head_dim)
    merged = E * v.spatial_merge_size**2
    block, ours = "visual.blocks.{}", "visual/blocks"
    patches = "visual.patch_embed.proj.weight"
    vision = [
        Weight(patches, (E, *v.patch_shape), ("visual/patch_embed/kernel",), (v.patch_dim,), (E,), 0),
        norm(f"{block}.norm1", f"{ours}/norm1", E, L),
        *linear(f"{block}.attn.qkv", [f"{ours}/q", f"{ours}/k", f"{ours}/v"], (E,), heads, L),
        *linear(f"{block}.attn.proj", [f"{ours}/o"], heads, (E,), L),
        norm(f"{block}.norm2", f"{ours}/norm2", E, L),
        *linear(f"{block}.mlp.gate_proj", [f"{ours}/gate"], (E,), (F,), L),
        *linear(f"{block}.mlp.up_proj", [f"{ours}/up"], (E,), (F,), L),
        *linear(f"{block}.mlp.down_proj", [f"{ours}/down"], (F,), (E,), L),
        norm("visual.merger.ln_q", "visual/merger/norm", E),
        *linear("visual.merger.mlp.0", ["visual/merger/fc1"], (merged,), (merged,)),
        *linear("visual.merger.mlp.2", ["visual/merger/fc2"], (merged,), (v.out_hidden_size,)),
    ]

    V, D, F, L = t.vocab_size, t.hidden_size, t.intermediate_size, t.num_hidden_layers
    heads, kv_heads = (t.num_attention_heads, t.head_dim), (t.num_key_value_heads, t.head_dim)
    layer, ours = "model.layers.{}", "text/layers"
    text = [
        Weight("model.embed_tokens.weight", (V, D), ("text/embed/embedding",), (), (V, D), 0),
        norm(f"{layer}.input_layernorm", f"{ours}/norm1", D, L),
        *linear(f"{layer}.self_attn.q_proj", [f"{ours}/q"], (D,), heads, L),
        *linear(f"{layer}.self_attn.k_proj", [f"{ours}/k"], (D,), kv_heads, L),
        *linear(f"{layer}.self_attn.v_proj", [f"{ours}/v"], (D,), kv_heads, L),
        *linear(f"{layer}.self_attn.o_proj", [f"{ours}/o"], heads, (D,), L, bias=False),
        norm(f"{layer}.post_attention_layernorm", f"{ours}/norm2", D, L),
        *linear(f"{layer}.mlp.gate_proj", [f"{ours}/gate"], (D,), (F,), L, bias=False),
        *linear(f"{layer}.mlp.up_proj", [f"{ours}/up"], (D,), (F,), L, bias=False),
        *linear(f"{layer}.mlp.down_proj", [f"{ours}/down"], (F,), (D,), L, bias=False),
        norm("model.norm", "text/norm", D),
    ]
    head = [] if t.tie_word_embeddings else [*linear("lm_head", ["head"], (D,), (V,), bias=False)]
    return vision + text + head


def to_hub_key(key: str) -> str:
    """A key of either layout → the hub's."""
    if key.startswith("model.visual."):
        return key.removeprefix("model.")
    return key.replace("model.language_model.", "model.", 1) if key.startswith("model.language_model.") else key


def from_hub_key(key: str, layout: Layout) -> str:
    """A key of the hub's layout → `layout`."""
    if layout == "hub" or key.startswith("lm_head."):
        return key
    return f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model.", 1)
