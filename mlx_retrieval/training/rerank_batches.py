"""From rows to batches of groups: a query, its documents, and a label or a teacher's score for each.

{"query": ..., "document": ..., "label": 1}             label: from 0 to 1; a group of one document
{"query": ..., "positive": ..., "negatives": [...]}     label 1, and 0 for each negative; triplets likewise
{"query": ..., "documents": [...], "scores": [...]}     graded; positive and negatives may have scores as well

`dataset.rows.Rows` reads them; `data_loader.Batches` makes its batches with a `GroupMaker`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loss import RERANKER_LOSSES
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.training.settings_checks import DISTILLING
from mlx_retrieval.utils.errors import Place, SettingError

BY_LABEL = ("yes_no", "bce", "list_bce")  # losses that take labels from 0 to 1, and documents by themselves
HIGHEST_GRADE = 30  # of `loss.lambda_loss`, whose gains are 2^grade - 1


@dataclass(frozen=True)
class GroupBatch:
    """G groups of at most K documents each, as N token sequences. `text` is -1 where a group has no more documents."""

    texts: Texts  # N sequences
    text: np.ndarray  # (G, K) int32: the sequence that holds the document
    place: np.ndarray  # (G, K) int32: the position of its score in that sequence's representation
    labels: np.ndarray  # (G, K) float32
    rows: np.ndarray  # (G,) int64: the groups' source rows, for messages
    source: int = -1  # as of `data_loader.Batch`

    @property
    def tokens(self) -> int:
        """The batch's real tokens, without padding."""
        return int(self.texts.lengths.sum())

    def rows_with(self, text: int) -> np.ndarray:
        """Return the source rows of the sequence with index `text`."""
        return self.rows[(self.text == text).any(axis=1)]


class GroupMaker:
    """Makes batches of groups.

    Args:
        rows: the source of the examples.
        random_negatives: how many documents of the batch's other rows each query gets as further negatives.
        shuffled: put a group's documents in a random order, for listwise rerankers, which see the documents' positions.
        seed: of that order, which is the same whenever the same rows make a batch.
        from_all: draw random negatives from all documents of the other rows, not in turn from their positives.
    """

    def __init__(
        self,
        rows: Source,
        random_negatives: int = 0,
        shuffled: bool = False,
        seed: int = 0,
        from_all: bool = False,
    ):
        self.rows = rows
        self.random_negatives = random_negatives
        self.shuffled = shuffled
        self.seed = seed
        self.from_all = from_all

    def group(
        self, examples: Sequence[Example], i: int, rng: np.random.Generator | None = None
    ) -> tuple[list[str], list[float]]:
        """Return the documents and labels of example i of a batch. `rng`: draws random negatives, with `from_all`."""
        example = examples[i]
        if self.rows.format == "label":
            return [example.positive], list(example.scores)
        negatives, labels = example.negatives, list(example.scores)
        if not labels:  # a positive that is among the negatives as well is none of them
            negatives = [text for text in negatives if text not in (example.positive, *example.other_positives)]
            labels = [1.0] + [0.0] * len(negatives)
        documents = [example.positive, *negatives]
        relevant = {e.positive for e in examples if e.query == example.query}
        relevant.update(documents, example.other_positives)
        rest = [examples[(i + step) % len(examples)] for step in range(1, len(examples))]
        others = [text for e in rest for text in ((e.positive, *e.negatives) if self.from_all else (e.positive,))]
        more = list(dict.fromkeys(text for text in others if text not in relevant))
        if self.from_all and len(more) > self.random_negatives:
            more = [more[j] for j in rng.choice(len(more), self.random_negatives, replace=False)]
        more = more[: self.random_negatives]
        return documents + more, labels + [min(0.0, *labels)] * len(more)  # scores may all be negative

    def __call__(self, examples: Sequence[Example], rows: Sequence[int], tokenizer: PairTokenizer) -> GroupBatch:
        groups = []
        labels = []
        rng = np.random.default_rng([self.seed, *rows])
        for i, example in enumerate(examples):
            documents, group_labels = self.group(examples, i, rng)
            if self.shuffled:
                order = rng.permutation(len(documents))
                documents = [documents[j] for j in order]
                group_labels = [group_labels[j] for j in order]
            groups.append((example.query, documents))
            labels.append(group_labels)
        sequences = tokenizer(groups)
        counts = np.array([len(group_labels) for group_labels in labels])
        real = np.arange(counts.max())[None, :] < counts[:, None]  # (G, K)
        text = np.full(real.shape, -1, np.int32)
        text[real] = sequences.text
        place = np.zeros(real.shape, np.int32)
        place[real] = sequences.place
        padded = np.zeros(real.shape, np.float32)
        padded[real] = [label for group_labels in labels for label in group_labels]
        return GroupBatch(sequences.texts, text, place, padded, np.array(rows, np.int64))


