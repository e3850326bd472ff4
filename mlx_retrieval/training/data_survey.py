"""What training rows are like: lengths in tokens, the share that is truncated, repeated rows, false-negative suspects.

survey = survey_rows(rows, tokenizer, batch_size=64)
survey.documents.truncated                     # the share of documents that are longer than the model reads

A seeded sample is looked at, so that the time is bounded however many rows there are.
"""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.text import excerpt

ROWS, CHARACTERS = 10_000, 2_000_000  # a sample ends at whichever comes first
TOKENISED = 50_000  # characters of a text; the length of a longer one is extrapolated
BINS = 24
EXAMPLES = 5  # suspects of a kind that are shown
EXCERPT = 160  # characters of a suspect


@dataclass(frozen=True)
class Lengths:
    """Lengths of texts in tokens, as the model takes them: with prompt and special tokens, before truncation.

    `edges` are BINS + 1 numbers of tokens, `counts` the texts between two of them; the last bin also holds all longer
    ones. `limit` is where texts are truncated; 0 = not by themselves. `truncated` is a share.
    """

    count: int
    median: int
    longest: int
    limit: int
    truncated: float
    edges: list[int]
    counts: list[int]

    def bars(self) -> list[tuple[float, int, bool]]:
        """Return of each bin its height as a share of the highest, its count, and whether its texts are truncated."""
        most = max(self.counts)
        over = [bool(self.limit) and edge >= self.limit for edge in self.edges]
        return [(count / most, count, cut) for count, cut in zip(self.counts, over, strict=False)]


class Suspect(NamedTuple):
    """A document that the loss takes for a wrong answer to a query, and that may be a right one."""

    kind: str
    query: str  # the beginning of its text
    document: str
    places: tuple[str, str]  # of the query's row and of the document's


@dataclass(frozen=True)
class Survey:
    """What a sample of rows is like.

    Two texts are the same if they have the same words in the same order: case, punctuation and white space do not
    count. What a batch holds is a mean over random batches of the run's size, estimated from the sample; None: the rows
    of a batch are not each other's negatives.

    rows, sampled: how many rows there are, one for each positive, and how many were looked at.
    repeated: rows of the sample that repeat an earlier one, query and document.
    shared_documents: pairs of rows in a batch with the same document and different queries.
    shared_queries: pairs of rows in a batch with the same query and different documents.
    answers_elsewhere: documents in a batch that count as wrong for a query although a row outside says they are right.
    respelt: documents in a batch that count as wrong only because query or document is spelt differently.
    negatives, own_answers: hard negatives in the sample, and those that are the same as an answer to their query.
    pairs_truncated: rerank: the share of pairs of query and document that are truncated.
    """

    rows: int
    sampled: int
    queries: Lengths
    documents: Lengths
    repeated: int
    shared_documents: float | None
    shared_queries: float | None
    answers_elsewhere: float | None
    respelt: float | None
    negatives: int
    own_answers: int
    pairs_truncated: float | None
    suspects: list[Suspect]


class Row(NamedTuple):
    """A row of the sample, with its texts and their words."""

    number: int
    query: str
    positive: str
    negatives: tuple[str, ...]
    query_words: str
    positive_words: str
    other_words: frozenset[str]  # of the row's other positives, which the loss knows


def survey_rows(rows: Source, tokenizer: TextTokenizer | PairTokenizer, batch_size: int, seed: int = 0) -> Survey:
    """Return what a seeded sample of the rows is like.

    Args:
        batch_size: examples of a batch; 0 = the rows of a batch are not each other's negatives.
    """
    sample = _sample(rows, seed)
    own_answers = list(_own_answers(sample))
    suspects = [("its own row names it as a negative and as an answer", *each) for each in own_answers]
    per_batch = dict.fromkeys(("shared_documents", "shared_queries", "answers_elsewhere", "respelt"))
    if batch_size:
        per_batch = _per_batch(sample, batch_size, len(sample) / len(rows))
        suspects += itertools.islice(_elsewhere(sample), EXAMPLES)
        suspects += itertools.islice(_respelt(sample), EXAMPLES)
    texts, limits, pairs_truncated = tokenizer, {"query": 0, "document": 0}, None
    if isinstance(tokenizer, PairTokenizer):
        texts = tokenizer.texts
        pairs = [(row.query[:TOKENISED], [row.positive[:TOKENISED]]) for row in sample]
        pairs_truncated = tokenizer(pairs).cut / len(sample)
    else:
        limits = tokenizer.max_lengths
    documents = [text for row in sample for text in (row.positive, *row.negatives)]
    return Survey(
        rows=len(rows),
        sampled=len(sample),
        queries=_lengths(texts, [row.query for row in sample], "query", limits["query"]),
        documents=_lengths(texts, documents, "document", limits["document"]),
        repeated=len(sample) - len({(row.query_words, row.positive_words) for row in sample}),
        negatives=sum(len(row.negatives) for row in sample),
        own_answers=len(own_answers),
        pairs_truncated=pairs_truncated,
        suspects=[
            Suspect(kind, excerpt(one.query, EXCERPT), excerpt(text, EXCERPT), (rows.where(one.number), rows.where(n)))
            for kind, one, text, n in _first_of_each(suspects)
        ],
        **per_batch,
    )


