"""Wrong input ends in one clear message and exit code 2, before anything is written or lost.

python -m pytest tests/test_bad_input.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels

import pytest

import embed
import eval as evaluation
import train
from mlx_retrieval import backend

ROOT = Path(__file__).resolve().parent.parent
GOOD = "".join(json.dumps({"query": f"query {i}", "document": f"document {i}"}) + "\n" for i in range(20))


@pytest.fixture
def attempt(tmp_path: Path, capsys, small: str):
    """Return a function that runs train.py on a data file, checks that nothing was written, and returns stderr."""

    def run(*flags: str, data: bytes | str = GOOD) -> str:
        file, output = tmp_path / "rows.jsonl", tmp_path / "run"
        file.write_bytes(data.encode() if isinstance(data, str) else data)
        base = ["--model", small, "--data", str(file), "--batch-size", "4", "--steps", "2", "--eval-tasks"]
        code = train.main([*base, "--output", str(output), *flags])
        captured = capsys.readouterr()
        assert code == 2 and not output.exists()
        assert captured.err.startswith("train.py: ") and "Traceback" not in captured.err
        return captured.err

    return run


def test_missing_file(attempt):
    assert "nowhere.jsonl: no such file" in attempt("--data", "nowhere.jsonl")


def test_folder_without_training_data(attempt, tmp_path):
    assert "has no train.jsonl" in attempt("--data", str(tmp_path))


def test_folder_without_weights(attempt, tmp_path, small):
    folder = tmp_path / "bare"
    folder.mkdir()
    assert "no config.json" in attempt("--model", str(folder))
    shutil.copy(Path(small) / "config.json", folder)
    assert "no weights (model*.safetensors)" in attempt("--model", str(folder))


def test_a_model_that_is_nowhere(attempt):
    assert "mlx_lm.convert --hf-path" in attempt("--model", "gemma-3-270m-mlx")


@pytest.mark.parametrize("bad, reason", [
    ('{"query": "a", ', "broken JSON"),
    ('{"query": "a"}', "no positive"),
    ('{"query": "", "document": "d"}', "query is empty"),
    ('{"query": "q", "document": "  "}', "document is empty"),
    ('{"query": "q", "positive": "p", "label": 0}', "the rows before have query/document"),
    ('{"query": "q", "positive": "p", "bm25_score": 3}', "bm25_score cannot be used"),
    (b'{"query": "caf\xe9", "document": "d"}', "not UTF-8"),
    ('{"query": "q", "document": "d"} {"query": "q", "document": "d"}', "line break missing"),
    ('["a", "b"]', "not a JSON object"),
    ('{"query": "q", "document": "d", "rank": 0}', "rank 0"),
], ids=lambda value: value if isinstance(value, str) and len(value) < 40 else "bytes")  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(attempt, bad, reason):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    error = attempt(data=GOOD.encode() + bad + b"\n" + GOOD.encode())
    assert "rows.jsonl:21: " in error and reason in error and len(error) < 500


def test_more_layers_than_there_are(attempt):
    assert "--num-layers 99: the model has 3 layers" in attempt("--num-layers", "99")


def test_lora_keys_that_match_nothing(attempt):
    assert "self_attn.q_proj" in attempt("--lora-keys", "qq_proj")


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "0"], "must be above 0"),
    (["--temperature", "0"], "must be above 0"),
    (["--lora-dropout", "1"], "must be from 0"),
    (["--warmup", "1.5"], "warmup"),
    (["--max-length", "2"], "leaves no room"),
    (["--max-length", "99999999"], "positions"),
    (["--micro-batch-tokens", "-1"], "must not be negative"),
    (["--data"], "at least one"),
    (["--resume"], "no run in"),
    (["--eval-tasks", "no-such-task-or-folder"], "neither a folder nor an MTEB task"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_invalid_values(attempt, flags, message):
    assert message in attempt(*flags)


def test_unknown_flag_and_unknown_yaml_key(attempt, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--no-such-flag", "1"])
    assert stop.value.code == 2 and "--no-such-flag" in capsys.readouterr().err
    (tmp_path / "settings.yaml").write_text("stepz: 3\n")
    assert "unknown key 'stepz'; did you mean steps?" in attempt("--config", str(tmp_path / "settings.yaml"))


@pytest.fixture
def finished(tmp_path: Path, small: str) -> Path:
    """A finished run of two steps."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    flags = ["--model", small, "--data", str(tmp_path / "good.jsonl"), "--batch-size", "4", "--steps", "2"]
    assert train.main([*flags, "--eval-tasks", "--lora-rank", "2", "--output", str(tmp_path / "done")]) == 0
    return tmp_path / "done"


