"""From samples to steps: what a stage reads, in which order, from which position."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL.Image import Image

from gvl_jax.config import Images
from gvl_jax.data.images import (
    FACTOR,
    MERGE,
    PATCH,
    PATCH_VALUES,
    ImageRejected,
    max_pixels_for,
    open_image,
    smart_resize,
    to_patches,
)
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
        low, high = images.min_pixels, images.max_pixels
        grids = _grids(opened, low, high)
        written = _written(sample, grids, tokenizer, answer)
        text = len(written[0]) - int(grids.prod(axis=1).sum()) // MERGE**2
        if len(written[0]) > max_length and opened and text + len(opened) <= max_length:
            high = max_pixels_for((max_length - text) // len(opened))
            low = min(low, high)
            grids = _grids(opened, low, high)
            written = _written(sample, grids, tokenizer, answer)
        if len(written[0]) > max_length:
            message = f"{text} tokens of text and {len(opened)} pictures, at most {max_length} tokens fit"
            raise SampleRejected("too_long", message)
        patches = [to_patches(image, low, high)[0] for image in opened]
        flat = np.concatenate(patches) if patches else np.zeros((0, PATCH_VALUES), np.uint8)
        return Example(*written, flat, grids)
    except SampleRejected:
        raise
    except ImageRejected as error:
        raise SampleRejected(error.reason, str(error)) from error
    except ValueError as error:  # a user turn whose tags are not its images
        raise SampleRejected("invalid", str(error)) from error


def _grids(opened: list[Image], low: int, high: int) -> np.ndarray:
    """i32[n, 3] of the pictures' patches within these bounds."""
    sizes = [smart_resize(image.height, image.width, FACTOR, low, high) for image in opened]
    return np.array([(1, height // PATCH, width // PATCH) for height, width in sizes], np.int32).reshape(-1, 3)


def _written(
    sample: Sample, grids: np.ndarray, tokenizer: Tokenizer, answer: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, loss mask, positions)"""
    if answer is not None:
        return build_example(sample, grids, tokenizer, answer)
    tokens, positions = build_prompt(sample, grids, tokenizer)
    return tokens, np.zeros(len(tokens), bool), positions


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
