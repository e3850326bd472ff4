"""Bring an index up to date with a folder: embed new and changed files, remove deleted ones, keep the rest.

from mlx_retrieval.retrieval.indexer import update
summary = update(Path("src"), Path(".index"), model)
print(summary.files, summary.chunks, summary.left_out)

A kill at any moment loses at most the batch in progress: the chunks of a batch are stored before the records of their
files, and the next run removes chunks without a record.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset import beir, chunks
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.dataset.documents import document
from mlx_retrieval.dataset.source_code import file_tree
from mlx_retrieval.dataset.source_code.file_tree import File
from mlx_retrieval.inference.embedder import Model, embed
from mlx_retrieval.retrieval import base, index_folder
from mlx_retrieval.retrieval.analyzer import ANALYSIS, ENGLISH, check_language
from mlx_retrieval.retrieval.base import TOKEN_BITS, FileRecord, IndexInfo
from mlx_retrieval.retrieval.forest import IndexSource, roots_of
from mlx_retrieval.retrieval.index_sources import index_source, is_document
from mlx_retrieval.retrieval.lance_errors import is_of_system
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.rewriting import rewrite
from mlx_retrieval.utils import locks
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import quantity

BATCH = 512  # chunks embedded and stored together
# Reasons why a file is left out that may end while it stays the same: permissions, or a library that opens PDFs.
PASSING = (document.UNREADABLE, document.FORBIDDEN, document.ENCRYPTED)


@dataclass
class Summary:
    """Counts of an `update`. Files that were left out count only in `left_out`."""

    files: int = 0
    chunks: int = 0
    embedded: int = 0  # chunks, by this run
    changed: int = 0  # files, including new ones
    unchanged: int = 0
    removed: int = 0
    size: int = 0  # of the index, in bytes
    seconds: float = 0.0
    left_out: Counter[str] = field(default_factory=Counter)  # reason -> files
    without_grammar: Counter[str] = field(
        default_factory=Counter
    )  # package -> files split as text because it is missing


def update(
    root: Path | Sequence[Path],
    folder: Path,
    model: Model,
    max_characters: int = chunks.MAX_CHARACTERS,
    overlap: int = chunks.OVERLAP,
    max_file_size: int | None = None,
    exclude: Sequence[str] = (),
    rebuild: bool = False,
    language: str | None = None,
    token_bits: int = TOKEN_BITS,
    token_pooling: int = 1,
    documents: bool | None = None,
) -> Summary:
    """Create the index in `folder`, or bring it up to date with the files in `root`.

    Args:
        root: folder of source code and texts, or several of them; or a folder of a BEIR corpus.
        model: the embedding model.
        max_characters, overlap: see chunks.chunk_file.
        max_file_size: in bytes, see index_sources.FileTree; exclude: patterns, see file_tree.walk.
        rebuild: replace an existing index; what `search.py tune` learnt for it is kept.
        language: of stems and stop words, see analyzer.py; None = the index's, or English. Another one than the
            index's needs new words, but no new vectors; so does an index of an earlier version.
        token_bits, token_pooling: of late interaction, see residual_codes.py and token_pooling.py.
        documents: read the folder as adapt.py does, see document_tree.py; None = as the index was made, or no.

    A new index is removed if nothing was stored before an error.

    Raises UserError if the index has another model, folder or size (unless `rebuild`), if another process is
    indexing, and if there is nothing to index.
    """
    started = time.monotonic()
    folder = folder.expanduser()
    root, folders, shown = roots_of([root] if isinstance(root, Path) else root)
    if language:
        check_language(language)
    if corpora := [path for path in folders.values() if beir.is_corpus(path)]:
        raise UserError(f"{corpora[0]}: a folder in BEIR layout is indexed alone")
    inside = folder.resolve().is_relative_to(root)
    before = index_folder.read_earlier(folder, rebuild)
    is_known = before is not None and not rebuild and model.is_of(before.fingerprint)
    kept = {} if before is None else {"fields": before.fields, "weight": before.weight}
    info = IndexInfo(
        root=os.path.relpath(root, folder.resolve()) if inside else str(root),
        is_corpus=not folders and beir.is_corpus(root),
        model=_name(model),
        fingerprint=before.fingerprint if is_known else model.fingerprint(),
        dimensions=model.dimensions,
        max_characters=max_characters,
        overlap=overlap,
        maxsim=model.config.maxsim if model.late else "",
        impute=model.config.impute if model.late else 0,
        folders=list(folders),
        language=language or (before.language if before else ENGLISH),
        token_bits=token_bits,
        token_pooling=token_pooling,
        documents=bool(before and before.documents) if documents is None else documents,
        exclude=list(exclude),
        max_file_size=max_file_size,
        analysis=ANALYSIS,
        **kept,
    )
    source = index_source(shown, folders, info, max_file_size, exclude, folder)
    if not source.files:
        reasons = "".join(f", {count} {reason}" for reason, count in source.left_out.items())
        raise UserError(f"{root}: nothing to index{reasons}")
    index_folder.check(folder)
    is_new = not folder.exists()
    with locks.only_one(folder / base.LOCK, f"--index {folder}: another process is indexing"):
        try:
            index = _open(folder, info, rebuild)
            index.info.fingerprint = model.fingerprint()  # of an index of before: as this version makes it
            index.info.exclude, index.info.max_file_size = info.exclude, info.max_file_size
            summary = _bring_up_to_date(index, source, model)
            if index.folder != folder:
                index_folder.install(folder)
                index = Index.open(folder)
        except BaseException:  # Ctrl-C too; nothing is handled, only tidied up
            _remove_empty(folder, is_new)
            raise
    summary.size, summary.seconds = index.size(), time.monotonic() - started
    return summary


def _open(folder: Path, info: IndexInfo, rebuild: bool) -> Index:
    """Return the index to bring up to date: the one in `folder`, or the one that is to replace it."""
    exists, rebuilt = (folder / base.FILE).is_file(), folder / index_folder.REBUILT
    if not exists and (rebuilt / base.FILE).is_file():  # a kill while the rebuilt one was put in place
        index_folder.install(folder)
        exists = True
    if exists and rebuild:
        return _interrupted(rebuilt, info) or Index.create(rebuilt, info)
    shutil.rmtree(rebuilt, ignore_errors=True)
    if not exists or (index := Index.open(folder, outdated=True)).is_empty():  # killed before it stored a chunk
        return Index.create(folder, info)
    _check(index, info)
    index.info.folders = info.folders
    if (index.info.version, index.info.language) != (base.VERSION, info.language) or index.has_older_words():
        return rewrite(index, language=info.language)
    index.info.analysis = ANALYSIS
    return index


def _interrupted(folder: Path, info: IndexInfo) -> Index | None:
    """Return the rebuilt index that an interrupted run left in `folder`; None if there is none that can be used.

    Nothing is written. Raises UserError if the system cannot read it now: it may be whole, and hours of work.
    """
    try:
        index = Index.open(folder)
        _check(index, info)
        index.check()
    except UserError as error:
        if is_of_system(error.__cause__):
            raise
        return None
    words = [(each.language, each.fields, each.analysis) for each in (index.info, info)]
    if words[0] != words[1]:
        return None
    index.info.folders, index.info.weight = info.folders, info.weight  # which may have changed since
    return index


def _remove_empty(folder: Path, is_new: bool) -> None:
    """Remove an index that never had a chunk, a half-made one too, and a new folder with it; any other stays."""
    if (folder / index_folder.REBUILT / base.FILE).is_file():
        return
    try:
        if (folder / base.FILE).is_file() and not Index.open(folder).is_empty():
            return
    except (UserError, OSError, RuntimeError, ValueError):  # damaged, as the error that is being raised says
        return
    with suppress(OSError):  # a file of someone else has come
        index_folder.clear(folder)
        if is_new:
            for name in (".gitignore", base.LOCK):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def _name(model: Model) -> str:
    from mlx_retrieval.backbones.finding import toolkit_relative

    return toolkit_relative(model.name)


def _check(index: Index, wanted: IndexInfo) -> None:
    """Raise UserError that names all differences between an index and the settings of this run."""
    have = index.info
    differences = []
    others = [name for name in have.folders or ["."] if wanted.folders and name not in wanted.folders]
    if index.root != (index.folder.resolve() / wanted.root).resolve() or others:
        differences.append(f"of {', '.join(str(index.root / name) for name in have.folders or ['.'])}")
    if have.fingerprint != wanted.fingerprint:
        differences.append(
            f"with another model ({have.model})"
            if have.model != wanted.model
            else f"with {have.model} as it was before its files changed"
        )
    if (have.max_characters, have.overlap) != (wanted.max_characters, wanted.overlap):
        differences.append(f"with --chunk-size {have.max_characters} --overlap {have.overlap}")
    if have.maxsim and (have.token_bits, have.token_pooling) != (wanted.token_bits, wanted.token_pooling):
        differences.append(f"with --token-bits {have.token_bits} --token-pooling {have.token_pooling}")
    if have.is_corpus != wanted.is_corpus:
        differences.append("of a BEIR corpus" if have.is_corpus else "of files")
    if have.documents != wanted.documents:
        differences.append("with --documents" if have.documents else "without --documents")
    if differences:
        raise UserError(
            f"--index {index.folder} was made {' and '.join(differences)}: --rebuild replaces it, "
            "or choose another folder with --index"
        )


def _bring_up_to_date(index: Index, source: IndexSource, model: Model) -> Summary:
    summary = Summary(left_out=Counter(source.left_out))
    records = index.records()
    index.remove_orphans(records)
    pending = [file for file in source.files if not _is_same(file, records.get(file.path))]
    if index.late:  # the first chunks are those that a codebook is learnt from
        np.random.default_rng(0).shuffle(pending)
    gone = sorted(set(records) - {file.path for file in source.files})
    index.info.model, was_complete = _name(model), index.info.complete
    index.info.complete &= not (pending or gone)
    index.write()
    if not index.info.complete:
        index.remove(gone)
        summary.removed = sum(not records.pop(path).left_out for path in gone)
        if _embed(index, source, model, pending, records, summary) or gone or not was_complete:
            index.finish()
        else:  # files that are read at every run are as they were
            index.info.complete = True
            index.write()
    indexed = [record for record in records.values() if not record.left_out]
    summary.files, summary.chunks = len(indexed), sum(record.chunks for record in indexed)
    summary.unchanged = summary.files - summary.changed
    summary.left_out += Counter(record.left_out for record in records.values() if record.left_out)
    if not index.info.is_corpus:
        packages = (chunks.missing_grammar(record.path) for record in indexed)
        summary.without_grammar = Counter(package for package in packages if package)
    return summary


def _embed(
    index: Index,
    source: IndexSource,
    model: Model,
    pending: Sequence[File],
    records: dict[str, FileRecord],
    summary: Summary,
) -> bool:
    """Read, embed and store files in batches; updates `records` and `summary`. Return whether anything was stored."""
    stored, touched, added = set(records), [], False
    batch: list[tuple[FileRecord, list[Chunk]]] = []
    with progress_bar("embedding", "files", len(pending)) as progress:
        for number, file in enumerate(pending, start=1):
            pieces, sha256, reason = source.read(file)
            before, record = records.get(file.path), FileRecord(*file, sha256, len(pieces), reason)
            records[file.path] = record
            if before is not None and _what_is_read(before) == _what_is_read(record):
                if record != before:  # only the time has changed
                    touched.append(record)
            else:
                summary.changed += not reason
                batch.append((record, pieces))
            count = sum(record.chunks for record, _ in batch)
            if batch and (count >= BATCH or len(batch) >= BATCH or number == len(pending)):
                texts = [chunk.embedded for _, pieces in batch for chunk in pieces]
                places = [source.place(record.path, chunk.line) for record, pieces in batch for chunk in pieces]
                index.add(batch, embed(model, texts, "document", places.__getitem__), stored)
                summary.embedded += count
                batch, added = [], True
            progress(number, note=f"{quantity(summary.embedded, 'chunk')}")
    if touched:
        index.record(touched)
    return added or bool(touched)


def _what_is_read(record: FileRecord) -> tuple[str, int, str]:
    """Return what decides whether a file is stored again: the same bytes may be read now that were left out before."""
    return record.sha256, record.chunks, record.left_out


def _is_same(file: File, record: FileRecord | None) -> bool:
    """Return whether a file need not be read: it is as it was, and a reason to leave it out has not ended."""
    if record is None or record.left_out in PASSING:
        return False
    if record.left_out in (file_tree.BINARY, file_tree.NOT_UTF8) and is_document(file.path):  # by an earlier version
        return False
    return (record.size, record.stamp) == (file.size, file.mtime)
