"""--micro-batch-tokens auto: what a step takes, the budget that fits, and what happens without room.

python -m pytest tests/training/test_memory.py
"""

import gc
from collections import defaultdict
from collections.abc import Callable
from statistics import median

from mlx_retrieval.backend import device_memory, mx

import pytest
from mlx.utils import tree_flatten

import train
from mlx_retrieval import backend
from mlx_retrieval.training import memory
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.gradient_cache import GradientCache
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.trainer import Trainer
from mlx_retrieval.utils.errors import UserError

GB = 10**9


def test_the_budget_is_the_largest_that_fits(settings, monkeypatch):
    trainer = training_run.prepare(settings(micro_batch_tokens="auto")).trainer
    before = [v.tolist() for _, v in tree_flatten(trainer.model.trainable_parameters())]
    monkeypatch.setattr(memory, "most", lambda: memory.GRID[-1])
    tokens = max(trainer.batches.batch(k).tokens for k in range(memory.SAMPLES))
    found = []
    for free in (0, 4_000_000, 16_000_000, GB):
        monkeypatch.setattr(device_memory, "free", lambda free=free: free)
        found.append(trainer.fit_memory())
        assert trainer.grad_cache.budget == trainer.state.micro_batch_tokens == found[-1].budget
    budgets, estimates = [fit.budget for fit in found], [fit.estimate for fit in found]
    assert budgets == sorted(budgets) and estimates[0] < estimates[-1]
    assert budgets[0] == memory.GRID[0] < budgets[-1] and tokens <= budgets[-1] < 2 * tokens
    assert "may be too little" in str(found[0]) and "too little" not in str(found[-1])
    assert [v.tolist() for _, v in tree_flatten(trainer.model.trainable_parameters())] == before
    monkeypatch.setattr(memory, "most", lambda: 128)  # as on CPUs, where more are no quicker
    assert trainer.fit_memory().budget == 128


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"grad_checkpoint": True}, {"train_type": "full"}))],
)
def test_auto_is_within_15_percent_of_the_peak(settings, monkeypatch, changes):
    """Regression: where passes are not compiled, the first probe also read the weights, and a token seemed to be cheap.

    On Metal that chose budgets that need five times the memory that there is.
    """
    monkeypatch.setattr(backend, "COMPILED", False)
    check_auto(settings(batch_size=32, **changes))


def check_auto(settings: Settings, peak_of: Callable = median, repeats: int = 3) -> None:
    """Compare the estimate with the peak of steps.

    Medians: how much is freed before the next array is made depends on the threads, as on a busy machine.
    """
    trainer = training_run.prepare(settings).trainer
    gc.collect()  # of earlier tests, which would count as taken, and be gone by the time of the peak
    estimate = median(trainer.fit_memory().estimate for _ in range(3))
    peaks = defaultdict(list)
    for k in [*range(memory.SAMPLES)] * repeats:
        mx.clear_cache()
        mx.reset_peak_memory()
        trainer.update(trainer.batches.batch(k), k + 1)
        peaks[k].append(backend.peak_memory())
    assert 0.85 < estimate / max(map(peak_of, peaks.values())) < 1.15, (estimate, peaks)


@pytest.mark.slow
@pytest.mark.compiled
@pytest.mark.skipif(not backend.FUSED, reason="about passes compiled as on CPUs")
def test_auto_holds_for_the_compiled_passes_of_cpus(minilm, settings):
    """With a real model, and its highest peak: threads are not at theirs at the same moment in every step."""
    check_auto(settings(model=str(minilm), batch_size=32), peak_of=max, repeats=4)


@pytest.mark.slow
def test_auto_holds_for_passes_compiled_as_on_gpus(settings, monkeypatch, as_metal):
    trainer = training_run.prepare(settings(batch_size=32, compile="on")).trainer
    fit = trainer.fit_memory()
    mx.reset_peak_memory()
    trainer.update(trainer.batches.batch(0), 1)
    assert 0.85 < fit.estimate / backend.peak_memory() < 1.15, fit


@pytest.mark.slow
def test_the_dry_run_tells_it_and_the_loss_stays(settings, capsys):
    losses = [train.train(settings(micro_batch_tokens=n, dry_run=True))["loss"] for n in ("auto", 0, 64)]
    told = [line for line in capsys.readouterr().out.splitlines() if "an estimate, with" in line]
    assert len(told) == 1 and "GB are free" in told[0]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


SHORT = "[metal::malloc] Attempting to allocate 9 bytes\nmore than there is"
METAL = "[METAL] Command buffer execution failed: "
WATCHDOG = f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)"
FAULT = f"{METAL}Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault)"


@pytest.fixture
def short(monkeypatch):
    """`short(tokens)`: a backend without room for micro-batches of more."""
    original = GradientCache.__call__

    def make(most: int, message: str = SHORT) -> None:
        def call(self, batch, seed):
            if (self.budget or backend.MICRO_BATCH_TOKENS) > most:
                raise RuntimeError(message)
            return original(self, batch, seed)

        monkeypatch.setattr(GradientCache, "__call__", call)

    return make


