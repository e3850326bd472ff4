"""Read evaluation folders in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/*.tsv.

Real folders are not tidy: see `UNTIDY`. They are read as BEIR and trec_eval read them, and one line on standard error
counts each kind; strict rules refuse them instead.
"""

import functools
import os
import re
import sys
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.dataset.json_lines import read_lines, read_objects
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity

Texts = dict[str, tuple[str, str]]  # id -> (title, text)
Qrels = dict[str, dict[str, int]]  # query id -> document id -> judgement

# Kinds of untidiness -> how they are named in the line that counts them.
UNTIDY = {
    "replaced": "judgements that a later line replaces",
    "no document": "judged documents that are not in the corpus, so never found",
    "no query": "judgements of queries that are not in the queries file, so left out",
    "null": "documents whose text is null, so read as their titles alone",
    "repeated": "documents or queries that are there twice, and alike",
}


class FolderRules(NamedTuple):
    """How evaluation folders are read and scored."""

    strict: bool = False  # refuse untidy folders
    ignore_identical_ids: bool = False  # leave out of a query's results the document of the same id; MTEB tasks too


TOLERANT = FolderRules()


def document_text(title: str | None, text: str) -> str:
    """Join title and text by a space, as mteb does: the text of a document that models see."""
    return f"{title or ''} {text}".strip()


def check_folders(names: Sequence[str], rules: FolderRules = TOLERANT) -> list[str]:
    """Read the folders among `names`, and return the other names, which are MTEB tasks.

    Raises UserError for the first folder that is missing or has errors.
    """
    others = []
    for name in map(toolkit.find, names):
        folder = Path(name).expanduser()
        if folder.is_dir():
            read_folder(folder, rules)
        elif len(folder.parts) > 1 or folder.exists():  # not a name of an MTEB task
            raise UserError(f"{name}: no such folder")
        else:
            others.append(name)
    return others


def read_folder(folder: Path, rules: FolderRules = TOLERANT) -> tuple[Texts, Texts, Qrels]:
    """Return documents, judged queries and judgements, sorted by id, so that the files' order does not decide ties.

    Cached until the files change. Raises UserError with file, line and reason.
    """
    return _read(*folder_state(folder), rules)


def is_corpus(folder: Path) -> bool:
    """Return whether a folder has a corpus in BEIR's layout."""
    return any((folder / name).is_file() for name in ("corpus.jsonl", "corpus.jsonl.gz"))


