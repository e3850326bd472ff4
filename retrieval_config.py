"""What makes a backbone a retrieval model: pooling, prompts, lengths. One place, read by training, evaluation and use.

A model that says itself how it pools and prompts (sentence-transformers' files) is believed; flags win over it; what
was used is saved as `retrieval_config.json` beside the weights and read back from there.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from backend import UserError

from heads import POOLING, EmbeddingHead
from models import ENCODERS
from models.source import read_json
from tokens import TextTokenizer, load_tokenizer

FILE = "retrieval_config.json"
ROLES = ("query", "document")


@dataclass
class RetrievalConfig:
    """How texts become tokens and states become what is compared; see the fields."""

    task: str = "embed"
    base_model: str = ""  # as it was named at training; a folder or a hub name
    base_fingerprint: dict = field(default_factory=dict)  # of the base's weights, see models.fingerprint
    pooling: str = "mean"  # mean, cls, last or max
    pool_special: bool = True  # mean and max count the tokenizer's own opening and closing tokens
    pool_prompt: bool = True  # ... and the prompt's tokens
    append_eos: bool = False  # close every text with the end-of-sequence token
    lowercase: bool = False
    bidirectional: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    max_length: int = 512  # tokens of a document
    query_max_length: int = 512  # tokens of a query
    dimensions: int = 0  # of a vector
    matryoshka_dims: list[int] = field(default_factory=list)  # shorter vectors that were trained as well

    def tokenizer(self, folder: Path) -> TextTokenizer:
        """The tokenizer of the model in `folder` under this config's prompts and limits."""
        return TextTokenizer(
            folder,
            prompts={"query": self.query_prompt, "document": self.document_prompt},
            max_lengths={"query": self.query_max_length, "document": self.max_length},
            append_eos=self.append_eos,
            pool_special=self.pool_special,
            pool_prompt=self.pool_prompt,
            lowercase=self.lowercase,
        )

    def head(self) -> EmbeddingHead:
        """The head that this config describes."""
        return EmbeddingHead(self.pooling)

    def write(self, folder: Path) -> None:
        """Write `retrieval_config.json` into `folder`."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "RetrievalConfig":
        """Read it back; UserError where it is missing, broken or has keys that this version does not know."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {FILE}, so this is no adapter folder of this toolkit")
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a JSON object")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise UserError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
        return cls(**values)

    def override(self, **flags) -> "RetrievalConfig":
        """A copy with every flag that is not None put in its place; queries follow max_length unless told otherwise."""
        if flags.get("max_length") is not None and flags.get("query_max_length") is None:
            flags["query_max_length"] = flags["max_length"]
        config = dataclasses.replace(self, **{name: value for name, value in flags.items() if value is not None})
        if config.pooling not in POOLING:
            raise UserError(f"pooling {config.pooling!r} is unknown; known: {', '.join(POOLING)}")
        return config


def of_base_model(folder: Path, model_config: dict) -> RetrievalConfig:
    """What a base model says of itself, or what suits its kind where it says nothing.

    Encoders: mean over all tokens. Decoders: mean over the text's own tokens, an `<eos>` at the end, and Gemma's
    reserved tokens as prompts where the vocabulary has them.
    """
    if (folder / "modules.json").is_file():
        config = _from_sentence_transformers(folder)
    elif model_config["model_type"] in ENCODERS:
        config = RetrievalConfig()
    else:
        config = RetrievalConfig(pool_special=False, append_eos=True)
        tokenizer = load_tokenizer(folder)
        if tokenizer.token_to_id("<unused0>") is not None and tokenizer.token_to_id("<unused1>") is not None:
            config.query_prompt, config.document_prompt = "<unused0>", "<unused1>"
    return config


def _read_json(path: Path) -> dict:
    """The file's content, {} where it is missing: a model need not have any of these files."""
    return read_json(path) if path.is_file() else {}


def _from_sentence_transformers(folder: Path) -> RetrievalConfig:
    """Pooling, prompts and lengths from `modules.json` and the files it names (both layouts, 2.x to 6.x)."""
    config = RetrievalConfig()
    modules = _read_json(folder / "modules.json")
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if unknown := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(
            f"{folder}: modules.json names {', '.join(sorted(unknown))}; only Transformer, Pooling and Normalize "
            "can be loaded so far"
        )
    pooling_folder = next((m["path"] for m in modules if m["type"].endswith("Pooling")), "1_Pooling")
    config.pooling, config.pool_prompt = _pooling(_read_json(folder / Path(pooling_folder).name / "config.json"))
    sentence = _read_json(folder / "sentence_bert_config.json")
    config.lowercase = bool(sentence.get("do_lower_case", False))
    # From version 6 on the limit is the tokenizer's; one that has none says so with an absurdly large number.
    limit = sentence.get("max_seq_length") or _read_json(folder / "tokenizer_config.json").get("model_max_length")
    if limit and limit < 1_000_000:
        config.max_length = config.query_max_length = int(limit)
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    config.query_prompt = prompts.get("query", "")
    config.document_prompt = prompts.get("document", prompts.get("passage", ""))
    return config


def _pooling(settings: dict) -> tuple[str, bool]:
    """(mode, prompt counts) of a Pooling module's config."""
    names = {
        "mean_tokens": "mean",
        "mean_sqrt_len_tokens": "mean",  # differs in length alone, and every vector is scaled to unit length
        "cls_token": "cls",
        "max_tokens": "max",
        "lasttoken": "last",
    }
    flag = "pooling_mode_"
    flagged = [key.removeprefix(flag) for key, value in settings.items() if key.startswith(flag) and value]
    said = settings.get("pooling_mode") or flagged
    modes = [names.get(mode, mode) for mode in ([said] if isinstance(said, str) else said)] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLING:
        raise UserError(f"pooling by {' and '.join(modes)} is not supported; known: {', '.join(POOLING)}")
    return modes[0], bool(settings.get("include_prompt", True))
