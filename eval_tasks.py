"""What a model is evaluated on: folders in BEIR layout and MTEB's tasks of type Retrieval, loaded once a process.

A folder holds corpus.jsonl and queries.jsonl (`{"_id", "title", "text"}` a line; .gz is read too) and qrels/test.tsv
(query id, document id, judgement, between tabs; a header line or none). To see whether one is sound:

    python -c "from eval_tasks import check_folders; check_folders(['eval-data'])"
"""

import difflib
import functools
import gzip
import json
import re
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backend import UserError

import deferred

Texts = dict[str, tuple[str, str]]  # id -> (title, text)
Qrels = dict[str, dict[str, int]]  # query id -> document id -> judgement


def load(name: str) -> tuple[Any, str]:
    """An mteb task with its data and "", or None and one line saying why a task of the hub could not be had.

    Raises UserError for a folder that is not sound, and for a name that is neither a folder nor a retrieval task.
    """
    folder = Path(name).expanduser()
    return (_folder_task(*_state(folder)), "") if folder.is_dir() else _hub_task(name)


@functools.cache
def import_mteb() -> None:
    """Import mteb and what it imports, datasets, torch, scipy and scikit-learn among them: some seconds, once."""
    with deferred.many_imports():
        import mteb  # noqa: F401


def check_folders(names: Sequence[str]) -> list[str]:
    """Read the folders among `names`, which takes no import of mteb, and give back the others, which are MTEB's tasks.

    Raises UserError for the first folder that is not sound.
    """
    others = []
    for name in names:
        folder = Path(name).expanduser()
        if folder.is_dir():
            read_folder(*_state(folder))
        elif len(folder.parts) > 1 or folder.exists():  # no task of MTEB is called like that
            raise UserError(f"{name}: no such folder")
        else:
            others.append(name)
    return others


# --- folders in BEIR layout ---


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", text) of the lines that are not blank."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error
    except (OSError, EOFError, zlib.error) as error:  # the latter two: a broken .gz
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_texts(folder: Path, stem: str) -> Texts:
    """The rows of `stem`.jsonl or `stem`.jsonl.gz."""
    path = next((p for p in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder / stem}.jsonl: no such file (nor .jsonl.gz); an evaluation folder needs it")
    rows: Texts = {}
    for where, line in lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: broken JSON ({error.msg} at character {error.pos + 1})") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: a {type(row).__name__}, not an object with _id and text")
        name, title, text = row.get("_id", row.get("id")), row.get("title") or "", row.get("text")
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise UserError(f'{where}: "_id" is missing or no text')
        if not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f'{where}: "{"text" if isinstance(title, str) else "title"}" is missing or no text')
        if str(name) in rows:
            raise UserError(f"{where}: the id {name} occurs twice")
        rows[str(name)] = (title, text)
    if not rows:
        raise UserError(f"{path}: empty")
    return rows


def _qrels_file(folder: Path) -> Path:
    found = sorted((folder / "qrels").glob("*.tsv"))
    for name in ("test.tsv", "dev.tsv"):
        if (folder / "qrels" / name) in found:
            return folder / "qrels" / name
    if len(found) != 1:
        names = f" among {', '.join(p.name for p in found)}" if found else ""
        raise UserError(f"{folder / 'qrels' / 'test.tsv'}: no such file, nor dev.tsv or a single other .tsv{names}")
    return found[0]


def _read_qrels(path: Path, queries: Texts, corpus: Texts) -> Qrels:
    """The judgements of the queries that have a positive one: without one there is nothing to find."""
    qrels: Qrels = {}
    header_possible = True
    for where, line in lines(path):
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
            raise UserError(f"{where}: query {query} and document {document} were judged otherwise further up")
    qrels = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not qrels:
        raise UserError(f"{path}: no query has a positive judgement, so there is nothing to measure")
    return qrels


