"""Will it fit: estimates from sizes alone, the flags that are advised, and the lines about Macs.

python -m pytest tests/training/test_estimate.py
"""

from dataclasses import replace

from mlx_retrieval.backend import device_memory, mx

import numpy as np
import pytest

import train
from mlx_retrieval import backend
from mlx_retrieval.backbones.activations import (
    NUMBERS,
    Passes,
    Sizes,
    activations,
    language_model_activations,
    sizes_of,
)
from mlx_retrieval.training import memory, memory_lines, retrieval_run
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.training.estimate import METAL, Device, Job, estimate, here, step_memory
from mlx_retrieval.training.memory_lines import GIB, Outlook

GB = 10**9
PLAIN = Device(gpu=False, compiled=False, fused=False, workers=1, tokens=2048, grid=1)
CPU = Device(gpu=False, compiled=True, fused=True, workers=3, tokens=1024, grid=4)
SIZES = Sizes("bert", layers=2, hidden=8, heads=2, attention=8, keys=8, inner=32, vocabulary=100)
JOB = Job(
    SIZES,
    parameters=1000,
    numbers=1000,
    unused=0,
    integers=0,
    checkpoint=2,
    trained=60,
    new=60,
    merged=500,
    product=40,
    lengths=(np.array([10, 10, 4]),),
    representation=8,
    token_vectors=False,
)
QWEN = {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
QWEN |= {"num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151_936}


def test_an_estimate_by_hand():
    """Two blocks of BERT, uncompiled in float32: every trained number four bytes, moments twice as many."""
    (h, _, _, i, s), (h1, _, _, i1, s1) = NUMBERS["bert"]["plain"]

    def numbers(rows: int, width: int) -> float:
        block, once = h * 8 + i * 32 + s * 2 * width, h1 * 8 + i1 * 32 + s1 * 2 * width
        return rows * width * (2 * block + once)

    assert activations(SIZES, Passes("plain"), 2, 10) == pytest.approx(numbers(2, 10))
    result = estimate(JOB, PLAIN)
    assert (result.weights, result.optimizer) == (4 * 1000 + 4 * 60, 2 * 4 * 60)
    assert result.step == pytest.approx(4 * numbers(3, 10), abs=1)  # all at once
    assert result.total == sum((result.weights, result.optimizer, result.step)) == result.of_process
    # In the checkpoint's 16 bits on a Mac; new weights, masters, moments and gradients are float32 everywhere.
    assert estimate(JOB, METAL).weights == 2 * 1000 + 4 * 60
    assert estimate(JOB, METAL).optimizer == 2 * 4 * 60
    full = replace(JOB, train_type="full", trained=1000, new=0)
    assert (estimate(full, METAL).weights, estimate(full, METAL).optimizer) == (2 * 1000, 3 * 4 * 1000)
    assert (estimate(full, PLAIN).weights, estimate(full, PLAIN).optimizer) == (4 * 1000, 2 * 4 * 1000)
    chat = replace(full, chat=True, lengths=(np.array([10, 10]),))
    assert estimate(chat, METAL).optimizer == (3 + 1) * 4 * 1000  # gradients too, as they are compiled with the update


@pytest.mark.parametrize("device", [PLAIN, CPU, METAL])
def test_more_work_takes_more_memory(device):
    job = replace(JOB, sizes=sizes_of(QWEN), lengths=(np.array([300, 200, 100, 50] * 8),))
    least = estimate(job, device).total
    longer = (np.array([1600, 1200, 800, 700] * 8),)
    for more in ({"lengths": longer}, {"numbers": 2000}, {"trained": 900, "new": 900}, {"rank": 64}, {"merged": 9000}):
        assert estimate(replace(job, **more), device).total >= least
    for name in ("layers", "hidden", "inner", "heads"):
        bigger = replace(job.sizes, **{name: 2 * getattr(job.sizes, name)})
        assert estimate(replace(job, sizes=bigger), device).total > least
    full = replace(job, train_type="full", trained=1000, new=0)
    assert estimate(full, device).optimizer > estimate(job, device).optimizer
    assert estimate(replace(job, grad_checkpoint=True), device).total < least
    assert estimate(replace(job, trained_layers=2), device).total < least
    assert estimate(replace(job, cutting=Cutting(budget=512)), device).total <= least
    late = replace(job, token_vectors=True, representation=1024, queries=(16,) * len(job.lengths))
    assert estimate(late, device).step > estimate(replace(late, representation=128), device).step


@pytest.mark.parametrize("device", [PLAIN, METAL])
def test_a_dtype_that_is_asked_for_decides_on_every_device(device):
    asked = {width: estimate(replace(JOB, dtype=width), device).total for width in (0, 2, 4)}
    assert asked[0] == asked[2 if device.gpu else 4] and asked[2] < asked[4]


@pytest.mark.parametrize("how", ["plain", "plain checkpointed"])
def test_what_is_clipped_in_float16_counts(how):
    """Regression: Gemma took 1.2 times the estimate in float16, and mT5 twice."""
    for family, ratio in (("gemma", 1.08), ("gated t5", 1.3), ("llama", 1)):
        sizes = Sizes(family, 5, 64, 4, 64, 16, 128, 512)
        half, float16 = (
            activations(sizes, Passes(how, half=True, float16=float16), 16, 32) for float16 in (False, True)
        )
        assert float16 > ratio * half if ratio > 1 else float16 == half
    job = replace(JOB, sizes=replace(SIZES, family="gemma"), float16=True)
    assert estimate(job, METAL).step > estimate(replace(job, float16=False), METAL).step
    assert estimate(job, PLAIN) == estimate(replace(job, float16=False), PLAIN)  # which computes in float32


def test_language_models_add_their_logits():
    few, many = (replace(sizes_of(QWEN), vocabulary=n) for n in (1000, 2000))
    difference = [language_model_activations(sizes, Passes("plain"), 2, 10) for sizes in (few, many)]
    assert difference[1] - difference[0] == 4 * 2 * 10 * 1000
    checkpointed = language_model_activations(many, Passes("checkpointed"), 2, 10)
    assert checkpointed < difference[1]
    chat = replace(JOB, sizes=many, chat=True, lengths=(np.array([10, 10]),))
    assert estimate(chat, PLAIN).step == round(4 * difference[1])
    assert estimate(replace(chat, parts=2), PLAIN).step < estimate(chat, PLAIN).step


def test_the_flags_that_make_it_fit_are_the_ones_that_cost_least():
    job = replace(JOB, sizes=sizes_of(QWEN), numbers=600_000_000, lengths=(np.array([512] * 64),), rank=16)
    needed = estimate(job, METAL).total
    assert memory_lines.smallest_change(job, METAL, needed) == ("", job)
    flags, changed = memory_lines.smallest_change(job, METAL, needed // 2)
    assert flags == f"--micro-batch-tokens {changed.cutting.budget}" and changed.cutting.budget < METAL.tokens
    assert estimate(changed, METAL).total <= needed // 2
    larger = replace(changed, cutting=Cutting(budget=2 * changed.cutting.budget))
    assert estimate(larger, METAL).total > needed // 2
    weights = 2 * 600_000_000
    assert "--grad-checkpoint" in memory_lines.smallest_change(job, METAL, weights + GB)[0]
    assert memory_lines.smallest_change(job, METAL, weights) is None
    chat = replace(job, chat=True, lengths=(np.array([512] * 4),))
    flags, changed = memory_lines.smallest_change(chat, METAL, int(0.8 * estimate(chat, METAL).total))
    assert flags == f"--gradient-accumulation-steps {changed.parts}" and changed.parts == 2


def test_auto_takes_the_budget_that_fits_here_and_on_a_mac():
    job = replace(JOB, sizes=sizes_of(QWEN), numbers=600_000_000, lengths=(np.array([512] * 64),), rank=16, auto=True)
    room = estimate(job, METAL).total // 2
    chosen = memory_lines.as_fits(job, METAL, room)
    assert estimate(chosen, METAL).total <= room and chosen.cutting.budget in memory.GRID
    assert memory_lines.as_fits(job, METAL, 0).cutting.budget == memory.GRID[0]
    assert memory_lines.as_fits(job, CPU, 10**15).cutting.budget == CPU.tokens
    assert "--micro-batch-tokens" not in "".join(line for _, line in Outlook(job, 0).mac_lines())


def test_the_lines_about_macs_name_what_a_mac_chooses_itself():
    """No flag is needed for it."""
    job = replace(JOB, sizes=sizes_of(QWEN), numbers=600_000_000, lengths=(np.array([512] * 64),), rank=16, open=True)
    lines = dict(Outlook(job, 0).mac_lines())
    assert lines["Mac, 16 GB"].startswith("fits: ") and lines["Mac, 16 GB"].endswith(" tokens at once")
    tokens = [int(line.split(", ")[1].split()[0].replace(",", "")) for line in lines.values() if "at once" in line]
    assert tokens == sorted(tokens) and all(count in memory.GRID for count in tokens)
    assert "--micro-batch-tokens" not in "".join(lines.values())
    chat = replace(job, chat=True, lengths=(np.array([1024] * 8),))
    lines = dict(Outlook(chat, 0).mac_lines())
    assert "micro-batches" in lines["Mac, 16 GB"] and "--gradient-acc" not in "".join(lines.values()), lines


def test_macs():
    """Metal's working set, and what macOS leaves; in the checkpoint's dtype, whatever this machine computes in."""
    job = replace(JOB, sizes=sizes_of(QWEN), numbers=600_000_000, lengths=(np.array([512] * 64),), rank=16)
    lines = dict(Outlook(job, process=int(0.5 * GIB)).mac_lines())
    assert list(lines) == [f"Mac, {size} GB" for size in (8, 16, 24, 32, 64)]
    rooms = [float(line.split(" of ")[1].split()[0]) for line in lines.values()]
    expected = [min(2 / 3 * size, size - 3.5) for size in (8, 16, 24, 32)]
    assert rooms == [round(room, 1) for room in [*expected, 0.75 * 64]]
    assert "--grad-checkpoint" in lines["Mac, 8 GB"] or "--micro-batch-tokens" in lines["Mac, 8 GB"]
    assert all(len(name) + 3 + len(line) <= 80 for name, line in lines.items()), lines
    huge = Outlook(replace(job, numbers=200_000_000_000), process=0)
    assert dict(huge.mac_lines())["Mac, 64 GB"].startswith("does not fit: ")


def test_the_memory_of_a_mac_is_told_as_it_is_sold(as_metal, monkeypatch):
    """Regression: 9 GB for a Mac of 8, 17 for 16, 69 for 64."""
    for size in (8, 16, 64):
        monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", str(size))
        ((_, line),) = Outlook(JOB, process=0).lines()
        assert f"; this machine has {size} GB, " in line


def test_what_was_measured_on_a_mac_s_path_is_expected_of_other_macs(as_metal, monkeypatch):
    """Regression: lines about Macs repeated the estimate below a higher figure. The mode's own copies are no Mac's."""
    job = replace(JOB, sizes=sizes_of(QWEN), numbers=600_000_000, dtype=4, lengths=(np.array([512] * 16),))
    outlook = Outlook(job, process=0)
    expected = outlook.expected.total
    measured, *macs = outlook.measured_lines(expected // 2)
    assert "copies" not in measured[1] and macs == outlook.mac_lines()
    assert outlook.measured_lines(5 * expected // 4)[-1][1] == f"fits: {1.25 * expected / GIB:.1f} of 48.0 GB"
    assert outlook.measured_lines(4 * expected)[-1][1].startswith("fits with --")
    half = Outlook(replace(job, dtype=2), process=0)
    measured, *macs = half.measured_lines(4 * expected)
    assert measured[1].endswith("for a Mac, which makes none of this mode's float32 copies")
    assert macs == half.mac_lines()
    monkeypatch.setattr(backend, "AS_METAL", False)  # a Mac itself
    assert half.measured_lines(4 * expected)[1:] != half.mac_lines()
    for name in ("IS_METAL", "IS_GPU"):  # a CPU, whose passes are others
        monkeypatch.setattr(backend, name, False)
    assert outlook.measured_lines(4 * expected)[1:] == outlook.mac_lines()


def test_a_run_says_before_it_reads_a_weight_whether_it_fits(settings, monkeypatch, capsys):
    """The line is there, and the warning with flags; nothing of the model is in memory by then."""
    before = mx.get_active_memory()
    read = []

    def note(*_, **__):
        read.append(mx.get_active_memory() - before)
        raise KeyboardInterrupt

    monkeypatch.setattr(retrieval_run, "seed", note)
    with pytest.raises(KeyboardInterrupt):
        training_run.prepare(settings())
    assert read[0] < 20_000  # random keys; the weights are 240 kB
    out = capsys.readouterr().out
    assert out.startswith("memory   base model of ") and "parameters; about" in out and "GB at most, an estimate" in out
    assert "weights 0.0" not in out  # parts that are nearly nothing
    assert "free" in out and "warning" not in out
    monkeypatch.setattr(device_memory, "free", lambda: 0)
    monkeypatch.setattr(memory_lines, "resident", lambda: 100_000)
    with pytest.raises(KeyboardInterrupt):
        training_run.prepare(settings())
    assert "warning: this will probably not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"train_type": "full"}, marks=pytest.mark.slow),
        {"task": "late"},
        pytest.param({"grad_checkpoint": True, "micro_batch_tokens": 256}, marks=pytest.mark.slow),
        pytest.param({"micro_batch_tokens": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_estimate_is_near_the_peak(settings, monkeypatch, changes):
    """Of a tiny model, whose small arrays weigh more than in real ones: benchmarks/memory.py has those."""
    monkeypatch.setattr(backend, "COMPILED", False)
    run = training_run.prepare(settings(batch_size=32, **changes))
    peak = 0
    for k in range(2):
        run.trainer.update(run.trainer.batches.batch(k), k + 1)
        mx.clear_cache()
        mx.reset_peak_memory()
        active = mx.get_active_memory()
        run.trainer.update(run.trainer.batches.batch(k), k + 2)
        peak = max(peak, backend.peak_memory() - active)
    expected = run.outlook.expected
    assert 0.6 < expected.step / peak < 1.6, (expected, peak)


@pytest.mark.compiled
@pytest.mark.skipif(not backend.FUSED, reason="passes are compiled for CPUs here")
def test_compiled_micro_batches_of_one_shape_are_at_their_peak_together(settings, monkeypatch):
    """Three workers begin with equal micro-batches, merge adapters and keep products: the estimate holds all of it."""
    run = training_run.prepare(settings(batch_size=128))
    grad_cache, job = run.trainer.grad_cache, run.outlook.job
    batch = max(map(run.trainer.batches.batch, range(4)), key=lambda batch: batch.tokens)
    largest = max(grad_cache.plan(batch)[0], key=lambda micro_batch: micro_batch.ids.size)
    rows, length = largest.ids.shape
    equal = [largest] * (3 * backend.WORKERS)
    seeds = range(len(equal))
    peak = 0
    for _ in range(2):  # the first also reads the weights
        mx.reset_peak_memory()
        active, saved = mx.get_active_memory(), {}
        cotangents = [mx.ones_like(each) for each in grad_cache.runner.representations(equal, seeds, saved)]
        assert len(saved) == len(equal)
        grad_cache.runner.gradient(equal, seeds, cotangents, saved)
        peak = mx.get_peak_memory() - active
    lengths = np.full(len(equal) * rows, length)
    expected = step_memory(job, here()).peak(lengths, replace(run.trainer.grad_cache.cutting, budget=rows * length))
    assert 0.95 < expected / peak < 1.6, (expected, peak)


def test_a_process_takes_more_than_its_arrays_on_a_cpu(monkeypatch):
    """Libraries, freed arrays that mlx keeps, and holes between arrays; on a GPU the first alone."""
    monkeypatch.setattr(memory_lines, "resident", lambda: GB)
    job = replace(JOB, evaluation=7)
    step = estimate(job, here()).step
    assert Outlook.of(job).process == pytest.approx(GB + 7 + 1.08 * step, abs=2)
    monkeypatch.setattr(backend, "CACHE_BYTES", 5)
    assert Outlook.of(job).process == pytest.approx(GB + 12 + 0.08 * step, abs=2)
    monkeypatch.setattr(backend, "IS_GPU", True)
    assert Outlook.of(job).process == GB + 7


def test_the_dry_run_has_the_estimate_and_a_line_a_mac(settings, capsys):
    plan = train.train(settings(dry_run=True))
    assert plan["estimated_memory_bytes"] > 0
    out = capsys.readouterr().out
    assert out.count("Mac, ") == 5 and "measured " in out and out.count("\nmemory ") == 0


def test_the_checkpoint_is_known_by_its_headers(tmp_path):
    from mlx_retrieval.training.estimate_job import checkpoint_dtype

    for dtype, name in ((mx.bfloat16, "BF16"), (mx.float16, "F16"), (mx.float32, "F32")):
        mx.save_safetensors(str(tmp_path / "model.safetensors"), {"a": mx.zeros((4, 4), dtype), "b": mx.zeros(2)})
        assert checkpoint_dtype(tmp_path) == name


def test_sizes_of_configs():
    assert sizes_of(QWEN) == Sizes("qwen3", 28, 1024, 16, 2048, 1024, 3072, 151_936)
    moe = sizes_of(QWEN | {"model_type": "qwen3_moe", "num_experts_per_tok": 8, "moe_intermediate_size": 768})
    assert moe.inner == 8 * 768
    t5 = {"model_type": "mt5", "d_model": 8, "d_kv": 4, "num_heads": 3, "num_layers": 2, "d_ff": 16, "vocab_size": 9}
    assert sizes_of(t5) == Sizes("gated t5", 2, 8, 3, 12, 12, 16, 9)
    assert sizes_of({"model_type": "gemma3", "text_config": QWEN | {"model_type": "gemma3_text"}}).family == "gemma"
    assert {family for family in NUMBERS} >= {"bert", "modernbert", "t5", "gated t5", "llama", "qwen3", "gemma"}


def test_passes_compiled_as_on_gpus_are_estimated_with_their_filled_rows(as_metal):
    job = replace(JOB, sizes=sizes_of(QWEN), lengths=(np.array([100] * 13),), compile="on")
    of_16 = replace(job, lengths=(np.array([100] * 16),))
    assert estimate(job, METAL).step == pytest.approx(estimate(of_16, METAL).step, rel=1e-3)
    off, uncompiled = replace(job, compile="off"), replace(CPU, compiled=False)
    assert estimate(off, CPU) == estimate(replace(off, compile="auto"), uncompiled) != estimate(job, CPU)
