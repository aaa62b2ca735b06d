"""Pictures instead of tensors: an encoded file an element, decoded as the bundle's own preprocessing does."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

from deployfa.bundle import Bundle
from deployfa.edits import Array
from deployfa.errors import InputError, RequestError
from deployfa.preprocess import ImagePreprocessor
from deployfa.preprocess.image import PIXELS
from deployfa.serving.limits import IMAGE

__all__ = ["PictureInput"]

#: A photograph of a good camera; a small file that says it has more would keep a thread busy for long.
_MAX_PIXELS = 24_000_000
#: What PNG, JPEG, GIF, BMP and WebP begin with once they are base64; none of them begins so itself.
_BASE64 = (b"iVBOR", b"/9j/", b"R0lGOD", b"Qk", b"UklGR")


class PictureInput:
    """Encoded pictures → the graph's ``pixel_values``."""

    def __init__(self, bundle: Bundle) -> None:
        steps = bundle.manifest.preprocessing.image
        assert steps is not None  # of a bundle that reads pictures
        self._preprocessor = ImagePreprocessor(steps, max_pixels=_MAX_PIXELS)

    @staticmethod
    def reads(bundle: Bundle, inputs: Sequence[str]) -> bool:
        return bundle.manifest.preprocessing.kind == "image" and list(inputs) == [PIXELS]

    def decoded(self, array: Array, max_rows: int) -> list[bytes]:
        """(rows,) or (rows, 1) of bytes → files; in JSON they come as base64.  Raises ``RequestError``."""
        if array.dtype.kind != "O" or array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
            raise RequestError(f"input '{IMAGE}' has shape {list(array.shape)}; send BYTES of shape [rows]")
        if not 1 <= array.shape[0] <= max_rows:
            raise RequestError(f"the request has {array.shape[0]} pictures; send 1 to {max_rows}, and more requests")
        return [_file(value, number) for number, value in enumerate(array.reshape(-1), start=1)]

    def encode(self, pictures: Sequence[bytes]) -> dict[str, Array]:
        """float32 (rows, channels, height, width).  Takes long: not for an event loop.  Raises ``RequestError``."""
        try:
            return self._preprocessor.encode(pictures)
        except InputError as error:
            raise RequestError(str(error)) from error


def _file(value: bytes, number: int) -> bytes:
    if not value.startswith(_BASE64):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"picture {number} is broken base64 ({error}); encode the file again") from error
