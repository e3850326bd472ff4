"""Describe an MLX folder's pooling as sentence-transformers does, for libraries that read it beside MLX weights.

MLXEmbedders of mlx-swift-lm and several servers read `1_Pooling/config.json`. mlx-embeddings reads the weights and the
dense layers, and pools every family in a way of its own, whatever the folder says.
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones.hub import read_weights
from mlx_retrieval.exporters import sentence_transformers_files
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

# How mlx-embeddings 0.1 pools, by model_type: over all tokens of a text, to unit length.
POOLING = {"bert": "mean", "xlm-roberta": "mean", "qwen3": "last"}


def write(
    folder: Path, config: RetrievalConfig, tokenizer: TextTokenizer, width: int, vocabulary: int, model_type: str
) -> str:
    """Write the files of `sentence_transformers_files.write`, whose arguments these are; return a note, or ""."""
    try:
        sentence_transformers_files.write(folder, config, tokenizer, width, vocabulary)
    except UserError as error:
        return f"without 1_Pooling: {str(error).removesuffix(sentence_transformers_files.ADVICE)}"
    pooling = POOLING.get(model_type)
    every_token = config.pool_special or config.pooling != "mean"
    if pooling is None or (config.pooling == pooling and every_token and config.normalize):
        return ""
    return f"mlx-embeddings gives other vectors: for {model_type}, the {pooling} of all tokens at unit length"


def pooler(folder: Path, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the pooler of a checkpoint, without which mlx-embeddings does not load BERT; {} if it has none.

    It is no part of a vector, and this toolkit leaves it out when it loads a model.
    """
    tensors = {}
    for name, value in read_weights(folder).items():
        own = re.fullmatch(r"(?:\w+\.)?(pooler\.dense\.(?:weight|bias))", name)
        if own and mx.issubdtype(value.dtype, mx.floating):
            tensors[own[1]] = value.astype(dtype)
    return tensors if len(tensors) == 2 else {}
