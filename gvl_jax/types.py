"""What crosses the borders between modules: plain tuples of text and arrays, no logic.

Axis letters, used in every shape comment and every einsum of this package:

    B rows (or prompts)   T tokens of a row       S tokens of a prompt   N query heads    D model width
    R rollouts a prompt   J tokens of a rollout   V vocabulary           K key heads      F feed-forward width
    P image patches       C values of a patch     W windows              G N // K         L layers
    M merged patches (P // 4)                     U patches a window     H head width
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL.Image import Image

Label = Literal["harmful", "unharmful"]
Remat = Literal["none", "dots", "layers"]  # what the backward pass computes again, see `scan_layers`
Array = Any  # np.ndarray on the host, jax.Array on a device


class Merged(NamedTuple):
    """Pictures that are shown side by side as one, put together each time they are opened."""

    parts: "tuple[ImageSource, ...]"


ImageSource = Path | bytes | Image | Merged


class Sample(NamedTuple):
    """One record: what a person asked, what an assistant answered, and what is known about both."""

    id: str
    request: str
    response: str | None = None
    images: tuple[ImageSource, ...] = ()
    request_label: Label | None = None
    response_label: Label | None = None
    reasoning: str | None = None  # the text between <think> and </think>
    user_turn: str | None = None  # rows that come as `messages`: the user turn verbatim, one <image> tag per image
    category: str | None = None  # of harm, in the words of its source; scores are also given for each


class Example(NamedTuple):
    """One sample as arrays: the host's last stop before packing."""

    tokens: np.ndarray  # i32[T] prompt, then answer (if any)
    loss_mask: np.ndarray  # bool[T] True on answer tokens: the ones that are predicted
    positions: np.ndarray  # i32[3, T] M-RoPE: time, height, width
    patches: np.ndarray  # u8[P, C] levels of all images, in the reference's order (merge blocks, row by row)
    grids: np.ndarray  # i32[n, 3] one (t, h, w) per image, in patches
    merged: np.ndarray | None = None  # [ΣM, D] what a frozen vision tower made of the patches, in reading order


class Vision(NamedTuple):
    """The images of one micro-batch in one buffer of a bucket's size.

    Patches stand in window order, so the four patches of a merged token are neighbours and so are the
    patches of a window. Padding patches have image 0 and appear in no window.
    """

    patches: Array  # u8[P, C] R, then G, then B of each
    coords: Array  # i32[P, 2] row and column of the patch in its image: the rotary position
    image: Array  # i32[P] which image, from 1; 0 = padding. Full-attention blocks stay inside an image
    windows: Array  # i32[W, U] the patch in each slot of each window; P = empty slot
    slots: Array  # i32[P] where a patch stands in `windows`, flattened; 0 for padding


class Batch(NamedTuple):
    """One micro-batch of packed rows.

    tokens     [ s y s u s e r … a n s w e r | s y s u s e r … a n s w e r | pad ]
    segments   [ 1 1 1 1 1 1 1 1 1 1 1 1 1 1 | 2 2 2 2 2 2 2 2 2 2 2 2 2 2 | 0   ]
    loss_mask  [ 0 0 0 0 0 0 0 0 1 1 1 1 1 1 | 0 0 0 0 0 0 0 0 1 1 1 1 1 1 | 0   ]
    """

    tokens: Array  # i32[B, T]
    loss_mask: Array  # bool[B, T] True where the token itself is predicted (the loss shifts by one, once)
    positions: Array  # i32[3, B, T]
    segments: Array  # i32[B, T] from 1; 0 = padding
    image_index: Array  # i32[B, T] which merged patch replaces the token's embedding; -1 = none
    vision: Vision | Array | None  # [M, D]: Example.merged of its examples; None: no image. Then the tower rests
    shared: Array | None = (
        None  # i32[S] what every sample begins with (the instruction): computed once, not in the rows
    )


class Rollout(NamedTuple):
    """Sampled completions of B prompts, R of each."""

    tokens: Array  # i32[B, R, J] right-padded
    logprobs: Array  # f32[B, R, J] of the sampled token, under softmax(logits / temperature) over allowed ids
    lengths: Array  # i32[B, R] tokens kept, the end token included
    stopped: Array  # i32[B, R] why: decoding.END_TOKEN, VERDICT, BUDGET or CUT
    scores: Array  # f32[B, R, 2] P(harmful) of request and response, where a forced close decided them; else 0
