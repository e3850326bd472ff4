"""Score documents for a query with a reranker."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval import backend
from mlx_retrieval.backbones import dtype_name, resolve
from mlx_retrieval.inference import embedder, fingerprint, finite
from mlx_retrieval.models import kinds, loading, maxsim
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.pair_tokenizers import Group, PairTokenizer, Sequences
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import SettingError, UserError

SEQUENCES = 4_096  # sequences tokenised and sorted by length together
SHARED_BY = 4  # documents of a query at least, to compute the common beginning of their sequences only once
SHARED_FROM = 16  # tokens of a common beginning at least, to be worth it


class Scorer(Protocol):
    """A model that scores documents for queries, which is all that evaluation needs; `Reranker` is one."""

    name: str

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """Return, for each (query, N documents), (N,) float32 scores in the documents' order; higher is better."""


def raw_scores(scorer: Scorer, groups: Sequence[Group]) -> list[np.ndarray]:
    """Return scores to sort by: before the scorer's activation, if it has one. Large logits have the same sigmoid."""
    return scorer.score_groups(groups, raw=True) if hasattr(scorer, "activated") else scorer.score_groups(groups)


def activated(scorer: Scorer, raw: np.ndarray) -> np.ndarray:
    """Return scores to show, (N,) float32, from those of `raw_scores`."""
    return scorer.activated(raw) if hasattr(scorer, "activated") else raw


