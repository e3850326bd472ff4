"""The files of a search index: .gitignore is read as git reads it, and every omission is counted.

python -m pytest tests/dataset/test_file_tree.py
"""

import os
import subprocess
from pathlib import Path

import pytest
from document_files import write_files

from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.dataset.source_code.file_tree import read_text, walk
from mlx_retrieval.utils.errors import UserError


def names(root: Path, **options) -> list[str]:
    return [file.path for file in walk(root, **options).files]


IGNORING = {
    ".gitignore": "*.log\n!keep.log\nbuild/\n/only-here.txt\ndocs/**/draft.md\n# comment\n\n\\#odd\n",
    "a.py": "x",
    "a.log": "x",
    "keep.log": "x",
    "#odd": "x",
    "only-here.txt": "x",
    "deep/only-here.txt": "x",
    "deep/a.log": "x",
    "build/out.py": "x",
    "deep/build/out.py": "x",
    "deep/build.py": "x",
    "docs/x/y/draft.md": "x",
    "docs/draft.txt": "x",
    "deep/.gitignore": "!a.log\nbuild.py\n",
    "with space/é.txt": "x",
}


def test_gitignore_as_git_reads_it(tmp_path):
    """git itself is the reference if it is installed, else the list below."""
    write_files(tmp_path, IGNORING)
    expected = [".gitignore", "a.py", "deep/.gitignore", "deep/a.log", "deep/only-here.txt", "docs/draft.txt"]
    expected += ["keep.log", "with space/é.txt"]
    assert names(tmp_path) == expected
    assert walk(tmp_path).left_out == {file_tree.IGNORED: 7}
    try:
        subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    command = ["git", "-c", "core.excludesFile=", "ls-files", "-z", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout.decode()
    assert names(tmp_path) == sorted(listed.strip("\0").split("\0"))


def test_the_repository_around_a_folder_counts(tmp_path):
    files = {".git/info/exclude": "secret.*\n", ".gitignore": "*.tmp\n/src/gone.py\nvendor/\n"}
    write_files(tmp_path, files | {f"src/{name}": "x" for name in ("a.py", "gone.py", "b.tmp", "secret.txt")})
    write_files(tmp_path, {"vendor/lib.py": "x", "vendor/b.tmp": "x"})
    assert names(tmp_path / "src") == ["a.py"]
    assert "lib.py" in names(tmp_path / "vendor")  # a folder that is named is wanted
    found = walk(tmp_path)
    assert [file.path for file in found.files] == [".gitignore", "src/a.py"] and found.left_out[file_tree.GIT] == 1


def test_omissions_are_counted(tmp_path):
    write_files(tmp_path, {"a.txt": "x", "large.txt": "x" * 11, "skip.me": "x", "folder/skip.me": "x", "index/a": "x"})
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = walk(tmp_path, max_file_size=10, exclude=["skip.*"], skip=[tmp_path / "index"])
    assert [file.path for file in found.files] == ["a.txt"]
    counts = {file_tree.TOO_LARGE: 1, file_tree.EXCLUDED: 2, file_tree.LINK: 2, file_tree.SPECIAL: 1}
    assert found.left_out == counts


def test_reading(tmp_path):
    write_files(tmp_path, {"bin": b"MZ\0\1", "latin": "é".encode("latin-1"), "empty": "", "blank": " \n\n"})
    write_files(tmp_path, {"crlf": "\ufeffa\r\nb\rc\n", "late-nul": b"a" * 9_000 + b"\0"})
    reasons = {name: read_text(tmp_path / name)[1] for name in ("bin", "latin", "empty", "blank", "gone", "late-nul")}
    assert reasons == {
        "bin": file_tree.BINARY,
        "latin": file_tree.NOT_UTF8,
        "empty": file_tree.EMPTY,
        "blank": file_tree.EMPTY,
        "gone": file_tree.UNREADABLE,
        "late-nul": "",
    }
    assert read_text(tmp_path / "crlf") == ("a\nb\nc\n", "", b"\xef\xbb\xbfa\r\nb\rc\n")


def test_bad_folders_and_patterns(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        walk(tmp_path / "nowhere")
    with pytest.raises(UserError, match="--exclude: "):
        walk(tmp_path, exclude=["a", "!"])


def test_hidden_files_and_folders_can_be_left_out(tmp_path):
    write_files(tmp_path, {"a.py": "x", ".env": "x", ".cache/a.py": "x", "b/.a.py": "x"})
    assert len(names(tmp_path)) == 4
    tree = walk(tmp_path, hidden=False)
    assert [file.path for file in tree.files] == ["a.py"] and tree.left_out == {file_tree.HIDDEN: 3}
