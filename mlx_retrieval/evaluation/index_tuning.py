"""Learn how a search weighs words and meaning, and the fields of the words, from queries whose answers are known.

    tuner = Tuner(index, queries, search(index, model, queries))
    tuned = tuner.tune()
    print(tuned.settings, tuned.evaluations["tuned"].tasks)

The figures come from cross-validation: each part of the queries is searched with the settings that are best on the
others. The settings that an index keeps are the best on all of them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mlx_retrieval.evaluation.index_search import Query, Searched, figures_of, held
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.retrieval import fields
from mlx_retrieval.retrieval.analyzer import analyzer
from mlx_retrieval.retrieval.base import Hit, Within
from mlx_retrieval.retrieval.bm25f import FieldedBm25, Scorer
from mlx_retrieval.retrieval.fusion import POOL, WEIGHTS, Candidate, complete, fuse_scores, minmax, weight_of
from mlx_retrieval.retrieval.rewriting import rewrite
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

SHARES = tuple(number / 20 for number in range(21))  # of the meaning
FIELD_WEIGHTS = (0, 1, 2, 4)  # of each field but the text, whose weight is 1
FOLDS, FEWEST_QUERIES = 5, 10


class Settings(NamedTuple):
    """The share of the meaning, and the weights of the fields in the order of fields.FIELDS; () = as they are."""

    weight: float | None  # None = the default, whatever that is in later versions
    fields: tuple[int, ...] = ()


class Scaled(NamedTuple):
    """The candidates of a query, sorted by place, with both scores scaled from 0 to 1, as `fuse_scores` has them."""

    words: np.ndarray  # (n,)
    meaning: np.ndarray  # (n,)
    matches: np.ndarray  # (n,) bool: shares a word with the query
    answers: list[list[int] | None]  # (n,): numbers of the answers that the chunk holds; None = it does not count
    gains: list[int]  # of each answer

    @classmethod
    def of(cls, candidates: Sequence[Candidate], query: Query) -> "Scaled":
        """Scale candidates and find the answers among them."""
        ordered = sorted(candidates, key=lambda each: (each.hit.path, each.hit.line, each.hit.id))
        words, meaning = (np.array([getattr(each, name) for each in ordered]) for name in ("words", "meaning"))
        spans = np.array([each.spans for each in ordered], bool)
        scaled = [minmax(each, spans) if len(ordered) else each for each in (words, meaning)]
        answers = [None if each.hit.path == query.ignored else held(each.hit, query) for each in ordered]
        return cls(*scaled, words > 0, answers, list(query.targets.values()))

    def ndcg(self, weight: float) -> float:
        """Return nDCG@10 if the share of the meaning is `weight`, as `index_search.rank` counts answers."""
        scores = weight * self.meaning + (1 - weight) * self.words
        seen, gained = set(), []
        for i in np.argsort(-scores, kind="stable")[:POOL].tolist():
            answers = self.answers[i]
            if answers is None or not (weight or self.matches[i]):
                continue
            new = [answer for answer in answers if answer not in seen]
            gained += [self.gains[answer] for answer in new] if answers else [0]
            seen.update(new)
            if len(gained) >= 10:
                break
        return _dcg(gained[:10]) / _dcg(sorted(self.gains, reverse=True)[:10])


@dataclass(frozen=True)
class Tuned:
    """The best settings for all queries, and figures: mode -> evaluation; "tuned" is cross-validated."""

    before: Settings
    settings: Settings
    evaluations: dict[str, Evaluation]

    @property
    def helps(self) -> bool:
        """Whether tuning is better than the settings before, by the mean nDCG@10 of queries it did not learn from."""
        before, after = (self.evaluations[name].tasks["queries"]["ndcg_at_10"] for name in ("hybrid", "tuned"))
        return self.settings != self.before and after > before


class Tuner:
    """Searches an index with other settings.

    Args:
        index: a LanceDB or Elasticsearch index; of the second, a server is asked for every choice of fields.
        queries: at least FEWEST_QUERIES, resolved.
        results: their hits, from `index_search.search`.

    Raises UserError if there are too few queries.
    """

    def __init__(self, index: Any, queries: Sequence[Query], results: Sequence[Searched]):
        if len(queries) < FEWEST_QUERIES:
            raise UserError(f"{len(queries)} queries are too few to learn from: at least {FEWEST_QUERIES}")
        self.index, self.queries, self.results = index, queries, results
        self.before = Settings(weight_of(index.info))
        # Of the last choice of fields alone: of all of them they would be some 2 MB a query.
        self._candidates: tuple[tuple[int, ...] | None, list[list[Candidate]]] = (None, [])
        self._meaning: list[dict[str, float]] = [{hit.id: hit.score for hit in each.meaning} for each in results]
        self.bm25, self.tuned_fields = None, []
        if hasattr(index, "chunk_texts"):
            self._read_texts()
        elif besides := getattr(index, "word_fields", ()):
            self._tune_fields([number for number, name in enumerate(fields.FIELDS) if name in besides])

    def _read_texts(self) -> None:
        """Count the words in the fields of all chunks."""
        info = self.index.info
        rows = sorted(self.index.chunk_texts(), key=lambda row: (row["path"], row["line"], row["id"]))
        chunks = (
            fields.fields_of(
                "" if info.is_corpus else row["path"], row["name"], row["language"], row.pop("context"), row.pop("text")
            )
            for row in rows
        )
        self.bm25 = FieldedBm25(chunks, [query.text for query in self.queries], analyzer(info.language))
        self.hits = [Hit(text="", score=0.0, **row) for row in rows]
        self._numbers = {hit.id: number for number, hit in enumerate(self.hits)}
        empty = self.bm25.empty_fields
        self._tune_fields([n for n, name in enumerate(fields.FIELDS) if name != "text" and name not in empty])

    def _tune_fields(self, numbers: list[int]) -> None:
        self.tuned_fields = numbers
        self.before = self.before._replace(fields=tuple(self.index.info.fields[name] for name in fields.FIELDS))

    def tune(self, seed: int = 0) -> Tuned:
        """Return the best settings, and the figures of words, meaning and both, before and after."""
        number, choices = len(self.queries), self._choices()
        scores = self._scores(choices).round(9)

        def best(chosen: np.ndarray) -> Settings:
            """Return the choice with the highest mean score on these queries; of equal ones, the first."""
            return choices[int(scores[:, chosen].mean(axis=1).round(9).argmax())]

        folds = np.random.default_rng(seed).permutation(number) % FOLDS
        rankings: list[list[Hit]] = [[] for _ in range(number)]
        for fold in range(FOLDS):
            settings = best(np.flatnonzero(folds != fold))
            for query in np.flatnonzero(folds == fold):
                rankings[query] = self._ranked(settings, query)
        settings = best(np.arange(number))
        hits = {
            "bm25": [each.words for each in self.results],
            "semantic": [each.meaning for each in self.results],
            "hybrid": [self._ranked(self.before, query) for query in range(number)],
            "tuned": rankings,
        }
        return Tuned(self.before, settings, {name: figures_of(name, self.queries, rows) for name, rows in hits.items()})

    def _choices(self) -> list[Settings]:
        """Return all settings that are tried; the first are those as they are."""
        texts = [FIELD_WEIGHTS if n in self.tuned_fields else (w,) for n, w in enumerate(self.before.fields)]
        return [self.before, *(Settings(share, choice) for choice in itertools.product(*texts) for share in SHARES)]

    def _scores(self, choices: Sequence[Settings]) -> np.ndarray:
        """Return nDCG@10 for every choice and query, (choices, Q); the same as `figures_of` gives."""
        rows: list[list[float]] = []
        with progress_bar("tuning", "settings", len(choices)) as progress:
            for weights, alike in itertools.groupby(choices, key=lambda choice: choice.fields):
                candidates = zip(self._candidates_of(weights), self.queries, strict=True)
                scaled = [Scaled.of(each, query) for each, query in candidates]
                for choice in alike:
                    rows.append([each.ndcg(choice.weight) for each in scaled])
                    progress(len(rows))
        return np.array(rows)

    def _ranked(self, settings: Settings, query: int) -> list[Hit]:
        """Return the first hits of a query."""
        return fuse_scores(self._candidates_of(settings.fields)[query], settings.weight)[:POOL]

    def _candidates_of(self, weights: tuple[int, ...]) -> list[list[Candidate]]:
        """Return the candidates of every query, for these weights of the fields."""
        if weights != self._candidates[0]:
            named, numbers = dict(zip(fields.FIELDS, weights, strict=False)), range(len(self.queries))
            if self.bm25:
                scorer = self.bm25.scorer(named)
                candidates = [self._complete(number, scorer) for number in numbers]
            else:
                index = self.index.weighted(named) if weights not in ((), self.before.fields) else self.index
                candidates = [self._searched(number, index) for number in numbers]
            self._candidates = weights, candidates
        return self._candidates[1]

    def _searched(self, number: int, index: Any) -> list[Candidate]:
        """Return the candidates of a query, which an index with other weights scores."""
        query, (vector, words, meaning) = self.queries[number], self.results[number]
        if index is not self.index:
            words = index.bm25(query.text, POOL)
        return complete(index, query.text, vector, words, meaning)

    def _complete(self, number: int, scorer: Scorer) -> list[Candidate]:
        """Return the candidates of a query, scored by words here and by meaning in the index."""
        query, searched, meaning = self.queries[number], self.results[number], self._meaning[number]
        scores = scorer.scores(query.text)
        first = np.argsort(-scores, kind="stable")[:POOL]
        hits = {self.hits[i].id: (self.hits[i], scores[i]) for i in first[scores[first] > 0]}
        hits |= {hit.id: (hit, scores[self._numbers[hit.id]]) for hit in searched.meaning}
        if missing := [name for name in hits if name not in meaning]:
            names = tuple(hits if self.index.info.impute else missing)  # as in `complete`
            found = {hit.id: hit.score for hit in self.index.semantic(searched.vector, len(names), Within(ids=names))}
            if self.index.info.impute:
                meaning = found
            else:
                meaning |= found
        return [Candidate(hit, float(score), meaning[name]) for name, (hit, score) in hits.items()]


def keep(index: Any, settings: Settings) -> None:
    """Keep settings in an index. LanceDB needs its words again for other weights. The caller holds the lock of it."""
    weights = dict(zip(fields.FIELDS, settings.fields, strict=False))
    if not weights or weights == index.info.fields:
        index.keep_weight(settings.weight)
    elif hasattr(index, "chunk_texts"):
        rewrite(index, fields=weights, weight=settings.weight)
    else:
        index.keep_weight(settings.weight, weights)


def forget(index: Any) -> tuple[Settings, Settings]:
    """Give an index the default settings again. Return those before and after. The caller holds the lock of it."""
    weights = fields.WEIGHTS if hasattr(index, "chunk_texts") or getattr(index, "word_fields", ()) else {}
    before = Settings(weight_of(index.info), tuple(index.info.fields[name] for name in weights))
    after = Settings(None, tuple(weights.values()))
    keep(index, after)
    return before, after


def described(settings: Settings) -> str:
    """Return settings in words: `weight 0.85; path 1, name 4, doc 2, text 1`."""
    weights = dict(zip(fields.FIELDS, settings.fields, strict=False))
    weight = WEIGHTS["scores"] if settings.weight is None else settings.weight
    return f"weight {weight:g}" + (f"; {fields.shown(weights)}" if weights else "")


def _dcg(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains))
