"""The error tree is public: its names, its shape, and the one-line texts that say the way out."""

from __future__ import annotations

import re

import pytest

from deployfa import errors


def tree():
    """Class → parent, as the docstring draws it."""
    found, stack = {}, []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)", line)
        if not match:
            continue
        depth = len(match[1]) // 4
        del stack[depth:]
        found[match[2]] = stack[-1] if stack else None
        stack.append(match[2])
    return found


def test_docstring_draws_the_tree_that_the_code_has():
    drawn = tree()
    assert sorted(drawn) == sorted(errors.__all__)
    for name, parent in drawn.items():
        assert getattr(errors, name).__bases__ == (Exception if parent is None else getattr(errors, parent),)


def test_unknown_site_lists_the_sites():
    error = errors.SiteError.unknown(["fc3"], ["fc2", "fc1"])
    assert str(error) == "site 'fc3' not found; sites in this graph: fc1, fc2"


def test_unknown_site_shows_the_nearest_of_many():
    known = [f"encoder.layer.{i}.query" for i in range(30)]
    text = str(errors.SiteError.unknown(["encoder.layer.29.qery", "other"], known))
    assert "(and 1 more) not found" in text
    assert "encoder.layer.29.query" in text and text.endswith("and 26 more")


def test_unknown_site_of_a_graph_without_sites():
    assert str(errors.SiteError.unknown(["fc"], [])).endswith("sites in this graph: none")


@pytest.mark.parametrize(
    "error", [errors.OutputExistsError("out/x"), errors.MissingExtraError("torch", "train", "training")]
)
def test_texts_are_one_line_with_the_way_out(error):
    wrong, _, way_out = str(error).partition("; ")
    assert wrong and way_out and "\n" not in str(error)
    assert "--force" in way_out or "pip install 'deployfa[train]'" in way_out
