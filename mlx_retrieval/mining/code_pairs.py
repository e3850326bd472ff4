"""Mine (docstring, code) pairs from source trees, to train a model that finds code by its purpose.

    from mlx_retrieval.mining.code_pairs import Counts, Rules, pairs
    counts = Counts()
    rows = list(pairs(["src"], Rules(languages=("python",)), counts))     # of Pair: query, positive, path, line, ...
    print(counts.pairs, counts.left_out)

The query is the docstring, or else the comment above, shortened by `docstrings.summary`. The positive is the function
or class with its decorators, without its docstring and those of the definitions inside it. `FILE_REASONS` and
`REASONS` list the rules by which files and definitions are left out. Pairs come in the order of paths and lines.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.near_duplicates import THRESHOLD, NearDuplicates
from mlx_retrieval.dataset.source_code.definitions import definitions
from mlx_retrieval.dataset.source_code.docstrings import MIN_WORDS, objection, summary
from mlx_retrieval.dataset.source_code.generated import HEADER, MAX_LINE
from mlx_retrieval.dataset.source_code.languages import Definition, Language, check_grammars
from mlx_retrieval.mining.source_files import SourceFiles, read_source

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
    "docstring no prose": "TODO, licence, linter directive, code, or less than half of it letters",
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
    """One row: `query` finds `positive`; the other fields are its origin."""

    query: str
    positive: str
    path: str
    line: int
    name: str
    language: str


@dataclass(frozen=True)
class Rules:
    """The rules of mining; no `languages` = all of `languages.LANGUAGES`."""

    languages: Sequence[str] = ()
    min_lines: int = 2  # of code: neither blank nor comment, docstrings apart
    max_lines: int = 150
    include_tests: bool = False
    keep_duplicates: bool = False


@dataclass
class Counts:
    """Counts of files, definitions and pairs, filled while `pairs` runs."""

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
    """Yield the pairs of files and folders. `progress(done, total)` is called after every file.

    Raises UserError if a path or a grammar is missing.
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
            for definition in definitions(text.encode(), file.language):
                counts.definitions[file.language.name] += 1
                query = summary(definition.doc)
                reason = judge(definition, query, file.language, rules)
                if not reason and not rules.keep_duplicates:
                    key = " ".join(query.casefold().split())
                    reason = "same query" if key in queries else seen.add(definition.code)
                    if not reason:
                        queries.add(key)
                if reason:
                    counts.left_out[reason] += 1
                else:
                    counts.pairs[file.language.name] += 1
                    yield Pair(
                        query, definition.code, file.relative, definition.line, definition.name, file.language.name
                    )
        if progress is not None:
            progress(done, len(sources.files))


def judge(definition: Definition, query: str, language: Language, rules: Rules) -> str:
    """Return the reason why a definition, looked at alone, gives no pair; "" if it gives one."""
    if not rules.include_tests and (definition.is_test or TEST_NAME.fullmatch(definition.name.rpartition(".")[2])):
        return "test function"
    if not definition.doc.strip():
        return "no docstring"
    if definition.is_broken:
        return "syntax error"
    if reason := objection(definition.doc, query):
        return reason
    lines = _code_lines(definition.code, language)
    if len(lines) < rules.min_lines or _is_trivial(definition, language):
        return "trivial body"
    return "too long" if len(lines) > rules.max_lines or len(definition.code) > MAX_CHARACTERS else ""


def _code_lines(code: str, language: Language) -> list[str]:
    """Return the lines that are neither blank nor comments, without indentation."""
    lines = (line.strip() for line in code.split("\n"))
    return [line for line in lines if line and not line.startswith(language.comments) and line != "*"]


def _is_trivial(definition: Definition, language: Language) -> bool:
    body = "\n".join(_code_lines(definition.body, language)).strip()
    if body.startswith("{") and body.endswith("}"):
        body = body[1:-1].strip()
    return bool(definition.body) and TRIVIAL.fullmatch(body.removesuffix(";").strip()) is not None
