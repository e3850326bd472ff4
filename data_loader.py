"""From checked rows to batches of token ids, in a seeded order, in the background.

batches = Batches(Rows(find_files(["pairs.jsonl"])), tokenizer, size=64)
for batch in batches.stream(0, 100): ...

Rows are reshuffled every epoch. For rows in files, batch k is computed from k alone; other sources also need their
`cursor` to continue with batch k in another process.
"""

import atexit
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Batch:
    """B examples as token ids. Every distinct text is in `texts` once: Q queries, then C documents (negatives too)."""

    texts: Texts
    queries: int  # Q
    query: np.ndarray  # (B,) int32: index of each example's query, 0..Q-1
    document: np.ndarray  # (B,) int32: index of its positive, 0..C-1
    rank: np.ndarray  # (B,) int32: of the positive, 1 = best
    rows: np.ndarray  # (B,) int64: the examples' source rows, for messages
    scored: np.ndarray  # (B, K) int32: documents with scores, the positive first; -1 = no more
    scores: np.ndarray  # (B, K) float32: a teacher's, or that of a scored pair
    known: np.ndarray  # (P, 2) int32: query and document of every known positive, the examples' own first
    mined: np.ndarray  # (H, 2) int32: query and document of every negative in a row; [[-1, -1]] = there are none
    keys: np.ndarray  # (N,) int64: the `text_keys.vector_key` of each text
    # Which source all rows are from, where sources have settings of their own; -1 = several, or there are none.
    source: int = -1

    @property
    def relevant(self) -> np.ndarray:
        """(Q, C) bool: whether an example has this document as a positive of this query, or its row has."""
        return self._relation(self.known)

    @property
    def hard_negatives(self) -> np.ndarray:
        """(Q, C) bool: whether a row of this query has this document as a negative."""
        return self._relation(self.mined)

    def _relation(self, cells: np.ndarray) -> np.ndarray:
        relation = np.zeros((self.queries, len(self.texts) - self.queries), dtype=bool)
        relation[tuple(cells[cells[:, 0] >= 0].T)] = True
        return relation

    @property
    def tokens(self) -> int:
        """The batch's real tokens, without padding."""
        return int(self.texts.lengths.sum())

    def rows_with(self, text: int) -> np.ndarray:
        """Return the source rows whose query or positive is the text of this index; all rows for a negative."""
        matches = self.query == text if text < self.queries else self.document == text - self.queries
        return self.rows[matches] if matches.any() else self.rows


def _numbered(texts: Iterable[tuple[TextTokenizer, str]]) -> dict[TextTokenizer, dict[str, int]]:
    """Return the number of each distinct text under each tokenizer; those of one tokenizer follow each other."""
    distinct: dict[TextTokenizer, dict[str, int]] = {}
    for tokenizer, text in texts:
        distinct.setdefault(tokenizer, {}).setdefault(text, 0)
    count = itertools.count()
    return {tokenizer: {text: next(count) for text in own} for tokenizer, own in distinct.items()}


def _all_forms(documents: dict[TextTokenizer, dict[str, int]], texts: Iterable[str]) -> list[int]:
    """Return the numbers of texts under every tokenizer."""
    return [numbers[text] for text in texts for numbers in documents.values() if text in numbers]


def make_batch(
    examples: Sequence[Example],
    rows: Sequence[int],
    tokenizer: TextTokenizer,
    tokenizers: Sequence[TextTokenizer] | None = None,
) -> Batch:
    """Tokenise examples into a batch, every distinct text once.

    `tokenizers`: of each example, where they differ; a text under two prompts is two texts, which mean the same.
    """
    own = tokenizers or [tokenizer] * len(examples)
    pairs = list(zip(own, examples, strict=True))
    queries = _numbered((t, e.query) for t, e in pairs)
    documents = _numbered([*((t, e.positive) for t, e in pairs), *((t, n) for t, e in pairs for n in e.negatives)])
    query = [queries[t][e.query] for t, e in pairs]
    document = [documents[t][e.positive] for t, e in pairs]
    known, mined = list(zip(query, document, strict=True)), []
    for (t, example), number in zip(pairs, query, strict=True):
        if len(queries) == 1:
            known += [(number, documents[t][text]) for text in example.other_positives if text in documents[t]]
            mined += [(number, documents[t][text]) for text in example.negatives]
        else:
            asked = [numbers[example.query] for numbers in queries.values() if example.query in numbers]
            known += itertools.product(asked, _all_forms(documents, (example.positive, *example.other_positives)))
            mined += itertools.product(asked, _all_forms(documents, example.negatives))
    sides = ("query", queries), ("document", documents)
    texts = Texts.join([t(list(numbers), name) for name, side in sides for t, numbers in side.items()])
    keys = [vector_key(text, name) for name, side in sides for numbers in side.values() for text in numbers]
    rank = np.array([e.rank for e in examples], np.int32)
    width = max(1, *(len(e.scores) for e in examples))  # mlx-data carries no empty arrays
    scored = np.full((len(examples), width), -1, np.int32)
    scores = np.zeros((len(examples), width), np.float32)
    for i, e in enumerate(examples):
        scored[i, : len(e.scores)] = [documents[own[i]][text] for text in (e.positive, *e.negatives)][: len(e.scores)]
        scores[i, : len(e.scores)] = e.scores
    return Batch(
        texts,
        sum(map(len, queries.values())),
        query=np.array(query, np.int32),
        document=np.array(document, np.int32),
        rank=rank,
        rows=np.array(rows, np.int64),
        scored=scored,
        scores=scores,
        known=np.array(known, np.int32),
        mined=np.array(mined or [(-1, -1)], np.int32),
        keys=np.array(keys, np.int64),
    )


