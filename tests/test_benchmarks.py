"""Parts of the benchmarks that make data themselves, so that a change of what they make is noticed here.

python -m pytest tests/test_benchmarks.py
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_retrieval import backend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import as_a_mac
import chat_memory
import gate
import growth
import limit
import peers
import samples
import sides
import train_speed

from mlx_retrieval.inference import embedder
from mlx_retrieval.models.cpu_model_runner import CpuModelRunner
from mlx_retrieval.training import run


def test_synthetic_batches_can_be_trained_on(settings):
    """Regression: they lacked what a batch has since there are teachers."""
    trainer, batch = run.prepare(settings()).trainer, growth.synthetic(4, 8)
    batch.texts.ids[:] %= 100  # the small model's vocabulary is smaller than MiniLM's
    assert trainer.update(batch, 1)["tokens"] == 4 * 2 * 8


def test_a_step_of_the_reference_design(small, tmp_path, monkeypatch):
    """Regression: it cut the second texts of pairs, which its micro-batches do not have."""
    monkeypatch.setenv("MLX_RETRIEVAL_PLAIN", "1")  # it sets that itself, and nobody else's should stay set
    data = [{"query": f"what is {i}", "document": f"this is number {i}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    turn = train_speed.reference(small, tmp_path / "rows.jsonl", batch_size=20, max_length=16)(0)
    assert 0 < turn.value < 10 and turn.tokens < turn.padded_tokens and turn.padded_tokens % 40 == 0


def test_what_is_measured_is_prepared_as_in_commands():
    """Regression: an import no longer sets up the process, and benchmarks measured kernels that were not vectorised."""
    computing = re.compile(
        r"mlx_retrieval\.(inference|models\.(loading|maxsim|batching))|training import run|training\.run"
    )
    texts = {file.name: file.read_text() for file in Path(growth.__file__).parent.glob("*.py")}
    users = {name for name, text in texts.items() if computing.search(text)}
    assert len(users) > 10
    assert not [name for name in sorted(users) if "backend.prepare()" not in texts[name]]


# --- sides.py ---------------------------------------------------------------------------------------------------------


class Sides:
    """Sides that note their turns instead of computing, `speeds` tokens a second by name; 0 runs out of memory."""

    def __init__(self, **speeds: float):
        self.speeds, self.order = speeds, []

    def __call__(self, name: str) -> sides.Side:
        side = sides.Side.__new__(sides.Side)
        side.name, side.warm_up, side.turns = name, 1, []

        def take_turn() -> None:
            if not self.speeds[name]:
                raise RuntimeError("out of memory\nsomewhere")
            self.order.append(name)
            side.turns.append(sides.Turn(1.0, self.speeds[name], 0))

        side.take_turn = take_turn
        side._child = SimpleNamespace(shutdown=lambda: None)
        return side


def test_either_side_begins_half_of_the_rounds():
    """Regression: what comes second may be slower, and that was always the peer."""
    made = Sides(a=30, b=20)
    assert sides.take_turns(made("a"), made("b"), 3) == 1.5
    assert "".join(made.order) == "ab" + "ab" + "ba" + "ab"


def test_the_peer_gets_its_fastest_setting(capsys):
    assert sides.fastest(["a", "b", "c"], made := Sides(a=0, b=20, c=30)) == "c"
    assert made.order.count("b") == 1 + sides.TRIALS
    assert "a: out of memory\n" in (streams := capsys.readouterr()).err and "best: c" in streams.out
    with pytest.raises(SystemExit, match="memory for none"):
        sides.fastest(["a", "b"], Sides(a=0, b=0))


# --- gate.py ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkouts(tmp_path) -> Callable[..., tuple[gate.Turns, gate.Turns]]:
    """Two checkouts with an embed.py of the given bodies after two turns of "encode", and one that does not count."""

    def compared(old: str, new: str) -> tuple[gate.Turns, gate.Turns]:
        folders = tmp_path / "before", tmp_path / "after"
        for folder, body in zip(folders, (old, new), strict=True):
            folder.mkdir()
            (folder / "embed.py").write_text(f"import sys, time\ndef main(argv):\n    {body}\n")
        return gate.compare("encode", *folders, {"minilm": "m", "texts": "t"}, tmp_path / "work", rounds=2)

    return compared


def test_two_checkouts_take_turns(checkouts):
    old, new = checkouts("time.sleep(0.2)", "print('much'); time.sleep(0.01)")  # what commands print disturbs nothing
    assert not old.error and not new.error and len(old.times) == len(new.times) == 2
    assert gate.ratio(old.times, new.times)[0] > 1


def test_each_checkout_is_started_first_for_half_of_the_rounds(monkeypatch, tmp_path):
    """Regression: the one that is started later is slower, and that was always the new one."""
    started = []

    class Checkout:
        def __init__(self, folder, *_):
            started.append(folder.name)
            self.name, self.times, self.error, self.later = folder.name, [], "", len(started) % 2 == 0

        def turn(self):
            self.times.append(1 + self.later / 10)

        def close(self):
            pass

    monkeypatch.setattr(gate, "Checkout", Checkout)
    old, new = gate.compare("encode", tmp_path / "old", tmp_path / "new", {}, tmp_path, rounds=6)
    assert started == ["old", "new", "new", "old"] and len(old.times) == len(new.times) == 6
    assert gate.ratio(old.times, new.times)[0] == pytest.approx(1)


@pytest.mark.parametrize("body", ["sys.exit('no such flag')", "return 2", "raise OSError('no such flag')"])
def test_a_checkout_that_fails_says_why(checkouts, body):
    old, new = checkouts("return 0", body)
    assert not old.error and ("no such flag" in new.error or "embed.py ended with 2" in new.error)


def test_a_checkout_without_models_or_a_server_says_why(tmp_path, monkeypatch, capsys):
    """Regression: a traceback with the exit code of something slower, and the log of the server was lost."""
    (tmp_path / "train.py").write_text("import sys; sys.exit('no such base')")
    monkeypatch.setattr("sys.argv", ["gate.py", str(tmp_path), str(tmp_path)])
    assert gate.main() == 2
    assert "train.py ended with 1: no such base" in capsys.readouterr().err
    (tmp_path / "serve.py").write_text("import sys; sys.exit('no such model')")
    (tmp_path / "few").touch()
    names = {"minilm": "m", "few": str(tmp_path / "few"), "scratch": str(tmp_path)}
    with pytest.raises(RuntimeError, match="no such model"):
        gate.serving(str(tmp_path), names)


def test_what_is_made_of_a_model_is_made_again_once_that_has_changed(tmp_path):
    """Regression: what a peer reads was found by the model's last name alone."""
    for name in "ab":
        (tmp_path / name / "best").mkdir(parents=True)
        (tmp_path / name / "best" / "weights").touch()
    before, other = (peers.cached(str(tmp_path / name / "best"), "late") for name in "ab")
    assert before != other and before == peers.cached(str(tmp_path / "a" / "best"), "late")
    os.utime(tmp_path / "a" / "best" / "weights", (1, 1))
    assert peers.cached(str(tmp_path / "a" / "best"), "late") != before
    assert peers.cached("gemma", "float32") != peers.cached("gemma", "bfloat16")


