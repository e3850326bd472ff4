"""Takes the steps of a chat run with mlx-lm's loop, with our loss, optimizer and gradients in float32.

tune(model, Optimizer(model.trainable_parameters(), 1e-4, 0.0, 1.0), parts, steps=100, per_step=1, callback=callback)

The arithmetic of a step is mlx-lm's, which has no argument for some of what is needed here: see `tune`,
`float32_gradients` and `compiled`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim

from mlx_retrieval.models.model_runner import in_float32
from mlx_retrieval.training import loss_scale
from mlx_retrieval.training.chat.data import Part
from mlx_retrieval.training.optimizer import AdamW


def loss_of(model: nn.Module, ids: mx.array, counted: mx.array, share: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cross-entropy of a batch and the number of counted tokens, both scalars, as mlx-lm's trainer does.

    Args:
        ids: (R, L + 1) int32.
        counted: (R, L) bool: whether ids[:, 1:] counts there.
        share: float32 scalar, the divisor of the sum over counted tokens; for the mean, their number.

    mlx-lm's own `default_loss` counts one token of padding after every text, and is NaN where nothing counts.
    """
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    total = mx.where(counted, losses, 0).astype(mx.float32).sum()
    # A loss that is not finite must have no finite gradient, so that the optimizer changes nothing.
    total = total * mx.where(mx.isfinite(total), 1.0, math.nan)
    return total / share, counted.sum()


def value_and_grad(model: nn.Module, loss: Callable, largest: float = loss_scale.LARGEST[0]) -> Callable:
    """Return what `nn.value_and_grad(model, loss)` returns, but with float32 gradients.

    In float16 they come from a scaled loss (loss_scale.py): the gradient that enters the model at a counted token is at
    most 1 / share, so the power of two at `share` brings it to about 1, and times `largest` to about `largest`.
    """
    is_scaled = loss_scale.is_needed(model)

    def scaled(model: nn.Module, *batch: mx.array) -> tuple[mx.array, ...]:
        value, count = loss(model, *batch)
        scale = largest * loss_scale.power_of_two(batch[-1]) if is_scaled else mx.array(1.0)
        return value * scale, value, count, scale

    scaled_value_and_grad = nn.value_and_grad(model, scaled)

    def function(model: nn.Module, *batch: mx.array) -> tuple[tuple[mx.array, mx.array], dict]:
        (_, value, count, scale), grads = scaled_value_and_grad(model, *batch)
        grads = in_float32(grads)
        return (value, count), loss_scale.unscaled(grads, scale) if is_scaled else grads

    return function


class Optimizer(AdamW):
    """AdamW with clipping, as for retrieval models; a gradient that is not finite changes nothing.

    `state["grad_norm"]` is the gradient's norm before clipping.
    """

    def __init__(self, parameters: dict, learning_rate: float, weight_decay: float, limit: float):
        super().__init__(parameters, learning_rate, weight_decay)
        self.limit = limit
        self.state["grad_norm"] = mx.array(0.0)
        self._good: mx.array | None = None

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        clipped, norm = optim.clip_grad_norm(gradients, self.limit or math.inf)
        self._good, step = mx.isfinite(norm), self.step
        updated = super().apply_gradients(clipped if self.limit else gradients, parameters)
        self.state["step"] = mx.where(self._good, self.step, step)
        self.state["grad_norm"], self._good = norm, None
        return updated

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        before = dict(state)
        updated = super().apply_single(gradient, parameter, state)
        for name, value in before.items():
            state[name] = mx.where(self._good, state[name], value)
        return mx.where(self._good, updated, parameter)


class StopTraining(Exception):  # noqa: N818  (no error: it ends mlx-lm's loop)
    """Raised by a callback to end mlx-lm's `train` after a step."""


def tune(
    model: nn.Module,
    optimizer: Optimizer,
    parts: Iterable[Part],
    steps: int,
    per_step: int,
    callback,
    largest: float = loss_scale.LARGEST[0],
) -> None:
    """Run mlx-lm's `train` on `parts`, `per_step` of them a step, without its output.

    mlx-lm knows no way to end early, and at its own end it would write the weights once more. So
    `callback.on_train_loss_report(info)`, which it calls after each step with the step's loss as `info["train_loss"]`,
    must raise StopTraining after the last step. `largest`: see `value_and_grad`.
    """
    from mlx_lm.cli_ui import make_console
    from mlx_lm.tuner.trainer import TrainingArgs, train

    arguments = TrainingArgs(
        iters=steps * per_step,
        steps_per_report=per_step,
        steps_per_save=steps * per_step + 1,
        grad_accumulation_steps=per_step,
    )
    console = make_console()  # mlx-lm's own, one a process; Reporter prints in its place
    before = console.quiet
    console.quiet = True
    try:
        with float32_gradients(largest):
            train(
                model=model,
                optimizer=optimizer,
                train_dataset=None,
                args=arguments,
                loss=loss_of,
                iterate_batches=lambda **_: (part.arrays for part in parts),
                training_callback=callback,
            )
    except StopTraining:
        pass
    finally:
        console.quiet = before


@contextmanager
def float32_gradients(largest: float) -> Iterator[None]:
    """Let mlx-lm's step use `value_and_grad` of this file. It has no argument for that, so it gets another `nn`."""
    from mlx_lm.tuner import trainer

    trainer.nn = SimpleNamespace(**vars(nn) | {"value_and_grad": partial(value_and_grad, largest=largest)})
    try:
        yield
    finally:
        trainer.nn = nn


@contextmanager
def compiled(allowed: bool) -> Iterator[None]:
    """Let mlx-lm compile its step, or not. It has no argument for that, so compilation is disabled in the process."""
    if not allowed:
        mx.disable_compile()
    try:
        yield
    finally:
        if not allowed:
            mx.enable_compile()
