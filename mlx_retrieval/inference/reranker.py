"""Score documents for a query with a reranker."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval import backend
from mlx_retrieval.backbones import resolve
from mlx_retrieval.inference import embedder, fingerprint
from mlx_retrieval.models import loading, maxsim
from mlx_retrieval.models.batching import Texts, micro_batches
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.pair_tokenizers import Group, PairTokenizer, Sequences
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

SEQUENCES = 4_096  # that are tokenised and sorted by length together
SHARED_BY = 4  # documents of a query, from which on what their sequences begin with is computed once
SHARED_FROM = 16  # tokens: a shorter common beginning is not worth computing apart


class Scorer(Protocol):
    """A model that scores documents for queries, which is all that evaluation needs; `Reranker` is one."""

    name: str

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Return, for each (query, N documents), (N,) float32 scores in the documents' order; higher is better."""


class Reranker:
    """A reranker in use: of any kind in `rerankers.KINDS`, or a late-interaction model.

    Args:
        model: adapter folder, base model's folder, or hub name.
        adapter: an adapter folder to put on the base model `model`.
        reranker_type: the kind, where the files do not tell; see `rerankers.reranker_kind`.
        max_length: tokens of query and document together (listwise: of a document); None = as the model was saved.
        instruction: what a qwen3 or listwise model is to judge by, in place of its own.

    Raises UserError where anything is missing or does not fit.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        reranker_type: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
    ):
        base: str | None = str(model)
        if adapter is None and loading.is_adapter(Path(model).expanduser()):
            base, adapter = None, model
        flags: dict[str, Any] = {"max_length": max_length, "instruction": instruction}
        if adapter is None and loading.detect_kind(base) != "late":
            flags |= {"task": "rerank", "reranker": reranker_type}
        parts = loading.open_model(base, str(adapter) if adapter else None, **flags)
        if adapter is None and tree_flatten(parts[0].head.trainable_parameters()):
            raise UserError(
                f"{model}: the weights of a reranker's head are not in this model, so its scores would mean nothing. "
                "python train.py --task rerank trains one"
            )
        self._take(*parts[:2], parts[1].tokenizer(parts[2]), str(adapter or base).rstrip("/"), parts[2])
        if reranker_type not in (None, self.kind):
            raise UserError(f"--reranker-type {reranker_type}: {self.name} is of the kind {self.kind}")

    @classmethod
    def of(
        cls,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: PairTokenizer | TextTokenizer,
        name: str,
    ) -> "Reranker":
        """A reranker of a model that is loaded, such as the one that is being trained."""
        reranker = cls.__new__(cls)
        reranker._take(model, config, tokenizer, name)
        return reranker

    def _take(self, model, config, tokenizer, name: str, base: Path | None = None) -> None:
        if config.task not in ("rerank", "late"):
            raise UserError(f"{name}: a model of one vector a text; rerankers read query and document together")
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.late: embedder.Model | None = None
        if config.task == "late":
            self.late = embedder.Model(model, config, tokenizer, name, base)
            self.runner = self.late.runner
        else:
            self.runner = make_runner(model)
        self.cut = 0  # documents that were too long, so far

    @property
    def kind(self) -> str:
        """One of `rerankers.KINDS`, or "late"."""
        return self.config.reranker or "late"

    def fingerprint(self) -> str:
        """Return a hash of everything that decides this reranker's scores; see `fingerprint.fingerprint`.

        An adapter is hashed by its own folder: its config holds a fingerprint of the base model's weights.
        """
        return fingerprint.fingerprint(self.config, resolve(self.name))

    def limit_shapes(self) -> None:
        """Meet fewer shapes from now on, for a process that answers requests: see `ModelRunner.limit_shapes`."""
        self.runner.limit_shapes()

    # --- scores ---

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """The best `top_n` documents (None = all), best first: {"index", "score", "document"}.

        Equal scores keep the documents' order.
        """
        if top_n is not None and top_n < 1:
            raise UserError(f"top_n {top_n}: at least 1")
        scores = self.score(query, documents)
        order = np.argsort(-scores, kind="stable")[:top_n]
        return [{"index": int(i), "score": float(scores[i]), "document": documents[i]} for i in order]

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """(N,) float32 in the documents' order: qwen3 and most cross-encoders from 0 to 1, listwise a cosine."""
        return self.score_groups([(query, documents)])[0]

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Scores of several queries' documents, computed together: an array as `score` gives it for each group."""
        for query, documents in groups:
            if isinstance(documents, str) or not all(isinstance(text, str) for text in (query, *documents)):
                raise UserError("a query is a text, and documents are a list of texts")
        self.model.eval()
        lengths = [len(documents) for _, documents in groups]
        if not sum(lengths):
            return [np.zeros(0, np.float32) for _ in groups]
        score = self._late if self.late else self._listwise if self.kind == "listwise" else self._pairs
        whole = score([group for group in groups if group[1]])
        if not np.isfinite(whole).all():
            raise FloatingPointError(
                f"{self.name}: {np.sum(~np.isfinite(whole))} of {len(whole)} scores are not finite"
            )
        if self.config.activation == "sigmoid":
            whole = 1 / (1 + np.exp(-whole))
        return np.split(whole.astype(np.float32), np.cumsum(lengths)[:-1])

    def _late(self, groups: Sequence[Group]) -> np.ndarray:
        queries = self.late.encode([query for query, _ in groups], "query", False)
        found = []
        for query, (_, documents) in zip(queries, groups, strict=True):
            vectors = self.late.encode(documents, "document", False)
            lengths = np.array([len(v) for v in vectors])
            found.append(maxsim.score(query, np.concatenate(vectors), lengths, self.config.maxsim, self.config.impute))
        return np.concatenate(found)

    def _listwise(self, groups: Sequence[Group]) -> np.ndarray:
        sequences = self._tokens(groups)
        found = np.empty(len(sequences.text), np.float32)
        for index, part in self._representations(sequences.texts):
            row = np.full(len(sequences.texts), -1)
            row[index] = np.arange(len(index))
            mine = row[sequences.text] >= 0
            found[mine] = part[row[sequences.text[mine]], sequences.place[mine], 0]
        return found

    def _pairs(self, groups: Sequence[Group]) -> np.ndarray:
        shares = self.kind == "qwen3" and self.model.backbone.has_past
        found = []
        for part in _parts(groups, SEQUENCES, alone=SHARED_BY if shares else SEQUENCES):
            texts, past = self._tokens(part).texts, None
            if shares and len(part) == 1 and len(texts) >= SHARED_BY:
                texts, past = self._shared(texts)
            scores = np.empty(len(texts), np.float32)
            for index, part_scores in self._representations(texts, past):
                scores[index] = part_scores[:, 0]
            found.append(scores)
        return np.concatenate(found)

    def _tokens(self, groups: Sequence[Group]) -> Sequences:
        sequences = self.tokenizer(groups)
        self.cut += sequences.cut
        return sequences

    def _representations(self, texts: Texts, past: list | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(index, representations) of micro-batches, as they are computed."""
        grid = self.runner.length_grid
        cut = list(micro_batches(texts, backend.MICRO_BATCH_TOKENS, self.tokenizer.pad_id, grid))
        parts = self.runner.representations([rows._replace(past=past) for _, rows in cut])
        return ((index, np.array(part)) for (index, _), part in zip(cut, parts, strict=True))

    def _shared(self, texts: Texts) -> tuple[Texts, list | None]:
        """The texts without the tokens that all begin with, and keys and values of those; as they are, if too few.

        Those tokens are the prompt and the query, and whatever the documents themselves have in common.
        """
        rows = np.split(texts.ids, texts.offsets[1:-1])
        least = min(map(len, rows)) - 1  # every row keeps a token, at which its score stands
        same = np.all([row[:least] == rows[0][:least] for row in rows], axis=0)
        count = least if same.all() else int(same.argmin())
        count -= count % self.runner.length_grid  # like every length
        if count < SHARED_FROM:
            return texts, None
        past = self.model.backbone.past(mx.array(rows[0][None, :count]))
        mx.eval(past)
        lengths = texts.lengths - count
        rest = np.concatenate([row[count:] for row in rows])
        return Texts(rest, lengths, np.zeros_like(lengths), lengths.copy()), past


def _parts(groups: Sequence[Group], most: int, alone: int) -> Iterator[list[Group]]:
    """Groups in lots of at most `most` documents, larger groups in several; those of `alone` or more by themselves."""
    lot, count = [], 0
    for query, documents in groups:
        for first in range(0, len(documents), most):
            part = documents[first : first + most]
            if lot and (count + len(part) > most or len(part) >= alone):
                yield lot
                lot, count = [], 0
            lot.append((query, part))
            count += len(part)
            if len(part) >= alone:
                yield lot
                lot, count = [], 0
    if lot:
        yield lot
