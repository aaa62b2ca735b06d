"""One at a time for a name, any number of names at a time."""

from __future__ import annotations

import threading

import pytest

from deployfa.serving.turns import Turns


def test_a_turn_is_waited_for_and_nothing_is_left() -> None:
    turns, order = Turns(), []
    inside, go = threading.Event(), threading.Event()

    def first() -> None:
        with turns.of("a"):
            inside.set()
            go.wait(10)
            order.append("first")

    def second() -> None:
        with turns.of("a"):
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    with turns.of("b"):
        order.append("another name")
    go.set()
    for thread in threads:
        thread.join(10)
    assert order == ["another name", "first", "second"]
    assert len(turns) == 0


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns()
    with pytest.raises(KeyError), turns.of("a"):
        raise KeyError
    assert len(turns) == 0
    with turns.of("a"):
        assert len(turns) == 1
