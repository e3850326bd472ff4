"""How late-interaction models are described on disk: PyLate's layout, which sentence-transformers 6 reads as well, and
what its MultiVectorEncoder itself writes.
"""

import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend import UserError, mx

import sentence_layout
from models.source import read_json

if TYPE_CHECKING:
    from retrieval_config import RetrievalConfig

KINDS = ("ColBERT", "MultiVectorEncoder")  # model_type of PyLate's and of sentence-transformers' folders
PROJECTION = "1_Dense"


def is_late(folder: Path) -> bool:
    """Whether a folder says that it holds a late-interaction model."""
    return sentence_layout.optional_json(folder / sentence_layout.SETTINGS).get("model_type") in KINDS


def read(folder: Path) -> dict[str, Any]:
    """Fields of `RetrievalConfig` from such a folder. UserError for what is not known here."""
    modules = sentence_layout.modules_of(folder)
    settings = sentence_layout.optional_json(folder / sentence_layout.SETTINGS)
    known = ("Transformer", "Dense", "MultiVectorMask", "Normalize")
    kinds = [kind for kind, _ in modules]
    if set(kinds) - set(known) or kinds.count("Transformer") != 1 or kinds[0] != "Transformer":
        raise UserError(f"{folder}: a late-interaction model of {', '.join(kinds)}; known: {', '.join(known)}")
    sentence = sentence_layout.optional_json(folder / sentence_layout.SENTENCE)
    said = sentence | {name: value for name, value in settings.items() if value is not None}
    mask = next((read_json(folder / Path(path).name / "config.json") for kind, path in modules if "Mask" in kind), None)
    expansion = _expansion(said)
    fields = {
        "task": "late",
        "maxsim": "sum",
        "lowercase": bool(sentence.get("do_lower_case", False)),
        "dense": [
            sentence_layout.dense(folder, Path(path).name, of_tokens=True) for kind, path in modules if kind == "Dense"
        ],
        "skiplist": _skiplist(folder, said, mask),
        **expansion,
        **sentence_layout.prompts(settings),
    }
    for role, name in (("query", "query_prompt"), ("document", "document_prompt")):
        fields[name] = said.get(f"{role}_prefix") or fields[name]
    limit = sentence_layout.longest(folder, sentence) or 512
    fields["max_length"] = int(said.get("document_length") or limit)
    fields["query_max_length"] = int(said.get("query_length") or expansion.get("query_expansion") or limit)
    return fields


def _skiplist(folder: Path, said: dict, mask: dict | None) -> list[str]:
    """The tokens that do not count in documents; PyLate's folders that say nothing of them leave punctuation out."""
    if mask is None:
        return list(said.get("skiplist_words", string.punctuation if said["model_type"] == "ColBERT" else ()))
    if mask.get("skiplist_tasks", ["document"]) != ["document"] or mask.get("keep_only_token_ids"):
        raise UserError(f"{folder}: only a skip list for documents is known, and its MultiVectorMask wants another")
    return list(mask.get("skiplist_words") or [])


def _expansion(said: dict) -> dict[str, Any]:
    """Query expansion, in PyLate's words or in sentence-transformers'."""
    whole = said.get("query_expansion")
    if isinstance(whole, dict):
        if whole.get("strategy") != "fixed":
            raise UserError(f"query expansion by {whole.get('strategy')} is not supported; known: fixed")
        return {"query_expansion": int(whole["length"]), "attend_expansion": bool(whole.get("attend"))}
    if said.get("do_query_expansion", said.get("model_type") == "ColBERT"):
        attend = bool(said.get("attend_to_expansion_tokens"))
        return {"query_expansion": int(said.get("query_length") or 32), "attend_expansion": attend}
    return {}


def write(folder: Path, config: "RetrievalConfig", frame: list[int], width: int) -> list[str]:
    """Write what describes the model, but for a projection of its own; returns what has to be said about it.

    Args:
        frame: the tokens that the tokenizer puts around a text. width: of a token's state.

    Raises UserError where the layout has no words for what the model does.
    """
    if (frame and not config.pool_special) or not config.pool_prompt:
        raise UserError("PyLate's layout counts every token, and this model leaves some out: use --format mlx or hf")
    if config.query_expansion and config.query_max_length != config.query_expansion:
        raise UserError(
            f"PyLate's layout cuts queries where it fills them, and this model fills them up to "
            f"{config.query_expansion} and cuts them at {config.query_max_length} tokens: use --format mlx or hf"
        )
    path = config.dense[0]["path"] or PROJECTION if config.dense else PROJECTION
    kinds = [("sentence_transformers.models.Transformer", ""), ("pylate.models.Dense.Dense", path)]
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path) in enumerate(kinds)]
    sentence_layout.write_json(folder, modules, sentence_layout.MODULES)
    longest = max(config.max_length, config.query_max_length)
    limits = {"max_seq_length": longest, "do_lower_case": config.lowercase}
    sentence_layout.write_json(folder, limits, sentence_layout.SENTENCE)
    length = config.query_expansion or config.query_max_length
    settings = {"__version__": {"sentence_transformers": "5.0.0"}, "model_type": "ColBERT"}
    settings |= {"similarity_fn_name": "MaxSim", "query_prefix": "", "document_prefix": "", "query_length": length}
    settings |= {"document_length": config.max_length, "skiplist_words": config.skiplist}
    settings |= {"do_query_expansion": bool(config.query_expansion), "prompts": config.prompts}
    settings |= {"attend_to_expansion_tokens": config.attend_expansion, "default_prompt_name": None}
    sentence_layout.write_json(folder, settings, sentence_layout.SETTINGS)
    said = []
    if not config.dense:  # PyLate would add a random one
        described = {"in_features": width, "out_features": width, "bias": False, "activation": "Identity"}
        place = sentence_layout.write_dense(folder, described | {"path": path})
        mx.save_safetensors(str(place / "model.safetensors"), {"linear.weight": mx.eye(width)}, {"format": "pt"})
        said.append(f"{path} is the identity: the layout wants a projection, and the model has none")
    if config.maxsim == "mean":
        said.append("other libraries sum over a query's tokens where this model takes the mean: the same ranking")
    if config.impute:
        said.append("other libraries score every token: XTR's imputation is only in retrieval_config.json")
    return said
