"""The table of all shapes: which path takes which body, and in which form it answers errors."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import Discriminator, Tag

from mlx_retrieval.inference.serving.shapes import cohere, infinity, jina, openai, tei
from mlx_retrieval.inference.serving.shapes.body import Body


class Shape(NamedTuple):
    """What a path takes: a `Body`, or a union of two that is told apart by its fields."""

    path: str
    body: Any
    error: Callable[[int, str], dict[str, Any]]
    listed: bool = True  # whether OpenAPI's documentation lists it

    @property
    def about(self) -> str:
        """The description of the path."""
        return "\n\n".join(body.__doc__ for body in bodies(self))


def _rerank_form(body: object) -> str:
    texts = body.get("texts") if isinstance(body, dict) else getattr(body, "texts", None)
    return "<jina>" if texts is None else "<tei>"


# TEI and others have a /rerank, and only TEI's has texts.
Rerank = Annotated[
    Annotated[tei.Rerank, Tag("<tei>")] | Annotated[jina.Rerank, Tag("<jina>")], Discriminator(_rerank_form)
]

SHAPES = (
    Shape("/v1/embeddings", jina.Embeddings, openai.error),  # and OpenAI's
    Shape("/v1/rerank", jina.Rerank, cohere.error),  # and Cohere's v1
    Shape("/v1/embed", cohere.EmbedV1, cohere.error),
    Shape("/v2/rerank", cohere.RerankV2, cohere.error),
    Shape("/v2/embed", cohere.EmbedV2, cohere.error),
    Shape("/embed", tei.Embed, tei.error),
    Shape("/embed_all", tei.EmbedAll, tei.error),
    Shape("/rerank", Rerank, cohere.error),
    Shape("/similarity", tei.Similarity, tei.error),
    Shape("/tokenize", tei.Tokenize, tei.error),
    Shape("/", tei.Embed, tei.error, listed=False),  # where huggingface_hub's client posts to
    Shape("/infinity/embeddings", infinity.Embeddings, openai.error),
    Shape("/infinity/rerank", infinity.Rerank, openai.error),
)
_ERRORS = {shape.path: shape.error for shape in SHAPES}


def error_of(path: str, status: int, message: str) -> dict[str, Any]:
    """Return the body of an error, in the form of a path's shape, or OpenAI's."""
    return _ERRORS.get(path, openai.error)(status, message)


def bodies(shape: Shape) -> tuple[type[Body], ...]:
    """Return the bodies that a shape takes."""
    return (tei.Rerank, jina.Rerank) if shape.body is Rerank else (shape.body,)
