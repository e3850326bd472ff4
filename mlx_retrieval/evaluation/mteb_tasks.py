"""Tasks of MTEB, of type Retrieval and of text: loaded, searched and scored through mteb.

task, why_not = load("NanoMSMARCORetrieval")
parts = task.evaluate(searcher)                    # an eval.Searcher

mteb imports torch, datasets, scipy, pandas and scikit-learn, which takes seconds; so whoever evaluates on folders alone
does without it, and gets the same figures (tests/test_eval.py).
"""

import difflib
import functools
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mlx_retrieval.dataset.beir import document_text
from mlx_retrieval.evaluation.tasks import Corpus, Part, Rankings
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.errors import UserError


def load(name: str, show_progress: bool = False) -> tuple["Task | None", str]:
    """A task with its data and "", or None and one line saying why it could not be had.

    Raises UserError for a name that is no task of MTEB, or none that can be evaluated here.
    """
    _import_mteb()
    with _quiet(show_progress):
        return _load(name)


@functools.cache
def _import_mteb() -> None:
    imports.reveal("torch")
    with imports.many_imports():
        import mteb  # noqa: F401


class Task:
    """A task of MTEB with its data."""

    def __init__(self, task: Any):
        self.task = task

    def evaluate(self, searcher: Any) -> list[Part]:
        """Let an `eval.Searcher` search it. What makes vectors is searched, exhaustively, by mteb."""
        search = (_Encoder if hasattr(searcher, "encode") else _Search)(searcher)
        # The task's own method: `mteb.evaluate` would import sentence-transformers, to see if it is one of its models.
        # The model cuts its own batches; mteb only hands texts over.
        options: Any = {"batch_size": 1024, "show_progress_bar": False}
        with _quiet(searcher.show_progress):
            scores = {s: self.task.evaluate(search, s, encode_kwargs=options) for s in self.task.eval_splits}
        return [
            Part((split, subset), self.task.dataset[subset][split]["relevant_docs"], rankings, scores[split][subset])
            for (split, subset), rankings in search.rankings.items()
        ]


class _Search:
    """A searcher as mteb knows searches: `index(corpus)`, then `search(queries)`, which keeps what it found."""

    def __init__(self, searcher: Any):
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty()  # every search has to have one
        self.searcher = searcher
        self.rankings: dict[tuple[str, str], Rankings] = {}

    def index(self, corpus: Any, **_: Any) -> None:
        def texts(numbers: Any) -> list[str]:
            return [document_text(row.get("title"), row["text"]) for row in corpus.select(numbers)]

        self.corpus = Corpus(list(corpus["id"]), texts)

    def search(self, queries: Any, *, top_k: int, hf_split: str, hf_subset: str, **_: Any) -> Rankings:
        asked = dict(zip(queries["id"], queries["text"], strict=True))
        rankings = self.searcher.search((hf_split, hf_subset), self.corpus, asked, top_k)
        self.rankings[hf_split, hf_subset] = rankings
        return rankings


class _Encoder(_Search):
    """A searcher's vectors as mteb knows encoders; the texts, with instructions where a task has any, are mteb's."""

    def __init__(self, searcher: Any):
        from mteb.models import SearchEncoderWrapper

        super().__init__(searcher)
        self.search_of_mteb = SearchEncoderWrapper(self)
        self.index = self.search_of_mteb.index

    def encode(self, inputs: Any, *, prompt_type: Any, **_: Any) -> np.ndarray:
        return self.searcher.encode([text for batch in inputs for text in batch["text"]], prompt_type.value)

    def similarity(self, queries: Any, documents: Any) -> np.ndarray:
        return np.asarray(queries) @ np.asarray(documents).T

    def search(self, queries: Any, **kwargs: Any) -> Rankings:
        rankings = self.search_of_mteb.search(queries, **kwargs)
        self.rankings[kwargs["hf_split"], kwargs["hf_subset"]] = rankings
        return rankings


@contextmanager
def _quiet(show_progress: bool) -> Iterator[None]:
    """No log lines below errors and no progress bars from mteb and what it uses."""
    import datasets

    levels = {logger: logger.level for logger in map(logging.getLogger, ("mteb", "datasets", "huggingface_hub"))}
    bars = datasets.is_progress_bar_enabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    if not show_progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


# --- loading ----------------------------------------------------------------------------------------------------------


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
def _load(name: str) -> tuple["Task | None", str]:
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
    return Task(task), ""
