"""Views of a source: its examples, of which some are left out.

rows = RowsWithout(rows, keeps, held)              # files, by number
rows = StreamWithout(elastic_rows, held)           # an index, as its documents come

Neither has an example with a held-out text as its query or positive; both leave such texts out of negatives.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Set
from typing import Any

import numpy as np

from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.reshuffled import Reshuffled
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.utils.errors import Place, UserError


def remaining(example: Example, held: Set[int], kind: str | None) -> Example | None:
    """Return what remains of an example without the texts that have these keys; None if it is of no use then.

    Args:
        kind: of the source's rows.

    An example without its query or positive is of no use; nor is one whose scores are left with nothing to compare.
    """
    if text_key(example.query) in held or text_key(example.positive) in held:
        return None
    others = tuple([text for text in example.other_positives if text_key(text) not in held])
    kept = [i for i, text in enumerate(example.negatives) if text_key(text) not in held]
    if len(kept) == len(example.negatives):
        return example if others == example.other_positives else example._replace(other_positives=others)
    if example.scores and not kept and kind != "label":
        return None
    scores = (example.scores[0], *(example.scores[1 + i] for i in kept)) if example.scores else ()
    negatives = tuple([example.negatives[i] for i in kept])
    return example._replace(negatives=negatives, scores=scores, other_positives=others)


class View:
    """A source whose examples are those of another one, or some of them; what is known of the other holds for it."""

    def __init__(self, source: Source):
        self.source = source

    @property
    def format(self) -> str | None:
        return self.source.format

    @property
    def has_negatives(self) -> bool:
        return self.source.has_negatives

    @property
    def has_scores(self) -> bool:
        return self.source.has_scores

    @property
    def has_some_scores(self) -> bool:
        return self.source.has_some_scores

    @property
    def score_range(self) -> tuple[float, float]:
        return self.source.score_range

    @property
    def without_positive(self) -> Place | None:
        return self.source.without_positive

    @property
    def skipped(self) -> list[str]:
        return self.source.skipped

    @property
    def ignored(self) -> Counter[str]:
        return self.source.ignored

    @property
    def names(self) -> list[str]:
        return self.source.names

    @property
    def readings(self) -> list[str]:
        return self.source.readings

    @property
    def constant(self) -> dict[str, str]:
        return self.source.constant

    def where(self, i: int) -> str:
        return self.source.where(i)

    def contents(self) -> list[Content]:
        return self.source.contents()

    def close(self) -> None:
        self.source.close()


class RowsWithout(Reshuffled, View):
    """The examples of files without some. An example keeps its number.

    Args:
        source: whose examples can be read by number.
        kept: (N,) uint32: the numbers of the examples that stay, ascending.
        held: keys of the texts that are held out.
        trimmed: numbers of those that have such texts among their negatives or other positives.
    """

    def __init__(self, source: Source, kept: np.ndarray, held: Set[int], trimmed: Set[int] = frozenset()):
        super().__init__(source)
        self.kept, self.held, self.trimmed = kept, held, trimmed

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, i: int) -> Example:
        example = self.source[i]
        return remaining(example, self.held, self.format) if i in self.trimmed else example

    def preview(self, count: int) -> list[tuple[str, Example]]:
        rest = np.linspace(2, len(self) - 1, max(0, min(count, len(self)) - 2), dtype=int).tolist()
        numbers = self.kept[[*range(min(count, len(self), 2)), *rest]].tolist()
        return [(self.where(i), self[i]) for i in numbers]

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.kept)


class StreamWithout(View):
    """The examples of an index without those that have a held-out text, which are left out as they come.

    An example's number is its position in the source, from which its position in the view follows by the examples that
    were left out before it.
    """

    def __init__(self, source: Source, held: Set[int]):
        super().__init__(source)
        self.held = held
        self._restart(0, 0)

    def _restart(self, position: int, source_position: int) -> None:
        self._base = position, source_position
        self._seen = source_position  # the source's position up to which its examples were looked at
        self._left_out: list[int] = []  # since the base: of each one, the view's position that follows it

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Example:
        if (example := remaining(self.source[i], self.held, self.format)) is None:
            raise IndexError(f"example {i} is held out")
        return example

    def preview(self, count: int) -> list[tuple[str, Example]]:
        examples = ((place, remaining(e, self.held, self.format)) for place, e in self.source.preview(count))
        return [(place, example) for place, example in examples if example]

    def _source_position(self, position: int) -> int:
        own, sources = self._base
        return sources + position - own + bisect_right(self._left_out, position)

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        own, sources = self._base
        at, place = self._source_position(position), position
        if at > self._seen:
            at, place = self._seen, own + self._seen - sources - len(self._left_out)
        fruitless = 0
        for number in self.source.numbers(seed, at):
            is_new = number >= self._seen
            self._seen = max(self._seen, number + 1)
            if remaining(self.source[number], self.held, self.format) is None:
                if is_new:
                    self._left_out.append(place)
                fruitless += 1
                if fruitless > 2 * len(self.source):
                    raise UserError(f"{', '.join(self.names)}: every document has a text of a held-out question")
                continue
            fruitless = 0
            if place >= position:
                yield number
            place += 1

    def cursor(self, position: int) -> dict[str, Any]:
        at = self._source_position(position)
        return {"position": at, "source": self.source.cursor(at)}

    def restore(self, cursor: dict[str, Any], position: int) -> None:
        self._restart(position, cursor["position"])
        self.source.restore(cursor["source"], cursor["position"])