@pytest.mark.slow
def test_where_memory_runs_out_the_step_is_repeated_with_half(settings, tmp_path, short, capsys):
    """Equal to a run that had that budget from the start; a resumed run knows it."""
    run = {"steps": 4, "lora_dropout": 0.2}
    train.train(settings(**run, micro_batch_tokens=150, output=str(tmp_path / "whole")))
    short(150)
    train.train(settings(**run, micro_batch_tokens=600, stop_after=2))
    assert capsys.readouterr().out.count("tokens at once, and the step is repeated") == 2  # 300, 150
    train.train(train.resumed_settings({"output": str(tmp_path / "run"), "resume": True}))
    assert "repeated" not in capsys.readouterr().out
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        files = [tmp_path / folder / "final" / name for folder in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_where_not_even_one_text_has_room(settings, short, monkeypatch):
    short(0)
    with pytest.raises(UserError, match=r"memory ran out \(.*\), on a single text; --grad-checkpoint"):
        train.train(settings())

    def fail(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(GradientCache, "__call__", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train.train(settings(overwrite=True))


def test_a_device_that_does_not_recover(settings, short, monkeypatch):
    """Regression, CUDA: to free what is kept failed after memory had run out, and a traceback was all that was told."""

    def fail():
        raise RuntimeError("cudaStreamSynchronize failed: an illegal memory access was encountered")

    trainer = training_run.prepare(settings()).trainer
    short(0)
    monkeypatch.setattr(mx, "clear_cache", fail)
    with pytest.raises(UserError, match=r"ran out \(.*Attempting.*illegal memory access.*--resume"):
        trainer.update(trainer.batches.batch(0), 1)


def test_the_step_is_repeated_after_other_overloads(settings, short, monkeypatch):
    """Regression: macOS's watchdog, and what it leaves behind, ended the run with a traceback."""
    behind = [RuntimeError(f"{METAL}Discarded (victim of GPU error/recovery).")] * 2

    def synchronize():
        if behind:
            raise behind.pop()

    monkeypatch.setattr(mx, "synchronize", synchronize)
    trainer = training_run.prepare(settings(micro_batch_tokens=600)).trainer
    batch = trainer.batches.batch(0)
    expected = trainer.compute_grads(batch, 1)[0].loss.item()
    short(150, WATCHDOG)
    assert trainer.compute_grads(batch, 1)[0].loss.item() == pytest.approx(expected, rel=1e-5)
    assert not behind and trainer.grad_cache.budget == trainer.state.micro_batch_tokens == 150


@pytest.mark.parametrize("where", ["gradient", "update", "evaluation"])
def test_other_errors_of_the_gpu_save_the_run(settings, tmp_path, monkeypatch, where):
    """Regression: a traceback, and what was learnt since the last save was lost. Weights in doubt are not saved."""
    calls, message = [], WATCHDOG if where == "evaluation" else FAULT
    monkeypatch.setattr(backend, "MICRO_BATCH_TOKENS", backend.GPU_TOKENS)

    def failing(function):
        def call(*args):
            calls.append(args)
            if len(calls) > 1:
                raise RuntimeError(message)
            return function(*args)

        return call

    if where == "gradient":
        monkeypatch.setattr(GradientCache, "__call__", failing(GradientCache.__call__))
    elif where == "evaluation":
        monkeypatch.setattr(Trainer, "evaluate", failing(lambda *_: {}))
    trainer = training_run.prepare(settings(steps=3, eval_steps=1, save_steps=int(where == "update"))).trainer
    if where == "update":
        kind = type(trainer.optimizer)
        monkeypatch.setattr(kind, "update", failing(kind.update))
    with pytest.raises(UserError) as caught:
        training_run.take_steps(trainer)
    told, run = str(caught.value), tmp_path / "run"
    step = 2 if where == "evaluation" else 1
    reason = "only what was saved before is whole" if where == "update" else f"the state after step {step} is saved"
    # Less at once than the last batch took, but only where that may help.
    half = trainer.grad_cache.at_once // 2
    assert 0 < half < backend.GPU_TOKENS // 2
    way = f"train.py --resume --output {run}" + (f" --micro-batch-tokens {half}" if where == "evaluation" else ".")
    assert message in told and reason in told and f"Continue: python {way}" in told
    assert [folder.name for folder in run.glob("step-*")] == [f"step-{step:06d}"]


def test_a_resumed_run_takes_another_budget(settings, tmp_path):
    run = settings(micro_batch_tokens=600)
    run.folder.mkdir()
    write_yaml(run, run.folder / "config.yaml")
    given = {"output": str(tmp_path / "run"), "resume": True}
    assert train.resumed_settings(given | {"micro_batch_tokens": 300}).micro_batch_tokens == 300
    assert train.resumed_settings(given).micro_batch_tokens == 600
