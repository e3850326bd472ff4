"""Files are replaced in one piece or not at all; locks end with their process; one bar for all.

python -m pytest tests/utils/test_files.py
"""

import ast
import errno
import fcntl
import os
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from mlx_retrieval.retrieval.topk import Nearest
from mlx_retrieval.utils import files, locks
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent.parent


def test_errors_name_the_file_and_have_no_stray_punctuation(tmp_path):
    full, of_mlx = (
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(0, "[write] Unable to write 8 bytes to file."),
    )
    message = f"^could not write {tmp_path}/v.f32: No space left on device$"
    with pytest.raises(files.SaveError, match=message), files.naming(tmp_path / "v.f32"):
        raise full

    def fill(folder: Path) -> None:
        raise of_mlx

    with pytest.raises(
        files.SaveError, match="could not save .*: Unable to write 8 bytes to file; what was saved before"
    ):
        files.write_folder(tmp_path / "x", fill)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "could not write .*/file: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "source.py"), "could not write .*/file: .*denied: 'source.py'"),
        (KeyboardInterrupt(), None),
    ],
)
@pytest.mark.parametrize("old", [True, False])
def test_a_block_that_fails_leaves_the_old_file(tmp_path, error, expected, old):
    path = tmp_path / "file"
    if old:
        path.write_text("old")
    with (
        pytest.raises(files.SaveError if expected else KeyboardInterrupt, match=expected),
        files.replacing(path) as new,
    ):
        new.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["file"] * old and (not old or path.read_text() == "old")


def test_several_files_all_or_none(tmp_path):
    def write(count: int) -> None:
        with ExitStack() as stack:
            for name in ("a", "b", "a-file/c")[:count]:
                stack.enter_context(files.replacing(tmp_path / name, f"--output {name}")).write_text("new")

    (tmp_path / "a-file").write_text("old")
    with pytest.raises(files.SaveError, match="^--output a-file/c: .*File exists"):
        write(3)
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]
    write(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a-file", "b"]


def test_missing_folders_are_made_and_removed_again_if_nothing_is_written(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "no" / "such" / "file") as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    files.write_file(tmp_path / "no" / "such" / "file", "whole")
    assert (tmp_path / "no" / "such" / "file").read_text() == "whole"


def test_a_folder_that_cannot_be_read_can_be_written_to(tmp_path, monkeypatch):
    real = os.open

    def refuse(path, *arguments, **options):
        if Path(path) == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    files.write_file(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"


def test_one_process_holds_the_lock_until_it_ends(tmp_path):
    """Even if it is killed: no lock is ever stale."""
    path = tmp_path / "new" / ".lock"
    code = (
        "import sys, time; from pathlib import Path; from mlx_retrieval.utils.locks import only_one\n"
        "with only_one(Path(sys.argv[1]), 'held'): print('holding', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "holding\n"
        with pytest.raises(UserError, match="^another works there$"), locks.only_one(path, "another works there"):
            pass
    finally:
        other.kill()
        other.wait()
    with locks.only_one(path, "held"), pytest.raises(UserError, match="held"), locks.only_one(path, "held"):
        pass
    with locks.only_one(path, "held"):
        path.unlink()  # as a folder that is removed with its lock
    (path.parent / "file").write_text("")
    with pytest.raises(UserError, match="file"), locks.only_one(path.parent / "file" / ".lock", "held"):
        pass


def test_one_bar_for_all(monkeypatch, capsys):
    with progress_bar("embedding", "texts", 6, show=True) as progress:
        progress(2)
        progress(6, note="3 chunks")
    err = capsys.readouterr().err
    assert "embedding" in err and "6/6" in err and "texts" in err and "3 chunks" in err
    with progress_bar("mining", "files", show=True) as progress:
        progress(1, 2)
    assert "1/2" in capsys.readouterr().err
    for total, terminal in ((6, False), (0, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        with progress_bar("embedding", "texts", total) as progress:
            progress(2)
        assert capsys.readouterr() == ("", "")


# --- volumes and systems that are unlike others -----------------------------------------------------------------------


def test_on_macos_files_reach_the_disk_itself(tmp_path, monkeypatch):
    """Regression: there fsync leaves them in the disk's cache, which a loss of power empties."""
    calls = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda handle, number: calls.append((os.fstat(handle).st_ino, number)))
    files.write_folder(tmp_path / "best", lambda folder: (folder / "a").write_text("one"))
    places = (tmp_path / "best" / "a", tmp_path / "best", tmp_path)
    assert calls == [(path.stat().st_ino, 51) for path in places]

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "fcntl", refuse)  # an external volume
    files.write_file(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_volumes_that_cannot_flush_folders(tmp_path, monkeypatch, number):
    """Regression: everything was written, and saving failed."""
    fsync = os.fsync

    def flush(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, "not here")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    files.make_folder(tmp_path / "run")
    files.write_folder(tmp_path / "run" / "best", lambda folder: (folder / "a").write_text("one"))
    files.write_file(tmp_path / "run" / "file", "two")
    assert (tmp_path / "run" / "best" / "a").read_text() == "one"

    def broken(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(files.SaveError, match="Input/output error"):
        files.write_folder(tmp_path / "run" / "best", lambda folder: None)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_volumes_without_locks_are_refused_with_the_reason(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    reason = "this volume has no file locks .*choose a folder on another volume"
    with pytest.raises(UserError, match=reason), locks.only_one(tmp_path / ".lock", "held"):
        raise AssertionError("not reached")


class AppleArray(np.ndarray):
    """Its products warn as NumPy's do on an M4: numpy#28687."""

    def __matmul__(self, other):
        np.divide(np.float32(1), np.zeros(1, np.float32))
        np.multiply(np.full(1, np.inf, np.float32), np.zeros(1, np.float32))
        return np.asarray(self) @ np.asarray(other)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_products_have_no_false_warnings():
    """Regression: a search on an M4 printed "divide by zero encountered in matmul"."""
    queries, documents = np.eye(3, dtype=np.float32).view(AppleArray), np.eye(3, dtype=np.float32)
    with pytest.raises(RuntimeWarning):
        queries @ documents
    assert (product(queries, documents) == np.eye(3)).all()
    nearest = Nearest(queries, 1, 3)
    nearest.add(documents)
    assert nearest.best()[0].ravel().tolist() == [0, 1, 2]


def test_products_of_numpy_go_through_one_function():
    """Files that compute with NumPy alone have no bare `@`."""
    for file in [*ROOT.glob("*.py"), *ROOT.glob("mlx_retrieval/**/*.py")]:
        text = file.read_text()
        if file.name != "products.py" and "import numpy" in text and "import mx" not in text:
            products = [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.BinOp) and _is_product(n)]
            assert not products, f"{file}: use utils.products.product in lines {products}"


def _is_product(node: ast.BinOp) -> bool:
    return isinstance(node.op, ast.MatMult)
