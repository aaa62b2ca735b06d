"""Which tokens are learnt: with tokenizers that put tokens around a text, and with cuts anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from deployfa.errors import DataError, InputError
from deployfa.preprocess import Cache, Preprocessing, PromptPreprocessor
from deployfa.preprocess import language as module
from deployfa.preprocess.language import Piece, pieces

WORDS = ["<s>", "</s>", "[UNK]", *(f"w{number}" for number in range(40))]
IDS = {word: number for number, word in enumerate(WORDS)}
START, END = IDS["<s>"], IDS["</s>"]
#: What a tokenizer may put around a text.
AROUND = {"nothing": "$A", "a start": "<s> $A", "an end": "$A </s>", "both": "<s> $A </s>"}


def words(folder: Path, around: str = "$A", **more: Any) -> Path:
    """A tokenizer of one token a word, that puts ``around`` around a text by itself."""
    tokenizer: Any = Tokenizer(models.WordLevel(IDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", START), ("</s>", END)]
    )
    for name, value in more.items():
        getattr(tokenizer, name)(**value)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def text(count: int) -> str:
    return " ".join(f"w{number % 40}" for number in range(count))


def tokens(count: int) -> tuple[int, ...]:
    return tuple(IDS[word] for word in text(count).split())


@pytest.mark.parametrize("around", list(AROUND))
def test_a_text_ends_once_however_its_tokenizer_ends_it(tmp_path: Path, around: str) -> None:
    folder = words(tmp_path, AROUND[around])
    start = (START,) if around in {"a start", "both"} else ()
    (piece,) = pieces(folder, [(text(3), None)], max_length=20, end=END)
    assert piece == Piece((*start, *tokens(3), END), start=1)
    # the text says so itself
    assert pieces(folder, [(f"{text(3)} </s>", None)], max_length=20, end=END) == [piece]
    (without,) = pieces(folder, [(text(3), None)], max_length=20, end=None)
    assert without.tokens == (*start, *tokens(3))


@pytest.mark.parametrize("around", list(AROUND))
def test_nothing_stands_between_a_prompt_and_its_completion(tmp_path: Path, around: str) -> None:
    folder = words(tmp_path, AROUND[around])
    start = (START,) if around in {"a start", "both"} else ()
    (piece,) = pieces(folder, [("w7 w8", " w9 w10")], max_length=20, end=END)
    assert piece.tokens == (*start, IDS["w7"], IDS["w8"], IDS["w9"], IDS["w10"], END)
    assert piece.start == len(start) + 2
    assert piece.learnt == 3
    assert pieces(folder, [("w7 w8", " w9 w10 </s>")], max_length=20, end=END) == [piece]


@pytest.mark.parametrize("around", list(AROUND))
def test_a_prompt_is_not_ended_when_it_is_run(tmp_path: Path, around: str) -> None:
    """What a model is asked to go on from is what it learnt to go on from."""
    folder = words(tmp_path, AROUND[around])
    settings = Preprocessing(kind="prompt", max_length=20, cache=Cache(layers=1, heads=1, head_size=4))
    reader = PromptPreprocessor(folder, settings)
    rows = reader.tokens(["w7 w8", "w7"])
    (piece,) = pieces(folder, [("w7 w8", " w9")], max_length=20, end=END)
    assert rows[0] == list(piece.tokens[: piece.start])
    assert reader.lengths(["w7 w8", "w7"]) == [len(row) for row in rows] == [piece.start, piece.start - 1]
    feeds = reader.encode(["w7 w8", "w7"])
    assert feeds["attention_mask"].sum(1).tolist() == reader.lengths(["w7 w8", "w7"])
    assert feeds["input_ids"][0].tolist() == rows[0]
    # nothing but its start
    assert reader.tokens(["", "w7"]) == [rows[0][: piece.start - 2], rows[1]]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 8, 9, 10, 31])
@pytest.mark.parametrize("longest", [2, 3, 5, 8])
def test_every_token_is_learnt_once_wherever_the_cuts_are(tmp_path: Path, count: int, longest: int) -> None:
    """Also the end of a text that fills its pieces to the last place."""
    whole = (*tokens(count), END)
    found = pieces(words(tmp_path), [(text(count), None)], max_length=longest, end=END)
    assert all(2 <= len(piece.tokens) <= longest and piece.start == 1 for piece in found)
    assert tuple(token for piece in found for token in piece.tokens[piece.start :]) == whole[1:]
    # each is given the tokens just before it
    place = 0
    for piece in found:
        assert piece.tokens == whole[place : place + len(piece.tokens)]
        place += piece.learnt


def test_a_long_prompt_loses_its_front_and_a_long_completion_its_back(tmp_path: Path) -> None:
    folder = words(tmp_path)
    (front,) = pieces(folder, [(text(10), "w20 w21")], max_length=6, end=END)
    assert front == Piece((*tokens(10)[-3:], IDS["w20"], IDS["w21"], END), start=3)
    (exact,) = pieces(folder, [(text(3), "w20 w21")], max_length=6, end=END)
    assert exact == Piece((*tokens(3), IDS["w20"], IDS["w21"], END), start=3)
    (back,) = pieces(folder, [(text(10), text(30))], max_length=6, end=END)
    assert back == Piece((tokens(10)[-1], *tokens(5)), start=1)


def test_rows_keep_their_order_and_those_of_one_token_are_left_out(tmp_path: Path) -> None:
    folder = words(tmp_path)
    found = pieces(folder, [("w1 w2", None), ("w3", None), ("w4", "w5")], max_length=9, end=None)
    assert [piece.tokens for piece in found] == [(IDS["w1"], IDS["w2"]), (IDS["w4"], IDS["w5"])]
    with pytest.raises(DataError, match="one token each"):
        pieces(folder, [("w3", None), ("w4", None)], max_length=9, end=None)


@pytest.mark.parametrize("longest", [1, 0])
def test_one_token_at_a_time_is_no_language_model(tmp_path: Path, longest: int) -> None:
    with pytest.raises(InputError, match=rf"max-length is {longest}.*pass 2"):
        pieces(words(tmp_path), [("w1 w2", None)], max_length=longest, end=END)


def test_limits_of_the_tokenizers_own_file_do_not_count(tmp_path: Path) -> None:
    limits = {"enable_truncation": {"max_length": 2}, "enable_padding": {"length": 50, "pad_id": 0}}
    found = pieces(words(tmp_path, **limits), [(text(9), None), (text(3), "w9")], max_length=30, end=END)
    assert [piece.tokens for piece in found] == [(*tokens(9), END), (*tokens(3), IDS["w9"], END)]


def test_a_text_of_many_parts_starts_and_ends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of gigabytes is not encoded as one."""
    monkeypatch.setattr(module, "_CHARACTERS", 30)
    folder = words(tmp_path, AROUND["both"])
    content = " ".join(f"w{number * 7 % 40}" for number in range(60))
    (piece,) = pieces(folder, [(content, None)], max_length=100, end=END)
    assert piece.tokens == (START, *(IDS[word] for word in content.split()), END)


