"""Models with a number that is not finite in the vector of one word, so that only texts with this word show it."""

import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
from tokenizers import Tokenizer

WORD = "whale"
TEXTS = ["a boiler drips", "the whale sings", "a bike squeaks"]  # number 1 has the word


def with_a_broken_word(folder: str | Path, target: Path, table: str = "model.embed_tokens.weight") -> str:
    """Copy a model's folder, with NaN in the table's row for the last token of `whale`; return the copy's path."""
    shutil.copytree(folder, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))

    token = tokenizer.encode(f"the {WORD}", add_special_tokens=False).ids[-1]
    weights = mx.load(str(target / "model.safetensors"))
    rows = np.array(weights[table].astype(mx.float32))
    rows[token] = np.nan
    weights[table] = mx.array(rows)
    mx.eval(weights)
    (target / "model.safetensors").unlink()
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "pt"})
    return str(target)
