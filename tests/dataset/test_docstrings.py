"""Docstrings and comments as queries: markers, sections and markup are removed, text that is not prose is refused.

python -m pytest tests/dataset/test_docstrings.py
"""

import pytest

from mlx_retrieval.dataset.source_code.docstrings import objection, strip_markers, summary


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        ("/** One. */", " One. "),
        ("/*! One. */", " One. "),
        ("/**\n * One\n *  two\n * *three*\n **/", "\n One\n  two\n *three*\n "),
        ("/// One\n//! two\n//!< three\n// four", " One\n two\n three\n four"),
        ("# One\n## two", " One\n two"),
        ("/-- One\n* two -/", " One\n* two "),
    ],
)
def test_strip_markers(comment, text):
    assert strip_markers(comment) == text


@pytest.mark.parametrize(
    "section",
    [
        "Args:\n  x: one", "Returns: one", "Parameters\n----------\nx : int", ":param x: one", ":rtype: int",
        "@param x one", "\\return one", ">>> f(1)", "```\nf(1)\n```", ".. note:: one", "# Examples",
        "- Parameter x: one", "- Returns: one", "See Also\n--------\ng", "Example::\n\n  f(1)",
        "<pre>f(1)</pre>", "TODO: more",
    ],
)  # fmt: skip
def test_sections_are_cut(section):
    assert summary(f"Add one.\n\n  Or more.\n\n{section}\n\nMore of it.") == "Add one.\nOr more."


def test_words_that_only_look_like_sections():
    text = "Merge the keyword\narguments and\nreturns\nthem; see @c name and e.g. returns: none."
    assert summary(text) == "Merge the keyword arguments and returns them; see name and e.g. returns: none."


def test_markup_is_taken_away():
    assert summary("Call :py:meth:`~A.f` or ``g`` and {@code h()}.") == "Call A.f or g and h()."
    assert summary("<p>Write a <code>Vec</code> &\n<br/>read it.</p>") == "Write a Vec &\nread it."
    assert summary("A Vec<T> of T.") == "A Vec<T> of T."
    assert summary("==== Title ====\nOne two three.\n-----\nFour.") == "Title One two three.\nFour."


def test_long_docstrings_end_with_a_paragraph():
    long, short = "word " * 100, "three more words"
    assert summary(f"{long}\n\n{short}\n\n{long}\n\n{short}") == f"{long.strip()}\n{short}"
    assert summary(long * 3) == (long * 3).strip()


def test_half_a_surrogate_pair_can_be_written():
    assert summary("The sign \ud800 alone.") == "The sign \ufffd alone."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Add one more.", ""),
        ("Add one.", "docstring too short"),
        ("計算する", ""),
        ("Args:\n  x: one two three four", "docstring too short"),
        ("TODO: write this up some day", "docstring no prose"),
        ("noqa: this is not for people", "docstring no prose"),
        ("Copyright (c) 2020 The Authors", "docstring no prose"),
        ("a = b + c - (1 * 2) // 3 == [4, 5, 6]", "docstring no prose"),
        ("call the function here;", "docstring no prose"),
    ],
)
def test_objections(text, expected):
    assert objection(text, summary(text)) == expected
