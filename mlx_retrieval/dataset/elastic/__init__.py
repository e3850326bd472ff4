"""Elasticsearch: documents to train on, vectors written back, and an index that is searched there."""
