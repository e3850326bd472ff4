"""Halves of surrogate pairs become U+FFFD; commands are quoted.

python -m pytest tests/utils/test_text.py
"""

import shlex

import pytest

from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell, writable, writable_values


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


def test_a_command_can_be_pasted(tmp_path):
    words = ["python", "train.py", "--output", tmp_path / "my runs/it's $HOME; *"]
    assert shlex.split(shell(*words)) == [str(word) for word in words]
