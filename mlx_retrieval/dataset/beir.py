"""Read evaluation folders in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/*.tsv."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.dataset.json_lines import read_lines, read_objects
from mlx_retrieval.utils.errors import UserError

Texts = dict[str, tuple[str, str]]  # id -> (title, text)
Qrels = dict[str, dict[str, int]]  # query id -> document id -> judgement


def document_text(title: str | None, text: str) -> str:
    """Join title and text by a space, as mteb does: the text of a document that models see."""
    return f"{title or ''} {text}".strip()


def check_folders(names: Sequence[str]) -> list[str]:
    """Read the folders among `names`, and return the other names, which are MTEB tasks.

    Raises UserError for the first folder that is missing or has errors.
    """
    others = []
    for name in names:
        folder = Path(name).expanduser()
        if folder.is_dir():
            read_folder(folder)
        elif len(folder.parts) > 1 or folder.exists():  # not a name of an MTEB task
            raise UserError(f"{name}: no such folder")
        else:
            others.append(name)
    return others


def read_folder(folder: Path) -> tuple[Texts, Texts, Qrels]:
    """Return documents, judged queries and judgements, sorted by id, so that the files' order does not decide ties.

    Cached until the files change. Raises UserError with file, line and reason.
    """
    return _read(*folder_state(folder))


def read_texts(folder: Path, stem: str) -> Texts:
    """Read the rows of `stem`.jsonl or `stem`.jsonl.gz. UserError with file, line and reason."""
    path = _texts_file(folder, stem)
    rows: Texts = {}
    for number, row in read_objects(path):
        where = f"{path}:{number}"
        name, title, text = row.get("_id", row.get("id")), row.get("title") or "", row.get("text")
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise UserError(f'{where}: "_id" is missing or not a text')
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f'{where}: "{"text" if isinstance(title, str) else "title"}" is missing or not a text')
        if str(name) in rows:
            raise UserError(f"{where}: the id {name} occurs twice")
        rows[str(name)] = (title, text)
    if not rows:
        raise UserError(f"{path}: empty")
    return rows


def files_of(folder: Path) -> list[Path]:
    """Return the three files that `read_folder` reads. UserError if one is missing."""
    return [_texts_file(folder, "corpus"), _texts_file(folder, "queries"), _qrels_file(folder)]


def _texts_file(folder: Path, stem: str) -> Path:
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


def _read_qrels(path: Path, queries: Texts, corpus: Texts) -> Qrels:
    """Return the judgements of the queries that have a positive one; for the others there is nothing to find."""
    qrels: Qrels = {}
    header_possible = True
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) != 3:
            raise UserError(f"{where}: {len(fields)} fields between tabs, not 3: query id, document id, judgement")
        query, document, judgement = fields
        is_integer = re.fullmatch(r"[+-]?\d{1,9}", judgement)
        if header_possible and not is_integer and query not in queries:
            header_possible = False
            continue
        header_possible = False
        if not is_integer:
            raise UserError(f"{where}: the judgement {judgement!r} is not an integer")
        if query not in queries:
            raise UserError(f"{where}: the query {query} is not in the queries file")
        if document not in corpus:
            raise UserError(f"{where}: the document {document} is not in the corpus")
        if qrels.setdefault(query, {}).setdefault(document, int(judgement)) != int(judgement):
            raise UserError(f"{where}: query {query} and document {document} have another judgement further up")
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise UserError(f"{path}: no query has a positive judgement, so there is nothing to measure")
    return qrels


def folder_state(folder: Path) -> tuple[Path, tuple]:
    """Return the resolved folder, and the names, times and sizes of its files: a key for caches of its contents."""
    folder = folder.resolve()
    files = sorted(p for pattern in ("*.jsonl*", "qrels/*.tsv") for p in folder.glob(pattern))
    return folder, tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)


@functools.lru_cache(maxsize=16)
def _read(folder: Path, state: tuple) -> tuple[Texts, Texts, Qrels]:
    corpus, queries = read_texts(folder, "corpus"), read_texts(folder, "queries")
    qrels = _read_qrels(_qrels_file(folder), queries, corpus)
    return dict(sorted(corpus.items())), {q: queries[q] for q in sorted(qrels)}, qrels
