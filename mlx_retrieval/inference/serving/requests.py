"""The requests that every public shape is turned into, and the results that every shape of answer is made of.

    Embed(texts=["where is Kyoto"], field="input", prompts=("query",))      -> Vectors
    Rerank(query="where is Kyoto", documents=[...], field="documents")      -> Ranking
    Tokenize(texts=["where is Kyoto"], field="inputs")                      -> Tokens

`field` is the name of the texts in the public shape, for messages.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

# What to do with a text that is longer than the model takes: cut its end or its start, or refuse it.
Truncation = Literal["end", "start", "none"]


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Texts to embed.

    Attributes:
        texts: texts, or of each text the token ids that the model's own tokenizer gives it.
        model: the name of the model; None = the request names none.
        prompts: names of prompts, of which the first that the model has is put before each text.
        dimensions: see `embedder.Model.encode`; `dimensions_field` is its name in the public shape.
        normalize: scale vectors to unit length; None = as the model's files say.
        max_tokens: most tokens of a text, without prompt and special tokens; None = as many as the model takes.
        by_token: make a vector of each token, with a late-interaction model.
    """

    texts: list[str] | list[list[int]]
    field: str
    model: str | None = None
    prompts: tuple[str, ...] = ("document",)
    dimensions: int | None = None
    dimensions_field: str = "dimensions"
    normalize: bool | None = None
    truncate: Truncation = "end"
    max_tokens: int | None = None
    by_token: bool = False


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """Documents to score for a query.

    Attributes:
        model: see `Embed`.
        top_n: how many results; None = all.
        raw: scores before the model's activation.
        max_tokens: most tokens of a document; None = as many as the model takes.
    """

    query: str
    documents: list[str]
    field: str
    model: str | None = None
    top_n: int | None = None
    raw: bool = False
    truncate: Truncation = "end"
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Texts to show as tokens; `prompt` names the model's prompt before each, None = no prompt."""

    texts: list[str]
    field: str
    model: str | None = None
    prompt: str | None = None
    special: bool = True  # whether with the tokens that the tokenizer adds


class Vectors(NamedTuple):
    """The result of `Embed`."""

    model: str  # the name of the model that computed it
    texts: list[str]
    vectors: np.ndarray | list[np.ndarray]  # (N, D) float32, or by token (L_i, D) of each text
    tokens: int

    @property
    def size(self) -> int:
        """The numbers in it."""
        return sum(map(np.size, self.vectors))


class Ranking(NamedTuple):
    """The result of `Rerank`."""

    model: str
    documents: list[str]
    scores: np.ndarray  # (N,) float32, in the documents' order
    order: list[int]  # of the best documents, best first
    tokens: int

    @property
    def size(self) -> int:
        """The documents in it."""
        return len(self.order)


class Token(NamedTuple):
    """A token of a text."""

    id: int
    text: str
    special: bool
    start: int | None  # its first character in prompt and text, None for a token that the tokenizer adds
    stop: int | None


class Tokens(NamedTuple):
    """The result of `Tokenize`: the tokens of each text."""

    model: str
    rows: list[list[Token]]

    @property
    def size(self) -> int:
        """The tokens in it."""
        return sum(map(len, self.rows))


Request = Embed | Rerank | Tokenize
Result = Vectors | Ranking | Tokens