def test_output_folder_with_another_run_in_it(finished, small, capsys):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    good = str(finished.parent / "good.jsonl")
    flags = ["--model", small, "--data", good, "--batch-size", "4", "--eval-tasks", "--output", str(finished)]
    assert train.main(flags) == 2
    assert "another run is in this folder" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert train.main(["--resume", "--output", str(finished)]) == 2
    assert "is finished" in capsys.readouterr().err


def test_adapter_of_another_base_model(finished, small, tmp_path, capsys):
    """The same architecture with other weights is another model."""
    from mlx_retrieval.backend import mx

    other = tmp_path / "other"
    shutil.copytree(small, other)
    weights = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(str(other / "model.safetensors"), {k: v * 1.5 for k, v in weights.items()}, {"format": "mlx"})
    flags = ["--model", str(other), "--adapter", str(finished / "final")]
    (tmp_path / "docs.txt").write_text("one\ntwo\n")
    assert embed.main([*flags, "--input", str(tmp_path / "docs.txt"), "--output", str(tmp_path / "v.npy")]) == 2
    assert "is another model" in capsys.readouterr().err and not (tmp_path / "v.npy").exists()
    assert evaluation.main(flags) == 2
    assert "is another model" in capsys.readouterr().err


def test_embed_says_what_is_wrong(finished, tmp_path, capsys):
    def error(*flags: str) -> str:
        flags = ["--model", str(finished / "final"), "--output", str(tmp_path / "v.npy"), *flags]
        assert embed.main(flags) == 2 and not (tmp_path / "v.npy").exists()
        return capsys.readouterr().err

    assert "No such file" in error("--input", str(tmp_path / "none.jsonl"))
    for content, message in (
        ("{", "docs.jsonl:1: broken JSON"),
        ("{}", "docs.jsonl:1: no text"),
        ("", "docs.jsonl: contains no text"),
    ):
        (tmp_path / "docs.jsonl").write_text(content)
        assert message in error("--input", str(tmp_path / "docs.jsonl"))
    (tmp_path / "docs.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    assert "not UTF-8" in error("--input", str(tmp_path / "docs.jsonl"))
    (tmp_path / "docs.jsonl").write_text('{"text": "fine"}')
    assert "no such adapter folder" in error("--input", str(tmp_path / "docs.jsonl"), "--adapter", "nowhere")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE stands in for a full disk on Linux only")
def test_disk_full_while_saving(tmp_path, small):
    """Files cut short at 10 KB, as on a full disk: exit code 2, and the run's folder holds nothing half-written."""
    (tmp_path / "good.jsonl").write_text(GOOD)
    flags = ["--model", small, "--data", str(tmp_path / "good.jsonl"), "--batch-size", "4", "--eval-tasks"]
    script = (
        "import resource, signal, sys, train; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); sys.exit(train.main(sys.argv[1:]))"
    )
    command = [*flags, "--steps", "1", "--output", str(tmp_path / "run")]
    subprocess.run([sys.executable, "train.py", *command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
    run = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "could not save" in run.stderr and "Traceback" not in run.stderr, run.stderr
    assert "being compiled" not in run.stdout  # the dry run did
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_dir()]
    if backend.KERNELS:  # and where not even a kernel can be kept
        cold = {name: value for name, value in os.environ.items() if name != "TMPDIR"} | {"TMPDIR": str(tmp_path)}
        cold["PATH"] = os.pathsep.join(p for p in cold["PATH"].split(os.pathsep) if cpu_kernels.FOLDER not in p)
        script = script.replace(
            "10_000", "13_000"
        )  # the program that compiles kernels is smaller, and every kernel larger
        command = [sys.executable, "-c", script, *command, "--overwrite"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=cold)
        assert run.returncode == 2 and "could not be compiled" in run.stderr, run.stderr
        assert "Traceback" not in run.stderr
        assert "being compiled for this processor" in run.stdout
