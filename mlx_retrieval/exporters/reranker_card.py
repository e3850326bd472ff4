"""What the README.md of an exported reranker says besides what every exported folder's says. Used by model_card.py."""

import json
from collections.abc import Sequence

from mlx_retrieval.models.retrieval_config import RetrievalConfig

TAGS = ("text-ranking", "reranker", "retrieval", "mlx-retrieval")
KINDS = {
    "cross-encoder": "reads query and document together: one score",
    "qwen3": 'a language model that answers yes or no: its logit of "yes" less that of "no"',
    "listwise": "reads up to 64 documents together: of each the cosine with the query",
}
LICENCES = {"listwise": "jina-reranker-v3's weights are CC-BY-NC-4.0, and so is what is made of them."}
SPELLED = """Texts that spell the tokenizer's special tokens become them there; `rerank.Reranker` takes them for
ordinary characters."""


def rows(config: RetrievalConfig, dtype: str) -> list[tuple[str, str]]:
    """The table of what the model is."""
    of = "of a document" if config.reranker == "listwise" else "of query and document together"
    lengths = f"{config.max_length:,} {of}, in tokens"
    if config.reranker == "listwise":
        lengths = f"{config.query_max_length:,} of a query, {lengths}"
    found = [
        ("kind", KINDS[config.reranker]),
        ("score", "from 0 to 1: the sigmoid" if config.activation == "sigmoid" else "as it is, without a sigmoid"),
        ("longest", lengths),
        ("weights", dtype),
    ]
    if config.instruction:
        found.insert(2, ("instruction", f"`{json.dumps(config.instruction, ensure_ascii=False)}`"))
    return found


def use(config: RetrievalConfig, form: str, name: str, answers: Sequence[int] | None) -> list[str]:
    """How to load the folder, one block of Markdown a library.

    answers: a judge's tokens of no and yes, where a chat template is its prompt.
    """
    judge = config.reranker == "qwen3"
    blocks = []
    if form == "sentence-transformers":
        version = "6 or newer; the prompt is the tokenizer's chat template" if judge else "4 or newer"
        told = '`model.predict(pairs, prompt="...")` judges by another instruction. ' if judge else ""
        blocks.append(
            f"""With sentence-transformers, {version}:

```python
from sentence_transformers import CrossEncoder

model = CrossEncoder("{name}")
print(model.predict([("where are the keys?", "The keys are in the drawer.")]))
```

{told}{SPELLED}
"""
        )
    if answers:
        no, yes = answers
        blocks.append(
            f"""With mlx-lm, as the language model that it is:

```python
import mlx.core as mx
from mlx_lm import load

model, tokenizer = load("{name}")
pair = {{"query": "where are the keys?", "document": "The keys are in the drawer."}}
messages = [{{"role": role, "content": text}} for role, text in pair.items()]
logits = model(mx.array([tokenizer.apply_chat_template(messages)]))[0, -1]
print(mx.sigmoid(logits[{yes}] - logits[{no}]))  # yes less no
```

{SPELLED}
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
