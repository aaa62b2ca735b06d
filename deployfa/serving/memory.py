"""Give memory back to the system: what one large request took is not kept for the next.

The C library learns from every large block that is freed to keep such blocks, so that a server that was sent some
bodies of 30 MB would stay larger by some hundred MB.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["return_large_blocks"]

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# less than the pieces in which a large body arrives
_LARGE = 2**16


def return_large_blocks() -> bool:
    """Blocks from 64 KB on go back to the system when they are freed; False where the C library cannot be told so.

    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False  # another C library
    return all(mallopt(which, _LARGE) == 1 for which in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD))
