"""The VADER ground truth as a task: sentiment of movie sentences, and three shifted domains to test it on.

Sentences with the mean of at least twenty human ratings, -4 (most negative) to 4 (most positive).  Source: Hutto, C.J.
& Gilbert, E.E. (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM-14.
"""

from __future__ import annotations

import csv
import html
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from deployfa.assets import Progress, fetch
from deployfa.atomic import check_output, write_directory
from deployfa.errors import InputError

__all__ = ["LABELS", "prepare_vader"]

LABELS = ("negative", "positive")

# the file of each domain; movies first, so that a text found in two domains stays with the one trained on
_FILES = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}


@dataclass(frozen=True)
class _Sentence:
    position: int
    """Place in its file, counted from 0; for movies, its id minus 1."""
    text: str
    label: str


def prepare_vader(
    out: Path,
    *,
    seed: int = 0,
    train_size: int = 3000,
    test_size: int = 2000,
    shifted_size: int = 1500,
    min_score: float = 0.5,
    block: int = 25,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write ``movies_train.csv``, ``movies_test.csv``, ``tweets.csv``, ``amazon.csv`` and ``nyt.csv`` into ``out``.

    Columns ``text,label``; the label is the sign of the mean rating, and sentences whose mean is nearer to 0 than
    ``min_score`` are left out.  HTML entities are unescaped.  A text that occurs twice, letter case and outer spaces
    aside, is kept once, over all domains.  ``test_size`` and ``shifted_size`` are the most rows of ``movies_test.csv``
    and of each of the other three domains, drawn at random.  One seed gives the same files on every machine.

    Movie sentences were cut from whole reviews but carry only a running id, and neighbours may come from one review.
    A split by sentence would put two halves of a review on both sides.  The split is therefore by blocks of ``block``
    neighbouring ids: whole blocks go to train or to test, in a seeded order.  A review that lies across the border of
    two blocks can still be on both sides; that is at most one border in ``block`` sentences.

    Returns name (``movies_train``, …) → path.  Raises ``InputError`` when ``train_size`` leaves no test rows or an
    option is out of range, ``OutputExistsError`` when ``out`` exists and ``force`` is not set, and what ``fetch`` does.
    """
    if min(train_size, test_size, shifted_size, block) < 1 or not 0 < min_score <= 4:
        raise InputError("sizes and block must be at least 1, and min_score in (0, 4]; change the options")
    check_output(out, force=force)
    source = fetch("vader", progress=progress)
    seen: set[str] = set()
    domains = {name: _read(source / file, min_score, seen) for name, file in _FILES.items()}
    # a string seed is hashed by the standard library in the same way everywhere; one stream for each domain
    train, rest = _split_blocks(domains["movies"], train_size, block, random.Random(f"{seed}:movies"))
    parts = {"movies_train": train, "movies_test": _sample(rest, test_size, random.Random(f"{seed}:movies_test"))}
    for name in ("tweets", "amazon", "nyt"):
        parts[name] = _sample(domains[name], shifted_size, random.Random(f"{seed}:{name}"))
    with write_directory(out, force=force) as partial:
        for name, sentences in parts.items():
            _write(partial / f"{name}.csv", sentences)
    return {name: out / f"{name}.csv" for name in parts}


def _read(path: Path, min_score: float, seen: set[str]) -> list[_Sentence]:
    """Lines of ``id TAB mean TAB text``, CRLF, UTF-8 (movies and tweets hold a few accented letters)."""
    found = []
    # no universal newlines and no csv module: texts hold bare quotation marks
    for position, line in enumerate(path.read_bytes().decode("utf-8").split("\r\n")):
        if not line:
            continue
        _, mean, raw = line.split("\t")
        # twice: some were escaped twice, &amp;#39;
        text = html.unescape(html.unescape(raw)).strip()
        key = text.casefold()
        score = float(mean)
        if not math.isfinite(score) or abs(score) < min_score or not text or key in seen:
            continue
        seen.add(key)
        found.append(_Sentence(position, text, LABELS[score > 0]))
    return found


def _split_blocks(
    sentences: list[_Sentence], train_size: int, block: int, rng: random.Random
) -> tuple[list[_Sentence], list[_Sentence]]:
    """Whole blocks until train has ``train_size`` rows; what the last of them has too many is in neither part."""
    blocks: dict[int, list[_Sentence]] = {}
    for sentence in sentences:
        blocks.setdefault(sentence.position // block, []).append(sentence)
    order = sorted(blocks)
    rng.shuffle(order)
    train: list[_Sentence] = []
    while order and len(train) < train_size:
        train += blocks[order.pop()]
    rest = [sentence for index in order for sentence in blocks[index]]
    if len(train) < train_size or not rest:
        raise InputError(
            f"{train_size} training rows asked for, but there are {len(sentences)} rows and some must stay for the "
            f"test; lower train_size or min_score"
        )
    train = train[:train_size]
    rng.shuffle(train)
    return train, rest


def _sample(sentences: list[_Sentence], size: int, rng: random.Random) -> list[_Sentence]:
    return rng.sample(sentences, min(size, len(sentences)))


def _write(path: Path, sentences: Iterable[_Sentence]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["text", "label"])
        writer.writerows([sentence.text, sentence.label] for sentence in sentences)
