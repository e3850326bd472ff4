"""Read source code: definitions, docstrings, file trees."""
