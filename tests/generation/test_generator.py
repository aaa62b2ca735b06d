"""Generation with real graphs of tiny models: the tokens are PyTorch's, whoever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deployfa.errors import InputError, RuntimeTargetError
from deployfa.generation import batch
from deployfa.generation.batch import Batch
from deployfa.generation.generator import Request
from deployfa.generation.options import Options

from .tiny import EOS, POSITIONS, Tiny

PROMPTS = ("the cat sat on the mat and the dog", "x", "wer früh übt, größer wird", "naïve 日本語", "log; log; log;")


def requests(options: Options | None = None, **more) -> list[Request]:
    return [Request(prompt=prompt, options=options or Options(max_new_tokens=24), **more) for prompt in PROMPTS]


def tokens(generator, asked, **more) -> list[list[int]]:
    return [completion.token_ids for completion in generator.generate(asked, **more)]


def by_torch(tiny: Tiny, prompt: str, most: int, ends: list[int]) -> list[int]:
    ids = torch.tensor([tiny.tokenizer.encode(prompt)])
    found = tiny.torch.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=EOS,
    )
    return [int(token) for token in found[0, ids.shape[1] :]]


def test_a_ragged_batch_generates_what_pytorch_does_with_each_prompt_alone(tiny):
    wanted = [by_torch(tiny, prompt, 24, [EOS]) for prompt in PROMPTS]
    assert tokens(tiny.base, requests()) == wanted
    assert len({tuple(each) for each in wanted}) == len(wanted)
    # and with several tokens that end it, so that rows leave the batch one after the other
    ends = sorted({each[4 * number] for number, each in enumerate(wanted)})
    wanted = [by_torch(tiny, prompt, 24, ends) for prompt in PROMPTS]
    assert len({len(each) for each in wanted}) > 2
    stopping = tiny.generator(tiny.base.decoder.runner, eos_token_ids=ends)
    found = stopping.generate(requests())
    assert [each.token_ids for each in found] == wanted
    for each in found:
        assert each.finish == ("stop" if each.token_ids[-1] in ends else "length")
        # a token that ends is no text
        assert each.text == tiny.tokenizer.decode(each.token_ids[: -1 if each.finish == "stop" else None]).rstrip(
            "\ufffd"
        )


@pytest.mark.parametrize("wrong", ["positions", "mask", "rows"])
def test_what_is_wrong_in_a_batch_is_seen(tiny, monkeypatch, wrong):
    """The comparisons of this file, with the batch broken."""
    plain = tokens(tiny.base, requests())
    if wrong == "rows":  # of those that leave, the wrong ones' caches stay
        leave = batch._leave
        monkeypatch.setattr(batch, "_leave", lambda count, rows: (leave(count, rows)[0], []))
        short = [Request(prompt=each, options=Options(max_new_tokens=4 + 5 * n)) for n, each in enumerate(PROMPTS)]
        assert any(one != other[: len(one)] for one, other in zip(tokens(tiny.base, short), plain, strict=True))
        return
    step = Batch._step

    def broken(self, tokens, positions):
        if wrong == "positions":
            positions = positions // 2
        else:
            self._mask[:, : self._width + tokens.shape[1]] = 1
        return step(self, tokens, positions)

    monkeypatch.setattr(Batch, "_step", broken)
    assert tokens(tiny.base, requests()) != plain


def test_each_prompt_alone_and_in_turns_and_in_pieces(tiny):
    wanted = tokens(tiny.base, requests())
    assert [tokens(tiny.base, [each])[0] for each in requests()] == wanted
    assert tokens(tiny.base, requests(), batch_size=2) == wanted
    for chunk in (1, 3):
        assert tokens(tiny.base, requests(), chunk=chunk) == wanted


def test_draws_do_not_depend_on_who_else_is_there(tiny):
    asked = [
        Request(prompt=prompt, options=Options(temperature=1.0, top_p=0.95, seed=number, max_new_tokens=8 + 3 * number))
        for number, prompt in enumerate(PROMPTS)
    ]
    wanted = tokens(tiny.base, asked)
    assert [tokens(tiny.base, [each])[0] for each in asked] == wanted
    assert tokens(tiny.base, asked[::-1])[::-1] == wanted
    assert tokens(tiny.base, [asked[0], asked[0]]) == [wanted[0]] * 2
    # drawn, and not the most likely
    assert wanted != [each[: len(drawn)] for each, drawn in zip(tokens(tiny.base, requests()), wanted, strict=True)]


def test_rows_that_leave_take_nothing_of_the_others_with_them(tiny):
    """Every order of leaving; the longest prompt first, so that its columns are cut off."""
    whole = tokens(tiny.base, requests())
    for seed in range(6):
        lengths = np.random.default_rng(seed).permutation([2, 5, 9, 9, 24])
        asked = [
            Request(prompt=prompt, options=Options(max_new_tokens=int(length)))
            for prompt, length in zip(PROMPTS, lengths, strict=True)
        ]
        assert tokens(tiny.base, asked) == [each[:length] for each, length in zip(whole, lengths, strict=True)]


def test_answers_longer_than_the_room_that_a_batch_begins_with(llama, monkeypatch):
    wanted = tokens(llama.base, requests())
    for room in (1, 5):
        monkeypatch.setattr(batch, "_ROOM", room)
        assert tokens(llama.base, requests()) == wanted


def test_columns_that_nobody_needs_are_cut_off(llama, monkeypatch):
    widths = []
    step = Batch._step

    def watched(self, tokens, positions):
        logits = step(self, tokens, positions)
        widths.append(next(iter(self._caches.values())).shape()[2])
        return logits

    monkeypatch.setattr(Batch, "_step", watched)
    asked = [
        Request(prompt=tuple(range(1, 60)), options=Options(max_new_tokens=3)),
        Request(prompt="x", options=Options(max_new_tokens=8)),
    ]
    found = tokens(llama.base, asked)
    assert widths == [59, 60, 61, 4, 5, 6, 7, 8]
    assert found[1] == tokens(llama.base, asked[1:])[0]


def test_a_pack_mixes_adapters_in_one_batch_and_each_answers_as_alone(tiny):
    names = ("a", "base", "b", "a", "b")
    asked = [
        Request(prompt=prompt, adapter=name, options=Options(max_new_tokens=6 + 4 * number))
        for number, (prompt, name) in enumerate(zip(PROMPTS, names, strict=True))
    ]
    found = tokens(tiny.pack, asked)
    for each, name, mine in zip(asked, names, found, strict=True):
        plain = Request(prompt=each.prompt, options=each.options)
        assert mine == tokens(tiny.alone[name], [plain])[0]
    # wrong adapters are other tokens, also for rows that have moved
    wrong = [Request(prompt=each.prompt, adapter="base", options=each.options) for each in asked]
    assert [one == other for one, other in zip(found, tokens(tiny.pack, wrong), strict=True)] == [
        name == "base" for name in names
    ]


def test_each_row_of_a_pack_has_its_own_strength(tiny):
    asked = [Request(prompt=PROMPTS[0], adapter="a", strength=strength) for strength in (0.0, 1.0, None, 0.5)]
    found = tokens(tiny.pack, asked)
    plain = [Request(prompt=PROMPTS[0])]
    assert found[0] == tokens(tiny.base, plain)[0]
    assert found[1] == found[2] == tokens(tiny.alone["a"], plain)[0]
    assert found[3] not in found[:3]
    with pytest.raises(InputError, match="not between 0"):
        tokens(tiny.pack, [Request(prompt="x", adapter="a", strength=2.0)])


def test_slots_take_an_adapter_a_call_whoever_swaps_meanwhile(tiny):
    generator, adapters = tiny.slots
    for name, slot in (("base", None), ("a", adapters["a"]), ("b", adapters["b"])):
        pieces = generator.stream(requests(), slot=slot)
        found: dict[int, list[int]] = {}
        for piece in pieces:
            found.setdefault(piece.row, []).append(piece.token)
            generator.decoder.runner.swap(adapters["b" if name == "a" else "a"])
        assert [found[row] for row in range(len(PROMPTS))] == tokens(tiny.alone[name], requests())
    # what is swapped in when the first token is asked for
    generator.decoder.runner.swap(adapters["b"])
    pieces = generator.stream(requests()[:1])
    first = next(pieces)
    generator.decoder.runner.swap(None)
    assert [first.token, *(piece.token for piece in pieces)] == tokens(tiny.alone["b"], requests()[:1])[0]
    assert tokens(generator, requests(strength=0.0), slot=adapters["a"]) == tokens(tiny.base, requests())


def test_a_stop_string_ends_an_answer_and_is_not_in_it(tiny):
    (whole,) = tiny.base.generate(requests()[:1])
    stop = whole.text[5:8]
    (found,) = tiny.base.generate([Request(prompt=PROMPTS[0], options=Options(stop=("no such", stop)))])
    assert found.finish == "stop string" and found.text == whole.text[: whole.text.index(stop)]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)] and len(found.token_ids) < len(whole.token_ids)


def test_pieces_come_as_the_tokens_do(tiny):
    pieces = list(tiny.base.stream(requests()))
    for row, whole in enumerate(tiny.base.generate(requests())):
        mine = [piece for piece in pieces if piece.row == row]
        assert [piece.token for piece in mine] == whole.token_ids
        assert "".join(piece.text for piece in mine) == whole.text
        assert [piece.finish for piece in mine] == [None] * (len(mine) - 1) + [whole.finish]
        assert whole.prompt_tokens == len(tiny.tokenizer.encode(PROMPTS[row]))
        assert whole.ttft_ms > 0 and whole.tokens_per_second > 0
    # all rows are a token further before any is two
    assert {piece.row for piece in pieces[: len(PROMPTS)]} == set(range(len(PROMPTS)))


def test_closing_early_runs_nothing_more(tiny, monkeypatch):
    steps = []
    step = Batch._step
    monkeypatch.setattr(Batch, "_step", lambda self, *feeds: steps.append(1) or step(self, *feeds))
    pieces = tiny.base.stream(requests()[:1])
    next(pieces)
    next(pieces)
    pieces.close()
    assert len(steps) == 2 and list(pieces) == []


def test_the_context_ends_an_answer(tiny):
    prompt = tuple(int(token) for token in np.random.default_rng(0).integers(1, 200, POSITIONS - 5))
    unending = tiny.generator(tiny.base.decoder.runner, eos_token_ids=[])
    (found,) = unending.generate([Request(prompt=prompt, options=Options(max_new_tokens=None))])
    assert len(found.token_ids) == 5 and found.finish == "length"
    with pytest.raises(InputError, match=f"prompt 2 has {POSITIONS - 5} .* pass --max-new-tokens 5, or"):
        unending.stream([Request(prompt="x"), Request(prompt=prompt, options=Options(max_new_tokens=6))])
    with pytest.raises(InputError, match="shorten it"):
        unending.stream([Request(prompt=(1,) * POSITIONS)])


def test_wrong_requests_are_refused_before_anything_runs(llama):
    for wrong, match in (
        (Request(prompt=""), "no tokens"),
        (Request(prompt=()), "no tokens"),
        (Request(prompt=(1, 5000)), "token id outside"),
        (Request(prompt=(-1,)), "token id outside"),
        (Request(prompt="\udcff"), "UTF-8"),
    ):
        with pytest.raises(InputError, match=match):
            llama.base.stream([wrong])
    with pytest.raises(InputError, match="pass 1 or more"):
        llama.base.stream([], batch_size=0)
    assert llama.base.generate([]) == []


def test_adapters_that_there_are_not_are_refused(llama):
    slots, adapters = llama.slots
    for generator, wrong, match in (
        (llama.pack, Request(prompt="x", adapter="c"), "no adapter 'c'"),
        (llama.pack, Request(prompt="x"), "name the adapter"),
        (llama.base, Request(prompt="x", adapter="a"), "one adapter"),
        (llama.base, Request(prompt="x", strength=0.5), "folded in"),
        (slots, Request(prompt="x", adapter="a"), "one adapter"),
    ):
        with pytest.raises(InputError, match=match):
            generator.generate([wrong])
    with pytest.raises(InputError, match="one strength for all"):
        slots.generate([Request(prompt="x", strength=each) for each in (0.5, 1.0)], slot=adapters["a"])
    with pytest.raises(InputError, match="none is active"):
        slots.generate([Request(prompt="x", strength=0.5)], slot=None)
    with pytest.raises(InputError, match="folded in"):
        llama.base.generate([Request(prompt="x")], slot=adapters["a"])


def test_numbers_that_are_none_are_an_error_and_no_token(llama, monkeypatch):
    step = Batch._step
    monkeypatch.setattr(Batch, "_step", lambda self, *feeds: step(self, *feeds) * np.float32(np.nan))
    with pytest.raises(RuntimeTargetError, match="not finite"):
        llama.base.generate([Request(prompt="x")])
