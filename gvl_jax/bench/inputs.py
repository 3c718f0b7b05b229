"""What is measured: model shapes with the real vocabulary, random weights, and prompts laid out like real ones."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from gvl_jax.config import Dtype
from gvl_jax.data.packing import Layout
from gvl_jax.guard.prompt import instruction_ids, mrope_positions
from gvl_jax.models.qwen_vl.config import QwenVLConfig, TextConfig, VisionConfig
from gvl_jax.models.qwen_vl.hub import save_params
from gvl_jax.models.qwen_vl.model import abstract_params, init_params
from gvl_jax.types import Example

VOCABULARY, TEXT_IDS = 151_936, 151_643  # rows of the embedding; ids of text, those above are control tokens


def _shape(width: int, ffn: int, layers: int, heads: tuple[int, int], vision: tuple[int, int, int, int], **other):
    """heads: query, key. vision: depth, width, ffn, heads; one block in eight sees the whole picture, as in Qwen's."""
    depth = vision[0]
    head_dim = width // heads[0]
    sections = (head_dim // 8, head_dim * 3 // 16, head_dim * 3 // 16)  # 16, 24, 24 of Qwen's 64 pairs
    return QwenVLConfig(
        text=TextConfig(
            vocab_size=other.get("vocabulary", VOCABULARY), hidden_size=width, intermediate_size=ffn,
            num_hidden_layers=layers, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
            rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=sections, tie_word_embeddings=other.get("tied", True),
        ),
        vision=VisionConfig(
            depth=depth, hidden_size=vision[1], intermediate_size=vision[2], num_heads=vision[3], patch_size=14,
            spatial_merge_size=2, temporal_patch_size=2, window_size=112, out_hidden_size=width,
            fullatt_block_indexes=tuple(range(7, depth, 8)) or (depth - 1,),
        ),
    )  # fmt: skip


SIZES = {  # named by parameters without embeddings; of the small ones a fifth is the vision tower, as of 3B
    "tiny": _shape(64, 192, 2, (2, 1), (2, 32, 64, 2)),
    "20M": _shape(256, 1376, 13, (4, 2), (8, 176, 470, 4)),
    "100M": _shape(512, 2752, 17, (8, 2), (8, 384, 1026, 8)),
    "3B": _shape(2048, 11008, 36, (16, 2), (32, 1280, 3420, 16)),
    "7B": _shape(3584, 18944, 28, (28, 4), (32, 1280, 3420, 16), vocabulary=152_064, tied=False),
}


class Workload(NamedTuple):
    """Sizes of the inputs, in tokens but for `side` and the counts."""

    prompt: int = 1000  # of the forward, rollout and update cases, instruction and picture included
    instruction: int = 300  # what all prompts begin with
    side: int = 18  # merged tokens along a picture's edge: 18 x 18 = 324 tokens, 504 x 504 px
    group_size: int = 16
    new: int = 64  # sampled tokens of a rollout
    answer: int = 250  # tokens of a completion in the update
    forward_rows: int = 4
    samples: int = 8  # of an SFT step, 0.5 to 1.5 prompts long; a quarter of each is learned
    trainer_batch: int = 2  # samples in a padded batch of the peer's SFT step, which keeps all logits
    requests: int = 32  # of the moderation case: text of 0.1 to 0.8 prompts, every other one with a picture
    verdict: int = 32  # tokens generated for a request

    @property
    def patches(self) -> int:
        return 4 * self.side**2


class World(NamedTuple):
    """A model on disk, and what runs on it."""

    config: QwenVLConfig
    checkpoint: Path
    work: Workload

    @property
    def layout(self) -> Layout:
        """Patch buckets of one, two and four pictures, as a histogram of pictures of this one size would give."""
        buckets = tuple(count * self.work.patches for count in (1, 2, 4))
        shared = tuple(instruction_ids(Ids(self.config, self.work.instruction)))
        return Layout(self.config.image_token_id, buckets, self.config.vision.window_size, shared)


class Ids:
    """Stands in for a tokenizer where only ids matter: text is random ids, and nothing ends a completion."""

    im_start, im_end, end_of_text = TEXT_IDS + 1, TEXT_IDS + 2, TEXT_IDS

    def __init__(self, config: QwenVLConfig, instruction: int):
        self.vision_start, self.vision_end = config.vision_start_token_id, config.vision_end_token_id
        self.image_pad, self.vocab_size = config.image_token_id, config.text.vocab_size
        self.instruction = np.random.default_rng(1).integers(0, TEXT_IDS, instruction - 4).tolist()
        self.banned_ids = list(range(TEXT_IDS, self.vocab_size))  # the ends too: every completion has its full length

    def encode_text(self, text: str) -> list[int]:
        return self.instruction if len(text) > 1 else [198]

    def decode(self, ids: Sequence[int]) -> str:
        return ""

    def token_bytes(self) -> list[bytes]:
        return [b""] * self.vocab_size


def world(size: str, dtype: Dtype, work: Workload, folder: Path) -> World:
    """Random weights of one of SIZES, saved in fp32 where both sides load them from (once)."""
    config = replace(SIZES[size], dtype=dtype)
    if not folder.exists():
        save_params(folder, init_params(config, 0), config, dtype="float32")
    return World(config, folder, work)


def parameters(config: QwenVLConfig) -> tuple[int, int]:
    """How many: (without embeddings, embeddings and untied head)."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    vocabulary = sum(leaf.size for _, leaf in leaves if config.text.vocab_size in leaf.shape)
    return sum(leaf.size for _, leaf in leaves) - vocabulary, vocabulary


def example(world: World, seed: int, length: int, *, picture: bool, answer: int = 0) -> Example:
    """The instruction, a picture of noise or none, random text, and `answer` tokens to learn: `length` in all."""
    rng, config, side = np.random.default_rng(seed), world.config, world.work.side
    shared = list(world.layout.shared)
    image = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    head = [*shared, *rng.integers(0, TEXT_IDS, 8).tolist(), *(image if picture else [])]
    if length < len(head) + answer + 1:
        raise ValueError(f"a sample of {length} tokens cannot hold {len(head)} of instruction and picture, a token "
                         f"of text and {answer} of answer; give longer ones")  # fmt: skip
    tokens = np.array([*head, *rng.integers(0, TEXT_IDS, length - len(head))], np.int32)
    grids = np.array([[1, 2 * side, 2 * side]] if picture else [], np.int32).reshape(-1, 3)
    patches = rng.integers(0, 256, (len(grids) * world.work.patches, config.vision.frame_dim), np.uint8)
    loss_mask = np.arange(length) >= length - answer
    return Example(tokens, loss_mask, mrope_positions(tokens == config.image_token_id, grids), patches, grids)


def prompts(world: World, count: int) -> list[Example]:
    return [example(world, seed, world.work.prompt, picture=True) for seed in range(count)]


def sft_samples(world: World) -> list[Example]:
    """Of mixed lengths, in random order; the longer half with a picture."""
    work = world.work
    lengths = np.linspace(0.5, 1.5, work.samples) * work.prompt
    order = np.random.default_rng(0).permutation(work.samples)
    return [
        example(world, i, int(lengths[i]), picture=lengths[i] > 0.9 * work.prompt, answer=int(lengths[i]) // 4)
        for i in order.tolist()
    ]


def requests(world: World) -> list[Example]:
    """For moderation: mixed lengths, every other one with a picture."""
    work = world.work
    texts = np.random.default_rng(0).integers(work.prompt // 10, work.prompt * 8 // 10, work.requests)
    image = work.side**2 + 2
    return [
        example(world, i, work.instruction + int(text) + image * (i % 2), picture=bool(i % 2))
        for i, text in enumerate(texts)
    ]
