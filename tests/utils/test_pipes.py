"""Rows and texts from pipes, which can be read only once.

python -m pytest tests/utils/test_pipes.py
"""

import os
import threading

import pytest

import train
from mlx_retrieval.dataset.rows import Rows, find_files
from mlx_retrieval.mining import collection
from mlx_retrieval.training.chat.data import is_chat
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.pipes import is_pipe

ROWS = '{"query": "q", "document": "d"}\n{"query": "r", "document": "e"}\n'


@pytest.fixture
def pipe(tmp_path):
    """A named pipe that gives ROWS once."""
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(ROWS,), daemon=True)
    writer.start()
    yield path
    writer.join(5)


def test_rows_of_a_pipe_are_read_as_often_as_needed(pipe):
    """Regression: a pipe was no such file."""
    assert not is_chat([str(pipe)])
    files = find_files([str(pipe)])
    for _ in range(2):
        assert [row.positive for row in map(Rows(files).__getitem__, (0, 1))] == ["d", "e"]
        assert len(list(collection.read_rows(files, collection.MINED))) == 2
    assert Rows(files).where(1) == f"{pipe}:2"


def test_a_corpus_may_be_a_pipe(pipe):
    for _ in range(2):
        assert list(collection.read_corpus(collection.corpus_file(str(pipe)))) == ["d", "e"]
    assert collection.place_of("e", [], pipe) == (pipe, 2)


def test_resume_says_that_a_pipe_cannot_be_read_again(tmp_path):
    path = tmp_path / "rows"
    os.mkfifo(path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"data: [{path}]\n")
    with pytest.raises(
        UserError, match=r"--resume: the rows came through the pipe .*/rows, which cannot be read again"
    ):
        train.resumed_settings({"output": str(tmp_path / "run")})


def test_what_a_pipe_is(tmp_path):
    assert is_pipe(tmp_path / ".." / "nowhere") is False and is_pipe(tmp_path) is False
    (tmp_path / "file").write_text("")
    assert not is_pipe(tmp_path / "file")
