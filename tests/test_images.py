import io
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gvl_jax.data.images import (
    FACTOR,
    ImageRejected,
    Limits,
    max_pixels_for,
    open_image,
    patch_coords,
    smart_resize,
    to_patches,
    window_order,
)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 2, extra: tuple = ()) -> bytes:
    """A PNG from scratch: `rows` are the filtered scanlines, `extra` chunks stand before the pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def claims(data: bytes, kind: str, width: int, height: int) -> bytes:
    """The file with another size in its header, so that decoding it could only fail."""
    data = bytearray(data)
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", height, width)
    else:  # lossy WebP: 14 bits each after the start code
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", width, height)
    return bytes(data)


def rejection(source, limits: Limits = Limits()) -> str:  # noqa: B008
    with pytest.raises(ImageRejected) as caught:
        open_image(source, limits)
    return caught.value.reason


FRAMES = [noise(8, 8), noise(8, 8).rotate(90)]
STILL = {kind: encoded(noise(40, 30), kind) for kind in ("PNG", "JPEG", "WEBP")}
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG",
        b"hello",
        SVG,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9",
        b"SIMPLE  =                    T",
        encoded(noise(8, 8), "GIF"),
        encoded(noise(8, 8), "BMP"),
        encoded(noise(8, 8), "TIFF"),
        encoded(noise(8, 8), "PPM"),
        encoded(noise(8, 8), "GIF") + STILL["PNG"],
        b"\n" + STILL["PNG"],
    ],
)
def test_only_png_jpeg_and_webp_are_opened(data):
    assert rejection(data) == "bad_format"


@pytest.mark.parametrize("kind", STILL)
def test_the_three_formats_open_whatever_the_file_is_called(kind, tmp_path):
    path = tmp_path / "picture.gif"
    path.write_bytes(STILL[kind])
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 30))
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(noise(8, 8), "GIF"))
    assert rejection(path) == "bad_format"


def test_missing_files_and_directories_are_rejected(tmp_path):
    assert rejection(tmp_path / "none.png") == "missing"
    assert rejection(tmp_path) == "missing"


def test_bytes_are_counted_before_anything_is_read(tmp_path):
    limits = Limits(max_bytes=len(STILL["PNG"]) - 1)
    path = tmp_path / "a.png"
    path.write_bytes(STILL["PNG"])
    assert rejection(STILL["PNG"], limits) == rejection(path, limits) == "too_many_bytes"
    open_image(STILL["PNG"], Limits(max_bytes=len(STILL["PNG"])))


@pytest.mark.parametrize(
    "data",
    [
        encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
        encoded(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:], default_image=True),
        encoded(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
        # Frame counts that Pillow calls invalid, so that it would show the still alone.
        png(1, 1, b"\0\0\0\0", extra=((b"acTL", struct.pack(">II", 0, 0)),)),
        png(1, 1, b"\0\0\0\0", extra=((b"tEXt", b"k\0IDAT"), *[(b"acTL", struct.pack(">II", 2, 0))] * 2)),
    ],
)
def test_animated_pictures_are_rejected(data):
    assert rejection(data) == "animated"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pillows_warning_of_a_bomb_is_a_rejection_under_any_limit():
    assert rejection(png(10_000, 10_000, b""), Limits(max_pixels=10**9)) == "too_many_pixels"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_is_checked_on_the_header_before_decoding():
    for width, height in [(8000, 8000), (10_000, 10_000), (16_000, 16_000)]:  # silent, warned and refused by Pillow
        assert rejection(png(width, height, b"")) == "too_many_pixels"
        for kind in ("JPEG", "WEBP"):
            assert rejection(claims(STILL[kind], kind, width, height)) == "too_many_pixels"
    assert rejection(png(50_000, 50_000, b"")) in ("too_many_pixels", "side_too_long")
    assert rejection(png(1, 20_000, b"")) == "side_too_long"
    assert rejection(claims(STILL["JPEG"], "JPEG", 1, 20_000)) == "side_too_long"
    assert rejection(png(2, 401, b"")) == "aspect"
    assert open_image(encoded(noise(1, 200), "PNG")).size == (1, 200)
    assert open_image(encoded(noise(1, 1), "PNG")).size == (1, 1)


def test_a_zero_sized_picture_is_rejected():
    assert rejection(png(0, 4, b"")) == "undecodable"


@pytest.mark.parametrize("kind", STILL)
def test_truncated_files_are_rejected(kind):
    for share in (0.3, 0.6, 0.9):
        assert rejection(STILL[kind][: int(len(STILL[kind]) * share)]) in ("truncated", "undecodable")


@pytest.mark.parametrize("kind", STILL)
def test_damaged_files_give_a_picture_or_a_rejection_and_nothing_else(kind):
    rng = np.random.default_rng(1)
    rejected = 0
    for _ in range(150):
        data = bytearray(STILL[kind])
        for at in rng.integers(0, len(data), rng.integers(1, 8)):
            data[at] = rng.integers(0, 256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except ImageRejected:
            rejected += 1
    assert rejected


def test_a_compressed_text_bomb_inside_a_png_is_rejected():
    bomb = b"k\0\0" + zlib.compress(bytes(80 * 2**20))
    assert rejection(png(1, 1, b"\0\0\0\0", extra=((b"zTXt", bomb),))) == "undecodable"


def test_what_follows_the_picture_is_ignored():
    for kind in STILL:
        tail = b"PK\x03\x04<script>alert(1)</script>" + encoded(noise(9, 9), "GIF")
        assert open_image(STILL[kind] + tail).tobytes() == open_image(STILL[kind]).tobytes()


def test_a_phone_jpeg_with_a_second_picture_shows_the_first():
    data = encoded(noise(8, 8), "MPO", save_all=True, append_images=[noise(4, 4)], quality=95)
    assert open_image(data).tobytes() == open_image(encoded(noise(8, 8), "JPEG", quality=95)).tobytes()


@pytest.mark.parametrize(
    ("orientation", "shown"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_rotation_is_applied(orientation, shown):
    stored, exif = noise(6, 4), Image.Exif()
    exif[0x0112] = orientation
    for source in (encoded(stored, "PNG", exif=exif), encoded(stored, "WEBP", exif=exif, lossless=True)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), shown(np.asarray(stored)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_unreadable_exif_does_not_cost_the_picture():
    data = encoded(noise(6, 4), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert open_image(data).size == (6, 4)


def test_transparent_parts_are_white():
    red, half, clear = (200, 0, 0, 255), (0, 0, 0, 128), (9, 9, 9, 0)
    image = Image.new("RGBA", (3, 1))
    image.putdata([red, half, clear])
    expected = [[200, 0, 0], [127, 127, 127], [255, 255, 255]]
    for source in (image, encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(np.asarray(open_image(source))[0], expected)

    grey = Image.new("LA", (2, 1))
    grey.putdata([(70, 255), (70, 0)])
    np.testing.assert_array_equal(np.asarray(open_image(encoded(grey, "PNG")))[0], [[70] * 3, [255] * 3])

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for transparency in (1, b"\xff\x00"):
        data = encoded(palette, "PNG", transparency=transparency)
        np.testing.assert_array_equal(np.asarray(open_image(data))[0], [[10, 20, 30], [255] * 3])

    data = encoded(Image.fromarray(np.array([[5, 6]], np.uint8)), "PNG", transparency=6)  # one grey level
    np.testing.assert_array_equal(np.asarray(open_image(data))[0], [[5] * 3, [255] * 3])


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
    expected = [0, 0, 1, 0x80, 0xFF]
    grey = encoded(Image.fromarray(levels), "PNG")
    rgb = png(5, 1, b"\0" + np.repeat(levels, 3).astype(">u2").tobytes(), bits=16)
    for source in (grey, rgb, Image.fromarray(levels)):
        np.testing.assert_array_equal(np.asarray(open_image(source))[0, :, 1], expected)


def test_a_transparent_colour_told_by_the_low_byte_alone_hides_nothing():
    """Text and ground differ in the lower 8 of 16 bits; the text is transparent, so people see it."""
    levels = np.array([0x8000, 0x8001], ">u2")
    grey = png(2, 1, b"\0" + levels.tobytes(), bits=16, colour=0, extra=((b"tRNS", levels[1:].tobytes()),))
    np.testing.assert_array_equal(np.asarray(open_image(grey))[0, :, 0], [0x80, 255])
    rgb = png(2, 1, b"\0" + levels.repeat(3).tobytes(), bits=16, extra=((b"tRNS", levels[1:].repeat(3).tobytes()),))
    assert rejection(rgb) == "bad_format"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    image = noise(16, 16, mode)
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_keeps_its_colours():
    data = encoded(Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(np.asarray(open_image(data)).astype(int) - (200, 40, 40)).max() <= 6


def test_pictures_given_as_objects_meet_the_same_limits():
    assert rejection(Image.new("L", (20_000, 100))) == "side_too_long"
    assert rejection(Image.new("L", (1, 201))) == "aspect"
    assert rejection(Image.new("F", (9, 9))) == "bad_format"
    assert (
        rejection(Image.open(io.BytesIO(encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]))))
        == "animated"
    )
    given_image = noise(9, 9)
    open_image(given_image).putpixel((0, 0), (0, 0, 0))
    assert given_image.tobytes() == noise(9, 9).tobytes()


@settings(deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10**6), st.integers(784, 4 * 10**6))
def test_the_smart_resize_gives_whole_tokens_and_keeps_the_aspect_ratio(height, width, low, high):
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ImageRejected):
            smart_resize(height, width, FACTOR, low, high)
        return
    h, w = smart_resize(height, width, FACTOR, low, high)
    assert min(h, w) >= FACTOR and h % FACTOR == w % FACTOR == 0
    if min(h, w) > FACTOR:
        assert 0.5 < (h / w) / (height / width) < 2
    h, w = smart_resize(height, width, FACTOR, low, 10**9)
    assert h * w >= low


@settings(deadline=None)
@given(st.integers(60, 4000), st.integers(60, 4000), st.integers(70, 2000))
def test_max_pixels_for_a_number_of_tokens_gives_at_most_as_many(height, width, tokens):
    limit = max_pixels_for(tokens)
    assert math.prod(smart_resize(height, width, FACTOR, 1, limit)) // FACTOR**2 <= tokens


def test_patches_are_the_pixels_of_merge_blocks_row_by_row():
    # Level 2·(patch row) in red, 2·(patch column) in green, and the pixel row inside the patch in blue.
    rows, columns = np.mgrid[: 4 * 14, : 6 * 14]
    image = Image.fromarray(np.stack([rows // 14 * 2, columns // 14 * 2, rows % 14], -1).astype(np.uint8))
    patches, grid = to_patches(image, 1, 10**6)
    assert grid.tolist() == [1, 4, 6] and grid.dtype == np.int32
    assert patches.shape == (24, 588) and patches.dtype == np.uint8
    levels = patches.reshape(24, 3, 14, 14)
    seen = levels[:, :2, 0, 0].astype(int) // 2
    assert seen[:9].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3], [0, 4]]
    np.testing.assert_array_equal(seen, patch_coords(grid))
    np.testing.assert_array_equal(levels[5, 2], np.arange(14)[:, None].repeat(14, 1))


def test_windows_are_four_by_four_merged_tokens_and_cut_at_the_edge():
    order, windows = window_order(np.array([1, 2 * 5, 2 * 6]), 4)
    assert [len(window) for window in windows] == [16, 8, 4, 2]
    assert windows[0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21]
    assert windows[1].tolist() == [4, 5, 10, 11, 16, 17, 22, 23]
    assert windows[2].tolist() == [24, 25, 26, 27] and windows[3].tolist() == [28, 29]
    np.testing.assert_array_equal(order, np.concatenate(windows))
