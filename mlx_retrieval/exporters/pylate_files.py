"""Write PyLate's files beside an exported model."""

from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval.exporters import sentence_transformers_files
from mlx_retrieval.models import sentence_transformers_files as models_sentence_transformers_files
from mlx_retrieval.models.pylate_files import PROJECTION
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError


def write(folder: Path, config: RetrievalConfig, frame: list[int], width: int) -> list[str]:
    """Write the files that describe the model, except a projection that it already has; return notes for the user.

    Args:
        frame: the tokens that the tokenizer puts around a text.
        width: dimensions of a token's state.

    Raises UserError if the layout cannot express the model.
    """
    if (frame and not config.pool_special) or not config.pool_prompt:
        raise UserError("PyLate's layout scores every token, and this model ignores some: use --format mlx or hf")
    if config.query_expansion and config.query_max_length != config.query_expansion:
        raise UserError(
            f"PyLate's layout truncates queries at the length to which it fills them, and this model fills them up to "
            f"{config.query_expansion} tokens and truncates them at {config.query_max_length}: use --format mlx or hf"
        )
    path = config.dense[0]["path"] or PROJECTION if config.dense else PROJECTION
    kinds = [("sentence_transformers.models.Transformer", ""), ("pylate.models.Dense.Dense", path)]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(kinds)]
    sentence_transformers_files.write_json(folder, modules, models_sentence_transformers_files.MODULES)
    longest = max(config.max_length, config.query_max_length)
    limits = {"max_seq_length": longest, "do_lower_case": config.lowercase}
    sentence_transformers_files.write_json(folder, limits, models_sentence_transformers_files.SENTENCE)
    length = config.query_expansion or config.query_max_length
    settings = {"__version__": {"sentence_transformers": "5.0.0"}, "model_type": "ColBERT"}
    settings |= {"similarity_fn_name": "MaxSim", "query_prefix": "", "document_prefix": "", "query_length": length}
    settings |= {"document_length": config.max_length, "skiplist_words": config.skiplist}
    settings |= {"do_query_expansion": bool(config.query_expansion), "prompts": config.prompts}
    settings |= {"attend_to_expansion_tokens": config.attend_expansion, "default_prompt_name": None}
    sentence_transformers_files.write_json(folder, settings, models_sentence_transformers_files.SETTINGS)
    notes = []
    if not config.dense:  # PyLate would add a random one
        identity = {"in_features": width, "out_features": width, "bias": False, "activation": "Identity"}
        place = sentence_transformers_files.write_dense(folder, identity | {"path": path})
        mx.save_safetensors(str(place / "model.safetensors"), {"linear.weight": mx.eye(width)}, {"format": "pt"})
        notes.append(f"{path} is the identity: the layout needs a projection, and the model has none")
    if config.maxsim == "mean":
        notes.append(
            "other libraries sum over a query's tokens, and this model takes the mean: the ranking is the same"
        )
    if config.impute:
        notes.append("other libraries score every token: only retrieval_config.json holds XTR's imputation")
    return notes
