"""TensorRT and TensorRT for RTX: build an engine from a graph, load it, run it."""

from deployfa.runtimes.tensorrt.library import LIBRARIES, Library, load_library

__all__ = ["LIBRARIES", "Library", "load_library"]
