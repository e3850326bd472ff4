"""How late-interaction models are described on disk: PyLate's layout, which sentence-transformers 6 reads as well, and
what its MultiVectorEncoder itself writes.
"""

import string
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.models import sentence_transformers_files
from mlx_retrieval.utils.errors import UserError

KINDS = ("ColBERT", "MultiVectorEncoder")  # model_type of PyLate's and of sentence-transformers' folders
PROJECTION = "1_Dense"


def is_late(folder: Path) -> bool:
    """Whether a folder says that it holds a late-interaction model."""
    return (
        sentence_transformers_files.optional_json(folder / sentence_transformers_files.SETTINGS).get("model_type")
        in KINDS
    )


def read(folder: Path) -> dict[str, Any]:
    """Fields of `RetrievalConfig` from such a folder. UserError for what is not known here."""
    modules = sentence_transformers_files.modules_of(folder)
    settings = sentence_transformers_files.optional_json(folder / sentence_transformers_files.SETTINGS)
    known = ("Transformer", "Dense", "MultiVectorMask", "Normalize")
    kinds = [kind for kind, _ in modules]
    if set(kinds) - set(known) or kinds.count("Transformer") != 1 or kinds[0] != "Transformer":
        raise UserError(f"{folder}: a late-interaction model of {', '.join(kinds)}; known: {', '.join(known)}")
    sentence = sentence_transformers_files.optional_json(folder / sentence_transformers_files.SENTENCE)
    said = sentence | {name: value for name, value in settings.items() if value is not None}
    mask = next((read_json(folder / Path(path).name / "config.json") for kind, path in modules if "Mask" in kind), None)
    expansion = _expansion(said)
    fields = {
        "task": "late",
        "maxsim": "sum",
        "lowercase": bool(sentence.get("do_lower_case", False)),
        "dense": [
            sentence_transformers_files.dense(folder, Path(path).name, of_tokens=True)
            for kind, path in modules
            if kind == "Dense"
        ],
        "skiplist": _skiplist(folder, said, mask),
        **expansion,
        **sentence_transformers_files.prompts(settings),
    }
    for role, name in (("query", "query_prompt"), ("document", "document_prompt")):
        fields[name] = said.get(f"{role}_prefix") or fields[name]
    limit = sentence_transformers_files.longest(folder, sentence) or 512
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
