"""OpenAI's embeddings and list of models: https://platform.openai.com/docs/api-reference/embeddings."""

from typing import Any, Literal

from fastapi import HTTPException

from mlx_retrieval.inference.serving.requests import Embed, Vectors
from mlx_retrieval.inference.serving.shapes.body import Body, Count, Inputs, Name, in_form

ERRORS = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


class Embeddings(Body):
    """Embed texts, or texts as token ids of the model's own tokenizer.

    `input_type` or `prompt`, which OpenAI has not, names a prompt of the model (default: "document").
    """

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    input_type: Name | None = None
    prompt: Name | None = None
    user: str | None = None  # changes nothing

    def request(self) -> Embed:
        if self.input_type and self.prompt and self.input_type != self.prompt:
            raise HTTPException(400, "input_type and prompt name different prompts: send only one")
        prompt = self.input_type or self.prompt or "document"
        return Embed(texts=self.input, field="input", model=self.model, prompts=(prompt,), dimensions=self.dimensions)

    def answer(self, result: Vectors) -> dict[str, Any]:
        return answer(result, self.encoding_format or "float")


def answer(result: Vectors, form: str) -> dict[str, Any]:
    """Return the answer with the vectors in a form of `body.in_form`."""
    rows = enumerate(in_form(result.vectors, form))
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in rows]
    usage = {"prompt_tokens": result.tokens, "total_tokens": result.tokens}
    return {"object": "list", "data": data, "model": result.model, "usage": usage}


def error(status: int, message: str) -> dict[str, Any]:
    """Return the body of an error."""
    kind = ERRORS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind}}


def model_card(name: str, created: int) -> dict[str, Any]:
    """Return a model as in the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": "mlx-retrieval"}
