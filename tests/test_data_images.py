"""One image by Pillow: what its own conversions would lose, and files that are none."""

import contextlib
import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from countermark.data import images
from countermark.data.images import DamagedError, decode, fitted, from_array
from countermark.errors import CountermarkError
from noise import drawn

pytestmark = [  # Pillow's own about odd files; `decoded` silences them
    pytest.mark.filterwarnings("ignore:Corrupt EXIF data"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


def packed(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def opened(data: bytes) -> np.ndarray:
    """Pixels `(h, w, c)` or `(h, w)`."""
    pixels = decode(data).pixels
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_file_without_loss_gives_its_pixels(form: str, channels: int) -> None:
    pixels = drawn(1, 5, 7, channels)
    found = decode(
        packed(Image.fromarray(pixels), form, **({"lossless": True} if form == "WEBP" else {}))
    )
    assert found.shape == (5, 7)
    assert found.kinds == ()
    if form == "WEBP" and channels == 1:  # a format of colours
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    assert np.array_equal(
        found.pixels, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    )


def test_a_jpeg_is_near_its_pixels_and_grey_ones_have_one_channel() -> None:
    smooth = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8), (24, 24))
    found = decode(packed(Image.fromarray(smooth), "JPEG", quality=95))
    assert found.pixels.shape == (1, 24, 24)
    assert np.abs(found.pixels[0].astype(int) - smooth).max() <= 4


def test_transparency_is_laid_over_white() -> None:
    """Transparency of four kinds is laid over white.

    These are RGBA, grey with alpha, a palette with alpha, and the one transparent colour of a PNG.
    """
    pixels = drawn(2, 4, 4, 4)
    alpha = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(opened(packed(Image.fromarray(pixels))) - expected).max() <= 1
    assert decode(packed(Image.fromarray(pixels))).kinds == ("alpha",)
    grey = np.dstack([drawn(3, 4, 4, 1), drawn(4, 4, 4, 1)])
    expected = grey[..., 0] * (grey[..., 1] / 255) + 255 * (1 - grey[..., 1] / 255)
    found = opened(packed(Image.fromarray(grey, "LA")))
    assert found.ndim == 2
    assert np.abs(found - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert opened(packed(palette, transparency=b"\x00\xff")).tolist() == [
        [[255, 255, 255], [40, 50, 60]]
    ]
    assert decode(packed(palette, transparency=1)).kinds == ("palette", "alpha")
    assert opened(packed(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert opened(packed(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    single = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert opened(packed(single, transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]
    single = Image.fromarray(np.array([[7, 9]], dtype=np.uint8))
    assert opened(packed(single, transparency=9)).tolist() == [[7, 255]]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 128, 257, 32768, 65535, 1000]], dtype=np.uint16)
    found = decode(packed(Image.fromarray(values)))
    assert found.pixels.tolist() == [[[0, 0, 1, 128, 255, 4]]]
    assert found.kinds == ("16-bit",)


def test_1_bit_and_cmyk_are_counted() -> None:
    found = decode(packed(Image.fromarray(np.array([[True, False]]))))
    assert found.pixels.tolist() == [[[255, 0]]]
    assert found.kinds == ("1-bit",)
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red
    found = decode(packed(cmyk, "JPEG", quality=95))
    assert found.kinds == ("cmyk",)
    assert np.abs(found.pixels.mean((1, 2)) - (255, 0, 0)).max() < 30


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """The corner that EXIF calls the first row and column ends where a viewer would show it."""
    upright = drawn(5, 6, 4)
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    as_stored = undo[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode(packed(Image.fromarray(np.ascontiguousarray(as_stored)), exif=exif))
    assert np.array_equal(found.pixels.transpose(1, 2, 0), upright)
    assert found.shape == (6, 4)
    assert found.kinds == (() if orientation == 1 else ("turned",))


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = packed(Image.fromarray(drawn(6)), "PNG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert np.array_equal(opened(data), drawn(6))


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_taken_and_counted(form: str) -> None:
    frames = [Image.fromarray(drawn(seed)) for seed in (7, 8)]
    found = decode(packed(frames[0], form, save_all=True, append_images=frames[1:], lossless=True))
    assert np.array_equal(found.pixels, drawn(7).transpose(2, 0, 1))
    assert found.kinds == ("animated",)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_size_scales_the_largest_centred_square(height: int, width: int, size: int) -> None:
    """Brute force: cut the square out first, then scale it."""
    pixels = drawn(9, height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = Image.fromarray(pixels[top : top + side, left : left + side])
    found = decode(packed(Image.fromarray(pixels)), size)
    assert found.shape == (height, width)
    assert found.pixels.shape == (3, size, size)
    assert np.array_equal(
        found.pixels.transpose(1, 2, 0),
        np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)),
    )


def test_scaling_down_is_antialiased_and_needs_little_memory_for_a_strip() -> None:
    fine = np.indices((64, 64)).sum(0) % 2 * 255  # a chessboard of single pixels
    found = decode(packed(Image.fromarray(fine.astype(np.uint8))), 4)
    assert np.abs(found.pixels.astype(int) - 128).max() <= 4
    strip = decode(
        packed(Image.new("L", (60_000, 1))), 64
    )  # the short side to 64 alone would make 245 million pixels
    assert strip.pixels.shape == (1, 64, 64)


def test_a_large_jpeg_is_scaled_while_it_is_decoded() -> None:
    smooth = np.linspace(0, 255, 512)[None].repeat(512, 0).astype(np.uint8)
    found = decode(packed(Image.fromarray(smooth), "JPEG", quality=95), 8)
    assert found.shape == (512, 512)
    assert np.abs(found.pixels[0, 0] - (np.arange(8) * 32 + 16)).max() < 4


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header promises a large image of almost no bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(20_000, 20_000), (2**31 - 1, 2**31 - 1), (1 << 27, 1)]
)
def test_a_bomb_is_refused_by_its_header(
    width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(DamagedError, match=r"^has .* 67108864 (pixels )?that are decoded$"):
        decode(png_of(width, height), 32)


def test_one_pixel_is_an_image() -> None:
    assert decode(packed(Image.new("RGB", (1, 1), (1, 2, 3)))).pixels.tolist() == [
        [[1]],
        [[2]],
        [[3]],
    ]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_truncated_file_is_refused(form: str, tmp_path: Path) -> None:
    data = packed(Image.fromarray(drawn(10, 64, 64)), form)
    for kept in (0, 1, 8, 30, len(data) // 2, len(data) - 200):
        with pytest.raises(DamagedError) as told:
            decode(data[:kept])
        assert "\n" not in str(told.value)
        (tmp_path / "cut").write_bytes(data[:kept])
        with pytest.raises(DamagedError):
            decode(tmp_path / "cut")


@pytest.mark.parametrize(
    "data",
    [
        b"no image at all",
        b"GIF89a" + bytes(100),
        b"\x80\x04\x95pickle",
        b"II*\x00" + bytes(64),
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(DamagedError, match="is not a PNG, JPEG, WebP or BMP image"):
        decode(data)


@settings(deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.integers(0, 10**6)
)
def test_no_bytes_make_it_fail_otherwise(noise: bytes, form: str, place: int) -> None:
    data = bytearray(packed(Image.fromarray(drawn(11)), form))
    start = place % len(data)
    data[start : start + len(noise)] = noise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = []
        with contextlib.suppress(DamagedError):
            found.append(decode(bytes(data)))
    for each in found:
        assert each.pixels.dtype == np.uint8
        assert each.pixels.shape == (len(each.pixels), *each.shape)


def test_a_file_that_may_not_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="No such file"):
        decode(tmp_path / "gone.png")


def test_arrays_of_either_order_give_the_same_pixels() -> None:
    pixels = drawn(12, 5, 6)
    expected = pixels.transpose(2, 0, 1)
    for array in (pixels, expected, pixels / 255, expected.astype(np.float32) / 255):
        assert np.array_equal(from_array(array).pixels, expected)
    assert from_array(pixels / 255).kinds == ("float",)
    assert np.array_equal(from_array(pixels[..., 0]).pixels, pixels[None, ..., 0])


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((3, 8, 3), dtype=np.uint8), "as .h, w, c. and as .c, h, w."),
        (np.zeros((8, 8, 4), dtype=np.uint8), "neither"),
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), "shape"),
        (np.zeros((8, 8), dtype=np.int64), "type int64"),
        (np.full((8, 8), 1.5), r"from 1\.5 to 1\.5"),
        (np.full((8, 8), np.nan), "nan"),
        (np.array(["a"]), "type"),
        (np.zeros((0, 8, 3), dtype=np.uint8), "shape"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, word: str) -> None:
    with pytest.raises(DamagedError, match=word):
        images.from_array(array)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 5, 7), (1, 5, 7)])