class Untidiness:
    """Counts of what is untidy in a folder. UserError at the first if `strict`."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.counts: dict[str, tuple[int, str]] = {}  # kind -> count, place of the first

    def add(self, kind: str, place: str, reason: str) -> None:
        """Count one of a kind of UNTIDY."""
        if self.strict:
            raise UserError(f"{place}: {reason} (read without --strict)")
        count, first = self.counts.get(kind, (0, place))
        self.counts[kind] = count + 1, first

    def summary(self, folder: Path) -> str:
        """Return the kinds with their counts, and the place of the first of each within the folder."""
        start = f"{folder}{os.sep}"
        kinds = ((UNTIDY[kind], *self.counts[kind]) for kind in UNTIDY if kind in self.counts)
        return "; ".join(f"{name}: {count:,} (first: {place.removeprefix(start)})" for name, count, place in kinds)


def read_texts(folder: Path, stem: str, untidy: Untidiness | None = None) -> Texts:
    """Read the rows of `stem`.jsonl or `stem`.jsonl.gz. UserError with file, line and reason.

    `untidy` counts what is not as it should be.
    """
    path = texts_file(folder, stem)
    untidy = untidy or Untidiness()
    rows: Texts = {}
    for number, row in read_objects(path):
        where = f"{path}:{number}"
        name, title, text = row.get("_id", row.get("id")), row.get("title") or "", row.get("text")
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise UserError(f'{where}: "_id" is missing or not a text')
        if text is None and "text" in row and stem == "corpus":
            untidy.add("null", where, 'the "text" is null')
            text = ""
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f'{where}: "{"text" if isinstance(title, str) else "title"}" is missing or not a text')
        if rows.get(str(name), (title, text)) != (title, text):
            raise UserError(f"{where}: the id {name} occurs twice, with different texts")
        if str(name) in rows:
            untidy.add("repeated", where, f"the id {name} occurs twice")
        rows[str(name)] = (title, text)
    if not rows:
        raise UserError(f"{path}: empty")
    return rows


def files_of(folder: Path) -> list[Path]:
    """Return the three files that `read_folder` reads. UserError if one is missing."""
    return [texts_file(folder, "corpus"), texts_file(folder, "queries"), _qrels_file(folder)]


def texts_file(folder: Path, stem: str) -> Path:
    path = next((p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder / stem}.jsonl: no such file (nor .jsonl.gz); an evaluation folder needs it")
    return path


def _qrels_file(folder: Path) -> Path:
    files = sorted((folder / "qrels").glob("*.tsv"))
    for name in ("test.tsv", "dev.tsv"):
        if (folder / "qrels" / name) in files:
            return folder / "qrels" / name
    if len(files) != 1:
        names = f" among {', '.join(p.name for p in files)}" if files else ""
        raise UserError(f"{folder / 'qrels' / 'test.tsv'}: no such file, nor dev.tsv or a single other .tsv{names}")
    return files[0]


class Judgement(NamedTuple):
    """A line of a file of judgements."""

    where: str  # file:line
    query: str  # id
    document: str  # id
    grade: int


def read_judgements(path: Path, queries: Container[str]) -> Iterator[Judgement]:
    """Yield the judgements of a .tsv file, of any query. `queries`: ids, by which a header is told from a judgement.

    UserError with file, line and reason.
    """
    header_possible = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3:
            count = quantity(len(fields), "field")
            raise UserError(f"{where}: {count} between tabs, not 3: query id, document id, judgement")
        query, document, judgement = fields
        is_integer = re.fullmatch(r"[+-]?\d{1,9}", judgement)
        if header_possible and not is_integer and query not in queries:
            header_possible = False
            continue
        header_possible = False
        if not is_integer:
            size = "has more than nine digits" if re.fullmatch(r"[+-]?\d+", judgement) else "is not an integer"
            raise UserError(f"{where}: the judgement {judgement[:40]!r} {size}")
        yield Judgement(where, query, document, int(judgement))


def _read_qrels(path: Path, queries: Texts, corpus: Texts, untidy: Untidiness) -> Qrels:
    """Return the judgements of the queries that have a positive one; for the others there is nothing to find."""
    qrels: Qrels = {}
    for where, query, document, grade in read_judgements(path, queries):
        if query not in queries:
            untidy.add("no query", where, f"the query {query} is not in the queries file")
            continue
        if document not in corpus:
            untidy.add("no document", where, f"the document {document} is not in the corpus")
        grades = qrels.setdefault(query, {})
        if grades.get(document, grade) != grade:
            untidy.add("replaced", where, f"query {query} and document {document} have another judgement further up")
        grades[document] = grade
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise UserError(f"{path}: no query has a positive judgement, so there is nothing to measure")
    if not any(document in corpus for grades in qrels.values() for document in grades):
        raise UserError(f"{path}: no judged document is in the corpus, so there is nothing to find")
    return qrels


def folder_state(folder: Path) -> tuple[Path, tuple]:
    """Return the resolved folder, and the names, times and sizes of its files: a key for caches of its contents."""
    folder = folder.resolve()
    files = sorted(p for pattern in ("*.jsonl*", "qrels/*.tsv") for p in folder.glob(pattern))
    return folder, tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)


@functools.lru_cache(maxsize=16)
def _read(folder: Path, state: tuple, rules: FolderRules) -> tuple[Texts, Texts, Qrels]:
    untidy = Untidiness(rules.strict)
    corpus, queries = read_texts(folder, "corpus", untidy), read_texts(folder, "queries", untidy)
    qrels = _read_qrels(_qrels_file(folder), queries, corpus, untidy)
    corpus, queries = dict(sorted(corpus.items())), {q: queries[q] for q in sorted(qrels)}
    if untidy.counts:
        print(f"{folder} is not tidy (--strict refuses it): {untidy.summary(folder)}", file=sys.stderr)
    if notice := _identical_ids(corpus, queries, rules.ignore_identical_ids):
        print(f"{folder}: {notice}", file=sys.stderr)
    return corpus, queries, qrels


def _identical_ids(corpus: Texts, queries: Texts, ignored: bool) -> str:
    """Return a notice about queries that have the id of a document; "" if there are none."""
    shared = [name for name in queries if name in corpus]
    if not shared:
        return ""
    alike = sum(queries[name][1].strip() in (corpus[name][1].strip(), document_text(*corpus[name])) for name in shared)
    those = f"queries that have the id of a document: {len(shared):,}, with the same text: {alike:,}"
    if ignored:
        return f"{those}; that document is left out of their results"
    return f"{those}; that document counts like any other (--ignore-identical-ids leaves it out, as BEIR does)"
