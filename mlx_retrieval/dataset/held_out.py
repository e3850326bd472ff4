"""Hold out questions from training rows, to judge a model by: neither they nor their answers are trained on.

held = hold_out(open_source(["pairs.jsonl"]), share=0.05, seed=0)
held.rows                                   # a `sources.Source` without them
held.questions.write(Path("run/held-out"))  # in BEIR layout

Texts count as the same if they differ in case, punctuation and white space only (text_keys.py).
"""

import copy
import itertools
import json
from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.choice import Keys, choose
from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.dataset.views import RowsWithout, StreamWithout, remaining
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
    questions: None = there are none, for this `reason`.
    """

    rows: Source
    examples: int
    left_out: int = 0
    negatives: int = 0
    questions: Questions | None = None
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
    leaving = Leaving(scan, frozenset(choice.texts.tolist()))
    if not leaving.leaves_rows:
        return HeldOut(source, len(scan), reason="all rows of one of the files share texts with them")
    asked = np.flatnonzero(np.isin(scan.keys.query, choice.queries))
    return leaving.held_out(_questions(scan, asked, leaving, seed))


def take_validation(source: Source, validation: Source, seed: int = 0) -> HeldOut | None:
    """Return the queries of validation rows, QUESTIONS at most, as questions, and the rows without any of their texts.

    None if this would leave less than half of the rows.
    """
    scan, valid = Scan(source, seed), Scan(validation, seed)
    leaving = Leaving(scan, frozenset([*valid.keys.query.tolist(), *valid.keys.positive.tolist()]))
    queries = np.unique(valid.keys.query[valid.keys.relevant])
    if not leaving.leaves_rows or 2 * leaving.count > len(scan) or not len(queries):
        return None
    chosen = np.random.default_rng(seed).permutation(queries)[:QUESTIONS]
    asked = np.flatnonzero(np.isin(valid.keys.query, chosen))
    return leaving.held_out(_questions(valid, asked, leaving, seed))


def leave_out(source: Source, texts: Set[int], seed: int = 0) -> HeldOut:
    """Return the rows without the texts that have these keys, and no questions."""
    return Leaving(Scan(source, seed), texts).held_out(None)


def texts_of(folder: Path) -> frozenset[int]:
    """Return the keys of the questions and answers in a folder of `Questions.write`. UserError if it is damaged."""
    documents, queries, qrels = beir.read_folder(folder)
    answers = {document for grades in qrels.values() for document in grades if document in documents}
    texts = [*(text for _, text in queries.values()), *(beir.document_text(*documents[name]) for name in answers)]
    return frozenset(map(text_key, texts))


def texts_in(source: Source) -> frozenset[int]:
    """Return the keys of the queries and positives of a source."""
    keys = Scan(source, 0).keys
    return frozenset([*keys.query.tolist(), *keys.positive.tolist()])


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
        for i in range(len(self)):
            example = self[i]
            self.keys.query[i] = text_key(example.query)
            self.keys.positive[i] = text_key(example.positive)
            self.keys.relevant[i] = source.format != "label" or example.scores[0] > 0.5
            self.is_plain = self.is_plain and not example.other_positives

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, i: int) -> Example:
        which = bisect_right(self.starts, i) - 1
        return self._readable[which][i - self.starts[which]]


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
            rest = remaining(example, texts, scan.source.format)
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

    def held_out(self, questions: Questions | None) -> HeldOut:
        """Return what is trained on, beside the questions."""
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


def _questions(scan: Scan, asked: np.ndarray, leaving: Leaving, seed: int) -> Questions:
    """Return the queries of some examples with their answers, among their own documents and those of other examples.

    Args:
        asked: numbers of the examples, all that have these queries.
        leaving: the positives of the rows that stay are added, up to DOCUMENTS; of the others, they may be answers.
    """
    rng = np.random.default_rng([seed, 0xD0C5])
    queries: dict[int, str] = {}
    answers: dict[int, dict[int, str]] = {}  # query -> answer -> text
    wrong: dict[int, str] = {}
    for i in asked.tolist():
        example = scan[i]
        query = int(scan.keys.query[i])
        queries.setdefault(query, example.query)
        of_query = answers.setdefault(query, {}) if scan.keys.relevant[i] else wrong
        of_query.setdefault(int(scan.keys.positive[i]), example.positive)
        wrong |= {key: text for text in example.negatives if (key := text_key(text)) not in wrong}
    documents = {key: text for of_query in answers.values() for key, text in of_query.items()}
    wrong = {key: text for key, text in wrong.items() if key not in documents}
    chosen = rng.permutation(len(wrong))[: max(0, DOCUMENTS - len(documents))]
    documents |= {key: wrong[key] for key in np.array([*wrong], np.uint64)[chosen].tolist()}
    others = leaving.scan
    more, places = np.unique(others.keys.positive, return_index=True)
    known = np.concatenate([others.keys.positive[~leaving.kept], np.array([*leaving.texts, *documents], np.uint64)])
    for place in rng.permutation(places[~np.isin(more, known)]).tolist():
        if len(documents) >= DOCUMENTS:
            break
        documents[int(others.keys.positive[place])] = others[place].positive
    # In a random order, so that equal scores favour neither right nor wrong documents.
    shuffled = rng.permutation(len(documents))
    keys = np.array([*documents], np.uint64)[shuffled].tolist()
    names = {key: f"d{number:05d}" for number, key in enumerate(keys, 1)}
    ids = {query: f"q{number:03d}" for number, query in enumerate(answers, 1)}
    return Questions(
        {name: queries[query] for query, name in ids.items()},
        {name: documents[key] for key, name in names.items()},
        {name: [names[key] for key in answers[query]] for query, name in ids.items()},
    )
