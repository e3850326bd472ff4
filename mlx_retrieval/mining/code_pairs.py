"""Pairs of (docstring, code) from source trees, to train a model that finds code by what it does.

    from code_pairs import Counts, Rules, pairs
    counts = Counts()
    found = list(pairs(["src"], Rules(languages=("python",)), counts))    # of Pair: query, positive, path, line, ...
    print(counts.pairs, counts.left_out)

The query is the docstring, or else the comment above, as `docstrings.summary` cuts it. The positive is the function or
class without its docstring and those of the definitions inside it, decorators kept. `FILE_REASONS` and `REASONS` say
what is left out. The order is that of paths and lines: the same tree gives the same pairs.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.source_code.definitions import definitions
from mlx_retrieval.dataset.source_code.docstrings import MIN_WORDS, objection, summary
from mlx_retrieval.dataset.source_code.languages import Definition, Language, check_grammars
from mlx_retrieval.mining.near_duplicates import THRESHOLD, NearDuplicates
from mlx_retrieval.mining.source_files import HEADER, MAX_LINE, SourceFiles, read_source

MAX_CHARACTERS = 20_000  # of a definition

FILE_REASONS = {
    "folder of builds or of others' code": "node_modules, vendor, build, target, dist, .git, ...: not entered",
    "folder of tests": "tests, testing, __tests__, test_*, ...: not entered",
    "test file": "test_*, *_test.*, *Test.*, *.spec.*, conftest.py",
    "ignored by .gitignore": "of the folder that is mined and of those below; a folder counts once",
    "symbolic link": "not followed",
    "unreadable": "no permission",
    "not UTF-8": "in any other encoding",
    "over 2 MB": "data rather than code",
    "generated or minified": f"says so in its first {HEADER} lines, or a line has over {MAX_LINE:,} characters",
}
REASONS = {
    "test function": "named test*, Rust's #[test], or in a Rust module tests",
    "no docstring": "nor a comment directly above",
    "syntax error": "inside the definition",
    "docstring no prose": "TODO, licence, linter's marks, code, or less than half letters",
    "docstring too short": f"fewer than {MIN_WORDS} words before the first section (parameters, returns, ...)",
    "trivial body": "under --min-lines lines of code, or a body that only passes, raises, or gets or sets one value",
    "too long": f"over --max-lines lines, or over {MAX_CHARACTERS:,} characters",
    "exact duplicate": "the same tokens as an earlier one",
    "near duplicate": f"a Jaccard similarity of {THRESHOLD} or more to an earlier one",
    "same query": "the docstring of an earlier one",
}

_VALUE = r"""(?:[\w.@$&*!>?:\[\]-]+(?:\(\))?|"[^"\n]*"|'[^'\n]*'|\[\s*\]|\{\s*\}|\(\s*\))"""
_ARGUMENTS = r"\((?:[^()]|\([^()]*\))*\)"
# Bodies of one statement: nothing, a value returned, a value set, or an error that says there is no body.
TRIVIAL = re.compile(
    rf"""(?:pass|\.\.\.|return|sorry|by\s+sorry|(?:return\s+)?{_VALUE}|{_VALUE}\s*:?=\s*{_VALUE}"""
    rf"""|raise\s+\w*(?:NotImplemented|Unsupported|Abstract)\w*(?:{_ARGUMENTS})?"""
    rf"""|throw\s+new\s+\w*(?:Unsupported|NotImplemented|Error|Exception)\w*{_ARGUMENTS}"""
    rf"""|(?:unimplemented!|todo!|unreachable!|panic!|panic|fatalError)\s*{_ARGUMENTS})?"""
)
TEST_NAME = re.compile(r"test(?:_.*|[A-Z].*)?")


class Pair(NamedTuple):
    """One row: `query` finds `positive`; the rest says where it came from."""

    query: str
    positive: str
    path: str
    line: int
    name: str
    language: str


@dataclass(frozen=True)
class Rules:
    """What is mined; `languages` empty = all of `languages.LANGUAGES`."""

    languages: Sequence[str] = ()
    min_lines: int = 2  # of code: neither blank nor comment, docstrings apart
    max_lines: int = 150
    include_tests: bool = False
    keep_duplicates: bool = False


@dataclass
class Counts:
    """What happened, filled while `pairs` runs."""

    files: Counter[str] = field(default_factory=Counter)  # read, by language
    definitions: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    left_out_files: Counter[str] = field(default_factory=Counter)  # by reason; a folder counts once
    left_out: Counter[str] = field(default_factory=Counter)  # definitions, by reason


def pairs(
    paths: Sequence[str | Path],
    rules: Rules | None = None,
    counts: Counts | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Pair]:
    """Mine files and folders; `progress(done, total)` is called after every file.

    Raises UserError where a path or a grammar is missing.
    """
    rules, counts = rules or Rules(), Counts() if counts is None else counts
    sources = SourceFiles(paths, rules.languages, rules.include_tests)
    counts.left_out_files += sources.left_out
    check_grammars({file.language for file in sources.files})
    seen, queries = NearDuplicates(), set()
    for done, file in enumerate(sources.files, start=1):
        text, reason = read_source(file.path)
        if reason:
            counts.left_out_files[reason] += 1
        else:
            counts.files[file.language.name] += 1
            for found in definitions(text.encode(), file.language):
                counts.definitions[file.language.name] += 1
                query = summary(found.doc)
                reason = judge(found, query, file.language, rules)
                if not reason and not rules.keep_duplicates:
                    key = " ".join(query.casefold().split())
                    reason = "same query" if key in queries else seen.add(found.code)
                    if not reason:
                        queries.add(key)
                if reason:
                    counts.left_out[reason] += 1
                else:
                    counts.pairs[file.language.name] += 1
                    yield Pair(query, found.code, file.relative, found.line, found.name, file.language.name)
        if progress is not None:
            progress(done, len(sources.files))


def judge(found: Definition, query: str, language: Language, rules: Rules) -> str:
    """Why a definition makes no pair, by the rules that look at it alone; "" = it makes one."""
    if not rules.include_tests and (found.is_test or TEST_NAME.fullmatch(found.name.rpartition(".")[2])):
        return "test function"
    if not found.doc.strip():
        return "no docstring"
    if found.is_broken:
        return "syntax error"
    if reason := objection(found.doc, query):
        return reason
    lines = _code_lines(found.code, language)
    if len(lines) < rules.min_lines or _is_trivial(found, language):
        return "trivial body"
    return "too long" if len(lines) > rules.max_lines or len(found.code) > MAX_CHARACTERS else ""


def _code_lines(code: str, language: Language) -> list[str]:
    """Lines that are neither blank nor comments, without indentation."""
    lines = (line.strip() for line in code.split("\n"))
    return [line for line in lines if line and not line.startswith(language.comments) and line != "*"]


def _is_trivial(found: Definition, language: Language) -> bool:
    body = "\n".join(_code_lines(found.body, language)).strip()
    if body.startswith("{") and body.endswith("}"):
        body = body[1:-1].strip()
    return bool(found.body) and TRIVIAL.fullmatch(body.removesuffix(";").strip()) is not None
