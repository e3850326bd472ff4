"""The source files below some paths: no vendored folders, builds, ignored files, tests or generated files.

from mlx_retrieval.mining.source_files import SourceFiles
sources = SourceFiles(["src"], languages=["python"])
for file in sources.files: print(file.relative, file.language.name)
print(sources.left_out)       # how many files each rule left out
"""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.dataset.source_code.file_tree import Entry, decode_text
from mlx_retrieval.dataset.source_code.generated import is_generated
from mlx_retrieval.dataset.source_code.languages import LANGUAGES, Language, language_of
from mlx_retrieval.utils.errors import UserError

MAX_BYTES = 2_000_000

OTHERS_FOLDERS = frozenset(
    {"node_modules", "bower_components", "site-packages", "dist-packages", "third_party", "third-party", "thirdparty"}
    | {"vendor", "vendored", "_vendor", "Pods", "Carthage", "build", "target", "dist", "out", "DerivedData"}
)
TEST_FOLDER = re.compile(r"tests?|testing|__tests__|testdata|test_.*|.*_tests?|.*Tests")
TEST_FILE = re.compile(r"(?:tests?|conftest|test_.*|.*[_.-]tests?|.*[.-]spec|.*\wTests?|Test[A-Z].*)\.[^.]+")


class SourceFile(NamedTuple):
    """A file to mine."""

    path: Path
    relative: str  # its path in the mined rows
    language: Language


class SourceFiles:
    """The source files below some paths: `files` by relative path; `left_out` counts the others by reason.

    Paths are relative to the one folder given, or to the folder that several paths have in common. The rules apply to
    everything below a given path, never to the path itself: a file that is given is taken. Symbolic links below are not
    followed.

    Raises UserError if a path does not exist.
    """

    def __init__(self, paths: Sequence[str | Path], languages: Sequence[str] = (), include_tests: bool = False):
        self.languages = frozenset(languages or LANGUAGES)
        self._headers = bool(self.languages & {"c", "cpp", "objc"})
        self.include_tests = include_tests
        self.left_out: Counter[str] = Counter()
        roots = [Path(path).expanduser() for path in paths]
        if missing := [str(root) for root in roots if not root.exists()]:
            raise UserError(f"{', '.join(missing)}: no such file or folder")
        roots = [root.resolve() for root in roots]
        self._base = os.path.commonpath([root if root.is_dir() else root.parent for root in roots])
        files: dict[Path, SourceFile] = {}
        for root in roots:
            below = file_tree.visit(root, self._judge, self.left_out) if root.is_dir() else None
            for path in [root] if below is None else [entry.path for entry in below]:
                if (language := self._language(path)) is not None:
                    files[path] = SourceFile(path, Path(os.path.relpath(path, self._base)).as_posix(), language)
        self.files = sorted(files.values(), key=lambda file: Path(file.relative).parts)

    def _judge(self, entry: Entry) -> str | None:
        if entry.name == "__pycache__" or not (entry.is_folder or self._may_be_source(entry.name)):
            return None
        if entry.is_link:
            return file_tree.LINK
        if entry.is_ignored:
            return "ignored by .gitignore"
        if not entry.is_folder:
            return "test file" if not self.include_tests and TEST_FILE.fullmatch(entry.name) else ""
        if entry.name.startswith(".") or entry.name in OTHERS_FOLDERS or (entry.path / "pyvenv.cfg").exists():
            return "folder of builds or of others' code"
        return "folder of tests" if not self.include_tests and TEST_FOLDER.fullmatch(entry.name) else ""

    def _may_be_source(self, name: str) -> bool:
        """Whether a file's name is a source file's; the language of a header is found later, in its first lines."""
        language = language_of(name)
        return language is not None and (language.name in self.languages or (self._headers and name.endswith(".h")))

    def _language(self, path: Path) -> Language | None:
        """Return a file's language if it is one of those to mine."""
        head = b""
        if path.suffix.lower() == ".h":
            try:
                with open(path, "rb") as file:
                    head = file.read(MAX_BYTES)
            except OSError:
                pass  # reading it as a whole fails again, and is counted there
        language = language_of(path.name, head)
        return language if language is not None and language.name in self.languages else None


def read_source(path: Path) -> tuple[str, str]:
    """Return (text with `\\n` line ends, reason why it is left out); one of them is ""."""
    try:
        data = path.read_bytes()
    except OSError:
        return "", file_tree.UNREADABLE
    if len(data) > MAX_BYTES:
        return "", "over 2 MB"
    if (text := decode_text(data)) is None:
        return "", file_tree.NOT_UTF8
    return ("", "generated or minified") if is_generated(text) else (text, "")
