"""Write the parts of an exported folder's README.md that only rerankers have."""

import json
from collections.abc import Sequence

from mlx_retrieval.models.retrieval_config import RetrievalConfig

TAGS = ("text-ranking", "reranker", "retrieval", "mlx-retrieval")
KINDS = {
    "cross-encoder": "reads query and document together and gives one score",
    "qwen3": 'a language model that answers yes or no: the logit of "yes" minus that of "no"',
    "listwise": "reads up to 64 documents together: the cosine of each with the query",
}
LICENCES = {
    "listwise": "jina-reranker-v3's weights are licensed under CC-BY-NC-4.0, and so are models derived from them."
}
SPECIAL_TOKENS = """If a text spells out a special token, this library reads that token; `rerank.Reranker` reads
ordinary characters."""


def rows(config: RetrievalConfig, dtype: str) -> list[tuple[str, str]]:
    """Return the rows of the table that describes the model."""
    of = "of a document" if config.reranker == "listwise" else "of query and document together"
    lengths = f"{config.max_length:,} {of}, in tokens"
    if config.reranker == "listwise":
        lengths = f"{config.query_max_length:,} of a query, {lengths}"
    table = [
        ("kind", KINDS[config.reranker]),
        ("score", "from 0 to 1: the sigmoid" if config.activation == "sigmoid" else "raw, without a sigmoid"),
        ("longest", lengths),
        ("weights", dtype),
    ]
    if config.instruction:
        table.insert(2, ("instruction", f"`{json.dumps(config.instruction, ensure_ascii=False)}`"))
    return table


def use(config: RetrievalConfig, form: str, name: str, answers: Sequence[int] | None) -> list[str]:
    """Return one block of Markdown for each library that loads the folder.

    `answers`: a judge's token ids of no and yes, if a chat template is its prompt.
    """
    judge = config.reranker == "qwen3"
    blocks = []
    if form == "sentence-transformers":
        version = "6 or newer; the prompt is the tokenizer's chat template" if judge else "4 or newer"
        hint = '`model.predict(pairs, prompt="...")` judges by another instruction. ' if judge else ""
        blocks.append(
            f"""With sentence-transformers, {version}:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
print(model.predict([("where are the keys?", "The keys are in the drawer.")]))
```

{hint}{SPECIAL_TOKENS}
"""
        )
    if answers:
        no, yes = answers
        blocks.append(
            f"""With mlx-lm, as a language model:

```python
import mlx.core as mx
from mlx_lm import load

model, tokenizer = load("{name}")
pair = {{"query": "where are the keys?", "document": "The keys are in the drawer."}}
messages = [{{"role": role, "content": text}} for role, text in pair.items()]
logits = model(mx.array([tokenizer.apply_chat_template(messages)]))[0, -1]
print(mx.sigmoid(logits[{yes}] - logits[{no}]))  # yes minus no
```

{SPECIAL_TOKENS}
"""
        )
    blocks.append(
        f"""With mlx-retrieval, from its folder:

```python
from rerank import Reranker

reranker = Reranker("{name}")
print(reranker.rerank("where are the keys?", ["The keys are in the drawer."], top_n=10))
```
"""
    )
    return blocks
