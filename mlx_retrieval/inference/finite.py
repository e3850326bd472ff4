"""Refuse vectors and scores that are not finite: NaN would be stored, ranked and averaged like any number.

check_vectors("adapters/final", texts, vectors)      # NonFiniteError that names the first text and the next command
"""

from collections.abc import Callable, Sequence

import numpy as np

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import excerpt, quantity, shell

EXCERPT = 60  # characters of a text that a message quotes


class NonFiniteError(UserError, FloatingPointError):
    """Vectors or scores of a model that are not finite.

    Args:
        model: the model's name.
        kind: "vectors" or "scores".
        texts: the texts that were computed.
        numbers: the numbers of those concerned, from 0.
        command: the command that looks for the cause.
        place: text's number -> how the caller names it, such as `docs.jsonl:7`.
    """

    def __init__(
        self,
        model: str,
        kind: str,
        texts: Sequence[str],
        numbers: Sequence[int],
        command: str = "embed.py",
        place: Callable[[int], str] | None = None,
    ):
        self.model, self.kind, self.texts, self.numbers, self.command = model, kind, texts, list(numbers), command
        number = self.numbers[0]
        name = place(number) if place else f"number {number + 1:,}"
        self.first = f'the first is {name}, "{excerpt(texts[number], EXCERPT)}"'
        super().__init__(
            f"{model}: the {kind} of {len(self.numbers):,} of {quantity(len(texts), 'text')} are not finite, "
            f"{self.first}. "
            f"To find the cause: {check_command(model, command)}"
        )

    def placed(self, place: Callable[[int], str]) -> "NonFiniteError":
        """Return the same error with the first text named by `place`, which takes its number from 0."""
        return NonFiniteError(self.model, self.kind, self.texts, self.numbers, self.command, place)


def check_command(model: str, command: str = "embed.py") -> str:
    """Return the command that checks a model, for the shell."""
    return shell("python", command, "--check", model)


def check_vectors(
    model: str,
    texts: Sequence[str],
    vectors: Sequence[np.ndarray],
    first: int = 0,
    place: Callable[[int], str] | None = None,
) -> None:
    """Raise NonFiniteError if a text's vector, or the vector of one of its tokens, is not finite.

    Args:
        model: the model's name.
        vectors: (D,) of each text from number `first` on, or (L_i, D) from a late-interaction model.
        place: see `NonFiniteError`.
    """
    if isinstance(vectors, np.ndarray):
        finite = np.isfinite(vectors).all(axis=tuple(range(1, vectors.ndim)))
    else:
        finite = np.array([bool(np.isfinite(each).all()) for each in vectors], bool)
    if not finite.all():
        done = texts[: first + len(finite)]
        raise NonFiniteError(model, "vectors", done, (first + np.flatnonzero(~finite)).tolist(), place=place)


def check_scores(model: str, documents: Sequence[str], scores: np.ndarray, command: str = "rerank.py") -> None:
    """Raise NonFiniteError if one of the scores (N,) of N documents is not finite."""
    if not (finite := np.isfinite(scores)).all():
        raise NonFiniteError(model, "scores", documents, np.flatnonzero(~finite).tolist(), command)