def test_a_file_is_fitted_to_the_shape_of_a_model(shape: tuple[int, int, int]) -> None:
    """As the folder was read; grey and colour are turned into each other."""
    grey, colours = Image.fromarray(drawn(1, 5, 7, 1)), Image.fromarray(drawn(2, 5, 7, 3))
    side = shape[1] if shape[1] == shape[2] else None
    for image in (grey, colours):
        data = packed(image)
        found = fitted(data, shape)
        assert found.shape == shape
        as_read = decode(data, side).pixels
        if len(as_read) == shape[0]:
            assert np.array_equal(found, as_read)
        elif shape[0] == 3:
            assert all(np.array_equal(channel, as_read[0]) for channel in found)
        else:
            weights = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
            assert np.abs(found[0] - (weights * as_read).sum(0)).max() <= 1


def test_a_file_that_fits_no_model_is_refused() -> None:
    data = packed(Image.fromarray(drawn(1, 5, 7, 1)))
    with pytest.raises(DamagedError, match=r"has 5 x 7 pixels .* takes 7 x 5"):
        fitted(data, (1, 7, 5))
    with pytest.raises(CountermarkError, match="the model takes 4; send arrays"):
        fitted(data, (4, 8, 8))
    with pytest.raises(DamagedError, match="not a PNG"):
        fitted(b"GIF89a", (1, 8, 8))