def words_of(text: str) -> str:
    """Return the words of a text in lower case, joined by spaces; the text itself if it has no words."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _sample(rows: Source, seed: int) -> list[Row]:
    """Return distinct rows in a random order: as many as ROWS and CHARACTERS allow, one at least."""
    sample, characters = [], 0
    drawn = itertools.islice(rows.numbers(seed + 1_000_003, 0), min(ROWS, len(rows)))
    for number in dict.fromkeys(drawn):  # mixed sources repeat the rows of the smaller ones
        example = rows[number]
        texts = example.query, example.positive, example.negatives
        words = words_of(example.query), words_of(example.positive), frozenset(map(words_of, example.other_positives))
        sample.append(Row(number, *texts, *words))
        characters += sum(map(len, (example.query, example.positive, *example.negatives)))
        if characters >= CHARACTERS:
            break
    return sample


def _lengths(tokenizer: TextTokenizer, texts: Sequence[str], name: str, limit: int) -> Lengths:
    """Return the lengths of texts under the prompt called `name`."""
    frame = len(tokenizer.opening) + len(tokenizer.closing)
    bodies = tokenizer.bodies([text[:TOKENISED] for text in texts], tokenizer.prompts.get(name, ""))
    scales = [max(1.0, len(text) / TOKENISED) for text in texts]
    lengths = np.array([frame + int(len(ids) * scale) for ids, scale in zip(bodies, scales, strict=True)])
    # Up to the 99th percentile, so that a single long text does not squeeze all others into one bin; beyond the limit
    # if texts are.
    shown = int(np.percentile(lengths, 99)) + 1
    if limit and lengths.max() > limit:
        shown = max(shown, min(int(lengths.max()) + 1, limit + limit // 4))
    width = -(-max(shown, BINS) // BINS)
    counts = np.bincount(np.minimum(lengths // width, BINS - 1), minlength=BINS)
    truncated = float((lengths > limit).mean()) if limit else 0.0
    edges = [width * i for i in range(BINS + 1)]
    return Lengths(len(texts), int(np.median(lengths)), int(lengths.max()), limit, truncated, edges, counts.tolist())


# --- negatives that may be answers ------------------------------------------------------------------------------------

Found = tuple[str, Row, str, int]  # kind, the query's row, the document, the number of the document's row


def _pairs(keys: Iterable[Hashable]) -> int:
    """Return how many pairs of equal keys there are."""
    return sum(math.comb(count, 2) for count in Counter(keys).values())


def _per_batch(sample: Sequence[Row], batch_size: int, share: float) -> dict[str, float]:
    """Return the figures of a batch, see `Survey`. `share`: of the sample in all rows."""
    in_batch = math.comb(batch_size, 2) / max(1, math.comb(len(sample), 2))
    query, positive = ([row.query_words for row in sample], [row.positive_words for row in sample])
    spelt = [row.positive for row in sample]
    same = _pairs(zip(query, positive, strict=True))
    # The same query in two spellings with two documents; and two spellings of a document with different queries. Where
    # one of both is spelt alike, the loss knows that they belong together.
    mixed = _pairs(zip(query, spelt, strict=True))
    queries = _pairs(query) - _pairs(r.query for r in sample) - mixed + _pairs((r.query, r.positive) for r in sample)
    documents = _pairs(positive) - _pairs(spelt) - same + mixed
    of_query, of_document = Counter(query), Counter(positive)
    aware = Counter((row.query_words, other) for row in sample for other in row.other_words)
    elsewhere = sum(
        (of_query[one] - count - aware[one, other]) * (of_document[other] - count)
        for (one, other), count in Counter(zip(query, positive, strict=True)).items()
    )
    return {
        "shared_documents": (_pairs(positive) - same) * in_batch,
        "shared_queries": (_pairs(query) - same) * in_batch,
        "answers_elsewhere": elsewhere * in_batch / share,  # the third row has to be in the sample, too
        "respelt": 2 * (queries + documents) * in_batch,
    }


def _own_answers(sample: Sequence[Row]) -> Iterator[tuple[Row, str, int]]:
    """Yield (row, negative, number of the answer's row) for hard negatives that are the same as an answer."""
    answers: dict[str, dict[str, int]] = defaultdict(dict)  # query -> answer -> row
    for row in sample:
        answers[row.query_words].setdefault(row.positive_words, row.number)
    for row in sample:
        for negative in row.negatives:
            if (number := answers[row.query_words].get(words_of(negative))) is not None:
                yield row, negative, number


def _elsewhere(sample: Sequence[Row]) -> Iterator[Found]:
    """Yield documents that are an answer to a query by a third row."""
    of_query, of_document = defaultdict(list), defaultdict(list)
    for row in sample:
        of_query[row.query_words].append(row)
        of_document[row.positive_words].append(row)
    for third in sample:
        answer = third.positive_words
        unaware = (r for r in of_query[third.query_words] if answer not in (r.positive_words, *r.other_words))
        query = next(unaware, None)
        other = next((r for r in of_document[answer] if r.query_words != third.query_words), None)
        if query and other:
            yield "a third row names it as an answer", query, other.positive, other.number


def _respelt(sample: Sequence[Row]) -> Iterator[Found]:
    """Yield documents that count as wrong because the query or they themselves are spelt in two ways."""
    for side, words in (("question", "query_words"), ("answer", "positive_words")):
        first: dict[str, Row] = {}
        for row in sample:
            one = first.setdefault(getattr(row, words), row)
            if one.positive == row.positive or one.query == row.query:
                continue
            if side == "question" or one.query_words != row.query_words:
                yield f"the same {side}, spelt differently", one, row.positive, row.number


def _first_of_each(suspects: Iterable[Found]) -> list[Found]:
    """Return the first EXAMPLES of each kind."""
    seen: Counter[str] = Counter()
    kept = []
    for suspect in suspects:
        seen[suspect[0]] += 1
        if seen[suspect[0]] <= EXAMPLES:
            kept.append(suspect)
    return kept
