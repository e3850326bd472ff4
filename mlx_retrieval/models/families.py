"""The families of models that load: the one table for `embed.py --models`, docs/models.md, README.md and defaults.

python -m mlx_retrieval.models.families      # writes docs/models.md, and the sentence of README.md that lists them
"""

import re
from textwrap import wrap
from types import ModuleType
from typing import NamedTuple

from mlx_retrieval.backbones import (
    bert,
    deberta,
    decoder,
    distilbert,
    eurobert,
    gte,
    modernbert,
    mpnet,
    nomic_bert,
    t5,
)
from mlx_retrieval.models.rerankers import TENSORS
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.files import write_file
from mlx_retrieval.utils.text import CHECKOUT

PAGE, README = CHECKOUT / "docs" / "models.md", CHECKOUT / "README.md"
WIDTHS = {PAGE: 120, README: 127}  # of a line
SENTENCE = "[These load](docs/models.md): "  # the beginning of README.md's list
CHECKED = "transformers 5.24"  # whose states and gradients the tests compare with


class Family(NamedTuple):
    """One row.

    Attributes:
        names: of its architectures, in words.
        module: the file that loads them.
        models: names on the Hub of some that people use.
        pooling: of a model whose files name none.
        prompts: of queries and documents, for models whose files name none and whose authors want some.
        note: what else there is to say.
        checked: the library that computes the same.
    """

    names: tuple[str, ...]
    module: ModuleType
    models: tuple[str, ...]
    pooling: str = "mean"
    prompts: tuple[str, str] | None = None
    note: str = ""
    checked: str = CHECKED

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of `model_type` in config.json; () = every decoder that mlx-lm loads."""
        return getattr(self.module, "MODEL_TYPES", ())

    @property
    def title(self) -> str:
        """The names as a heading."""
        return ", ".join(self.names).replace("every", "Every")

    @property
    def file(self) -> str:
        """The file of the module, from the top of the checkout."""
        return self.module.__name__.replace(".", "/") + ".py"


FAMILIES = (
    Family(
        ("BERT", "RoBERTa", "XLM-RoBERTa", "CamemBERT"),
        bert,
        ("sentence-transformers/all-MiniLM-L6-v2", "BAAI/bge-base-en-v1.5", "BAAI/bge-reranker-v2-m3"),
    ),
    Family(
        ("ModernBERT",),
        modernbert,
        ("answerdotai/ModernBERT-base", "Alibaba-NLP/gte-modernbert-base"),
    ),
    Family(
        ("MPNet",),
        mpnet,
        ("sentence-transformers/all-mpnet-base-v2", "sentence-transformers/multi-qa-mpnet-base-dot-v1"),
    ),
    Family(
        ("DistilBERT",),
        distilbert,
        ("distilbert/distilbert-base-uncased", "sentence-transformers/msmarco-distilbert-base-tas-b"),
    ),
    Family(
        ("DeBERTa-v2 and v3",),
        deberta,
        ("mixedbread-ai/mxbai-rerank-base-v1", "mixedbread-ai/mxbai-rerank-large-v1"),
    ),
    Family(
        ("nomic-bert",),
        nomic_bert,
        ("nomic-ai/nomic-embed-text-v1.5", "Snowflake/snowflake-arctic-embed-m-long"),
        prompts=("search_query: ", "search_document: "),
        note="without mixtures of experts (v2-moe)",
    ),
    Family(
        ("GTE",),
        gte,
        (
            "Alibaba-NLP/gte-base-en-v1.5",
            "Alibaba-NLP/gte-multilingual-base",
            "Snowflake/snowflake-arctic-embed-m-v2.0",
        ),
        pooling="cls",
        note="exports are read by transformers' own class, without remote code",
        checked=f"{CHECKED}; scaled positions with the published formula",
    ),
    Family(("EuroBERT",), eurobert, ("EuroBERT/EuroBERT-210m",)),
    Family(("T5", "mT5", "umT5"), t5, ("sentence-transformers/sentence-t5-base",), note="the encoder alone"),
    Family(
        ("every decoder of mlx-lm",),
        decoder,
        ("Qwen/Qwen3-Embedding-0.6B", "google/embeddinggemma-300m", "Alibaba-NLP/gte-Qwen2-1.5B-instruct"),
        note="causal, or with attention to both sides if the config says so or with --bidirectional",
        checked=f"{CHECKED} (Gemma 3, Qwen 2 and 3, Llama, Mistral)",
    ),
)


def family_of(model_type: str) -> Family:
    """Return the row of a model_type; the decoders' for one that no encoder has."""
    return next((family for family in FAMILIES if model_type in family.model_types), FAMILIES[-1])


