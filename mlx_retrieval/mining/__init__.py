"""Make training data: hard negatives, teachers' scores, pairs of docstring and code, questions for documents."""
