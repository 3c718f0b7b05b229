"""The shape of Qwen2.5-VL, and its config.json both ways.

What this implementation does not do is refused here, by name: a checkpoint never loads into a model that
would compute something else.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Any

# transformers' class defaults. Its config writer leaves out what equals them, so an absent field means these.
_VISION_DEFAULTS: dict[str, Any] = dict(
    depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, window_size=112, fullatt_block_indexes=(7, 15, 23, 31),
    out_hidden_size=3584,
)  # fmt: skip
_TEXT_DEFAULTS: dict[str, Any] = dict(
    vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5,
)  # fmt: skip
_TOKEN_DEFAULTS = dict(
    image_token_id=151655, video_token_id=151656, vision_start_token_id=151652, vision_end_token_id=151653
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower. `window_size` is in pixels; blocks not in `fullatt_block_indexes` attend inside windows."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int = 3
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    out_hidden_size: int

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"vision hidden_size {self.hidden_size} must be a multiple of 4 x num_heads ({self.num_heads}): "
                "the 2-D rotary splits a head in four"
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise ValueError(
                f"window_size {self.window_size} is not a multiple of a merged patch "
                f"({self.patch_size} x {self.spatial_merge_size} px)"
            )
        if not set(self.fullatt_block_indexes) <= set(range(self.depth)):
            raise ValueError(f"fullatt_block_indexes {self.fullatt_block_indexes} outside the {self.depth} blocks")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of a patch: channels x frames x rows x columns."""
        return prod(self.patch_shape)

    @property
    def frame_dim(self) -> int:
        """Those of one frame (C): all that a still picture has."""
        return self.patch_dim // self.temporal_patch_size

    @property
    def patch_shape(self) -> tuple[int, int, int, int]:
        return self.in_channels, self.temporal_patch_size, self.patch_size, self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder. `mrope_section`: rotary pairs of a head turned by time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim} x {self.num_attention_heads} heads is not hidden_size {self.hidden_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} query heads cannot share {self.num_key_value_heads} key heads evenly"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} must be 3 numbers that add up to half of head_dim {self.head_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class QwenVLConfig:
    """Both towers, the ids of the vision tokens, and the dtype of the computation (not of the stored weights)."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ValueError(
                f"vision out_hidden_size {self.vision.out_hidden_size} is not the text's {self.text.hidden_size}"
            )


def from_hf(raw: dict[str, Any]) -> QwenVLConfig:
    """Read a config.json: the hub's flat form, or transformers' nested one (text_config).

    Raises:
        ValueError: one line that names every field this implementation cannot honour.
    """
    if raw.get("model_type") != "qwen2_5_vl":
        raise ValueError(f"model_type is {raw.get('model_type')!r}; only 'qwen2_5_vl' is implemented")
    if not isinstance(raw.get("vision_config"), dict):
        raise ValueError("vision_config is missing: not the config of a vision-language model")
    vision, text = _VISION_DEFAULTS | raw["vision_config"], _TEXT_DEFAULTS | (raw.get("text_config") or raw)
    if "in_channels" not in raw["vision_config"] and "in_chans" in vision:
        vision["in_channels"] = vision["in_chans"]
    if text["num_key_value_heads"] is None:
        text["num_key_value_heads"] = text["num_attention_heads"]
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if problems := _unsupported(raw, vision, text, rope):
        raise ValueError("; ".join(problems) + ". This implementation would compute something else: use another model")
    return QwenVLConfig(
        vision=VisionConfig(
            **{name: vision[name] for name in _VISION_DEFAULTS if name != "fullatt_block_indexes"},
            fullatt_block_indexes=tuple(vision["fullatt_block_indexes"]),
        ),
        text=TextConfig(
            **{name: text[name] for name in _TEXT_DEFAULTS},
            head_dim=text["hidden_size"] // text["num_attention_heads"],
            rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
            mrope_section=tuple(rope["mrope_section"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        ),
        **{name: raw.get(name, default) for name, default in _TOKEN_DEFAULTS.items()},
    )


def _unsupported(raw: dict, vision: dict, text: dict, rope: dict) -> list[str]:
    """Every field that asks for something the model does not do, as 'field is value, implemented: …'."""
    problems = []

    def require(name: str, value: Any, *allowed: Any) -> None:
        if value not in allowed:
            problems.append(f"{name} is {value!r}, implemented: {' or '.join(repr(one) for one in allowed)}")

    for where, part, defaults in (("vision_config", vision, _VISION_DEFAULTS), ("text", text, _TEXT_DEFAULTS)):
        for name, default in defaults.items():
            if isinstance(default, int) and (type(part[name]) is not int or part[name] < 1):
                problems.append(f"{where}.{name} is {part[name]!r}, expected a positive whole number")
        require(f"{where}.hidden_act", part.get("hidden_act", "silu"), "silu")
    require("quantization_config", raw.get("quantization_config"), None)

    require("text.attention_bias", text.get("attention_bias", True), True)
    require("text.mlp_bias", text.get("mlp_bias", False), False)
    require("text.attention_dropout", text.get("attention_dropout") or 0.0, 0.0)
    if not problems:  # the numbers below are numbers
        head_dim = text["hidden_size"] // text["num_attention_heads"]
        require("text.head_dim", text.get("head_dim") or head_dim, head_dim)
        sliding = text.get("use_sliding_window") and text.get("sliding_window", 4096) is not None
        if sliding and text.get("max_window_layers", 80) < text["num_hidden_layers"]:
            problems.append("use_sliding_window is True for some layers, implemented: full attention in every layer")
    for kind in sorted(set(text.get("layer_types") or ()) - {"full_attention"}):
        problems.append(f"layer_types has {kind!r}, implemented: 'full_attention'")

    for name in ("type", "rope_type"):
        require(f"rope {name}", rope.get(name, "default"), "mrope", "default")
    require("rope partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)
    known = {"type", "rope_type", "rope_theta", "mrope_section", "partial_rotary_factor"}
    problems += [f"rope {name} is {rope[name]!r}, implemented: no such scaling" for name in sorted(set(rope) - known)]
    if not isinstance(rope.get("mrope_section"), list | tuple):
        problems.append("rope mrope_section is missing")
    axial = vision.get("rope_parameters") or {}
    require("vision_config rope_theta", axial.get("rope_theta", 10000.0), 10000.0)
    require("vision_config rope_type", axial.get("rope_type", "axial"), "axial", "default")
    return problems


def to_hf(config: QwenVLConfig, dtype: str) -> dict[str, Any]:
    """A config.json in the hub's flat form, which every transformers since 4.49 reads. dtype: of the stored weights."""
    text = {field.name: getattr(config.text, field.name) for field in fields(TextConfig)}
    del text["head_dim"]  # always hidden_size / num_attention_heads
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.pop("mrope_section"))},
        **text,
        **{name: getattr(config, name) for name in _TOKEN_DEFAULTS},
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            **{field.name: getattr(config.vision, field.name) for field in fields(VisionConfig)},
            "fullatt_block_indexes": list(config.vision.fullatt_block_indexes),
        },
    }
