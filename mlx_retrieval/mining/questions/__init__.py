"""Questions for the chunks of documents: generators, the file that keeps them, and the filter."""
