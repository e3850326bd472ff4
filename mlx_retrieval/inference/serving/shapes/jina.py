"""Jina's embeddings and rerank: https://api.jina.ai/redoc. They have every field of OpenAI's and of Cohere's v1."""

from dataclasses import replace
from typing import Any, Literal

from fastapi import HTTPException

from mlx_retrieval.inference.serving import requests
from mlx_retrieval.inference.serving.requests import Embed, Ranking, Vectors
from mlx_retrieval.inference.serving.shapes import cohere, openai
from mlx_retrieval.inference.serving.shapes.body import Count, Name, refuse

# The last part of a task's name -> the kind of its texts; tasks that stand alone treat all texts alike.
SIDES = {"query": "query", "passage": "document", "document": "document"}
ALIKE = ("text-matching", "classification", "separation", "clustering")


class Embeddings(openai.Embeddings):
    """Embed texts, or texts as token ids of the model's own tokenizer.

    `task` chooses the prompt: the model's own of this name if it has one, else "query" for `retrieval.query` and the
    like, and "document" for all others. `input_type` or `prompt` names a prompt of the model itself.
    """

    task: Name | None = None
    embedding_type: Literal["float", "base64", "binary", "ubinary"] | None = None
    normalized: bool | None = None  # false demands nothing: vectors are as the model's files say
    truncate: bool | None = None
    late_chunking: bool | None = None
    return_multivector: bool | None = None

    def request(self) -> Embed:
        if self.late_chunking:
            refuse("late_chunking", "true", "texts are embedded one by one here; send the chunks as texts")
        if self.return_multivector:
            refuse("return_multivector", "true", "POST /embed_all returns a vector a token")
        request = replace(super().request(), normalize=self.normalized or None)
        if self.truncate is False:
            request = replace(request, truncate="none")
        if self.task is None:
            return request
        if self.input_type or self.prompt:
            raise HTTPException(400, "task names a prompt, as input_type and prompt do: send only one")
        kind = SIDES.get(self.task.rpartition(".")[2], "document" if self.task in ALIKE else None)
        return replace(request, prompts=(self.task, kind) if kind else (self.task,))

    def answer(self, result: Vectors) -> dict[str, Any]:
        return openai.answer(result, self.embedding_type or self.encoding_format or "float")


class Rerank(cohere.Rerank):
    """Score documents for a query; answer with the best `top_n`, best first."""

    max_doc_length: Count | None = None
    max_chunk_per_doc: Count | None = None
    truncation: bool | None = None
    truncate: bool | None = None

    def request(self) -> requests.Rerank:
        cohere.refuse_chunks("max_chunk_per_doc", self.max_chunk_per_doc)
        request, limits = super().request(), [self.max_tokens_per_doc, self.max_doc_length]
        truncate = "none" if False in (self.truncation, self.truncate) else "end"
        return replace(request, truncate=truncate, max_tokens=min(filter(None, limits), default=None))

    def answer(self, result: Ranking) -> dict[str, Any]:
        usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
        return super().answer(result) | {"object": "list", "usage": usage}
