"""An order in which rows with similar queries follow each other, so that their documents are hard negatives in a batch.

rows = side_by_side(rows, 4)

Nothing is embedded and nothing is mined: queries that share rare words are similar. In a batch of random rows nearly
every other document is easy to tell from the right one, and a step teaches little (hard negatives: Xiong et al. 2021,
2007.00808; orders of rows: Sachidananda et al. 2023, "Global Selection of Contrastive Batches").
"""

import copy
import heapq
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_retrieval.dataset.reshuffled import Reshuffled
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.dataset.text_keys import text_key, words_of
from mlx_retrieval.dataset.views import View
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.progress import progress_bar

RAREST = 8  # words of a query that are looked at
NEAREST = 256  # rows with a word, at most, that are looked at for a row


def side_by_side(rows: Source, size: int) -> Source:
    """Return the rows in groups of `size` with similar queries; 1 = as they are.

    Of a mixture, those of each source. Raises SettingError for an index, whose rows come as they are stored.
    """
    if size == 1:
        return rows
    if isinstance(rows, InterleavedRows):
        mixture = copy.copy(rows)
        mixture.sources = [side_by_side(source, size) for source in rows.sources]
        return mixture
    if not hasattr(rows, "order"):
        raise SettingError(
            "{similar_rows} {size}: {name} is read as it is stored; rows of files can be put side by side",
            size=size,
            name=", ".join(rows.names),
        )
    return SimilarRows(rows, size)


class SimilarRows(Reshuffled, View):
    """Rows of files of which `size` with similar queries follow each other, where there are as many. None is left out.

    An epoch's order depends on the seed and the epoch only. Each row in a random order that is not in a group yet
    begins one, and takes those that are most similar and free: by the sum, over the words that the queries share, of
    1 / rows with the word, so that one rare word says more than a common phrase. Rows of the same query are no
    negatives of each other and never share a group.
    """

    def __init__(self, source: Any, size: int):
        super().__init__(source)
        self.size = size
        self._numbers = np.sort(source.order(0, 0))
        self._queries = np.empty(len(source), np.uint64)  # their keys
        self._read()

    def _read(self) -> None:
        """Note the rarest words of every query that another one has, by number, rarest first."""
        vocabulary: dict[str, int] = {}
        words = []
        with progress_bar("comparing queries", "rows", len(self)) as progress:
            for i, number in enumerate(self._numbers.tolist()):
                query = self.source[number].query
                self._queries[i] = text_key(query)
                words.append(
                    [vocabulary.setdefault(w, len(vocabulary)) for w in dict.fromkeys(words_of(query).split())]
                )
                progress(i + 1)
        frequency = Counter(itertools.chain.from_iterable(words))
        shared = [sorted((frequency[w], w) for w in row if 1 < frequency[w] < len(words))[:RAREST] for row in words]
        self._words = [[w for _, w in row] for row in shared]
        self._weights = {w: 1 / count for w, count in frequency.items()}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        return self.source[i]

    def preview(self, count: int) -> list[tuple[str, Example]]:
        return self.source.preview(count)

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        groups = list(self._groups(rng.permutation(len(self)).tolist()))
        chosen = itertools.chain.from_iterable(groups[k] for k in rng.permutation(len(groups)))
        return self._numbers[np.fromiter(chosen, np.int64, len(self))]

    def _groups(self, turns: list[int]) -> Iterator[list[int]]:
        """Yield groups of places in `_numbers`; `turns`: all places, in the order in which they may begin one."""
        having: dict[int, list[int]] = {}  # word -> places of rows that have it
        for place in turns:
            for word in self._words[place]:
                having.setdefault(word, []).append(place)
        free = bytearray(b"\1") * len(self)
        for first in turns:
            if not free[first]:
                continue
            group = [first, *self._nearest(first, having, free)]
            for place in group:
                free[place] = 0
            yield group

    def _nearest(self, first: int, having: dict[int, list[int]], free: bytearray) -> list[int]:
        scores: dict[int, float] = {}
        for word in self._words[first]:
            having[word] = rows = [place for place in having[word] if free[place]]
            for place in rows[:NEAREST]:
                scores[place] = scores.get(place, 0.0) + self._weights[word]
            if len(scores) >= NEAREST:
                break
        asked = {self._queries[first]}
        nearest: list[int] = []
        for place in heapq.nlargest(NEAREST, scores, key=scores.__getitem__):
            if len(nearest) < self.size - 1 and self._queries[place] not in asked:
                asked.add(self._queries[place])
                nearest.append(place)
        return nearest
