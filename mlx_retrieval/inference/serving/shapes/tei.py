"""Text Embeddings Inference: https://huggingface.github.io/text-embeddings-inference. Its requests name no model.

`model`, which it has not, chooses one where a server has several.
"""

from typing import Any, Literal

from fastapi import HTTPException

from mlx_retrieval.inference.serving import requests
from mlx_retrieval.inference.serving.requests import Ranking, Tokens, Truncation, Vectors
from mlx_retrieval.inference.serving.shapes.body import Body, Count, Fields, Inputs, Name, Texts, refuse

ERRORS = {401: "Unauthorized", 404: "Backend", 413: "Validation", 503: "Overloaded"}


class Truncating(Fields):
    """An object that says what becomes of long texts; without a word they are truncated at their end."""

    truncate: bool | None = None
    truncation_direction: Literal["Left", "left", "Right", "right"] | None = None

    @property
    def truncation(self) -> Truncation:
        if self.truncate is False:
            return "none"
        return "start" if (self.truncation_direction or "").lower() == "left" else "end"


class Embed(Body, Truncating):
    """Embed texts, or texts as token ids; answer with a list of vectors."""

    inputs: Inputs
    normalize: bool | None = None
    prompt_name: Name | None = None
    dimensions: Count | None = None
    encoding_format: Literal["float"] | None = None  # as huggingface_hub sends it

    def request(self) -> requests.Embed:
        return requests.Embed(
            texts=self.inputs, field="inputs", model=self.model, prompts=(self.prompt_name or "document",),
            dimensions=self.dimensions, truncate=self.truncation, normalize=self.normalize is not False,
        )  # fmt: skip

    def answer(self, result: Vectors) -> list:
        return list(result.vectors)


class EmbedAll(Body, Truncating):
    """Embed texts with a late-interaction model; answer with a vector of each token that counts, of each text."""

    inputs: Inputs
    prompt_name: Name | None = None

    def request(self) -> requests.Embed:
        return requests.Embed(
            texts=self.inputs, field="inputs", model=self.model, prompts=(self.prompt_name or "document",),
            truncate=self.truncation, by_token=True,
        )  # fmt: skip

    def answer(self, result: Vectors) -> list:
        return result.vectors


class Rerank(Body, Truncating):
    """Score texts for a query; answer with a list, best first."""

    query: str
    texts: Texts
    top_n: Count | None = None  # as litellm sends it
    raw_scores: bool | None = None
    return_text: bool | None = None

    def request(self) -> requests.Rerank:
        if self.truncation == "start":
            refuse("truncation_direction", self.truncation_direction, "texts to rerank are truncated at their end")
        return requests.Rerank(
            query=self.query, documents=self.texts, field="texts", model=self.model, top_n=self.top_n,
            raw=bool(self.raw_scores), truncate=self.truncation,
        )  # fmt: skip

    def answer(self, result: Ranking) -> list:
        rows = [{"index": i, "score": float(result.scores[i])} for i in result.order]
        return [row | {"text": result.documents[row["index"]]} for row in rows] if self.return_text else rows


class Sentences(Fields):
    """A text, and those to compare it with."""

    source_sentence: str
    sentences: Texts


class Parameters(Truncating):
    """Settings of a comparison."""

    prompt_name: Name | None = None


class Similarity(Body):
    """Compare a sentence with others; answer with the cosine of each."""

    inputs: Sentences
    parameters: Parameters | None = None

    def request(self) -> requests.Embed:
        parameters = self.parameters or Parameters()
        if not self.inputs.sentences:
            raise HTTPException(400, "inputs.sentences: empty")
        return requests.Embed(
            texts=[self.inputs.source_sentence, *self.inputs.sentences], field="inputs", model=self.model,
            prompts=(parameters.prompt_name or "document",), truncate=parameters.truncation, normalize=True,
        )  # fmt: skip

    def answer(self, result: Vectors) -> list:
        return (result.vectors[1:] @ result.vectors[0]).tolist()


class Tokenize(Body):
    """Show texts as the tokens of a model; answer with a list of tokens of each."""

    inputs: Inputs
    add_special_tokens: bool = True
    prompt_name: Name | None = None

    def request(self) -> requests.Tokenize:
        if isinstance(self.inputs[0] if self.inputs else "", list):
            refuse("inputs", self.inputs[0][:3], "texts are tokenised, and no token ids")
        return requests.Tokenize(
            texts=self.inputs, field="inputs", model=self.model, prompt=self.prompt_name,
            special=self.add_special_tokens,
        )  # fmt: skip

    def answer(self, result: Tokens) -> list:
        return [(token._asdict() for token in row) for row in result.rows]


def error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": message, "error_type": ERRORS.get(status, "Validation" if status < 500 else "Backend")}
