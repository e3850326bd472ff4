"""Where the time of a training step goes: `python train.py --profile 20`."""

import time

from mlx_retrieval import backend
from mlx_retrieval.models.batching import micro_batches

FORWARD = ("forward, queries", "forward, documents")
PHASES = ("data", "forward", *FORWARD, "loss", "backward", "forward, loss, backward", "optimizer")


def profile(run: "Run") -> dict[str, float]:  # noqa: F821  (train.py stands above this file)
    """Train `--profile` steps after a first one that also compiles, print where their time went, and keep nothing.

    Returns seconds of a step by phase, of the whole `step`, of an `evaluation` of all tasks, and a step's `tokens`.
    """
    trainer, settings = run.trainer, run.settings
    clock, tokens = trainer.clock, 0
    stream = trainer.batches.stream(0, settings.profile + 1)
    try:
        for step in range(1, settings.profile + 2):
            if step == 2:
                clock.seconds.clear()
                tokens, began = 0, time.perf_counter()
            with clock("data"):
                batch = next(stream)
            trainer.update(batch, step)
            tokens += batch.tokens
        whole = time.perf_counter() - began
    finally:
        stream.close()
    found = {phase: seconds / settings.profile for phase, seconds in clock.seconds.items()}
    if "forward" in found and run.retrieval.task != "rerank":  # whose queries and documents go together
        shares = _sides(trainer.grad_cache, batch)
        found |= {name: found["forward"] * share for name, share in zip(FORWARD, shares, strict=True)}
    found |= {"step": whole / settings.profile, "tokens": tokens / settings.profile}
    if run.evaluations:
        with clock("evaluation"):
            run.evaluations.evaluate()
        found["evaluation"] = clock.seconds["evaluation"]
    _print(found, settings)
    return found


def _sides(gradient_of: "GradientCache", batch: "Batch") -> tuple[float, float]:  # noqa: F821
    """Shares of queries and documents in a forward pass, by a batch's computed apart: in a step they go together."""
    seconds = []
    for part in (batch.texts.part(0, batch.queries), batch.texts.part(batch.queries, len(batch.texts))):
        rows = [rows for _, rows in micro_batches(part, backend.MICRO_BATCH_TOKENS, gradient_of.pad_id)]
        for _ in range(2):  # the first compiles
            began = time.perf_counter()
            list(gradient_of.runner.representations(rows))
            taken = time.perf_counter() - began
        seconds.append(taken)
    return seconds[0] / sum(seconds), seconds[1] / sum(seconds)


def _print(found: dict[str, float], settings: "Settings") -> None:  # noqa: F821
    from mlx_retrieval.utils.console import print_lines, print_rows

    step, tokens = found["step"], found["tokens"]
    phases = [phase for phase in PHASES if phase in found and not (phase == "forward" and FORWARD[0] in found)]
    seconds = {phase: found[phase] for phase in phases}
    seconds |= {"other": step - sum(seconds.values()), "step": step}
    rows = [
        (phase, f"{1e3 * s:,.1f}", f"{s / step:.1%}", "" if phase in ("data", "other") else f"{tokens / s:,.0f}")
        for phase, s in seconds.items()
    ]
    if "evaluation" in found:
        rows.append(("evaluation (all tasks)", f"{1e3 * found['evaluation']:,.1f}", "", ""))
    title = f"{settings.profile} steps of {settings.batch_size} rows, {tokens:,.0f} tokens each without padding"
    print_rows(title, ("phase", "ms", "of a step", "tokens/s"), rows)
    print_lines([("profile", "nothing was written; one step before these, which also compiles, is left out")])
