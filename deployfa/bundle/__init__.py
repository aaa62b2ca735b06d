"""The bundle: a directory with everything a device needs, and a manifest that says what is in it."""

from deployfa.bundle.bundle import Bundle
from deployfa.bundle.manifest import MANIFEST, Manifest

__all__ = ["MANIFEST", "Bundle", "Manifest"]
