"""Sentences for a reference when nobody brings data."""

from __future__ import annotations

__all__ = ["SENTENCES"]

_SUBJECTS = (
    "The film",
    "This phone",
    "The service here",
    "My new laptop",
    "The battery",
    "The committee's report",
)
_REMARKS = (
    "was a joy.",
    "is dreadful!",
    "could have been worse.",
    "never gets going, sadly.",
    "surprised all of us.",
    "does what it says.",
    "is not as bad as they claim.",
    "left me cold :(",
    "deserves every prize it won.",
    "broke after 3 days.",
    "will be discussed on Tuesday.",
)
#: Used when no data is given.  Many rows, because the ratio of two noises scatters by about 1/sqrt(rows); short ones,
#: because float64 in numpy is slow; a few long and odd ones.
SENTENCES = (
    "The plot was good, but the characters are uncompelling and the dialogue is not great.",
    "ok",
    "Not the worst thing I have seen this year, though 1999's original did more with a tenth of the money :-(",
    "Smart, funny and handsome — everything its dull, lumbering, over-long predecessor was not.",
    *(f"{subject} {remark}" for subject in _SUBJECTS for remark in _REMARKS),
)
