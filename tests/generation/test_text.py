"""Text piece by piece: nothing lost, never half a character, and nothing after a stop string."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deployfa.errors import BundleError, InputError
from deployfa.generation.text import TextStream, Tokenizer

from .tiny import EOS, TEXT, make_tokenizer

HARD = "naïve 日本語 😀👩‍👩‍👧 ẞ e\u0301 the cat\n\n  sat"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), prompt=()) -> list[str]:
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("text", [TEXT, HARD])
def test_pieces_are_the_text_and_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    # tokens that are single bytes: some pieces wait
    assert "" in streamed(tokenizer, tokenizer.encode("日本語"))


def test_any_tokens_in_any_order_are_streamed_as_they_decode(tokenizer):
    """What no text has: bytes that are no UTF-8, one after the other.  An incomplete end is held back."""
    random = np.random.default_rng(0)
    size = tokenizer.inner.get_vocab_size()
    for _ in range(200):
        ids = [int(token) for token in random.integers(1, size, 30)]
        pieces = streamed(tokenizer, [*ids, *tokenizer.encode("x")])
        assert "".join(pieces) == tokenizer.decode([*ids, *tokenizer.encode("x")])


def test_half_a_character_at_the_end_stays_away(tokenizer):
    ids = tokenizer.encode("ab日")
    assert "".join(streamed(tokenizer, ids[:-1])) == "ab"


def test_special_tokens_are_no_text(tokenizer):
    ids = [*tokenizer.encode("cat"), EOS, *tokenizer.encode(" dog")]
    assert "".join(streamed(tokenizer, ids)) == "cat dog"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("the cat sat", ("cat",), "the "),
        ("the cat sat", ("sat", "cat"), "the "),
        ("the cat sat", ("t s",), "the ca"),
        ("aaab", ("aab",), "a"),
        ("the cat sat", ("dog",), "the cat sat"),
        ("the cat sat", ("sat on",), "the cat sat"),
        ("naïve 日本語 x", ("本",), "naïve 日"),
        ("the cat", ("the",), ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(tokenizer, text, stop, wanted):
    assert "".join(streamed(tokenizer, tokenizer.encode(text), stop)) == wanted
    # byte by byte
    ids = [token for character in text for token in tokenizer.encode(character)]
    pieces = streamed(tokenizer, ids, stop)
    assert "".join(pieces) == wanted
    # nothing that was said had to be taken back
    assert all(wanted.startswith("".join(pieces[:n])) for n in range(len(pieces) + 1))


def test_what_may_become_a_stop_string_waits(tokenizer):
    stream = TextStream(tokenizer, (), ("cats",))
    said = [stream.push(token) for character in "a cat " for token in tokenizer.encode(character)]
    assert said == ["a", " ", "", "", "", "cat "]


def test_a_space_after_the_prompt_is_kept(tmp_path):
    """Decoders of SentencePiece models strip the space before the first word of a text: here it is not the first."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers

    inner = Inner(models.WordLevel({"▁a": 0, "▁b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode([1]) == "b"
    assert "".join(streamed(tokenizer, [1, 0], prompt=[0])) == " b a"


def test_what_is_no_tokenizer_and_no_text(tmp_path: Path, tokenizer):
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is no tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(InputError, match="UTF-8"):
        tokenizer.encode("\udcff")


def test_truncation_and_padding_of_training_are_gone(tmp_path, tokenizer):
    tokenizer.inner.enable_truncation(2)
    tokenizer.inner.enable_padding(length=50)
    tokenizer.inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer.inner.no_truncation()
    tokenizer.inner.no_padding()
    assert Tokenizer(tmp_path).encode("the cat sat on the mat") == tokenizer.encode("the cat sat on the mat")
