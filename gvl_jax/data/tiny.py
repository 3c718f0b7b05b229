"""The demo's tiny Qwen2.5-VL: a byte-level BPE tokenizer trained on the demo's own texts, and the files of an ordinary
checkpoint directory. The weights are not made here: this package holds no model code.
"""

import copy
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gvl_jax.guard.prompt import INSTRUCTION, answer_text, user_turn
from gvl_jax.types import Sample

# Qwen2's pre-tokenizer: words with the blank or mark before them, single digits, runs of marks, line breaks, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5's added tokens, in its order: control tokens, then tokens that are one id but stay visible in decoded text.
CONTROL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}"""

# About 1.5M parameters. The vocabulary size and the token ids are the tokenizer's: write_tiny adds them.
# initializer_range is near 1 / sqrt(width): with Qwen's 0.02 so narrow a model needs several times the steps.
TINY_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "dtype": "float32",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.08,
        "intermediate_size": 384,
        "layer_types": ["full_attention"] * 4,
        "max_position_embeddings": 4096,
        "max_window_layers": 4,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        # Time, height, width: pairs of the 32 values of a head.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        "sliding_window": None,
        "use_cache": True,
        "use_sliding_window": False,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 3,
        "fullatt_block_indexes": [2],
        "hidden_act": "silu",
        "hidden_size": 96,
        "in_channels": 3,
        "initializer_range": 0.08,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}

PREPROCESSOR_CONFIG: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}


def training_texts(samples: Iterable[Sample]) -> Iterator[str]:
    """What the tokenizer is trained on: the three turns of each labelled sample, as they are encoded."""
    for sample in samples:
        answer = answer_text(sample.reasoning, sample.request_label, sample.response_label)
        yield from ("system\n" + INSTRUCTION, "user\n" + user_turn(sample), "assistant\n", answer)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1280) -> Tokenizer:
    """Qwen2's tokenizer with a vocabulary of its own: NFC, the same split, byte-level BPE, the same added tokens.

    vocab_size: ids of the BPE, fewer if the texts offer fewer merges; the added tokens follow it, as in Qwen2.5.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return tokenizer


def write_tiny(directory: str | Path, texts: Iterable[str], vocab_size: int = 1280) -> None:
    """A Qwen2.5-VL checkpoint directory without its weights: tokenizer, config, preprocessor, generation config."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))

    ids = {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
    config = copy.deepcopy(TINY_CONFIG)
    config |= {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    config["text_config"] |= {
        "vocab_size": 128 * math.ceil(tokenizer.get_vocab_size() / 128),
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": None,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "model_max_length": TINY_CONFIG["text_config"]["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
        "tokenizer_config.json": tokenizer_config,
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
