"""Messages → a prompt, as a model's chat template says.

A template is a program that came with a bundle, and a bundle may come from a stranger.  It runs in jinja2's sandbox, as
in transformers, which keeps it from Python and from files, and in a process of its own with limits on memory, processor
time and output, because a sandbox does not keep it from looping or from filling memory.

Source: https://huggingface.co/docs/transformers/chat_templating
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deployfa.bundle import Bundle
from deployfa.errors import BundleError, MissingExtraError
from deployfa.generation import chat_worker
from deployfa.preprocess import CHAT_TEMPLATE

__all__ = ["Message", "open_chat_template", "render"]

_SECONDS = 20
#: Of a ``tokenizer_config.json``, what templates may name.
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Message(msgspec.Struct, frozen=True):
    """role: ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


def open_chat_template(bundle: Bundle) -> tuple[str, dict[str, str]]:
    """The template of ``bundle``, and the special tokens that it may name: what ``render`` takes.

    Raises ``BundleError`` where there is none, or the manifest does not vouch for it.
    """
    settings = bundle.manifest.preprocessing.generation
    if settings is None or not settings.chat_template or CHAT_TEMPLATE not in bundle.manifest.files:
        raise BundleError(f"'{bundle.path}' has no chat template; leave --chat out")
    try:
        template = (bundle.path / CHAT_TEMPLATE).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"the chat template of '{bundle.path}' is not UTF-8; leave --chat out") from error
    return template, _special_tokens(bundle.path / "tokenizer_config.json")


def render(
    template: str, conversations: Sequence[Sequence[Message]], special: Mapping[str, str] | None = None
) -> list[str]:
    """One prompt for each conversation, to which the model's answer is the continuation.

    Takes a tenth of a second, the start of a process, however many there are.  Raises ``BundleError`` for a template
    that is wrong, refuses the messages, or goes beyond its limits; ``MissingExtraError`` without jinja2.
    """
    if importlib.util.find_spec("jinja2") is None:
        raise MissingExtraError("jinja2", "chat", "applying a chat template")
    request = {
        "template": template,
        "special": dict(special or {}),
        "conversations": [[msgspec.structs.asdict(message) for message in each] for each in conversations],
    }
    # -I: neither the environment nor the working directory decides what is imported
    command = [sys.executable, "-I", str(Path(chat_worker.__file__))]
    try:
        done = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError("the chat template does not come to an end; leave --chat out") from error
    try:
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except ValueError:
        answer = {}
    if "prompts" in answer:
        return [str(prompt) for prompt in answer["prompts"]]
    why = answer.get("error") or "it took more memory or time than a template may"
    raise BundleError(f"the chat template fails ({why}); leave --chat out")


def _special_tokens(file: Path) -> dict[str, str]:
    try:
        said = msgspec.json.decode(file.read_bytes(), type=dict[str, Any]) if file.is_file() else {}
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BundleError(f"'{file}' is no JSON object ({error}); export the bundle again") from error
    found = {}
    for name in _SPECIAL:
        token = said.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
