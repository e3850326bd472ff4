"""An order of examples for each epoch that follows from the seed and the epoch alone."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np


class Reshuffled(ABC):
    """What sources share whose examples can be read by number: a subclass says how an epoch is shuffled."""

    _order: tuple[tuple[int, int], np.ndarray] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        """Return the numbers of all examples in the order of an epoch, (examples,) uint32."""

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Return `shuffled`; that of the last epoch is kept."""
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), self.shuffled(seed, epoch)
        return self._order[1]

    def numbers(self, seed: int, position: int) -> Iterator[int]:
        for place in itertools.count(position):
            epoch, place_there = divmod(place, len(self))
            yield int(self.order(seed, epoch)[place_there])

    def cursor(self, position: int) -> dict[str, Any]:
        """Return {}: the order follows from the position alone."""
        return {}

    def restore(self, cursor: dict[str, Any], position: int) -> None:  # noqa: B027  (there is nothing to restore)
        """Do nothing: the order follows from the position alone."""
