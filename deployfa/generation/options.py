"""What a request may ask of generation, checked when it is made."""

from __future__ import annotations

import math

import msgspec

from deployfa.errors import InputError

__all__ = ["MAX_STOPS", "MAX_STOP_LENGTH", "Options"]

#: Every piece of text is searched for every stop string, and as much text as the longest is held back.
MAX_STOPS, MAX_STOP_LENGTH = 16, 256


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen and when to stop; the names and the meanings are those of transformers.

    temperature: 0 takes the most likely token, always; above, one is drawn.  top_k: only among as many (0: all).
    top_p: only among the most likely that together have this probability.  min_p: only those with this share of the
    most likely one's probability.  repetition_penalty: divides the logits of what the prompt or the answer has already.
    seed: of the draws; ``None`` draws a seed.  The draws of a row depend on nothing but its own seed.
    max_new_tokens: at most; ``None`` goes on to the end of the context.  stop: texts that end the answer, and are not
    part of it.

    Raises ``InputError``.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_new_tokens: int | None = 64
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        temperature, penalty, most = self.temperature, self.repetition_penalty, self.max_new_tokens
        if not (math.isfinite(temperature) and temperature >= 0):
            raise InputError(f"temperature {temperature:g} is not a number from 0 up; pass 0 for the most likely token")
        # a quotient by less overflows float32
        if 0 < temperature < 1e-4:
            raise InputError(f"temperature {temperature:g} is too small to divide by; pass 0 for the most likely token")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k} is negative; pass 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p:g} is not above 0 and at most 1; pass 1 for no limit")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p:g} is not between 0 and 1; pass 0 for no limit")
        if not (math.isfinite(penalty) and penalty > 0):
            raise InputError(f"repetition_penalty {penalty:g} is not a number above 0; pass 1 for none")
        if self.seed is not None and self.seed < 0:
            raise InputError(f"seed {self.seed} is negative; pass 0 or more")
        if most is not None and most < 1:
            raise InputError(f"max_new_tokens {most} leaves nothing to answer; pass 1 or more")
        if len(self.stop) > MAX_STOPS:
            raise InputError(f"{len(self.stop)} stop strings; pass {MAX_STOPS} at most")
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_LENGTH:
                raise InputError(f"a stop string has {len(text)} characters; pass 1 to {MAX_STOP_LENGTH}")
