"""Halves of surrogate pairs become U+FFFD; commands are quoted.

python -m pytest tests/utils/test_text.py
"""

import shlex

import pytest

from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import CHECKOUT, excerpt, listed, quantity, shell, writable, writable_values


def test_writable():
    assert writable("a\ud800b") == "a\ufffdb" and writable("\udcff\udcfe") == "\ufffd\ufffd"
    assert writable("\ud83d" + "\ude00") == "😀"
    assert writable_values({"\ud800": ["\udfff", 1, None, {"x": "é"}]}) == {"\ufffd": ["\ufffd", 1, None, {"x": "é"}]}


def test_files_can_be_written(tmp_path):
    files.write_file(tmp_path / "a.json", "half \ud83d")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "half \ufffd"


def test_names_that_libraries_cannot_open(tmp_path):
    files.check_name(tmp_path / "é", "--output")
    with pytest.raises(UserError, match="^--output .*: not a name in UTF-8"):
        files.check_name(tmp_path / "\udcff", "--output")


def test_words_that_are_listed():
    assert listed("abc", 3) == "a, b, c" and listed([], 2) == ""
    assert listed((f"{i}" for i in range(2_000)), 2, "; ") == "0; 1 and 1,998 more"


def test_a_command_can_be_pasted(tmp_path):
    words = ["python", "train.py", "--output", tmp_path / "my runs/it's $HOME; *"]
    assert shlex.split(shell(*words)) == [str(word) for word in words]


def test_the_toolkits_commands_are_found_from_any_folder(tmp_path, monkeypatch):
    """Regression: `next python embed.py ...` failed wherever a run was not started in the checkout."""
    monkeypatch.chdir(CHECKOUT)
    assert shell("python", "embed.py", "--help") == "python embed.py --help"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embed.py").write_text("somebody's own")
    assert shlex.split(shell("python", "embed.py", "--help")) == ["python", str(CHECKOUT / "embed.py"), "--help"]
    assert shell("python", "convert_hf_to_gguf.py") == "python convert_hf_to_gguf.py"


def test_an_excerpt_is_one_short_line():
    assert excerpt(" a\n\tb\u2028c ", 10) == "a b c" and excerpt("a\n b\x00c \ud83d", 10) == "a b c \ufffd"
    assert excerpt("one two three", 8) == "one two…" and excerpt("one two", 7) == "one two"
    assert excerpt("x" * 1_000_000, 5) == "xxxxx…" == excerpt("xxxxxx", 5)
    assert excerpt(" " * 9_000 + "far away", 8) == "…"  # only the beginning is looked at
    assert excerpt("a\x00b\x1bc\ud800d\u202ee", 20) == "a b c\ufffdd e"
    assert excerpt("\u0645\u06cc\u200c\u062e\u0648\U0001f468\u200d\U0001f469", 20) == (
        "\u0645\u06cc\u200c\u062e\u0648\U0001f468\u200d\U0001f469"
    )  # joiners are part of words and emoji


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [(0, "row", "0 rows"), (1, "query", "1 query"), (2, "query", "2 queries"), (1_000, "bad row", "1,000 bad rows")],
)
def test_quantities(count, noun, expected):
    assert quantity(count, noun) == expected
