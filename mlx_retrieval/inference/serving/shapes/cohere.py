"""Cohere's rerank and embed, v1 and v2: https://docs.cohere.com/reference/rerank, https://docs.cohere.com/reference/embed."""

import uuid
from typing import Any, ClassVar, Literal

from fastapi import HTTPException

from mlx_retrieval.inference.serving import requests
from mlx_retrieval.inference.serving.requests import Embed, Ranking, Truncation, Vectors
from mlx_retrieval.inference.serving.shapes import openai
from mlx_retrieval.inference.serving.shapes.body import (
    Body,
    Count,
    Documents,
    Fields,
    Name,
    Texts,
    VectorType,
    in_form,
    refuse,
)

# Cohere's names of what texts are -> our prompt, unless the model has one of the name itself.
INPUT_TYPES = {"search_query": "query", "search_document": "document"}
INPUT_TYPES |= dict.fromkeys(("classification", "clustering"), "document")
TRUNCATE: dict[str | None, Truncation] = {None: "end", "END": "end", "START": "start", "NONE": "none"}


def refuse_chunks(field: str, count: int | None) -> None:
    """Refuse to score a document as the best of several chunks."""
    if count is not None and count > 1:
        refuse(field, count, "documents are scored as one piece here, and truncated; send 1, or chunks as documents")


class Rerank(Body):
    """Score documents for a query; answer with the best `top_n`, best first. Cohere's v1."""

    version: ClassVar[str] = "1"
    query: str
    documents: Documents
    top_n: Count | None = None
    return_documents: bool | None = None
    rank_fields: list[str] | None = None
    max_chunks_per_doc: Count | None = None
    max_tokens_per_doc: Count | None = None
    priority: int | None = None  # changes nothing: the oldest request is computed first

    def request(self) -> requests.Rerank:
        refuse_chunks("max_chunks_per_doc", self.max_chunks_per_doc)
        if self.rank_fields not in (None, ["text"]):
            refuse("rank_fields", self.rank_fields, "documents are ranked by their text alone")
        return requests.Rerank(
            query=self.query, documents=self.documents, field="documents", model=self.model, top_n=self.top_n,
            max_tokens=self.max_tokens_per_doc,
        )  # fmt: skip

    def answer(self, result: Ranking) -> dict[str, Any]:
        results = []
        for i in result.order:
            results.append({"index": i, "relevance_score": float(result.scores[i])})
            if self.return_documents:
                results[-1]["document"] = {"text": result.documents[i]}
        meta = {"api_version": {"version": self.version}, "billed_units": {"search_units": 1}}
        return {"id": str(uuid.uuid4()), "model": result.model, "results": results, "meta": meta}


class RerankV2(Rerank):
    """Score documents for a query; answer with the best `top_n`, best first. Cohere's v2."""

    version: ClassVar[str] = "2"


class EmbedV1(Body):
    """Embed texts. Cohere's v1."""

    version: ClassVar[str] = "1"
    texts: Texts | None = None
    images: list | None = None
    input_type: Name | None = None
    embedding_types: list[VectorType] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    max_tokens: Count | None = None
    output_dimension: Count | None = None
    priority: int | None = None  # changes nothing: the oldest request is computed first

    def request(self) -> Embed:
        if self.images:
            raise HTTPException(400, "images: this server takes texts, and no images")
        kind = INPUT_TYPES.get(self.input_type or "search_document")
        prompts = tuple(name for name in (self.input_type, kind) if name)
        return Embed(
            texts=self.texts or [], field="texts", model=self.model, prompts=prompts, dimensions=self.output_dimension,
            dimensions_field="output_dimension", truncate=TRUNCATE[self.truncate], max_tokens=self.max_tokens,
        )  # fmt: skip

    def answer(self, result: Vectors) -> dict[str, Any]:
        if self.embedding_types is None and self.version == "1":
            kind, embeddings = "embeddings_floats", in_form(result.vectors, "float")
        else:
            types = dict.fromkeys(self.embedding_types or ["float"])
            kind, embeddings = "embeddings_by_type", {form: in_form(result.vectors, form) for form in types}
        meta = {"api_version": {"version": self.version}, "billed_units": {"input_tokens": result.tokens}}
        answer = {"id": str(uuid.uuid4()), "response_type": kind, "embeddings": embeddings, "texts": result.texts}
        return answer | {"meta": meta}


class Part(Fields):
    """A part of an input."""

    type: str
    text: str | None = None


class Input(Fields):
    """A text in parts."""

    content: list[Part]


class EmbedV2(EmbedV1):
    """Embed texts. Cohere's v2, where a text is one of `texts`, or of `inputs` with one part of the type text."""

    version: ClassVar[str] = "2"
    inputs: list[Input] | None = None

    def request(self) -> Embed:
        if self.inputs:
            if self.texts:
                raise HTTPException(400, "texts and inputs: send only one")
            for i, each in enumerate(self.inputs):
                if [part.type for part in each.content] != ["text"] or each.content[0].text is None:
                    raise HTTPException(400, f"inputs[{i}]: one part of the type text; this server takes no images")
            self.texts = [each.content[0].text for each in self.inputs]
        return super().request()


def error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error: Cohere's, and OpenAI's beside it."""
    return {"message": message} | openai.error(status, message)
