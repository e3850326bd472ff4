"""From a folder of documents to a model of their own: stages that are kept, and skipped when they are done."""
