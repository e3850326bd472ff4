"""Assemble backbone, head and tokenizer into a retrieval model; batch and run it."""
