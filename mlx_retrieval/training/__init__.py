"""Train: settings, run, trainer, gradient cache, objectives, several machines, checkpoints, reports."""
