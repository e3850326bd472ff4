"""Where the time of a training step goes: `python train.py --profile 20`."""

import time
from collections.abc import Callable

from data_loader import Batch
from mlx_retrieval import backend
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.trainer import Trainer
from mlx_retrieval.utils.console import print_lines, print_rows
from mlx_retrieval.utils.text import quantity

FORWARD = ("forward, queries", "forward, documents")
PHASES = ("data", "forward", *FORWARD, "loss", "backward", "forward, loss, backward", "optimizer")


def profile(trainer: Trainer, evaluate: Callable[[], object] | None = None) -> dict[str, float]:
    """Time `--profile` steps after a first one that also compiles, and print a table. Write nothing.

    Args:
        evaluate: evaluates the model on all tasks; None = no evaluation is timed.

    Returns the seconds of a step by phase, of the whole `step` and of an `evaluation`, and the `tokens` of a step.
    """
    settings = trainer.settings
    clock = trainer.clock
    tokens = 0
    stream = trainer.batches.stream(0, settings.profile + 1)
    try:
        for step in range(1, settings.profile + 2):
            if step == 2:
                clock.seconds.clear()
                tokens = 0
                began = time.perf_counter()
            with clock("data"):
                batch = next(stream)
            trainer.update(batch, step)
            tokens += batch.tokens
        total = time.perf_counter() - began
    finally:
        stream.close()
    figures = {phase: seconds / settings.profile for phase, seconds in clock.seconds.items()}
    if "forward" in figures and isinstance(batch, Batch):  # rerankers read query and document together
        shares = _sides(trainer.grad_cache, batch)
        figures |= {name: figures["forward"] * share for name, share in zip(FORWARD, shares, strict=True)}
    figures |= {"step": total / settings.profile, "tokens": tokens / settings.profile}
    if evaluate:
        with clock("evaluation"):
            evaluate()
        figures["evaluation"] = clock.seconds["evaluation"]
    _print(figures, settings, trainer.batches.size)
    return figures


def _sides(grad_cache: GradientCache, batch: Batch) -> tuple[float, float]:
    """Return the shares of queries and of documents in a forward pass. A step mixes them: here they run apart."""
    seconds = []
    for texts in (batch.texts.part(0, batch.queries), batch.texts.part(batch.queries, len(batch.texts))):
        batches = grad_cache.runner.micro_batches(texts, backend.MICRO_BATCH_TOKENS, grad_cache.pad_id)
        parts = [part for _, part in batches]
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            list(grad_cache.runner.representations(parts))
            elapsed = time.perf_counter() - began
        seconds.append(elapsed)
    return seconds[0] / sum(seconds), seconds[1] / sum(seconds)


def _print(figures: dict[str, float], settings: Settings, size: int) -> None:
    step = figures["step"]
    tokens = figures["tokens"]
    phases = [phase for phase in PHASES if phase in figures and not (phase == "forward" and FORWARD[0] in figures)]
    seconds = {phase: figures[phase] for phase in phases}
    seconds |= {"other": step - sum(seconds.values()), "step": step}
    rows = [
        (phase, f"{1e3 * s:,.1f}", f"{s / step:.1%}", "" if phase in ("data", "other") else f"{tokens / s:,.0f}")
        for phase, s in seconds.items()
    ]
    if "evaluation" in figures:
        rows.append(("evaluation (all tasks)", f"{1e3 * figures['evaluation']:,.1f}", "", ""))
    steps, rows_each = quantity(settings.profile, "step"), quantity(size, "row")
    title = f"{steps} of {rows_each}, {tokens:,.0f} tokens each without padding"
    print_rows(title, ("phase", "ms", "of a step", "tokens/s"), rows)
    print_lines([("profile", "nothing was written; one step before these, which also compiles, is left out")])
