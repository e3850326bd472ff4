"""Tables at any width: text folds, figures are never cut.

python -m pytest tests/utils/test_console.py
"""

import re

import pytest

import rerank
from mlx_retrieval.utils import console

COLUMNS = ("task", "nDCG@10", "MRR@10", "Recall@100", "P@1")
ROWS = [("eval-data/a/long/path/of-a-folder", "0.7712", "0.1234", "0.9999", "0.5000"), ("average", *["0.1111"] * 4)]


@pytest.fixture
def printed(capsys, monkeypatch):
    """`printed(width, function, ...)` returns what a function prints at a width."""

    def run(width: int, function, *args) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        console.console.cache_clear()
        function(*args)
        return capsys.readouterr().out

    yield run
    console.console.cache_clear()


@pytest.mark.parametrize("width", [20, 30, 40, 52, 53, 54, 55, 56, 57, 60, 80, 100])
def test_figures_and_names_are_whole_at_every_width(printed, width):
    """Regression: at 35 columns the figures were "0.77…", and the names were gone."""
    out = printed(width, console.print_rows, "a/model", COLUMNS, ROWS)
    assert "…" not in out and max(map(len, out.splitlines())) <= max(width, len("task " + ROWS[0][0]))
    for _, *figures in ROWS:
        assert re.findall(r"0\.\d{4}", out).count(figures[0]) >= 1
    assert all(name in out for name in COLUMNS) and len(re.findall(r"\b0\.\d{4}\b", out)) == 8
    squeezed = re.sub(r"[\s]|0\.\d{4}", "", out)
    assert ROWS[0][0] in squeezed and "average" in squeezed


def test_columns_move_below_where_the_table_is_too_wide(printed):
    lines = printed(40, console.print_rows, "a/model", COLUMNS, ROWS).splitlines()
    assert lines[:4] == ["a/model", "", f"task {ROWS[0][0]}", "  nDCG@10 0.7712   MRR@10 0.1234"]
    assert "nDCG@10   MRR@10" in printed(80, console.print_rows, "a/model", COLUMNS, ROWS)


@pytest.mark.parametrize("width", [20, 32, 33, 40])
def test_a_ranking_shows_score_and_number_at_every_width(printed, width):
    results = [{"index": 12345, "score": -10.98765, "document": "a text of many words " * 9}]
    out = printed(width, rerank.print_results, results, 1, "m")
    assert "-10.9877" in out and "#12345" in out and "a text" in out and "…" in out


def test_a_warning_is_a_line_of_its_own(printed):
    """Regression: one run printed both `warning   text` and `warning: text`."""
    lines = [("data", "2 rows"), ("warning", "all are alike"), ("steps", "1")]
    assert printed(80, console.print_lines, lines) == "data    2 rows\nwarning: all are alike\nsteps   1\n"
