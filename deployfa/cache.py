"""Where deployfa keeps what it can fetch or make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "cache_dir"]

CACHE_VARIABLE = "DEPLOYFA_CACHE"


def cache_dir() -> Path:
    """``$DEPLOYFA_CACHE`` when set and not empty, else the user's cache folder of this platform; it need not exist."""
    import platformdirs

    chosen = os.environ.get(CACHE_VARIABLE, "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("deployfa", appauthor=False))
