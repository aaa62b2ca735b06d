"""Triton's logging extension, as far as there is something to set: whether requests are told, and how much else.

Source: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_logging.md
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from deployfa.errors import RequestError

__all__ = ["change_log", "shown_log"]

#: What clients know of and nobody can change: to take it silently would be to lie.
_FIXED = {"log_file": "", "log_warning": True, "log_error": True, "log_format": "json"}


def shown_log(log: logging.Logger, *, requests: bool) -> dict[str, Any]:
    """``requests``: whether each one gets a line."""
    told = requests and log.isEnabledFor(logging.INFO)
    return {**_FIXED, "log_info": told, "log_verbose_level": int(log.isEnabledFor(logging.DEBUG))}


def change_log(log: logging.Logger, asked: Mapping[str, Any], *, requests: bool) -> bool:
    """Do what is ``asked``, all or nothing; returns ``requests`` from now on.

    Raises ``RequestError`` for what there is not, what cannot be changed, and values of another type.
    """
    for name, value in asked.items():
        if name in _FIXED:
            if value != _FIXED[name]:
                raise RequestError(f"'{name}' is always {_FIXED[name]!r} here; set log_info or log_verbose_level")
        elif name == "log_info":
            if not isinstance(value, bool):
                raise RequestError(f"'log_info' is {str(value)[:40]!r}; send true or false")
        elif name == "log_verbose_level":
            if type(value) is not int or value < 0:
                raise RequestError(f"'log_verbose_level' is {str(value)[:40]!r}; send a whole number from 0 on")
        else:
            raise RequestError(f"'{name[:80]}' is no log setting; there are: log_info, log_verbose_level")
    if asked.get("log_verbose_level"):
        log.setLevel(logging.DEBUG)
    elif "log_verbose_level" in asked and log.isEnabledFor(logging.DEBUG):
        log.setLevel(logging.INFO)
    if asked.get("log_info") and not log.isEnabledFor(logging.INFO):
        # the server was started with a quieter --log-level
        log.setLevel(logging.INFO)
    return bool(asked.get("log_info", requests))
