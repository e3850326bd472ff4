"""Read the description of a late-interaction model in PyLate's layout, or in that of sentence-transformers 6.

sentence-transformers' MultiVectorEncoder reads PyLate's layout and writes its own; both are read here.
"""

import string
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.models import sentence_transformers_files
from mlx_retrieval.utils.errors import UserError

KINDS = ("ColBERT", "MultiVectorEncoder")  # model_type of PyLate's and of sentence-transformers' folders
MODULE_KINDS = ("Transformer", "Dense", "MultiVectorMask", "Normalize")
PROJECTION = "1_Dense"


def is_late(folder: Path) -> bool:
    """Return whether a folder's files say that it holds a late-interaction model."""
    return (
        sentence_transformers_files.optional_json(folder / sentence_transformers_files.SETTINGS).get("model_type")
        in KINDS
    )


def read(folder: Path) -> dict[str, Any]:
    """Return fields of RetrievalConfig from a late-interaction model's folder; UserError for an unknown module."""
    modules = sentence_transformers_files.modules_of(folder)
    settings = sentence_transformers_files.optional_json(folder / sentence_transformers_files.SETTINGS)
    kinds = [kind for kind, _ in modules]
    if set(kinds) - set(MODULE_KINDS) or kinds.count("Transformer") != 1 or kinds[0] != "Transformer":
        raise UserError(f"{folder}: a late-interaction model of {', '.join(kinds)}; known: {', '.join(MODULE_KINDS)}")
    sentence = sentence_transformers_files.optional_json(folder / sentence_transformers_files.SENTENCE)
    merged = sentence | {name: value for name, value in settings.items() if value is not None}
    mask = next((read_json(folder / Path(path).name / "config.json") for kind, path in modules if "Mask" in kind), None)
    expansion = _expansion(merged)
    fields = {
        "task": "late",
        "maxsim": "sum",
        "lowercase": bool(sentence.get("do_lower_case", False)),
        "dense": [
            sentence_transformers_files.dense(folder, Path(path).name, of_tokens=True)
            for kind, path in modules
            if kind == "Dense"
        ],
        "skiplist": _skiplist(folder, merged, mask),
        **expansion,
        **sentence_transformers_files.prompts(settings),
    }
    for role, name in (("query", "query_prompt"), ("document", "document_prompt")):
        fields[name] = merged.get(f"{role}_prefix") or fields[name]
    limit = sentence_transformers_files.longest(folder, sentence) or 512
    fields["max_length"] = int(merged.get("document_length") or limit)
    fields["query_max_length"] = int(merged.get("query_length") or expansion.get("query_expansion") or limit)
    return fields


def _skiplist(folder: Path, settings: dict, mask: dict | None) -> list[str]:
    """Return the tokens that do not count in documents: punctuation, if a folder of PyLate's does not say."""
    if mask is None:
        return list(settings.get("skiplist_words", string.punctuation if settings["model_type"] == "ColBERT" else ()))
    if mask.get("skiplist_tasks", ["document"]) != ["document"] or mask.get("keep_only_token_ids"):
        raise UserError(f"{folder}: only a skip list for documents is supported, and its MultiVectorMask has another")
    return list(mask.get("skiplist_words") or [])


def _expansion(settings: dict) -> dict[str, Any]:
    """Return the fields of query expansion, from PyLate's keys or from sentence-transformers'."""
    expansion = settings.get("query_expansion")
    if isinstance(expansion, dict):
        if expansion.get("strategy") != "fixed":
            raise UserError(f"query expansion by {expansion.get('strategy')} is not supported; known: fixed")
        return {"query_expansion": int(expansion["length"]), "attend_expansion": bool(expansion.get("attend"))}
    if settings.get("do_query_expansion", settings.get("model_type") == "ColBERT"):
        attend = bool(settings.get("attend_to_expansion_tokens"))
        return {"query_expansion": int(settings.get("query_length") or 32), "attend_expansion": attend}
    return {}
