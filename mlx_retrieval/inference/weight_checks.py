"""Look at a model's weights themselves: a number that is not finite harms only the texts that use it."""

from mlx_retrieval.backend import mx, nn

import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from mlx_retrieval.utils.text import quantity

SHOWN = 4  # tensors, and tokens of one, that a finding names


def finite_weights(model: nn.Module, tokenizer: Tokenizer) -> tuple[bool, str]:
    """Check every tensor of a model, its adapter's and its head's included.

    Returns (whether all numbers are finite, the number of tensors or the names of those that are not). Of a table of
    token embeddings, the detail names the tokens.
    """
    tables = {
        name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    }
    findings, tensors, numbers = [], 0, 0
    for name, value in tree_flatten(model.parameters()):
        if not mx.issubdtype(value.dtype, mx.floating):
            continue
        tensors, numbers = tensors + 1, numbers + value.size
        if bad := int((~mx.isfinite(value)).sum().item()):
            detail = f"{bad:,} of {value.size:,} numbers"
            if name.rpartition(".")[0] in tables and len(value) >= tokenizer.get_vocab_size(with_added_tokens=False):
                detail = _tokens(value, tokenizer)
            findings.append(f"{name} ({detail})")
    if findings:
        more = f" and {quantity(len(findings) - SHOWN, 'more tensor')}" if len(findings) > SHOWN else ""
        return False, f"not finite: {', '.join(findings[:SHOWN])}{more}"
    return True, f"{quantity(tensors, 'tensor')}, {quantity(numbers, 'number')}"


def _tokens(table: mx.array, tokenizer: Tokenizer) -> str:
    """Describe the rows of a table of token embeddings (V, D) that are not finite."""
    rows = np.flatnonzero(~np.array(mx.isfinite(table).all(axis=1))).tolist()
    names = ", ".join(f"{row} {tokenizer.id_to_token(row)!r}" for row in rows[:SHOWN])
    return f"{len(rows):,} of {len(table):,} rows; tokens {names}{', ...' if len(rows) > SHOWN else ''}"