class Reranker:
    """A reranker for inference: one of `rerankers.KINDS`, or a late-interaction model.

    Args:
        model: adapter folder, base model's folder or GGUF, or hub name.
        adapter: adapter folder to load on top of the base model `model`.
        reranker_type: one of `rerankers.KINDS`; None = by the model's files, see `rerankers.reranker_kind`.
        max_length: most tokens of query and document together (listwise: of a document); None = as saved.
        instruction: the instruction by which a qwen3 or listwise model judges; None = as saved.
        raw_scores: give logits, without the sigmoid that most rerankers' files ask for.
        dtype, shared, dequantize: see `embedder.load`.

    Raises UserError if anything is missing or does not fit.

    Attributes:
        cut: documents that were truncated so far.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        reranker_type: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
        raw_scores: bool = False,
        dtype: str | None = None,
        shared: SharedWeights | None = None,
        dequantize: str | None = None,
    ):
        base: str | None = str(model)
        if adapter is None and kinds.is_adapter(Path(model).expanduser()):
            base, adapter = None, model
        flags: dict[str, Any] = {"max_length": max_length, "instruction": instruction, "dtype": dtype}
        flags |= {"activation": ""} if raw_scores else {}
        name = str(adapter or base).rstrip("/")
        names = (base, str(adapter) if adapter else None)
        kind = kinds.detect_kind(*names) if reranker_type else kinds.require(kinds.RERANKING, *names)
        if adapter is None and kind != "late":
            flags |= {"task": "rerank", "reranker": reranker_type}
        opened, config, folder = loading.open_model(*names, shared=shared, dequantize=dequantize, **flags)
        if adapter is None and tree_flatten(opened.head.trainable_parameters()):
            raise UserError(
                f"{model}: the weights of a reranker's head are not in this model, so its scores would mean nothing. "
                "python train.py --task rerank trains one"
            )
        self.set_model(opened, config, config.tokenizer(folder), name, folder)
        if reranker_type not in (None, self.kind):
            raise SettingError(
                "{reranker_type} {wanted}: {name} is of the kind {kind}",
                wanted=reranker_type,
                name=self.name,
                kind=self.kind,
            )

    @classmethod
    def of(
        cls,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: PairTokenizer | TextTokenizer,
        name: str,
        compile: str = "auto",
    ) -> "Reranker":
        """Make a reranker of a model that is already loaded, such as the one that is being trained.

        Args:
            compile: whether passes are compiled; see `make_runner`.
        """
        reranker = cls.__new__(cls)
        reranker.set_model(model, config, tokenizer, name, compile=compile)
        return reranker

    def set_model(
        self,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: PairTokenizer | TextTokenizer,
        name: str,
        base: Path | None = None,
        compile: str = "auto",
    ) -> None:
        """Score with this loaded model from now on; UserError for an embedding model.

        Args:
            base: see `embedder.Model`; only for a late-interaction model.
            compile: see `of`.
        """
        if config.task not in ("rerank", "late"):
            raise UserError(kinds.explain(name, "embed"))
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.late: embedder.Model | None = None
        if config.task == "late":
            self.late = embedder.Model(model, config, tokenizer, name, base, compile)
            self.runner = self.late.runner
        else:
            self.runner = make_runner(model, compile)
        self.cut = 0

    @property
    def kind(self) -> str:
        """One of `rerankers.KINDS`, or "late"."""
        return self.config.reranker or "late"

    @property
    def dtype(self) -> str:
        """The dtype that the backbone computes in, such as `bfloat16`; scores are float32 whatever it is."""
        return dtype_name(self.model.backbone)

    def fingerprint(self) -> str:
        """Return a hash of everything that decides this reranker's scores; see `fingerprint.fingerprint`.

        An adapter is hashed by its own folder: its config holds a fingerprint of the base model's weights.
        """
        return fingerprint.fingerprint(self.config, resolve(self.name))

    def limit_shapes(self, models: int = 1) -> None:
        """Keep fewer graphs from now on, in a process that answers requests: see `ModelRunner.limit_shapes`."""
        self.runner.limit_shapes(models)

    def count_tokens(self, query: str, documents: Sequence[str]) -> int:
        """Return how many tokens are computed to score the documents, prompts and special tokens included."""
        if self.late:
            return self.late.count_tokens([query], "query") + self.late.count_tokens(documents, "document")
        return int(self.tokenizer([(query, documents)]).texts.lengths.sum())

    def count_cut(self, query: str, documents: Sequence[str]) -> tuple[bool, int]:
        """Return whether the query would be truncated for one of the documents, and how many of these would be."""
        if not self.late:
            sequences = self.tokenizer([(query, documents)])
            return sequences.cut_queries > 0, sequences.cut
        return self._longer("query", [query]) > 0, self._longer("document", documents)

    def _longer(self, name: str, texts: Sequence[str]) -> int:
        """Return how many texts under the prompt called `name` a late-interaction model truncates."""
        room, prompt = self.tokenizer.room(name), self.tokenizer.prompts[name]
        frame = len(next(iter(self.tokenizer.bodies([""], prompt))))
        return sum(len(ids) - frame > room for ids in self.tokenizer.bodies(texts, prompt))

    # --- scores ---

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """Return the documents, best first, as {"index", "score", "document"}; equal scores keep the documents' order.

        Args:
            top_n: return only the best N; None = all.
        """
        if top_n is not None and top_n < 1:
            raise UserError(f"top_n {top_n}: at least 1")
        _check([(query, documents)])
        raw = self._raw([(query, documents)])
        order = np.argsort(-raw, kind="stable")[:top_n]  # not by the sigmoid, which in float32 is 1 for many
        scores = self.activated(raw)
        return [{"index": int(i), "score": float(scores[i]), "document": documents[i]} for i in order]

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """Return (N,) float32 scores in the documents' order.

        They are 0 to 1, a sigmoid, from qwen3 and cross-encoders whose files do not name another activation (as by
        sentence-transformers' CrossEncoder), a cosine from listwise, and a sum or mean of cosines from late-interaction
        models.
        """
        return self.score_groups([(query, documents)])[0]

    def score_groups(self, groups: Sequence[Group], raw: bool = False) -> list[np.ndarray]:
        """Score the documents of several queries together; return the array of `score` for each (query, documents).

        Args:
            raw: give the scores before the activation.

        Raises NonFiniteError, which names a document, if a score is not finite.
        """
        _check(groups)
        if not groups:
            return []
        lengths = [len(documents) for _, documents in groups]
        scores = self._raw(groups)
        return np.split(scores.astype(np.float32) if raw else self.activated(scores), np.cumsum(lengths)[:-1])

    def _raw(self, groups: Sequence[Group]) -> np.ndarray:
        """Return the scores of all groups' documents before the activation, one group after another."""
        if self.model.training:  # eval() walks through all modules
            self.model.eval()
        if not any(documents for _, documents in groups):
            return np.zeros(0, np.float32)
        score = self._late if self.late else self._listwise if self.kind == "listwise" else self._pairs
        scores = score([group for group in groups if group[1]])
        finite.check_scores(self.name, [text for _, documents in groups for text in documents], scores)
        return scores

    def activated(self, scores: np.ndarray) -> np.ndarray:
        """Return float32 scores after the activation, from those before it."""
        if self.config.activation == "sigmoid":
            with np.errstate(over="ignore"):  # exp of a large number: the score is 0
                scores = 1 / (1 + np.exp(-scores))
        return scores.astype(np.float32)

    def _late(self, groups: Sequence[Group]) -> np.ndarray:
        queries = self.late.encode([query for query, _ in groups], "query", False)
        scores, how = [], (self.config.maxsim, self.config.impute)
        for query, (_, documents) in zip(queries, groups, strict=True):
            vectors = self.late.encode(documents, "document", False)
            lengths = np.array([len(v) for v in vectors])
            scores.append(maxsim.score(query, np.concatenate(vectors), lengths, *how))
        return np.concatenate(scores)

    def _listwise(self, groups: Sequence[Group]) -> np.ndarray:
        sequences = self._tokens(groups)
        scores = np.empty(len(sequences.text), np.float32)
        for index, representations in self._representations(sequences.texts):
            row = np.full(len(sequences.texts), -1)  # of each sequence in this micro-batch; -1: in another one
            row[index] = np.arange(len(index))
            here = row[sequences.text] >= 0
            scores[here] = representations[row[sequences.text[here]], sequences.place[here], 0]
        return scores

    def _pairs(self, groups: Sequence[Group]) -> np.ndarray:
        shares = self.kind == "qwen3" and self.model.backbone.has_past
        scores = []
        for lot in _lots(groups, SEQUENCES, alone=SHARED_BY if shares else SEQUENCES):
            texts, past = self._tokens(lot).texts, None
            if shares and len(lot) == 1 and len(texts) >= SHARED_BY:
                texts, past = self._shared(texts)
            lot_scores = np.empty(len(texts), np.float32)
            for index, representations in self._representations(texts, past):
                lot_scores[index] = representations[:, 0]
            scores.append(lot_scores)
        return np.concatenate(scores)

    def _tokens(self, groups: Sequence[Group]) -> Sequences:
        """Tokenise the groups, and count the documents that are truncated."""
        sequences = self.tokenizer(groups)
        self.cut += sequences.cut
        return sequences

    def _representations(self, texts: Texts, past: list | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (index, representations) of each micro-batch.

        Args:
            past: keys and values of tokens that all texts have before their own; see `MicroBatch`.
        """
        batches = list(self.runner.micro_batches(texts, backend.MICRO_BATCH_TOKENS, self.tokenizer.pad_id))
        results = self.runner.representations([micro_batch._replace(past=past) for _, micro_batch in batches])
        return ((index, np.array(result)) for (index, _), result in zip(batches, results, strict=True))

    def _shared(self, texts: Texts) -> tuple[Texts, list | None]:
        """Return the texts without the tokens that all of them begin with, and the keys and values of those tokens.

        Those tokens are the prompt, the query, and a common beginning of the documents. If there are too few of them,
        return the texts unchanged, and None.
        """
        rows = np.split(texts.ids, texts.offsets[1:-1])
        least = min(map(len, rows)) - 1  # every row keeps its last token, which gives its score
        same = np.all([row[:least] == rows[0][:least] for row in rows], axis=0)
        count = least if same.all() else int(same.argmin())
        count -= count % self.runner.length_grid  # a length as on the grid
        if count < SHARED_FROM:
            return texts, None
        past = self.model.backbone.past(mx.array(rows[0][None, :count]))
        mx.eval(past)
        lengths = texts.lengths - count
        rest = np.concatenate([row[count:] for row in rows])
        return Texts(rest, lengths, np.zeros_like(lengths), lengths.copy()), past


def _check(groups: Sequence[Group]) -> None:
    """Raise UserError for anything but texts."""
    for query, documents in groups:
        if isinstance(documents, str) or not all(isinstance(text, str) for text in (query, *documents)):
            raise UserError("a query must be a text, and documents a list of texts")


def _lots(groups: Sequence[Group], most: int, alone: int) -> Iterator[list[Group]]:
    """Yield lots of groups, each with at most `most` documents in all.

    A larger group is split over several lots, and a group of `alone` documents or more is a lot by itself.
    """
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