@pytest.mark.parametrize("content", ["a" * 95, " " * 40 + "a" * 50, "a b" * 40, " " + "a" * 35, "a" * 30, "a" * 31, ""])
def test_the_parts_of_a_text_are_the_text(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHARACTERS", 30)
    parts = list(module._parts(content))
    assert "".join(parts) == content
    assert all(0 < len(part) <= 30 for part in parts) or content == ""
    # words that fit are whole
    if content == "a b" * 40:
        assert all(part.startswith(" b") for part in parts[1:])


def test_a_space_of_sentencepiece_is_not_put_before_a_completion(tmp_path: Path) -> None:
    """Llama 2 and its kin write a space before every text that they are given alone."""
    pairs = ["▁Is", "▁it", "?", "▁yes", "yes", "▁", "Is", "it"]
    tokenizer: Any = Tokenizer(models.WordLevel({word: n for n, word in enumerate(pairs)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    def said(completion: str) -> list[str]:
        (piece,) = pieces(tmp_path, [("Is it?", completion)], max_length=20, end=None)
        assert [pairs[token] for token in piece.tokens[: piece.start]] == ["▁Is", "▁it", "?"]
        return [pairs[token] for token in piece.tokens[piece.start :]]

    assert said("yes") == ["yes"]
    assert said(" yes") == ["▁yes"]


def test_a_token_across_the_border_is_not_learnt(tmp_path: Path) -> None:
    """The model will be asked to go on from the prompt's own tokens."""
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert pieces(tmp_path, [("a", "b")], max_length=9, end=None) == [Piece((0, 1), start=1)]
    assert pieces(tmp_path, [("ab", None)], max_length=9, end=0) == [Piece((2, 0), start=1)]


def test_the_tokenizer_that_was_saved_is_the_one_that_is_asked(tmp_path: Path) -> None:
    """A changed file gives other tokens: nothing is remembered from elsewhere."""
    folder = words(tmp_path)
    before = pieces(folder, [("w1 w2", None)], max_length=9, end=None)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    after = pieces(folder, [("w1 w2", None)], max_length=9, end=None)
    assert before[0].tokens == after[0].tokens[::-1]