def takes_random_negatives(rows: Source, loss: str) -> bool:
    """Return whether documents of other rows can join a query's own: not a single labelled document, nor where the
    loss learns a teacher's scores, which they do not have."""
    return rows.format != "label" and loss not in DISTILLING


def check_random_negatives(learnt: Sequence[tuple[Source, str]]) -> None:
    """Raise SettingError for --random-negatives that no source takes, each given with its loss."""
    if any(takes_random_negatives(rows, loss) for rows, loss in learnt):
        return
    rows, loss = learnt[0]
    if rows.format == "label":
        raise SettingError(
            "{random_negatives}: in {where} each row is a document with its own label, which no others join",
            where=[Place(name) for name in rows.names],
        )
    raise SettingError(
        "{random_negatives}: {loss} {name} learns a teacher's scores, and other rows' documents have none for this "
        "query: ranknet and list_mle take them as worse than the row's own",
        name=loss,
    )


def check(rows: Source, loss: str, random_negatives: int = 0) -> None:
    """Raise UserError if the rows lack what the loss needs."""
    low, high = rows.score_range
    where = [Place(name) for name in rows.names]
    if loss not in RERANKER_LOSSES:
        raise SettingError(
            "{loss} {name} compares vectors; rerankers learn by {known}", name=loss, known=", ".join(RERANKER_LOSSES)
        )
    single = rows.format == "label" or not (rows.has_negatives or random_negatives)  # one document a group
    if single and rows.format != "label":
        raise SettingError(
            "{where}: the rows have neither labels nor negatives, so there is nothing to tell apart; "
            "{random_negatives} 4 takes other rows' documents",
            where=where,
        )
    if single and loss not in BY_LABEL:
        raise SettingError(
            "{loss} {name} compares the documents of a group, and the rows of {where} are single pairs",
            name=loss,
            where=where,
        )
    if loss == "info_nce" and (rows.has_some_scores or rows.format == "documents"):
        raise SettingError(
            "{loss} info_nce takes rows of a positive and negatives, and those of {where} have scores: list_softmax "
            "takes them, and {ignore_keys} leaves them unread",
            where=where,
        )
    if loss in DISTILLING and not rows.has_scores:
        raise SettingError(
            "{loss} {name}: every row of {where} needs scores, a teacher's, of its positive and negatives",
            name=loss,
            where=where,
        )
    if loss in BY_LABEL and not 0 <= low <= high <= 1:
        raise SettingError(
            "{loss} {name} takes labels from 0 to 1, and the scores in {where} go from {low:g} to {high:g}: "
            "ranknet, list_mle, margin_mse and kl_distill take any",
            name=loss,
            where=where,
            low=low,
            high=high,
        )
    if loss in ("list_softmax", "lambda_loss", "info_nce") and low < 0:
        raise SettingError(
            "{loss} {name} takes scores from 0 on, and {where} has {low:g}: ranknet and list_mle take any",
            name=loss,
            where=where,
            low=low,
        )
    if loss == "lambda_loss" and high > HIGHEST_GRADE:
        raise SettingError(
            "{loss} lambda_loss takes grades up to {highest}, whose gain is 2^grade - 1, and {where} has {high:g}: "
            "ranknet and list_mle take any",
            highest=HIGHEST_GRADE,
            where=where,
            high=high,
        )
    if loss == "list_softmax" and rows.without_positive:
        raise SettingError(
            "{place}: the group has no positive, all its scores are 0: nothing to learn", place=rows.without_positive
        )
