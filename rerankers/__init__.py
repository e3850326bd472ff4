"""Rerankers: what is common to those that judge a query and documents together. `rerank.Reranker` is their use.

pairs.py     a query and its documents -> token sequences, in each kind's own format
layout.py    what a model's folder says of being a reranker, and its head
groups.py    rows of text -> batches of groups: a query, documents, labels

exporting.py         a merged reranker's folder: weights and config.json of each kind
tokenizer_export.py  its tokenizer, and the chat template that is a judge's prompt
score_agreement.py   does the folder give the scores that it should?
card.py              what its README.md says
"""

KINDS = ("qwen3", "cross-encoder", "listwise")