def names() -> str:
    """Return the names of all families as one phrase."""
    every = [name for family in FAMILIES for name in family.names]
    return f"{', '.join(every[:-1])} and {every[-1]}"


def describe(family: Family) -> Lines:
    """Return what there is to say of a family, as pairs of a name and a text."""
    encoder = bool(family.model_types)
    pooling = {"mean": "the mean of all tokens", "cls": "the first token"}[family.pooling]
    if not encoder:
        pooling = "the mean of the text's own tokens, with an end-of-sequence token"
    prompts = " and ".join(map(repr, family.prompts or ())) + ", with --query-prompt and --document-prompt"
    scores = TENSORS.keys() & set(family.model_types)
    reranker = "cross-encoder" if scores else "cross-encoder, exported to no library"
    pairs = [
        ("model_type", ", ".join(family.model_types) or "any that mlx-lm has"),
        ("file", family.file),
        ("models", ", ".join(family.models)),
        ("pooling", pooling),
        ("prompts", prompts if family.prompts else "none"),
        ("reranker", reranker if encoder else "cross-encoder, qwen3 (yes or no), listwise"),
        ("note", family.note),
        ("checked", family.checked),
    ]
    return [(name, text) for name, text in pairs if text]


INTRODUCTION = (
    "A model is a folder with config.json and safetensors, a GGUF, or a name on the Hub. Its pooling, prompts and "
    "lengths are those that its files name: sentence-transformers', PyLate's or this toolkit's own. The pooling below "
    "is that of a model whose files name none. Each family was compared with the named library on small random "
    "models: states, gradients, 4 and 8 bits, and exports. The models are examples, and were not downloaded for that."
)


def page() -> str:
    """Return docs/models.md."""
    head = ["# Models that load", "", *wrap(INTRODUCTION, WIDTHS[PAGE]), "", "```sh", "python embed.py --models", "```"]
    lines = [*head, "", *wrap(f"These load: {names()}.", WIDTHS[PAGE])]
    for family in FAMILIES:
        lines += ["", f"## {family.title}", ""]
        lines += [f"- {name}: {_as_code(name, text)}" for name, text in describe(family)]
    return "\n".join(lines) + "\n"


def _as_code(name: str, text: str) -> str:
    """Return a text of `describe` with paths and names of models in Markdown's code quotes."""
    return ", ".join(f"`{part}`" for part in text.split(", ")) if name in ("file", "models") else text


def with_names(readme: str) -> str:
    """Return README.md with the names of all families in its sentence, whose paragraph is wrapped again."""
    paragraphs = readme.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if SENTENCE in paragraph:
            text = re.sub(rf"({re.escape(SENTENCE)})[^.]*", rf"\g<1>{names()}", " ".join(paragraph.split()))
            lines = wrap(text, WIDTHS[README], break_long_words=False, break_on_hyphens=False)
            paragraphs[i] = "\n".join(lines)
    return "\n\n".join(paragraphs)


if __name__ == "__main__":
    write_file(PAGE, page())
    write_file(README, with_names(README.read_text(encoding="utf-8")))
