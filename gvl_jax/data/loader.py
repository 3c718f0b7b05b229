"""From samples to steps: what a stage reads, in which order, from which position."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL.Image import Image

from gvl_jax.config import Images
from gvl_jax.data.images import MERGE, PATCH_VALUES, ImageRejected, max_pixels_for, open_image, to_patches
from gvl_jax.data.tokenizer import Tokenizer
from gvl_jax.guard.prompt import build_example, build_prompt
from gvl_jax.types import Example, Sample


class SampleRejected(ValueError):
    """A sample that cannot become an example. `reason` is a short code that is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def to_example(
    sample: Sample, tokenizer: Tokenizer, images: Images, max_length: int, answer: str | None = None
) -> Example:
    """Sample → Example: the prompt alone, or prompt and answer (which is then what is learned).

    A sample over `max_length` tokens has its pictures shrunk by the smart-resize rule until it fits; text is
    never cut. Raises SampleRejected: a bad picture, text that alone is too long, a turn whose tags are not its images.
    """
    try:
        opened = [open_image(source) for source in sample.images]
        example = _assemble(sample, tokenizer, opened, images.min_pixels, images.max_pixels, answer)
        if len(example.tokens) <= max_length:
            return example
        text = len(example.tokens) - len(example.patches) // MERGE**2
        if text + len(opened) <= max_length and opened:
            most = max_pixels_for((max_length - text) // len(opened))
            example = _assemble(sample, tokenizer, opened, min(images.min_pixels, most), most, answer)
        if len(example.tokens) > max_length:
            message = f"{text} tokens of text and {len(opened)} pictures, at most {max_length} tokens fit"
            raise SampleRejected("too_long", message)
        return example
    except SampleRejected:
        raise
    except ImageRejected as error:
        raise SampleRejected(error.reason, str(error)) from error
    except ValueError as error:  # a user turn whose tags are not its images
        raise SampleRejected("invalid", str(error)) from error


def _assemble(
    sample: Sample, tokenizer: Tokenizer, opened: list[Image], low: int, high: int, answer: str | None
) -> Example:
    prepared = [to_patches(image, low, high) for image in opened]
    grids = np.array([grid for _, grid in prepared], np.int32).reshape(-1, 3)
    patches = np.concatenate([p for p, _ in prepared]) if prepared else np.zeros((0, PATCH_VALUES), np.float32)
    if answer is None:
        tokens, positions = build_prompt(sample, grids, tokenizer)
        loss_mask = np.zeros(len(tokens), bool)
    else:
        tokens, loss_mask, positions = build_example(sample, grids, tokenizer, answer)
    return Example(tokens, loss_mask, positions, patches, grids)


def steps(
    samples: Sequence,
    build: Callable,
    *,
    per_step: int,
    epochs: int,
    seed: int,
    start: int = 0,
    whole: bool = False,
    finish: Callable[[list], Any] = list,
    workers: int | None = None,
    share: tuple[int, int] = (0, 1),
    mixture: Sequence[tuple[Sequence, float]] = (),
) -> Iterator:
    """What a run reads, from step `start`: shuffled anew each epoch, `per_step` samples a step.

    Samples are built in `workers` threads (None: one per core, at most 16), and `finish` makes a step of what is
    built in one more, two steps ahead of the reader. A step is a function of (samples, per_step, epochs, seed, mixture,
    its number) and nothing else, so a resumed run reads on exactly where it stopped.
    whole: leave out a last step that is not full. share: (i, n): only every n-th sample of each step, from i, for the
    i-th of n processes; n divides per_step. The last step of some may be empty, and is left out.
    mixture: the parts of `samples`, each with its weight: how often it is drawn, in proportion. An epoch stays as long
    as all samples; a part that is used up begins anew, in another order.
    """
    workers, (first, processes) = workers or min(16, os.cpu_count() or 1), share
    order = _shuffled(samples, seed).repeat(epochs)
    if mixture:
        parts = [_shuffled(part, seed + number).repeat() for number, (part, _) in enumerate(mixture)]
        order = grain.MapDataset.mix(parts, [weight for _, weight in mixture])[: len(order)]
    if whole:
        order = order[: len(order) // per_step * per_step]
    order = order.map(build)[start * per_step + first :: processes]
    built = order.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))
    ready = built.batch(per_step // processes, batch_fn=list).map(finish)
    iterator = iter(grain.experimental.ThreadPrefetchIterDataset(ready, prefetch_buffer_size=1))
    iterator.start_prefetch()
    return iterator


def _shuffled(samples: Sequence, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(samples).seed(seed).shuffle()


def step_count(samples: int, per_step: int, epochs: int, whole: bool = False) -> int:
    """Steps of a run; the last one may be short, unless only `whole` ones count."""
    return samples * epochs // per_step if whole else -(-samples * epochs // per_step)
