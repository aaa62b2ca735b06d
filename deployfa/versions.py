"""Installed versions, read from package metadata without importing anything."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable

__all__ = ["installed"]


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package → version, for those of ``packages`` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
