"""Use a model: embed, rerank, quantise, check, serve."""
