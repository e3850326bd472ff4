"""Infinity's embeddings and rerank, below /infinity: a document comes back as a plain text."""

from dataclasses import replace
from typing import Any, Literal

from fastapi import HTTPException

from mlx_retrieval.inference.serving import requests
from mlx_retrieval.inference.serving.requests import Ranking
from mlx_retrieval.inference.serving.shapes import jina, openai
from mlx_retrieval.inference.serving.shapes.body import Count


class Embeddings(openai.Embeddings):
    """Embed texts, or texts as token ids of the model's own tokenizer."""

    modality: Literal["text"] | None = None
    output_dimension: Count | None = None  # as litellm calls dimensions

    def request(self) -> requests.Embed:
        request = super().request()
        if self.output_dimension is None:
            return request
        if request.dimensions not in (None, self.output_dimension):
            raise HTTPException(400, "dimensions and output_dimension differ: send only one")
        return replace(request, dimensions=self.output_dimension, dimensions_field="output_dimension")


class Rerank(jina.Rerank):
    """Score documents for a query; answer with the best `top_n`, best first."""

    raw_scores: bool | None = None

    def request(self) -> requests.Rerank:
        return replace(super().request(), raw=bool(self.raw_scores))

    def answer(self, result: Ranking) -> dict[str, Any]:
        answer = super().answer(result)
        for each in answer["results"]:
            if "document" in each:
                each["document"] = each["document"]["text"]
        return answer | {"object": "rerank"}
