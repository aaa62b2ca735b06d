"""TensorRT and TensorRT for RTX: build an engine from a graph, load it, run it."""

from deployfa.runtimes.tensorrt.builder import BuildRequest, Built
from deployfa.runtimes.tensorrt.library import LIBRARIES, Library, load_library
from deployfa.runtimes.tensorrt.messages import NodePlace
from deployfa.runtimes.tensorrt.process import build_engine
from deployfa.runtimes.tensorrt.profiles import Sizes

__all__ = ["LIBRARIES", "BuildRequest", "Built", "Library", "NodePlace", "Sizes", "build_engine", "load_library"]
