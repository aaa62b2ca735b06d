"""Renders a chat template, in a process of its own: one JSON object on stdin, one on stdout.

Run as a file and not as a module: nothing is imported but jinja2 and the standard library, so that it starts quickly
and little is within reach.  ``deployfa.generation.chat`` starts it.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

#: A megabyte of prompt is some hundred thousand tokens.
MAX_CHARACTERS = 1_000_000
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 2


def limit() -> None:
    """No more memory, processor time or files than a template may need; Windows has no such limits."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def render(request: dict[str, Any]) -> list[str]:
    """The environment is that of transformers; raises whatever jinja2 raises."""
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise RuntimeError(f"jinja2 {jinja2.__version__} has known holes in its sandbox, 3.1.6 is needed")

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant says, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def _check_name(name: str) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"'{name}' is no name for a template's variable")

    class Namespace(jinja2.utils.Namespace):
        """Takes no names that begin with an underscore, which Python gives a meaning."""

        def __init__(self, *args: Any, **names: Any) -> None:
            for name in (*names, *(key for each in args for key in dict(each))):
                _check_name(name)
            super().__init__(*args, **names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["namespace"] = Namespace
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    template = environment.from_string(request["template"])
    found, size = [], 0
    for messages in request["conversations"]:
        parts = []
        for part in template.generate(messages=messages, add_generation_prompt=True, **request["special"]):
            size += len(part)
            if size > MAX_CHARACTERS:
                raise RuntimeError(f"it writes more than {MAX_CHARACTERS} characters")
            parts.append(part)
        found.append("".join(parts))
    return found


def main() -> int:
    request = json.load(sys.stdin.buffer)
    limit()
    try:
        answer: dict[str, Any] = {"prompts": render(request)}
    except MemoryError:
        return 1
    except Exception as error:
        text = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
