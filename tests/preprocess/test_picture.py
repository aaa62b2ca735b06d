"""Pictures from strangers: every mode becomes RGB, everything that is no whole picture is one line with its name."""

from __future__ import annotations

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

from deployfa.errors import DataError
from deployfa.preprocess.picture import FORMATS, open_picture


def pixels(size: tuple[int, int] = (9, 13), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def refused(item: object, part: str, **options: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=part) as caught:
            open_picture(item, **options)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


@pytest.mark.parametrize("form", ["PNG", "BMP"])
def test_bytes_path_image_and_array_are_one_picture(form: str, tmp_path: Path) -> None:
    array = pixels()
    content = encoded(Image.fromarray(array), form)
    file = tmp_path / f"a.{form.lower()}"
    file.write_bytes(content)
    for item in (content, file, str(file), array, Image.fromarray(array)):
        assert np.array_equal(np.asarray(open_picture(item)), array)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read(form: str) -> None:
    image = Image.new("RGB", (20, 12), (200, 30, 90))
    found = np.asarray(open_picture(encoded(image, form)))
    assert found.shape == (12, 20, 3)
    assert np.abs(found.astype(int) - (200, 30, 90)).max() <= 4


def test_other_formats_are_not_even_opened() -> None:
    for form in ("TIFF", "PPM", "ICO", "PCX"):
        refused(encoded(Image.new("RGB", (16, 16)), form), "formats: PNG")


def test_grey_and_alpha_and_palette() -> None:
    grey = pixels()[..., 0]
    assert np.array_equal(np.asarray(open_picture(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(np.asarray(open_picture(grey[..., None])), np.asarray(open_picture(grey)))
    clear = np.dstack([pixels(), np.zeros((9, 13), np.uint8)])
    for item in (clear, encoded(Image.fromarray(clear), "PNG"), Image.fromarray(clear).convert("LA")):
        assert (np.asarray(open_picture(item)) == 255).all()
    image = Image.fromarray(pixels()).quantize(8)
    assert np.array_equal(np.asarray(open_picture(encoded(image, "PNG"))), np.asarray(image.convert("RGB")))
    seen = np.asarray(open_picture(encoded(image, "PNG", transparency=0)))
    assert (seen[np.asarray(image) == 0] == 255).all()
    assert np.array_equal(seen[np.asarray(image) != 0], np.asarray(image.convert("RGB"))[np.asarray(image) != 0])


def test_ink_and_sixteen_bits_and_one() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(np.asarray(open_picture(encoded(ink, "JPEG"))).astype(int) - (255, 0, 0)).max() < 12
    deep = (pixels()[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    found = np.asarray(open_picture(encoded(Image.fromarray(deep), "PNG")))
    assert np.array_equal(found[..., 0], pixels()[..., 0])
    assert set(np.unique(np.asarray(open_picture(encoded(Image.new("1", (8, 8), 1), "PNG"))))) == {255}
    refused(Image.new("F", (4, 4), 1.0), "16 bits")


def test_one_channel() -> None:
    image = open_picture(pixels(), channels=1)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.asarray(Image.fromarray(pixels()).convert("L")))


def test_the_right_way_up() -> None:
    image = Image.fromarray(pixels((10, 16)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_picture(encoded(image, "PNG", exif=exif))
    assert turned.size == (10, 16)
    assert np.array_equal(np.asarray(turned), np.rot90(pixels((10, 16)), -1))


def test_the_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 0, 255))]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(open_picture(content))[0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("form", FORMATS)
def test_cut_short(form: str, tmp_path: Path) -> None:
    content = encoded(Image.fromarray(pixels((64, 64))), form)
    file = tmp_path / "cut.bin"
    for share in (0.03, 0.3, 0.7):
        file.write_bytes(content[: int(len(content) * share)])
        refused(file, r"cut\.bin")


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for edge in (9_000, 100_000, 2**31 - 1):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0))
        bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
        refused(bomb, "more than|pixels|broken")
    refused(pixels(), "13 x 9 pixels, more than 100", max_pixels=100)
    refused(Image.fromarray(pixels()), "13 x 9 pixels", max_pixels=100)


def test_what_is_no_picture(tmp_path: Path) -> None:
    refused(tmp_path / "no.png", "does not exist")
    refused(tmp_path, "cannot read")
    refused("\0", "cannot read")
    refused(b"", "no picture")
    refused(b"<svg/>", "no picture")
    refused(pixels().astype(np.float32), "float32; give uint8")
    refused(np.zeros((2, 3, 3, 3), np.uint8), "shape")
    refused(np.zeros((0, 3), np.uint8), "no pixels")


@settings(max_examples=150)
@given(form=st.sampled_from(FORMATS), at=st.floats(0, 0.999), value=st.integers(0, 255), length=st.integers(1, 8))
def test_damage_never_gives_another_error(form: str, at: float, value: int, length: int) -> None:
    content = bytearray(encoded(Image.fromarray(pixels((24, 24))), form))
    start = int(at * len(content))
    content[start : start + length] = bytes([value]) * len(content[start : start + length])
    try:
        assert open_picture(bytes(content)).mode == "RGB"
    except DataError as error:
        assert "\n" not in str(error)
