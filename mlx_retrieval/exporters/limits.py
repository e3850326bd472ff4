"""How far an exported retrieval model may be from the original one, for each form of its weights.

Both sides compute in float32, so that only the stored weights differ. all-MiniLM-L6-v2 has worst cosines of 1.000000 in
float32, 0.999999 in float16, 0.999955 in bfloat16, 0.9997 in 8 bits and 0.92 in 4 bits, also with --gguf-ready; as a
cross-encoder with a random last layer, its worst scores differ by 0.02 in 8 bits and by 0.33 in 4 bits.

A form of one dtype that misses its limit is not written. Quantised weights are written, with a warning and exit code 1:
how much a model of few dimensions may lose is for an evaluation to say. Chat models have limits of another kind: see
chat_parity.py.
"""

from typing import NamedTuple


class Limit(NamedTuple):
    """The limits of one form."""

    cosine: float  # least cosine of any vector to the original model's
    score: float  # largest difference of any score; of logits, as a share of their range


LIMITS = {
    "float32": Limit(0.9999, 1e-4),
    "float16": Limit(0.999, 0.02),
    "bfloat16": Limit(0.999, 0.1),
    "8 bits": Limit(0.999, 0.05),
    "4 bits": Limit(0.85, 0.5),
}
MISSED = "limit missed"  # the name of a line that says so


def form_of(dtype: object) -> str:
    """Return the form of weights of one dtype of mlx, a key of LIMITS."""
    return str(dtype).rpartition(".")[-1]


def quantised_form(bits: int) -> str:
    """Return the form of quantised weights, a key of LIMITS."""
    return f"{bits} bits"


def advice(form: str) -> str:
    """Return the way on for a form that missed its limit, or ""."""
    more = {"4 bits": "--quantize 8 keeps more", "8 bits": "the model without --quantize keeps more"}
    more |= {"bfloat16": "--dtype float16 keeps more", "float16": "--dtype float32 keeps more"}
    return f"; {more[form]}" if form in more else ""
