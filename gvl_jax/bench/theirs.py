"""The same work by transformers and torch: stock calls on a stock model. Needs the test extra."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, logging

from gvl_jax.bench.inputs import TEXT_IDS, World
from gvl_jax.models.qwen_vl.vision import MEAN, STD
from gvl_jax.types import Example

logging.set_verbosity_error()
logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def settle(step: Callable[[], Any]) -> int:
    """Give torch the number of threads with which `step` is fastest, one or one per core. → that number

    All cores are not always best: where other work holds one of them, OpenMP's threads wait for each other, and a step
    took 49 s with two threads and 16 s with one. That would be the machine's time, not the peer's.
    """
    seconds = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        step()
        began = time.perf_counter()
        step()
        seconds[threads] = time.perf_counter() - began
    fastest = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(fastest)
    return fastest


def load(world: World, *, train: bool = False) -> Any:
    """The checkpoint as transformers loads it, attention by sdpa. Training keeps fp32 weights, as a Trainer does."""
    dtype = torch.float32 if train else getattr(torch, world.config.dtype)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        world.checkpoint, dtype=dtype, attn_implementation="sdpa"
    )
    return model.to(DEVICE).train(train)


def pixel_values(levels: np.ndarray) -> np.ndarray:
    """Example.patches as the reference's image processor gives them: f32[P, 2 C], bit for bit."""
    rescaled = (levels.reshape(len(levels), 3, 1, -1) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    return np.repeat((rescaled - mean) / std, 2, axis=2).reshape(len(levels), -1)


def inputs(world: World, examples: Sequence[Example], *, left: bool) -> dict[str, Any]:
    """One padded batch. mm_token_type_ids: without it transformers uses 1-D positions."""
    longest = max(len(e.tokens) for e in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, e in enumerate(examples):
        span = slice(longest - len(e.tokens), None) if left else slice(len(e.tokens))
        tokens[row, span] = torch.tensor(e.tokens).long()
        mask[row, span] = 1
    pictures = [e for e in examples if len(e.grids)]
    batch = {"input_ids": tokens, "attention_mask": mask}
    batch["mm_token_type_ids"] = (tokens == world.config.image_token_id).int()
    if pictures:
        batch["pixel_values"] = torch.tensor(pixel_values(np.concatenate([e.patches for e in pictures])))
        batch["image_grid_thw"] = torch.tensor(np.concatenate([e.grids for e in pictures])).long()
    return {name: value.to(DEVICE) for name, value in batch.items()}


def forward(world: World, examples: Sequence[Example]) -> Callable[[], np.ndarray]:
    """→ step: logits of the last tokens f32[B, V]."""
    model, batch = load(world), inputs(world, examples, left=True)

    def step() -> np.ndarray:
        with torch.inference_mode():
            return model(**batch, logits_to_keep=1, use_cache=False).logits[:, 0].float().cpu().numpy()

    return step


def generate(
    world: World,
    examples: Sequence[Example],
    new: int,
    *,
    group_size: int = 1,
    temperature: float = 0.0,
    ban: bool = False,
) -> Callable[[], np.ndarray]:
    """→ step: new tokens [B · group_size, new]. ban: text only, as our sampler; a cost that its timing is spared."""
    model, batch = load(world), inputs(world, examples, left=True)
    how: dict[str, Any] = {"max_new_tokens": new, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    if temperature:
        how |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how["num_return_sequences"] = group_size
    if ban:
        how["suppress_tokens"] = list(range(TEXT_IDS, world.config.text.vocab_size))

    def step() -> np.ndarray:
        return model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :].cpu().numpy()

    return step


def sft(world: World, samples: Sequence[Example], rate: float) -> Callable[[], tuple[float, float]]:
    """→ step: one update as the Trainer makes it: padded batches, fused AdamW, clipping at 1. → (loss, gradient norm)

    bfloat16: autocast over fp32 weights.
    """
    model, size = load(world, train=True), world.work.trainer_batch
    adamw = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    total = sum(int(e.loss_mask.sum()) for e in samples)
    batches = []
    for start in range(0, len(samples), size):
        part = samples[start : start + size]
        batch = inputs(world, part, left=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for row, e in enumerate(part):
            labels[row, : len(e.tokens)] = torch.tensor(np.where(e.loss_mask, e.tokens, -100)).long()
        batches.append(batch | {"labels": labels})

    def step() -> tuple[float, float]:
        loss = 0.0
        for batch in batches:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=world.config.dtype == "bfloat16"):
                share = model(**batch, num_items_in_batch=total, use_cache=False).loss
            share.backward()
            loss += share.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        adamw.step()
        adamw.zero_grad()
        return loss, norm

    return step


def matmul(size: int, dtype: str) -> Callable[[], None]:
    a = torch.randn(size, size, dtype=getattr(torch, dtype), device=DEVICE)

    def step() -> None:
        a @ a
        _wait()

    return step


def copy(values: int) -> Callable[[], None]:
    source = torch.zeros(values, device=DEVICE)
    target = torch.empty_like(source)

    def step() -> None:
        target.copy_(source)
        _wait()

    return step


def peak_device_bytes() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
