"""Settings that make a backbone a retrieval model: pooling, prompts, lengths and the like.

They are saved as `retrieval_config.json` beside the weights, and training, evaluation, inference and export all read
them from there. `loading.base_model_config` makes them for a base model that has no such file.
"""

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.models import rerankers
from mlx_retrieval.models.heads import POOLING, Dense, EmbeddingHead, LateHead
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import SettingError, UserError

FILE = "retrieval_config.json"


@dataclass
class RetrievalConfig:
    """How texts become tokens, and how token states become vectors or scores."""

    task: str = "embed"  # a vector a text; or "late": a vector a token; or "rerank"
    base_model: str = ""  # its name in training: a folder, a GGUF or a hub name
    base_fingerprint: dict = field(default_factory=dict)  # of the base model's weights, see lora.fingerprint
    pooling: str = "mean"  # mean, cls, last or max
    pool_special: bool = True  # whether mean and max count the tokenizer's opening and closing tokens
    pool_prompt: bool = True  # whether they count the prompt's tokens
    normalize: bool = True  # scale vectors to unit length
    append_eos: bool = False  # end every text with the end-of-sequence token
    lowercase: bool = False
    bidirectional: bool = False
    query_prompt: str = ""
    document_prompt: str = ""
    task_prompts: dict[str, str] = field(default_factory=dict)  # further prompts, by name
    max_length: int = 512  # tokens of a document
    query_max_length: int = 512  # tokens of a query
    # Layers after pooling, or on every token: arguments of heads.Dense, and "path", the base model's subfolder with the
    # weights ("" = a new layer).
    dense: list[dict] = field(default_factory=list)
    maxsim: str = "mean"  # late: mean or sum over a query's tokens
    skiplist: list[str] = field(default_factory=list)  # late: tokens that do not count in documents
    query_expansion: int = 0  # late: tokens that queries are filled up to with mask tokens; 0 = not filled
    attend_expansion: bool = False  # late: whether a query's other tokens attend to those mask tokens
    impute: int = 0  # late: retrieved tokens a query token in XTR's scores; 0 = use all similarities
    reranker: str = ""  # rerank: one of rerankers.KINDS; max_length is then of query and document together
    instruction: str = ""  # rerank: the instruction by which qwen3 and listwise models judge
    activation: str = ""  # rerank: of scores in use, not in training: sigmoid, or "" = none
    dtype: str = "auto"  # to compute in, one of backend.DTYPES
    dimensions: int = 0  # length of a vector, as it is trained
    truncate_dim: int = 0  # embed: only the first N dimensions are used; 0 = all
    matryoshka_dims: list[int] = field(default_factory=list)  # shorter vector lengths that were trained as well

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
        """Return the head of an embedding model under this config, with newly initialised dense layers."""
        layers = [Dense(**{k: v for k, v in layer.items() if k != "path"}) for layer in self.dense]
        return LateHead(layers) if self.task == "late" else EmbeddingHead(self.pooling, layers, self.normalize)

    def write(self, folder: Path) -> None:
        """Write `retrieval_config.json` into `folder`."""
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "RetrievalConfig":
        """Read `retrieval_config.json`; UserError if it is missing, broken or has keys unknown to this version."""
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder}: no {FILE}, so this is no adapter folder of this toolkit")
        values = read_json(path)
        if not isinstance(values, dict):
            raise UserError(f"{path}: not a JSON object")
        if unknown := set(values) - {f.name for f in dataclasses.fields(cls)}:
            raise UserError(f"{path}: unknown keys {', '.join(sorted(unknown))}")
        return cls(**values)

    def override(self, **flags) -> "RetrievalConfig":
        """Return a copy with every flag that is not None.

        Unless it is given, query_max_length follows query_expansion, as ColBERT truncates queries at the length that it
        fills them up to, and of a model without expansion max_length.

        Raises UserError for an unknown pooling, and for a flag that this kind of model would not use.
        """
        given = {name: value for name, value in flags.items() if value is not None}
        config = dataclasses.replace(self, **given)
        if "query_max_length" not in given and (given.get("query_expansion") or "max_length" in given):
            config.query_max_length = config.query_expansion or config.max_length
        if config.pooling not in POOLING:
            raise UserError(f"pooling {config.pooling!r} is unknown; known: {', '.join(POOLING)}")
        config._check_reranking(given)
        if given.get("attend_expansion") and not config.query_expansion:
            raise SettingError("{attend_expansion} needs a {query_expansion}: queries have no mask tokens")
        return config

    def _check_reranking(self, given: Collection[str]) -> None:
        """Raise SettingError if a field is given that only other kinds of rerankers use."""
        if "instruction" in given and self.reranker not in rerankers.INSTRUCTED:
            raise SettingError(
                "{instruction} is for rerankers of the kinds {kinds}, and this one is {kind}",
                kinds=" and ".join(rerankers.INSTRUCTED),
                kind=self.reranker or self.task,
            )
        if "query_max_length" in given and self.task == "rerank" and self.reranker != "listwise":
            raise SettingError(
                "{query_max_length} is for listwise rerankers, and this one is {kind}: its {max_length} is that of "
                "query and document together",
                kind=self.reranker,
            )
