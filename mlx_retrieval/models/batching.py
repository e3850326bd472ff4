"""Group texts of different lengths into padded micro-batches under a budget of tokens.

Training and inference share it. It is only a matter of speed: no result depends on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlx_retrieval.backend import mx

import numpy as np

from mlx_retrieval import backend

MEASURED_LAYER = 1_774_464  # weights of a layer of MiniLM, with which `backend.CPU_OVERHEAD` was measured


class MicroBatch(NamedTuple):
    """R right-padded texts of at most L tokens, as the backbone takes them."""

    ids: mx.array  # (R, L) int32
    lengths: mx.array  # (R,) int32: tokens of each row without padding
    start: mx.array  # (R,) int32: first token that pooling counts
    end: mx.array  # (R,) int32: one past the last token that pooling counts
    # (R,) int32: where the second text of a pair begins, for models with token types.
    second: mx.array | None = None
    # Keys and values, one pair a layer, of tokens that all rows have before their own.
    past: list[tuple[mx.array, mx.array]] | None = None

    def rows(self, first: int, last: int) -> "MicroBatch":
        """Return rows `first` to `last` - 1, in the same padding."""
        if (first, last) == (0, len(self.ids)):
            return self
        columns = (None if column is None else column[first:last] for column in self[:5])
        return MicroBatch(*columns, self.past)


@dataclass(frozen=True)
class Texts:
    """Token ids of N texts, one text after another, and the tokens that pooling counts."""

    ids: np.ndarray  # (sum of lengths,) int32
    lengths: np.ndarray  # (N,) int32
    start: np.ndarray  # (N,) int32: first token that pooling counts, relative to the text
    end: np.ndarray  # (N,) int32: one past the last one
    seen: np.ndarray | None = None  # (N,) int32: leading tokens that all tokens attend to; None: all of them
    second: np.ndarray | None = None  # (N,) int32: where the second text of a pair begins; None: these are not pairs

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> np.ndarray:
        """(N + 1,) int64: where each text begins in `ids`, and the length of `ids`."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def part(self, first: int, last: int) -> "Texts":
        """Return texts `first` to `last` - 1."""
        offsets = self.offsets
        rest = (self.lengths, self.start, self.end, self.seen, self.second)
        columns = (None if column is None else column[first:last] for column in rest)
        return Texts(self.ids[offsets[first] : offsets[last]], *columns)

    def without(self, tokens: list[int], width: int) -> np.ndarray:
        """Return (N, width) bool: False at positions where a text has one of these tokens."""
        row = np.repeat(np.arange(len(self)), self.lengths)
        column = np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], self.lengths)
        hit = np.isin(self.ids, tokens) & (column < width)
        result = np.ones((len(self), width), bool)
        result[row[hit], column[hit]] = False
        return result

    @staticmethod
    def join(parts: list["Texts"]) -> "Texts":
        """Concatenate the texts of all `parts`."""
        columns = [(p.ids, p.lengths, p.start, p.end, p.lengths if p.seen is None else p.seen) for p in parts]
        return Texts(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def padded(lengths: np.ndarray, grid: int | None = None) -> np.ndarray:
    """Round lengths up to multiples of `grid`; None = the device's, `backend.LENGTH_GRID`."""
    grid = grid or backend.LENGTH_GRID
    return -(-lengths // grid) * grid


def rounded_rows(rows: np.ndarray | int) -> np.ndarray:
    """Round numbers of rows up to 1, 2, 3, 4, 6, 8, 12, 16 ...: powers of two, and one and a half times them."""
    step = 2.0 ** np.maximum(0, np.floor(np.log2(np.maximum(rows, 1))) - 1)
    return (np.ceil(rows / step) * step).astype(int)


def plan(
    lengths: np.ndarray,
    budget: int,
    grid: int | None = None,
    round_rows: bool = False,
    overhead: int | None = None,
) -> list[np.ndarray]:
    """Plan micro-batches of texts of similar length, with the least padding.

    Texts are sorted by length, and dynamic programming finds the boundaries of least total cost: a micro-batch costs
    its tokens, padding included, plus a constant.

    Args:
        lengths: (N,) tokens of each text.
        budget: most tokens of a micro-batch, padding included; a longer text is a micro-batch by itself.
        grid: see `padded`.
        round_rows: whether a micro-batch costs as many rows as it has in compiled passes; see `rounded_rows`.
        overhead: the cost of a micro-batch, in tokens; None = this device's, `backend.MICRO_BATCH_OVERHEAD`.

    Returns index arrays that together hold 0..N-1 once, longest texts first (so that a lack of memory shows early).
    """
    order = np.argsort(-lengths, kind="stable")
    widths = padded(lengths[order], grid)
    count, overhead = len(order), min(overhead or backend.MICRO_BATCH_OVERHEAD, budget / 8)
    cost, start, first = np.zeros(count + 1), np.zeros(count + 1, int), 0
    rows = np.arange(count + 1)
    rows = rounded_rows(rows) if round_rows else rows
    for end in range(1, count + 1):
        while first < end - 1 and rows[end - first] * widths[first] > budget:
            first += 1
        costs = cost[first:end] + rows[end - first : 0 : -1] * widths[first:end] + overhead
        best = int(costs.argmin())
        cost[end], start[end] = costs[best], first + best
    groups, end = [], count
    while end:
        groups.append(order[start[end] : end])
        end = start[end]
    return groups[::-1]


def cpu_overhead(weights: int) -> int:
    """Return the cost of a micro-batch on a CPU, in tokens, for a model of so many weights a layer.

    What a pass takes beside its products is the same for every layer, and the products of a token take the longer, the
    more weights the layer has.
    """
    return round(backend.CPU_OVERHEAD * max(1, MEASURED_LAYER / weights))


def pad_rows(texts: Texts, index: np.ndarray, pad_id: int = 0, grid: int | None = None) -> MicroBatch:
    """Return the texts at `index` as right-padded rows; `grid`: see `padded`."""
    lengths = texts.lengths[index]
    ids = np.full((len(index), padded(lengths.max(), grid)), pad_id, dtype=np.int32)
    offsets = texts.offsets
    for row, i in enumerate(index):
        ids[row, : texts.lengths[i]] = texts.ids[offsets[i] : offsets[i + 1]]
    seen = lengths if texts.seen is None else texts.seen[index]
    second = None if texts.second is None else mx.array(texts.second[index])
    return MicroBatch(mx.array(ids), mx.array(seen), mx.array(texts.start[index]), mx.array(texts.end[index]), second)


def micro_batches(
    texts: Texts,
    budget: int,
    pad_id: int = 0,
    grid: int | None = None,
    round_rows: bool = False,
    overhead: int | None = None,
) -> Iterator[tuple[np.ndarray, MicroBatch]]:
    """Yield every micro-batch of `plan`, as (index, padded rows)."""
    for index in plan(texts.lengths, budget, grid, round_rows, overhead):
        yield index, pad_rows(texts, index, pad_id, grid)


def shares(micro_batches: Sequence[MicroBatch], count: int) -> list[list[int]]:
    """Return the numbers of the micro-batches that each of `count` workers computes.

    Work is as equal as possible, and the same micro-batches are always shared out in the same way.
    """
    work, chosen = [0] * count, [[] for _ in range(count)]
    for i in sorted(range(len(micro_batches)), key=lambda i: -micro_batches[i].ids.size):
        least = work.index(min(work))
        work[least] += micro_batches[i].ids.size
        chosen[least].append(i)
    return chosen
