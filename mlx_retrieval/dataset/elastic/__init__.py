"""Read documents and training rows from Elasticsearch."""
