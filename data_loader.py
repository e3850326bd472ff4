"""From checked rows to batches of token ids, in a seeded order, in the background.

batches = Batches(Rows(find_files(["pairs.jsonl"])), tokenizer, size=64)
for batch in batches.stream(0, 100): ...

The order is another one every epoch. Of rows in files, batch k is computed from k alone; `cursor` says what else a
source needs to continue with batch k in another process.
"""

import atexit
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError


@dataclass(frozen=True)
class Batch:
    """B examples as token ids. A text that occurs more than once is there once.

    `texts` holds Q distinct queries, then C distinct documents (positives and negatives).
    """

    texts: Texts
    queries: int  # Q
    query: np.ndarray  # (B,) int32: index of each example's query, 0..Q-1
    document: np.ndarray  # (B,) int32: index of its positive, 0..C-1
    rank: np.ndarray  # (B,) int32
    rows: np.ndarray  # (B,) int64: where it came from, for messages
    judged: np.ndarray  # (B, K) int32: documents that a teacher scored, the positive first; -1 = no more
    scores: np.ndarray  # (B, K) float32: its scores

    @property
    def relevant(self) -> np.ndarray:
        """(Q, C) bool: documents that some example of the batch gives as positive to a query."""
        relation = np.zeros((self.queries, len(self.texts) - self.queries), dtype=bool)
        relation[self.query, self.document] = True
        return relation

    @property
    def tokens(self) -> int:
        """Real tokens of the batch, no padding."""
        return int(self.texts.lengths.sum())

    def rows_with(self, text: int) -> np.ndarray:
        """The source rows in which the text of that index is the query or the positive; all rows for a negative."""
        used = self.query == text if text < self.queries else self.document == text - self.queries
        return self.rows[used] if used.any() else self.rows


def make_batch(examples: Sequence[Example], rows: Sequence[int], tokenizer: TextTokenizer) -> Batch:
    """Tokenise examples into a batch, every distinct text once."""
    queries: dict[str, int] = {}
    documents: dict[str, int] = {}
    query = [queries.setdefault(e.query, len(queries)) for e in examples]
    document = [documents.setdefault(e.positive, len(documents)) for e in examples]
    for example in examples:
        for negative in example.negatives:
            documents.setdefault(negative, len(documents))
    texts = Texts.join([tokenizer(list(queries), "query"), tokenizer(list(documents), "document")])
    rank = np.array([e.rank for e in examples], np.int32)
    width = max(1, *(len(e.scores) for e in examples))  # mlx-data carries no empty arrays
    judged, scores = np.full((len(examples), width), -1, np.int32), np.zeros((len(examples), width), np.float32)
    for i, e in enumerate(examples):
        judged[i, : len(e.scores)] = [documents[text] for text in (e.positive, *e.negatives)][: len(e.scores)]
        scores[i, : len(e.scores)] = e.scores
    numbers = (np.array(query, np.int32), np.array(document, np.int32), rank, np.array(rows, np.int64))
    return Batch(texts, len(queries), *numbers, judged, scores)


class Batches:
    """An endless, seeded sequence of batches: batch k holds the k-th `size` rows of epoch after epoch.

    `rows` is a source, see sources.py, and gives the order. A batch may cross from one epoch into the next, so no row
    is ever dropped. `make` makes a batch, of type `kind`, of examples, their rows' numbers and the
    tokenizer.
    """

    def __init__(
        self,
        rows: Source,
        tokenizer: TextTokenizer,
        size: int,
        seed: int = 0,
        make: Callable = make_batch,
        kind: type = Batch,
    ):
        if size > len(rows):
            raise UserError(f"--batch-size {size} is larger than the data: {len(rows)} rows")
        if make is make_batch and rows.format == "label":
            raise UserError(f"{rows.names[0]}: rows with a label are for --task rerank")
        if make is make_batch and size == 1 and not rows.has_negatives:
            raise UserError("--batch-size 1: rows without negatives leave each query one candidate; nothing to learn")
        self.rows, self.tokenizer, self.size, self.seed = rows, tokenizer, size, seed
        self.make, self.kind = make, kind

    def row_numbers(self, k: int) -> list[int]:
        """The rows of batch k, counted from 0."""
        return list(itertools.islice(self.rows.numbers(self.seed, k * self.size), self.size))

    def batch(self, k: int) -> Batch:
        """Batch k, counted from 0."""
        return next(self._made(k, k + 1))

    def _made(self, first: int, last: int) -> Iterator[Batch]:
        numbers = self.rows.numbers(self.seed, first * self.size)
        for _ in range(first, last):
            drawn = [(i, self.rows[i]) for i in itertools.islice(numbers, self.size)]
            if len(drawn) < self.size:  # the source was closed
                return
            yield self.make([example for _, example in drawn], [i for i, _ in drawn], self.tokenizer)

    def cursor(self, k: int) -> dict:
        """What `restore` needs, besides k, to go on with batch k in another process."""
        return self.rows.cursor(k * self.size)

    def restore(self, cursor: dict, k: int) -> None:
        """Go on with batch k as the process would have that gave the cursor."""
        self.rows.restore(cursor, k * self.size)

    def stream(self, first: int, last: int) -> Iterator[Batch]:
        """Batches `first` to `last` - 1, read and tokenised by mlx-data in the background, two ahead."""
        import mlx.data as dx

        def produce() -> Iterator[dict]:
            return map(pack, self._made(first, last))

        stream = dx.stream_python_iterable(produce).prefetch(2, 1)

        def stop() -> None:
            self.rows.close()  # first, as `reset` waits for what is being read
            stream.reset()

        # The interpreter aborts or hangs at exit while a stream still prefetches, or after one met an error.
        atexit.register(stop)
        try:
            for sample in stream:
                yield unpack(sample, self.kind)
        finally:
            atexit.unregister(stop)
            stop()


def pack(batch: Any) -> dict[str, np.ndarray]:
    """A batch, of whatever kind, as the arrays that mlx-data carries."""
    arrays = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Texts):
            arrays |= {f"{f.name}.{name}": v for name, v in vars(value).items() if v is not None}
        else:
            arrays[f.name] = value if isinstance(value, np.ndarray) else np.int64(value)
    return arrays


def unpack(sample: dict, kind: type) -> Any:
    """The batch of that kind which `pack` took apart."""
    texts = {name.removeprefix("texts."): np.array(v) for name, v in sample.items() if name.startswith("texts.")}
    rest = {name: v if (v := np.array(value)).ndim else int(v) for name, value in sample.items() if "." not in name}
    return kind(texts=Texts(**texts), **rest)
