"""A picture from a stranger → RGB or grey, as its maker meant it to be seen.

A picture is data and no more: common formats only, so that a decoder nobody reviews is never reached; the number of
pixels is read from the header before one of them is decoded; whatever is wrong with it is one line with its name.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from deployfa.edits import Array
from deployfa.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FORMATS", "MAX_PIXELS", "Picture", "open_picture"]

#: A path, the bytes of a file, a Pillow image, or uint8 pixels (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
Picture: TypeAlias = "str | Path | bytes | Array | Image"
#: Pillow's names of what is read; of an animation its first frame.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
#: More pixels than this are refused: 200 MB as RGB, twice what a large photograph has.
MAX_PIXELS = 64_000_000


def open_picture(item: Picture, *, name: str = "", channels: int = 3, max_pixels: int = MAX_PIXELS) -> Image:
    """``item`` in mode ``RGB``, or ``L`` for one channel, the way up that its EXIF data says.

    Transparency lies on white, 16 bits are rounded to 8.  ``name``: what an error calls the picture, by default its
    path.  Raises ``DataError`` for anything that is no whole picture of ``FORMATS`` with at most ``max_pixels``.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise MissingExtraError("pillow", "cpu", "reading pictures") from error
    name = name or (f"'{item}'" if isinstance(item, str | Path) else "the picture")
    if isinstance(item, np.ndarray):
        return _converted(_from_array(item, name, max_pixels), name, channels)
    if isinstance(item, Image.Image):
        _check_size(item.size, name, max_pixels)
        return _decoded(item, name, channels, ImageOps)
    raw = item if isinstance(item, bytes) else _read(Path(item), name)
    try:
        with warnings.catch_warnings():
            # Pillow warns of what is refused below, and of odd metadata, which nobody reads
            warnings.simplefilter("ignore")
            opened = Image.open(io.BytesIO(raw), formats=FORMATS)
    except Image.DecompressionBombError:
        raise DataError(f"{name} has more than {max_pixels:,} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is no picture of these formats: {', '.join(FORMATS)}; convert it") from None
    except Exception as error:  # a decoder meets bytes that nobody foresaw
        raise _broken(name, error) from error
    with opened:
        _check_size(opened.size, name, max_pixels)
        return _decoded(opened, name, channels, ImageOps)


def _decoded(image: Image, name: str, channels: int, operations: Any) -> Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _converted(operations.exif_transpose(image), name, channels)
    except DataError:
        raise
    except Exception as error:  # as above
        raise _broken(name, error) from error


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {name} ({reason}); give a readable file") from error


def _broken(name: str, error: Exception) -> DataError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return DataError(f"{name} is broken or cut short ({reason}); copy it again, or leave it out")


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise DataError(f"{name} has no pixels; leave it out")
    if width * height > max_pixels:
        raise DataError(f"{name} has {width} x {height} pixels, more than {max_pixels:,}; make it smaller")


def _from_array(array: Array, name: str, max_pixels: int) -> Image:
    from PIL import Image

    if array.dtype != np.uint8:
        raise DataError(f"{name} is {array.dtype}; give uint8 from 0 to 255")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in {3, 4}):
        raise DataError(f"{name} has shape {array.shape}; give (height, width), or that with 1, 3 or 4 channels")
    _check_size((array.shape[1], array.shape[0]), name, max_pixels)
    return Image.fromarray(np.ascontiguousarray(array))


def _converted(image: Image, name: str, channels: int) -> Image:
    """RGB or L.  As transformers does it where transformers does it."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image, name)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    # from RGB, so that grey is one mixture of the three whatever the file held
    image = image.convert("RGB")
    return image.convert("L") if channels == 1 else image


def _eight_bits(image: Image, name: str) -> Image:
    """16 bits → 8, the nearest: Pillow itself would cut off all above 255."""
    from PIL import Image

    numbers = np.asarray(image).astype(np.float64)
    if image.mode == "F" or numbers.min() < 0 or numbers.max() > 65535:
        raise DataError(f"{name} holds other numbers than 16 bits have; save it with 8 or 16 bits")
    return Image.fromarray(np.round(numbers / 257).astype(np.uint8))