def test_the_interval_holds_the_mean_and_a_slower_side_is_seen():
    mean, low, high = gate.ratio([1.0, 1.1, 0.9, 1.0], [2.0, 2.0, 2.0, 2.2])
    assert low < mean < high < 1 and 0.45 < mean < 0.55


# --- limit.py ---------------------------------------------------------------------------------------------------------


def test_flop_of_a_token(small):
    """A layer of 8 to 16 weights counts 2 * 8 * 16; the gradient passes each product once, attention's twice."""
    shapes = Counter({(16, 8): 2})
    assert limit.flop_of_a_token(shapes, 100, 50, "forward") == 512 + 50
    assert limit.flop_of_a_token(shapes, 100, 50, "training") == 562 + 512 + 100 + 600
    assert limit.flop_of_a_token(shapes, 100, 50, "repeated", kept=0) == 2 * 562 + 512 + 100 + 600
    assert limit.flop_of_a_token(shapes, 100, 50, "repeated", kept=0.75) == 562 + 128 + 50 + 512 + 100 + 600


@pytest.mark.skipif(backend.IS_GPU, reason="products are kept on CPUs")
@pytest.mark.parametrize(("room", "share"), [(0, 0), (1 << 40, 1)])
def test_tokens_whose_products_are_kept_are_counted(settings, monkeypatch, room, share):
    monkeypatch.setattr(CpuModelRunner, "_worth_saving", CpuModelRunner._worth_saving)  # restored after the test
    monkeypatch.setattr(backend, "MICRO_BATCH_TOKENS", 64)
    monkeypatch.setattr(backend.device_memory, "for_products", lambda: room)
    trainer, tokens = run.prepare(settings(compile="on")).trainer, limit.count_kept()
    trainer.update(next(trainer.batches.stream(0, 2)), 1)
    assert tokens["all"] > 0 and tokens["kept"] == share * tokens["all"]


