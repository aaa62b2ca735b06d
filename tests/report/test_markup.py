from __future__ import annotations

from deployfa.report.markup import Html, drawn, table, tag


def test_strings_are_text_and_html_is_markup():
    assert tag("p", "<b> & \"'") == "<p>&lt;b&gt; &amp; &quot;&#x27;</p>"
    assert tag("p", tag("b", "x"), " y") == "<p><b>x</b> y</p>"
    assert tag("ul", [tag("li", "1"), tag("li", "<")]) == "<ul><li>1</li><li>&lt;</li></ul>"


def test_what_was_pasted_together_is_text_again():
    """An f-string around markup is a plain string: escaped once too often, never once too few."""
    assert tag("p", f"{Html('<b>')}") == "<p>&lt;b&gt;</p>"


def test_attributes():
    made = tag("a", "x", class_="c", aria_label='"><script>')
    assert made == '<a class="c" aria-label="&quot;&gt;&lt;script&gt;">x</a>'
    assert tag("meta", name="n", http_equiv="e") == '<meta name="n" http-equiv="e">'


def test_table_aligns_words_left_and_figures_right():
    made = table("<cap>", ["a", "b", "c"], [["r", "1", "word"]], words=(2,))
    assert "<caption>&lt;cap&gt;</caption>" in made and 'aria-label="&lt;cap&gt;"' in made
    assert '<th scope="row" class="word">r</th><td class="figure">1</td><td class="word">word</td>' in made


def test_a_plot_that_is_not_there_leaves_nothing():
    assert drawn({}, "ratios", "caption") == ""
    assert drawn({"ratios": Html("<svg></svg>")}, "ratios", "c") == (
        "<figure><svg></svg><figcaption>c</figcaption></figure>"
    )
