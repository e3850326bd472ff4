"""Rerankers: what is common to those that judge a query and documents together. `rerank.Reranker` is their use.

pairs.py     a query and its documents -> token sequences, in each kind's own format
layout.py    what a model's folder says of being a reranker, and its head
groups.py    rows of text -> batches of groups: a query, documents, labels
"""

KINDS = ("qwen3", "cross-encoder", "listwise")
