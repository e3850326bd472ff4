"""What all shapes share: a body whose unknown fields are refused, its types of texts, and forms of vectors.

A shape is a `Body` with two methods: `request` gives the internal request, `answer` the public answer of its result.
"""

import base64
import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import HTTPException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, FailFast, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mlx_retrieval.inference.quantization import quantise, scaled_to_unit
from mlx_retrieval.inference.serving.requests import Request, Result
from mlx_retrieval.utils.errors import near_miss


def _plain(value: object) -> object:
    """Replace {"text": ...} objects by their text; validation refuses anything else that is not a text."""
    if not isinstance(value, list):
        return value
    if any(isinstance(item, dict) and "image" in item for item in value):
        raise PydanticCustomError("image", "this server takes texts, and no images")
    return [item["text"] if isinstance(item, dict) and "text" in item else item for item in value]


def _rows(value: object) -> object:
    """Return a list of texts, or of token ids of each text, where a single one was sent."""
    single = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
    return [value] if single else _plain(value)


def _form(value: object) -> str:
    return "<ids>" if isinstance(value, list) and value and isinstance(value[0], list) else "<texts>"


class _First(FailFast):
    """Stop at the first item that is wrong: every error costs memory, and a body can hold millions."""

    __hash__ = object.__hash__  # unions need it


Texts = Annotated[list[str], _First()]
Documents = Annotated[Texts, BeforeValidator(_plain)]
Ids = Annotated[list[Annotated[list[int], _First()]], _First()]
Inputs = Annotated[
    Annotated[Texts, Tag("<texts>")] | Annotated[Ids, Tag("<ids>")], Discriminator(_form), BeforeValidator(_rows)
]
Name = Annotated[str, Field(max_length=100)]
Count = Annotated[int, Field(ge=1)]


class Fields(BaseModel):
    """An object of a request. Unknown fields are refused, not ignored: a misspelt one would change the answer."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: object) -> object:
        if isinstance(data, dict) and (unknown := next((name for name in data if name not in cls.model_fields), None)):
            near = near_miss(unknown, cls.model_fields)
            names = {"name": repr(unknown[:100]), "known": ", ".join(cls.model_fields), "near": near}
            raise PydanticCustomError("unknown_field", "the field {name} is unknown; known: {known}{near}", names)
        return data


class Body(Fields, ABC):
    """A request's body, which may name the model."""

    model: str | None = None

    @abstractmethod
    def request(self) -> Request:
        """Return the internal request; HTTPException (400) for what this server cannot obey."""

    @abstractmethod
    def answer(self, result: Result) -> dict[str, Any] | list:
        """Return the public answer, for `guard.json_response`: with arrays and generators in place of long lists."""


def refuse(field: str, value: object, reason: str) -> None:
    """Refuse a field that would change the answer, and that this server cannot obey, with the reason."""
    raise HTTPException(400, f"{field} {value}: {reason}")


# --- forms of vectors -----------------------------------------------------------------------------------------------

VectorType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
DEVIATIONS = 8  # of a unit vector's entries, which int8 covers


def in_form(vectors: np.ndarray, form: str) -> list:
    """Return vectors (N, D) float32 in a form for JSON: a list of N arrays or texts.

    `base64` is that of float32, little-endian; `binary` and `ubinary` are as in quantization.py. `int8` is
    127 * max(1, sqrt(D) / 8) * value of the vector at unit length, rounded and clipped, and `uint8` 128 more: one
    scale for all, so that plain dot products compare such vectors.
    """
    if form == "float":
        return list(vectors)
    if form == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    if form in ("binary", "ubinary"):
        return list(quantise(vectors, form))
    scale = 127 * max(1.0, math.sqrt(vectors.shape[1]) / DEVIATIONS)
    levels = np.clip(np.rint(scale * scaled_to_unit(vectors)), -128, 127).astype(np.int32)
    return list(levels + 128 * (form == "uint8"))