def _state(folder: Path) -> tuple[Path, tuple]:
    """The folder and what tells whether its files have changed."""
    folder = folder.resolve()
    files = sorted(p for pattern in ("*.jsonl*", "qrels/*.tsv") for p in folder.glob(pattern))
    return folder, tuple((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in files)


@functools.lru_cache(maxsize=16)
def read_folder(folder: Path, _state: tuple = ()) -> tuple[Texts, Texts, Qrels]:
    """Documents, judged queries and judgements, sorted by id: the order of the files must not decide ties."""
    corpus, queries = read_texts(folder, "corpus"), read_texts(folder, "queries")
    qrels = _read_qrels(_qrels_file(folder), queries, corpus)
    return dict(sorted(corpus.items())), {q: queries[q] for q in sorted(qrels)}, qrels


@functools.lru_cache(maxsize=16)
def _folder_task(folder: Path, state: tuple) -> Any:
    from datasets import Dataset
    from mteb import TaskMetadata
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    corpus, queries, qrels = read_folder(folder, state)
    metadata = TaskMetadata(
        name="LocalFolder",
        description="A folder in BEIR layout.",
        dataset={"path": str(folder), "revision": "local"},
        type="Retrieval",
        category="t2t",
        eval_langs=["eng-Latn"],
        eval_splits=["test"],
        main_score="ndcg_at_10",
    )
    task = type("LocalFolder", (AbsTaskRetrieval,), {"metadata": metadata})()
    titles, texts = zip(*corpus.values(), strict=True)
    data = RetrievalSplitData(
        corpus=Dataset.from_dict({"id": list(corpus), "title": titles, "text": texts}),
        queries=Dataset.from_dict({"id": list(queries), "text": [text for _, text in queries.values()]}),
        relevant_docs=qrels,
        top_ranked=None,
    )
    task.dataset, task.data_loaded = {"default": {"test": data}}, True
    return task


# --- tasks of the hub ---


@functools.cache
def _hub_answers() -> bool:
    """Whether the hub can be asked: one request without retries, where the libraries would try for 20 seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:  # an answer all the same
        return True
    except OSError as error:  # Python may lack the certificates that the hub's library brings along
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@functools.cache
def _hub_task(name: str) -> tuple[Any, str]:
    """As `load`; settled once a process, as asking an unreachable hub every N steps would only cost time."""
    import mteb
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        known = [task.metadata.name for task in mteb.get_tasks(task_types=["Retrieval"], exclude_superseded=False)]
        close = ", ".join(difflib.get_close_matches(name, known))
        hint = f"; close: {close}" if close else ""
        raise UserError(f"{name} is neither a folder nor an MTEB task{hint}") from error
    metadata = task.metadata
    if metadata.type != "Retrieval":
        raise UserError(f"{name} is a task of type {metadata.type}; only those of type Retrieval can be evaluated")
    if parts := getattr(metadata, "tasks", None):
        raise UserError(f"{name} is a bundle; name the tasks: {' '.join(part.metadata.name for part in parts)}")
    if metadata.modalities != ["text"]:
        raise UserError(f"{name} is about {', '.join(metadata.modalities)}; only tasks of text can be evaluated")
    path, revision = metadata.dataset["path"], metadata.dataset["revision"]
    reason = "the hub does not answer" + (" (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "")
    try:
        if not _hub_answers():  # then the cache's copy of this revision is as good
            where = {"revision": revision, "cache_dir": constants.HF_HUB_CACHE, "local_files_only": True}
            copy = snapshot_download(path, repo_type="dataset", **where)
            task.metadata = metadata.model_copy(update={"dataset": metadata.dataset | {"path": copy}})
        task.load_data()
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        if not isinstance(error, LocalEntryNotFoundError):
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None, (
            f"{name}: data set {path}, revision {revision}, can not be loaded from the cache {constants.HF_HUB_CACHE} "
            f"(HF_HOME names another) nor from the hub: {reason}. "
            f"To fetch it where there is a network: hf download --repo-type dataset {path} --revision {revision}"
        )
    return task, ""
