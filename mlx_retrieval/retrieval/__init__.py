"""Find documents in a corpus: indices, chunks, BM25, fusion, late interaction."""
