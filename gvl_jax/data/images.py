"""Untrusted picture → RGB → patches, and where each patch stands: rotary coordinates, attention windows.

The levels are those of Qwen2-VL's reference image processor (the Pillow one of transformers) bit for bit, before it
rescales and normalises them: the vision tower does that, so that a picture takes an eighth of the bytes on its way.
"""

import io
import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from gvl_jax.guard.mixing import merge_images
from gvl_jax.types import ImageSource, Merged

PATCH = 14  # pixels of a patch's side
MERGE = 2  # patches of a merged token's side

FACTOR = PATCH * MERGE  # 28: both sides of a resized picture are multiples of it
PATCH_VALUES = 3 * PATCH**2  # C = 588: of one of the two equal frames that a still picture is to the tower


class Limits(NamedTuple):
    """What a picture may be before it is decoded."""

    max_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000
    max_side: int = 16_384
    max_aspect: int = 200  # the smart resize is undefined above it


LIMITS = Limits()


class ImageRejected(ValueError):
    """A picture we do not show to the model. `reason` is a short code for counters and rejected rows:
    missing, too_many_bytes, bad_format, animated, too_many_pixels, side_too_long, aspect, truncated, undecodable,
    too_much_memory; the server adds timeout and crashed (media.py), url and fetch (fetch.py)."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"image rejected ({reason}): {message}")
        self.reason, self.message = reason, message


def open_image(source: ImageSource, limits: Limits = LIMITS) -> Image.Image:
    """A picture as people see it: RGB, EXIF rotation applied, transparent parts on white, 16 bits scaled to 8; merged
    ones in one.

    Size limits are checked on the header, before any pixel is decoded. Raises ImageRejected, nothing else, whatever
    the bytes are.
    """
    if isinstance(source, Merged):
        return merge_images([open_image(part, limits) for part in source.parts])
    try:
        image = source if isinstance(source, Image.Image) else _open_bytes(_read(source, limits))
        _check_header(image, limits)
        return _to_rgb(_upright(image))
    except ImageRejected:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageRejected("too_many_pixels", f"{error}; limit {limits.max_pixels}") from error
    except MemoryError as error:
        raise ImageRejected("too_much_memory", "decoding takes more memory than is allowed") from error
    except Exception as error:  # decoders raise a dozen types on hostile bytes
        reason = "truncated" if "truncated" in str(error) else "undecodable"
        raise ImageRejected(reason, f"{type(error).__name__}: {error}") from error


def _read(source: Path | bytes, limits: Limits) -> bytes:
    if isinstance(source, Path):
        if not source.is_file():
            raise ImageRejected("missing", f"no such file: {source}")
        with source.open("rb") as file:
            source = file.read(limits.max_bytes + 1)
    if len(source) > limits.max_bytes:
        raise ImageRejected("too_many_bytes", f"got more than {limits.max_bytes} bytes; send a smaller file")
    return source


def _open_bytes(data: bytes) -> Image.Image:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        if _png_has_chunk(data, b"acTL"):  # also malformed ones, which Pillow shows as stills and a browser may not
            raise ImageRejected("animated", "animated PNG; send one still picture per frame")
        if data[24:26] == b"\x10\x02" and _png_has_chunk(data, b"tRNS"):
            # Pillow drops the low bytes, which may tell transparent pixels from the rest: a picture only people see.
            raise ImageRejected("bad_format", "16-bit RGB with a transparent colour; send 8 bits or an alpha channel")
        kind = "PNG"
    elif data.startswith(b"\xff\xd8\xff"):
        kind = "JPEG"
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "WEBP"
    else:
        raise ImageRejected("bad_format", f"got bytes that start with {data[:8]!r}, expected PNG, JPEG or WebP")
    return Image.open(io.BytesIO(data), formats=[kind])


def _png_has_chunk(data: bytes, wanted: bytes) -> bool:
    position = 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == wanted:
            return True
        position += length + 12
    return False


def _check_header(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    # From MAX_IMAGE_PIXELS on Pillow warns of a bomb; filters that make it an error are not thread-safe, this is.
    most = min(limits.max_pixels, Image.MAX_IMAGE_PIXELS or limits.max_pixels)
    # MPO: a JPEG with a second picture behind the first (phones store a preview there); viewers show the first.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ImageRejected("animated", "more than one frame; send one still picture per frame")
    if min(width, height) < 1:
        raise ImageRejected("undecodable", f"got {width}x{height} pixels")
    if max(width, height) > limits.max_side:
        raise ImageRejected("side_too_long", f"got {width}x{height} pixels, longest side allowed {limits.max_side}")
    if width * height > most:
        raise ImageRejected("too_many_pixels", f"got {width}x{height} pixels, at most {most} allowed")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise ImageRejected("aspect", f"got {width}x{height} pixels, at most {limits.max_aspect}:1 allowed")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF: viewers show the picture as it is stored, so do we
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow clips these to 8 bits instead of scaling
        levels = np.asarray(image).astype(np.uint16)
        shown = np.where(levels == image.info.get("transparency", -1), 255, levels >> 8)
        return Image.fromarray(shown.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageRejected("bad_format", f"mode {image.mode} has no fixed white; convert the picture to RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of the resized picture, as Qwen2-VL's reference: both multiples of `factor`, their product within
    [min_pixels, max_pixels] where that is possible, the aspect ratio kept as well as it can be.

    Raises ImageRejected above an aspect ratio of 200.
    """
    if max(height, width) > 200 * min(height, width):
        raise ImageRejected("aspect", f"got {width}x{height} pixels, at most 200:1 allowed")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def picture_tokens(image: Image.Image, min_pixels: int, max_pixels: int) -> int:
    """Merged tokens of the picture after its smart resize: one for 28x28 pixels. Raises ImageRejected."""
    height, width = smart_resize(image.height, image.width, FACTOR, min_pixels, max_pixels)
    return height * width // FACTOR**2