def test_shapes_are_those_of_the_model(small):
    model = embedder.load(small).model
    config = json.loads((Path(small) / "config.json").read_text())
    into, width = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    shapes = limit.linear_shapes(model.backbone)
    assert shapes[into, config["intermediate_size"]] == config["num_hidden_layers"]  # down_proj
    assert limit.attention_width(model.backbone) == width
    # Two texts of 3 and 5 tokens: 4 FLOP for each pair of tokens and each number of a head, half of them if causal.
    expected = 4 * width * config["num_hidden_layers"] * (9 + 25) / 8
    for bidirectional, share in ((True, 1), (False, 0.5)):
        model.backbone.bidirectional = bidirectional
        assert limit.attention_flop(model.backbone, width, [3, 5]) == share * expected


# --- as_a_mac.py ------------------------------------------------------------------------------------------------------

ROW = as_a_mac.Row("full", 20, "--train-type full")
RESULT = {"row": "full", "dtype": "float32", "loss": 0.5, "before": 1.5, "after": 0.75, "seconds": 9}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`runs(scale)`: measure ROW in two dtypes, of which float16 fails. `runs.taken`: the dtypes of all runs so far."""
    (tmp_path / "train.jsonl").write_text(json.dumps({"query": "a", "document": "b"}) + "\n")
    monkeypatch.setattr(as_a_mac, "commit", lambda: "abc")

    def train(row, dtype, folder, scale):
        measured.taken.append(dtype)
        return {"error": "exit code 2: not finite"} if dtype == "float16" else dict(RESULT)

    def measured(scale: float = 1.0) -> dict:
        return as_a_mac.measure([ROW], ["float32", "float16"], tmp_path, tmp_path / "results.jsonl", scale)

    monkeypatch.setattr(as_a_mac, "train", train)
    measured.taken = []
    return measured


def test_a_run_that_fails_is_named_and_stops_no_other(runs):
    lines = as_a_mac.table([ROW], ["float32", "float16"], runs(), 1.0)
    assert "| full | 20 | loss, last 5 steps | 0.5000 | failed |" in lines
    assert "| | | held-out loss | 1.5000 -> 0.7500 | failed |" in lines
    assert lines[-1] == "- full, float16: exit code 2: not finite"


def test_a_stopped_script_goes_on_and_tries_again_what_failed(runs, tmp_path):
    runs()
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"commit": "abc", "row": "fu')  # killed while it wrote
    assert runs.taken == ["float32", "float16"]
    assert runs()["full", "float32"]["after"] == 0.75
    assert runs.taken[2:] == ["float16"]
    runs(0.1)
    assert runs.taken[3:] == ["float32", "float16"]  # of other steps


def test_a_run_ends_in_figures_or_in_its_last_word(tmp_path, monkeypatch):
    monkeypatch.setattr(as_a_mac, "ROOT", tmp_path)
    code = """
        import json, os, pathlib, sys
        flags = sys.argv
        assert os.environ["MLX_RETRIEVAL_AS"] == "metal" and flags[flags.index("--steps") + 1] == "20"
        dtype = flags[flags.index("--dtype") + 1]
        if dtype == "float16":
            sys.exit("train.py: no good\\n")
        folder = pathlib.Path(flags[flags.index("--output") + 1])
        folder.mkdir()
        losses = [9.0, 5.0, 4.0, 3.0, 2.0, 1.0 if dtype == "float32" else float("nan")]
        lines = [{"type": "train", "loss": loss} for loss in losses]
        lines += [{"type": "eval", "metrics": {"validation_loss": loss}} for loss in (2.0, 1.5, 1.0)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\\n" for line in lines))
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(code))
    result = as_a_mac.train(ROW, "float32", tmp_path, 1.0)
    assert {name: result[name] for name in ("loss", "before", "after")} == {"loss": 3, "before": 2, "after": 1}
    assert as_a_mac.train(ROW, "float16", tmp_path, 1.0) == {"error": "exit code 1: train.py: no good"}
    assert "not finite" in as_a_mac.train(ROW, "bfloat16", tmp_path, 1.0)["error"]
    shutil.rmtree(tmp_path / "full-float32")
    other = as_a_mac.train(dataclasses.replace(ROW, metric="ndcg_at_10"), "float32", tmp_path, 1.0)
    assert other == {"error": "metrics.jsonl holds 6 losses and as ndcg_at_10 [None, None, None]"}


