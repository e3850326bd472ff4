"""Settings that make a backbone a retrieval model: pooling, prompts, lengths and the like.

They are saved as `retrieval_config.json` beside the weights, and training, evaluation, inference and export all read
them from there. `loading.base_model_config` makes them for a base model that has no such file.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.models import rerankers
from mlx_retrieval.models.heads import POOLING, Dense, EmbeddingHead, LateHead
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

FILE = "retrieval_config.json"


@dataclass
class RetrievalConfig:
    """How texts become tokens and states become what is compared; see the fields."""

    task: str = "embed"  # or late: one vector a token; or rerank
    base_model: str = ""  # as it was named at training; a folder or a hub name
    base_fingerprint: dict = field(default_factory=dict)  # of the base's weights, see models.fingerprint
    pooling: str = "mean"  # mean, cls, last or max
    pool_special: bool = True  # mean and max count the tokenizer's own opening and closing tokens
    pool_prompt: bool = True  # ... and the prompt's tokens
    normalize: bool = True  # scale vectors to unit length; without, they are compared as they are
    append_eos: bool = False  # close every text with the end-of-sequence token
    lowercase: bool = False
    bidirectional: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    task_prompts: dict[str, str] = field(default_factory=dict)  # by name: what the model has besides these two
    max_length: int = 512  # tokens of a document
    query_max_length: int = 512  # tokens of a query
    # Layers after pooling, or of every token: heads.Dense's arguments, and the base's folder they are in ("" = none).
    dense: list[dict] = field(default_factory=list)
    maxsim: str = "mean"  # late: over a query's tokens, mean or sum
    skiplist: list[str] = field(default_factory=list)  # late: tokens that do not count in documents
    query_expansion: int = 0  # late: queries are filled with mask tokens up to so many
    attend_expansion: bool = False  # ... to which their other tokens attend
    impute: int = 0  # late: XTR's scores, of so many retrieved tokens; 0 = every similarity counts
    reranker: str = ""  # rerank: see rerankers.KINDS; max_length is then of query and document together
    instruction: str = ""  # rerank: what the model is told to judge by, in the kinds that have such a line
    activation: str = ""  # rerank: of scores in use, sigmoid, or "" = as they are
    dimensions: int = 0  # of a vector
    matryoshka_dims: list[int] = field(default_factory=list)  # shorter vectors that were trained as well

    @property
    def prompts(self) -> dict[str, str]:
        """Every prompt by its name; "query" and "document" first."""
        return {"query": self.query_prompt, "document": self.document_prompt} | self.task_prompts

    def tokenizer(self, folder: Path) -> TextTokenizer | PairTokenizer:
        """Return the tokenizer of the model in `folder`, with this config's prompts and limits; a reranker's takes
        groups of a query and its documents."""
        if self.task == "rerank":
            limits = (self.max_length, self.query_max_length)
            return rerankers.tokenizer(folder, self.reranker, *limits, self.instruction)
        return TextTokenizer(
            folder,
            prompts=self.prompts,
            max_lengths={"query": self.query_max_length, "document": self.max_length},
            append_eos=self.append_eos,
            pool_special=self.pool_special,
            pool_prompt=self.pool_prompt,
            lowercase=self.lowercase,
            query_expansion=self.query_expansion,
            attend_expansion=self.attend_expansion,
        )

    def head(self) -> EmbeddingHead | LateHead:
        """The head that this config of an embedding model describes, its dense layers freshly initialised."""
        layers = [Dense(**{k: v for k, v in layer.items() if k != "path"}) for layer in self.dense]
        return LateHead(layers) if self.task == "late" else EmbeddingHead(self.pooling, layers, self.normalize)

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
