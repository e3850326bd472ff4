"""Hold out questions from training rows, to judge a model by: neither they nor their answers are trained on.

held = hold_out(open_source(["pairs.jsonl"]), share=0.05, seed=0)
held.rows                                   # a `sources.Source` without them
held.questions.write(Path("run/held-out"))  # in BEIR layout

What leaves training goes by the loose keys of text_keys.py; what is asked, and what answers it, by exact texts.
"""

import copy
import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.choice import Keys, askable, choose
from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.dataset.text_keys import exact, text_key
from mlx_retrieval.dataset.views import RowsWithout, StreamWithout, remaining
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import writable

QUESTIONS = 500  # of validation rows, at most
DOCUMENTS = 2_000  # that questions are searched among, unless they have more answers
SAMPLE = 10_000  # examples of an index that are looked at


@dataclass(frozen=True)
class Questions:
    """Queries with their answers, among documents. `answers`: query -> ids of the documents that answer it."""

    queries: dict[str, str]  # id -> text
    documents: dict[str, str]
    answers: dict[str, list[str]]

    @property
    def texts(self) -> frozenset[int]:
        """The keys of the queries and their answers, see text_keys.py."""
        answers = {self.documents[name] for names in self.answers.values() for name in names}
        return frozenset(map(text_key, (*self.queries.values(), *answers)))

    def write(self, folder: Path) -> None:
        """Write corpus.jsonl, queries.jsonl and qrels/test.tsv into a folder that exists."""
        for name, texts in (("corpus", self.documents), ("queries", self.queries)):
            rows = (json.dumps({"_id": i, "text": writable(text)}, ensure_ascii=False) for i, text in texts.items())
            (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        judged = "".join(f"{query}\t{document}\t1\n" for query, those in self.answers.items() for document in those)
        (folder / "qrels").mkdir()
        (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")


@dataclass(frozen=True)
class HeldOut:
    """What is trained on, and what is not.

    rows: to train on.
    examples, left_out: how many examples were looked at, and how many of them are not trained on.
    negatives: how many held-out texts were removed from the negatives of the others.
    questions: `Questions`, or `held_out_pairs.Pairs`; None = there are none, for this `reason`.
    """

    rows: Source
    examples: int
    left_out: int = 0
    negatives: int = 0
    questions: Any = None
    reason: str = ""


def hold_out(source: Source, share: float, seed: int = 0) -> HeldOut:
    """Return questions, and the rows without them and their answers; see `choice.choose`.

    Args:
        share: of the queries.
        seed: decides which ones, and the documents that they are searched among.
    """
    scan = Scan(source, seed)
    choice = choose(scan.keys, share, seed)
    if choice.reason:
        return HeldOut(source, len(scan), reason=choice.reason)
    asked = Asked(scan, np.isin(scan.keys.query, choice.queries))
    leaving = Leaving(scan, asked.texts)
    if not leaving.leaves_rows:
        return HeldOut(source, len(scan), reason="all rows of one of the files share texts with them")
    return leaving.held_out(asked.questions(leaving, seed))


def take_validation(source: Source, validation: Source, seed: int = 0) -> HeldOut:
    """Return the queries of validation rows, QUESTIONS at most, as questions, and the rows without any of their texts.

    No questions if this would leave less than half of the rows.
    """
    scan, valid = Scan(source, seed), Scan(validation, seed)
    if not len(queries := askable(valid.keys)):
        return HeldOut(source, len(scan), reason="no document of it answers its query, as all labels are 0.5 or less")
    leaving = Leaving(scan, valid.keys.texts)
    if not leaving.leaves_rows or 2 * leaving.count > len(scan):
        return HeldOut(source, len(scan), reason="most rows share a question or an answer with it")
    chosen = np.random.default_rng(seed).permutation(queries)[:QUESTIONS]
    return leaving.held_out(Asked(valid, np.isin(valid.keys.query, chosen)).questions(leaving, seed))


def leave_out(source: Source, texts: Set[int], seed: int = 0) -> HeldOut:
    """Return the rows without the texts that have these keys, and no questions."""
    return Leaving(Scan(source, seed), texts).held_out(None)


def read_questions(folder: Path) -> Questions:
    """Return what `Questions.write` wrote into a folder. UserError if it is damaged."""
    documents, queries, qrels = beir.read_folder(folder)
    texts = {name: beir.document_text(*documents[name]) for name in documents}
    answers = {query: [name for name in grades if name in documents] for query, grades in qrels.items()}
    return Questions({name: text for name, (_, text) in queries.items()}, texts, answers)


def take_questions(source: Source, questions: Questions, seed: int = 0) -> HeldOut:
    """Return questions that were held out before, and the rows without their texts.

    No questions if fewer than half of them are asked in the rows, or nothing would be left. No reason if none is asked.
    """
    scan = Scan(source, seed)
    keys = np.array([*map(text_key, questions.queries.values())], np.uint64)
    count = int(np.isin(keys, scan.keys.query).sum())
    if not count:
        return HeldOut(source, len(scan))
    leaving = Leaving(scan, questions.texts)
    if 2 * count < len(keys) or not leaving.leaves_rows:
        return HeldOut(source, len(scan), reason=f"{count} of its {len(keys)} held-out questions are in these data")
    return leaving.held_out(questions)


def count_asked(source: Source, questions: Questions) -> int:
    """Return how many of some questions are queries of a source."""
    keys = np.array([*map(text_key, questions.queries.values())], np.uint64)
    return int(np.isin(keys, Scan(source, 0).keys.query).sum())


def texts_in(source: Source) -> frozenset[int]:
    """Return the keys of the queries and positives of a source."""
    return Scan(source, 0).keys.texts


class Scan:
    """The examples of a source, looked at once; of an index, SAMPLE of them in a seeded order.

    An example has a number from 0 on through all `parts`, the sources that are mixed. `keys`: see `choice.Keys`.
    """

    def __init__(self, source: Source, seed: int):
        self.source = source
        self.parts: Sequence[Source] = source.sources if isinstance(source, InterleavedRows) else [source]
        self._readable = [_sample(part, seed) if isinstance(part, ElasticRows) else part for part in self.parts]
        self.starts = [0, *itertools.accumulate(map(len, self._readable))]
        self.keys = Keys(*(np.empty(len(self), kind) for kind in (np.uint64, np.uint64, bool)))
        self.is_plain = not source.has_negatives  # so that only queries and positives can be held-out texts
        with progress_bar("comparing texts", "rows", len(self)) as progress:
            for i in range(len(self)):
                example = self[i]
                self.keys.query[i] = text_key(example.query)
                self.keys.positive[i] = text_key(example.positive)
                # Scored pairs are no questions beside rows that are.
                is_pair = self.kind_of(i) == "label"
                self.keys.relevant[i] = not is_pair or (source.format == "label" and example.scores[0] > 0.5)
                self.is_plain = self.is_plain and not example.other_positives
                if i % 1_000 == 999:
                    progress(i + 1)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Example:
        which = self._part_of(i)
        return self._readable[which][i - self.starts[which]]

    def kind_of(self, i: int) -> str | None:
        """Return the format of the source that an example is from."""
        return self.parts[self._part_of(i)].format

    def _part_of(self, i: int) -> int:
        return bisect_right(self.starts, i) - 1


def _sample(rows: ElasticRows, seed: int) -> list[Example]:
    """Return the first SAMPLE examples of an order of its own, read through a connection of its own."""
    rows = ElasticRows(rows.address, rows.fields, rows.documents.query, rows.skip_bad)
    try:
        return [rows[number] for number in itertools.islice(rows.numbers(seed + 1, 0), min(SAMPLE, len(rows)))]
    finally:
        rows.close()


class Leaving:
    """What leaves training, as it has one of these texts.

    kept: (N,) bool: the examples of the scan that stay. count: of those that leave. negatives: see `HeldOut`.
    """

    def __init__(self, scan: Scan, texts: Set[int]):
        self.scan, self.texts = scan, texts
        keys = np.array([*texts], np.uint64)
        self.kept = ~(np.isin(scan.keys.query, keys) | np.isin(scan.keys.positive, keys))
        self.negatives = 0
        self._trimmed: list[int] = []
        for i in [] if scan.is_plain else np.flatnonzero(self.kept).tolist():
            example = scan[i]
            rest = remaining(example, texts, scan.kind_of(i))
            self.kept[i] = rest is not None
            if rest is not None and rest is not example:
                self._trimmed.append(i)
                self.negatives += len(example.negatives) - len(rest.negatives)
        self.count = int((~self.kept).sum())

    @property
    def _spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.scan.starts))

    @property
    def leaves_rows(self) -> bool:
        """Whether something of every source is left."""
        return all(self.kept[start:end].any() for start, end in self._spans)

    def held_out(self, questions: Any) -> HeldOut:
        """Return what is trained on, beside the questions or pairs."""
        views = [self._view(part, *span) for part, span in zip(self.scan.parts, self._spans, strict=True)]
        rows = views[0]
        if isinstance(self.scan.source, InterleavedRows):
            rows = copy.copy(self.scan.source)
            rows.sources = views
        return HeldOut(rows, len(self.scan), self.count, self.negatives, questions)

    def _view(self, part: Source, start: int, end: int) -> Source:
        if isinstance(part, ElasticRows):
            return StreamWithout(part, self.texts)
        kept = np.flatnonzero(self.kept[start:end]).astype(np.uint32)
        return RowsWithout(part, kept, self.texts, frozenset(i - start for i in self._trimmed if start <= i < end))