@pytest.mark.slow
def test_a_script_finds_the_toolkit_without_installing_it(tmp_path):
    """Also `variants.py`, which imports none of its neighbours before `seeds`."""
    folder = str(Path(growth.__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import variants"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- samples.py -------------------------------------------------------------------------------------------------------

REPORT = """
# To display the perf.data header info, please use --header/--header-only options.
    36.00%  libmkl_avx512.so.3     [.] mkl_blas_avx512_sgemm_kernel_0
     6.00%  libmkl_avx512.so.3     [.] mkl_blas_avx512_sgemm_kernel_nocopy_nt_b0
     5.50%  libmkl_avx512.so.3     [.] mkl_blas_avx512_sgemm_scopy_right8_ea
     7.00%  libmlx.so              [.] mlx::core::(anonymous namespace)::copy_general_general<float, float>
     4.50%  libEf4IErfFHf4_1234_contiguous.so  [.] Ef4IErfFHf4_1234_contiguous
     3.25%  [kernel.kallsyms]      [k] do_sched_yield
     2.75%  libpython3.11.so.1.0   [.] _PyEval_EvalFrameDefault
"""
TORCH = """
    45.40%  libtorch_cpu.so        [.] mkl_blas_avx512_sgemm_kernel_0
     1.80%  [JIT] tid 27935        [.] 0x00007f297fb5503f
     3.60%  libtorch_cpu.so        [.] mkl_blas_avx512_sgemm_scopy_right48_ea
     5.40%  libgomp.so.1           [.] 0x000000000001de62
     3.00%  libtorch_cpu.so        [.] at::native::(anonymous namespace)::cpu_flash_attention<float, 64l>
     0.70%  libtorch_cpu.so        [.] at::native::AVX2::RowwiseMomentsImpl<float, 4l>
     0.60%  libc.so.6              [.] __memmove_avx512_unaligned_erms
"""


def test_samples_are_sorted_by_what_is_done():
    assert samples.by_kind(REPORT.splitlines()) == pytest.approx(
        {
            "products": 0.42,
            "products: packing of the factors": 0.055,
            "copies": 0.07,
            "fused: activation": 0.045,
            "threads that wait for work": 0.0325,
            "Python, graphs and the rest": 0.0275,
        }
    )
    assert samples.by_kind(TORCH.splitlines()) == pytest.approx(
        {
            "products": 0.472,
            "products: packing of the factors": 0.036,
            "threads that wait for work": 0.054,
            "fused: exponentials of attention": 0.03,
            "fused: norms": 0.007,
            "copies": 0.006,
        }
    )


# --- chat_memory.py ---------------------------------------------------------------------------------------------------


def test_the_memory_of_a_chat_run_stands_beside_its_estimate(small, tmp_path):
    """Regression: the estimate had moved, and the script ended with an error."""
    shutil.copytree(small, tmp_path / "0")
    chat_memory.conversations(tmp_path / "data", length=16, count=4)
    found = chat_memory.measure(str(tmp_path), bits=0, num_layers=-1, grad_checkpoint=False, batch=1, length=32)
    assert found["estimate"] > found["weights"] > 0 and found["peak"] > 0 and found["tokens_per_second"] > 0


# --- sides.py ---------------------------------------------------------------------------------------------------------


def test_a_part_of_a_folder_has_the_answers_of_its_questions(tmp_path):
    """Even where they stand behind documents that answer nothing."""
    source = tmp_path / "whole"
    (source / "qrels").mkdir(parents=True)
    for name, ids in (("queries", ("q1", "q2", "q3")), ("corpus", ("d1", "d2", "d3", "d4", "d5"))):
        (source / f"{name}.jsonl").write_text("".join(json.dumps({"_id": i, "text": i}) + "\n" for i in ids))
    (source / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td5\t1\nq2\td3\t1\nq3\td1\t1\n")
    for documents, expected in ((1, {"d3", "d5"}), (3, {"d1", "d3", "d5"})):
        part = sides.write_part(source, tmp_path / str(documents), queries=2, documents=documents)
        ids = [json.loads(line)["_id"] for line in (part / "corpus.jsonl").read_text().splitlines()]
        assert set(ids) == expected
        assert (part / "qrels" / "test.tsv").read_text().split("\n")[1:3] == ["q1\td5\t1", "q2\td3\t1"]