def max_pixels_for(merged_tokens: int) -> int:
    """The `max_pixels` at which the smart resize gives at most this many merged tokens; a picture so narrow that its
    short side is a single token may take more."""
    return merged_tokens * FACTOR**2


def resize(image: Image.Image, min_pixels: int, max_pixels: int) -> Image.Image:
    """The picture in the size of its smart resize; in that size already: a copy, bit for bit."""
    height, width = smart_resize(image.height, image.width, FACTOR, min_pixels, max_pixels)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def to_patches(image: Image.Image, min_pixels: int, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB picture → patches u8[P, 588] in the reference's order (2x2 merge blocks, row by row) and its grid i32[3] =
    (1, rows, columns) in patches. Raises ImageRejected above an aspect ratio of 200."""
    pixels = np.asarray(resize(image, min_pixels, max_pixels))
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    blocks = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, PATCH_VALUES)
    return patches, np.array([1, rows, columns], np.int32)


def patch_coords(grid: np.ndarray) -> np.ndarray:
    """i32[P, 2]: row and column of each patch of one image in the reference's order; the tower's rotary positions."""
    _, rows, columns = map(int, grid)
    coords = np.moveaxis(np.indices((rows, columns)), 0, -1)
    blocks = coords.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(-1, 2).astype(np.int32)


def window_order(grid: np.ndarray, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One image's merged tokens (numbered in reading order) in window order, i32[M], and the same cut into its windows:
    `side` x `side` merged tokens, row by row, those at the right and lower edge smaller (Qwen2.5-VL's
    get_window_index; side 4 in the released checkpoints: 112 px)."""
    _, rows, columns = map(int, grid)
    index = np.arange(rows * columns // MERGE**2, dtype=np.int32).reshape(rows // MERGE, columns // MERGE)
    windows = [
        index[top : top + side, left : left + side].reshape(-1)
        for top in range(0, index.shape[0], side)
        for left in range(0, index.shape[1], side)
    ]
    return np.concatenate(windows), windows