@dataclass
class Asked:
    """The questions of some examples of a scan, and their answers.

    Of questions that differ in nothing but what their keys leave out, one is asked. A question is not asked if an
    answer of another one has its text, or differs from one of its own answers in no more than that: it would count as
    wrong.

    Args:
        scan: where the examples are.
        chosen: (N,) bool: all examples that have these queries.
    """

    scan: Scan
    chosen: np.ndarray
    queries: dict[int, str] = field(default_factory=dict)  # key -> text
    answers: dict[int, dict[int, str]] = field(default_factory=dict)  # query -> answer -> text
    known: set[int] = field(default_factory=set)  # texts that may be right, in some spelling
    wrong: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        by_query: dict[int, dict[int, list[str]]] = {}
        spelling: dict[int, str] = {}
        for i in np.flatnonzero(self.chosen).tolist():
            example, query = self.scan[i], int(self.scan.keys.query[i])
            self.known.add(query)
            answers, others = _answers(example, self.scan.kind_of(i))
            self.wrong |= {key: text for text in others if (key := text_key(text)) not in self.wrong}
            self.known.update(map(text_key, answers))
            if answers and exact(spelling.setdefault(query, example.query)) == exact(example.query):
                for text in answers:
                    by_query.setdefault(query, {}).setdefault(text_key(text), []).append(text)
        documents: dict[int, str] = {}
        for query, answers in by_query.items():
            alike = all(exact(documents.get(key, texts[0])) in map(exact, texts) for key, texts in answers.items())
            others = documents.keys() - answers.keys()
            if alike and query not in others and self.queries.keys().isdisjoint(answers.keys() - {query}):
                self.queries[query] = spelling[query]
                self.answers[query] = {key: documents.setdefault(key, texts[0]) for key, texts in answers.items()}
        self.documents = documents
        self.wrong = {key: text for key, text in self.wrong.items() if key not in self.known}

    @property
    def texts(self) -> frozenset[int]:
        """The keys of the questions and their answers."""
        return frozenset(self.queries) | frozenset(self.documents)

    def questions(self, leaving: Leaving, seed: int) -> Questions:
        """Return the questions among their own documents and those of other examples.

        Args:
            leaving: the positives of the rows that stay are added, up to DOCUMENTS; of the others, they may be answers.
        """
        rng = np.random.default_rng([seed, 0xD0C5])
        documents = dict(self.documents)
        chosen = rng.permutation(len(self.wrong))[: max(0, DOCUMENTS - len(documents))]
        documents |= {key: self.wrong[key] for key in np.array([*self.wrong], np.uint64)[chosen].tolist()}
        keys = leaving.scan.keys
        more, places = np.unique(keys.positive, return_index=True)
        apart = np.array([*leaving.texts, *self.known, *documents], np.uint64)
        apart = np.concatenate([keys.positive[~leaving.kept], apart])
        for place in rng.permutation(places[~np.isin(more, apart)]).tolist():
            if len(documents) >= DOCUMENTS:
                break
            documents[int(keys.positive[place])] = leaving.scan[place].positive
        # In a random order, so that equal scores favour neither right nor wrong documents.
        order = np.array([*documents], np.uint64)[rng.permutation(len(documents))].tolist()
        names = {key: f"d{number:05d}" for number, key in enumerate(order, 1)}
        ids = {query: f"q{number:03d}" for number, query in enumerate(self.queries, 1)}
        return Questions(
            {name: self.queries[query] for query, name in ids.items()},
            {name: documents[key] for key, name in names.items()},
            {name: [names[key] for key in self.answers[query]] for query, name in ids.items()},
        )


def _answers(example: Example, kind: str | None) -> tuple[list[str], list[str]]:
    """Return an example's documents that answer its query, and the others. `kind`: of the source's rows."""
    if kind == "label" and example.scores[0] <= 0.5:
        return [], [example.positive]
    best = example.scores[0] if kind == "documents" else None
    scores = example.scores[1:] if kind == "documents" else [0.0] * len(example.negatives)
    pairs = list(zip(example.negatives, scores, strict=True))
    return [example.positive, *(t for t, s in pairs if s == best)], [t for t, s in pairs if s != best]