class Batches:
    """An endless, seeded sequence of batches: batch k holds the k-th `size` examples of epoch after epoch.

    A batch may cross from one epoch into the next, so no example is ever dropped.

    Args:
        rows: a source, see dataset/sources.py; it defines the order.
        size: examples of a batch, at most all.
        make: makes a batch of examples, their row numbers and the tokenizer.
        kind: the type of that batch, a dataclass of arrays.
        tokenizers: of each source of a mixture, if these differ; [] = they do not.
    """

    def __init__(
        self,
        rows: Source,
        tokenizer: TextTokenizer,
        size: int,
        seed: int = 0,
        make: Callable = make_batch,
        kind: type = Batch,
        tokenizers: Sequence[TextTokenizer] = (),
    ):
        self.size = min(size, len(rows))
        self.rows = rows
        self.tokenizer = tokenizer
        self.seed = seed
        self.make = make
        self.kind = kind
        self.tokenizers = tokenizers

    def sample_numbers(self, count: int) -> list[int]:
        """Return the numbers of the first batches, and of the first one of each source that has its own tokenizer."""
        is_mixture = self.tokenizers and isinstance(self.rows, InterleavedRows) and self.rows.block == self.size
        return sorted({*range(count), *(self.rows.first_turns() if is_mixture else [])})

    def row_numbers(self, k: int) -> list[int]:
        """Return the row numbers of batch k, counted from 0."""
        return list(itertools.islice(self.rows.numbers(self.seed, k * self.size), self.size))

    def batch(self, k: int) -> Batch:
        """Return batch k, counted from 0."""
        return next(self._batches(k, k + 1))

    def _batches(self, first: int, last: int) -> Iterator[Batch]:
        numbers = self.rows.numbers(self.seed, first * self.size)
        for _ in range(first, last):
            drawn = [(i, self.rows[i]) for i in itertools.islice(numbers, self.size)]
            if len(drawn) < self.size:  # the source was closed
                return
            yield self._made([example for _, example in drawn], [i for i, _ in drawn])

    def _made(self, examples: list[Example], numbers: list[int]) -> Any:
        if not self.tokenizers:
            return self.make(examples, numbers, self.tokenizer)
        which = [self.rows.source_of(i) for i in numbers]
        own = [self.tokenizers[source] for source in which]
        if any(tokenizer is not own[0] for tokenizer in own):
            return self.make(examples, numbers, self.tokenizer, own)
        batch = self.make(examples, numbers, own[0])
        return replace(batch, source=which[0]) if len({*which}) == 1 else batch

    def cursor(self, k: int) -> dict:
        """Return the data that `restore` needs, besides k, to continue with batch k in another process."""
        return self.rows.cursor(k * self.size)

    def restore(self, cursor: dict, k: int) -> None:
        """Continue with batch k as the process that returned the cursor would have; {} = it had not yet begun."""
        if cursor:
            self.rows.restore(cursor, k * self.size)

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """Yield batches `first` to `last` - 1, read and tokenised in the background, two ahead."""
        read_ahead = _read_ahead_with_mlx_data if _has_mlx_data() else _read_ahead_in_thread
        return read_ahead(lambda: self._batches(first, last), self.kind, self.rows.close)


def _has_mlx_data() -> bool:
    try:
        import mlx.data  # noqa: F401
    except ModuleNotFoundError:  # it has no wheel for Python 3.14
        return False
    return True


def _read_ahead_with_mlx_data(make: Callable[[], Iterator[Any]], kind: type, close: Callable[[], None]) -> Iterator:
    """Yield the batches, of that kind, of `make()`, which mlx-data draws two ahead. At the end call `close`."""
    import mlx.data as dx

    stream = dx.stream_python_iterable(lambda: map(pack, make())).prefetch(2, 1)

    def stop() -> None:
        close()  # first, as `reset` waits for the reader
        stream.reset()

    # The interpreter aborts or hangs at exit if a stream still prefetches, or has met an error.
    atexit.register(stop)
    try:
        for sample in stream:
            yield unpack(sample, kind)
    finally:
        atexit.unregister(stop)
        stop()


def _read_ahead_in_thread(make: Callable[[], Iterator[Any]], kind: type, close: Callable[[], None]) -> Iterator:
    """Do the same in a thread of the standard library, and with the very batches of `make()`, whatever their kind."""
    batches, end = make(), object()
    with ThreadPoolExecutor(1, "batches") as thread:
        try:
            ahead = deque(thread.submit(next, batches, end) for _ in range(2))
            while (batch := ahead.popleft().result()) is not end:
                ahead.append(thread.submit(next, batches, end))
                yield batch
        finally:
            close()  # first, as the thread may wait for the reader
            thread.shutdown(cancel_futures=True)


def pack(batch: Any) -> dict[str, np.ndarray]:
    """Return a batch, of any kind, as the arrays that mlx-data carries."""
    arrays = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Texts):
            arrays |= {f"{f.name}.{name}": v for name, v in vars(value).items() if v is not None}
        else:
            arrays[f.name] = value if isinstance(value, np.ndarray) else np.int64(value)
    return arrays


def unpack(sample: dict, kind: type) -> Any:
    """Return the batch, of that kind, that `pack` took apart."""
    texts = {name.removeprefix("texts."): np.array(v) for name, v in sample.items() if name.startswith("texts.")}
    rest = {name: v if (v := np.array(value)).ndim else int(v) for name, value in sample.items() if "." not in name}
    return kind(texts=Texts(**texts), **rest)
