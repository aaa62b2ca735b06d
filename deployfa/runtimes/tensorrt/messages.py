"""What the parser and the builder say, as one line that names the node and the module it came from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployfa.errors import RuntimeTargetError

__all__ = ["NodePlace", "build_error", "make_log", "parse_error"]

#: A long message is a dump; its beginning says what is wrong.
_LONGEST = 300
#: what a builder says → what to do about it
_HINTS = {
    r"OutOfMemory|workspace": "leave out --workspace, or give it more",
    r"at least one output": "the graph is empty, export the bundle again",
    r"SM75|Turing": "build float32 for compute capability 8.0 or newer, or pass --precision fp16",
    r"[Pp]rofile|[Dd]imension|shape": "try another --profile",
}


@dataclass(frozen=True)
class NodePlace:
    """Where a node of the graph came from: ``module`` is the PyTorch module path, empty if the graph does not say."""

    name: str
    op: str
    module: str = ""

    def __str__(self) -> str:
        inside = f", module '{self.module}'" if self.module else ""
        return f"node '{self.name}' ({self.op}{inside})"


def make_log(api: Any) -> Any:
    """A logger for ``api`` that keeps errors in ``errors`` and warnings in ``warnings``, and prints nothing."""

    class Log(api.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity <= api.ILogger.ERROR:
                self.errors.append(msg)
            elif severity == api.ILogger.WARNING:
                self.warnings.append(msg)

    return Log()


def parse_error(target: str, parser: Any, errors: Sequence[str], nodes: Sequence[NodePlace]) -> RuntimeTargetError:
    """Every node that the parser refused, the first one in full."""
    refused = [parser.get_error(number) for number in range(parser.num_errors)]
    if not refused:
        return RuntimeTargetError(f"{target} does not read the graph ({_first(errors)}); export the bundle again")
    first = refused[0]
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    where = _place(first, nodes)
    if not where:
        return RuntimeTargetError(f"{target} does not read the graph ({_tidy(first.desc())}); export the bundle again")
    return RuntimeTargetError(
        f"{target} does not take {where}{more}: {_reason(first.desc())}; "
        "deploy this bundle with onnxruntime, or change the module that makes the node"
    )


def build_error(
    target: str, errors: Sequence[str], nodes: Sequence[NodePlace], *, refit: bool = False
) -> RuntimeTargetError:
    """The builder's first error, and the node that it is about if it names one.  refit: whether that was asked for,
    which fails without a GPU in as many words as there are capabilities to build for."""
    text = _first(errors)
    named = [node for node in nodes if node.name and re.search(rf"(?<![\w/.]){re.escape(node.name)}(?![\w/])", text)]
    where = f" of {max(named, key=lambda node: len(node.name))}" if named else ""
    hint = next((hint for words, hint in _HINTS.items() if re.search(words, text)), "try another --precision")
    if refit:
        hint = "--refit needs the GPU that the engine is for; leave it out here"
    return RuntimeTargetError(f"{target} did not build the engine{where}: {text}; {hint}")


def _place(error: Any, nodes: Sequence[NodePlace]) -> str:
    name, index = str(error.node_name() or ""), int(error.node())
    for node in nodes:
        if name and node.name == name:
            return str(node)
    if 0 <= index < len(nodes) and not name:
        return str(nodes[index])
    return f"node '{name}' ({error.node_operator()})" if name or error.node_operator() else ""


def _reason(text: str) -> str:
    """Why a node was refused; of an operator that it does not know, a parser gives its own condition and no words."""
    if text.strip() == "false" or "Plugin not found" in text:
        return "it has no such operator"
    lines = [line for line in text.splitlines() if not re.search(r"^Invalid Node - |Cuda Runtime", line)]
    return _tidy(" ".join(lines) or text)


def _first(errors: Sequence[str]) -> str:
    return _tidy(errors[0]) if errors else "it does not say why"


def _tidy(text: str) -> str:
    """One line, without the library's own function names and source lines before it."""
    line = " ".join(text.split())
    line = re.sub(r"^(\[[^\]]*\]\s*)+", "", line)
    line = re.sub(r"^I\w+::\w+: |^Error Code \d+: ", "", re.sub(r"^I\w+::\w+: ", "", line))
    line = re.sub(r"\[\w+\.\w+:\d+: [^\]]+\] |\w+\.cpp:\d+: |\.? +In \w+ at /[^\s)]+", "", line).strip().rstrip(".")
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
