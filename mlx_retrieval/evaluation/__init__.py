"""Compute figures with their intervals: folders, MTEB, rerankers, indices."""
