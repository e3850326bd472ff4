"""What strangers' files may do: name tensors and files beside them, and nothing else. And secrets stay where they are.

python -m pytest tests/test_trust.py           pickles are refused in tests/backbones/test_hub.py
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import mx

import pytest
from trained_models import trained

from mlx_retrieval import backend
from mlx_retrieval.backbones.hub import inside, weight_files
from mlx_retrieval.models import loading, pylate_files, sentence_transformers_files
from mlx_retrieval.models.retrieval_config import FILE
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("..", "../other", "a/../../other", "/etc", "../../other/x.safetensors", "", None, 5, "a\0b")
# By name, as the checkout may hold an environment with other people's files.
ROOMS = ("mlx_retrieval", "benchmarks", "examples", "tools")
SOURCES = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]


def test_what_lies_inside():
    folder = Path("models/one")
    assert inside(folder, "2_Dense", "x") == folder / "2_Dense" and inside(folder, "", "x") == folder
    assert inside(folder, "a/./b", "x") == folder / "a/b"
    for name in OUTSIDE:
        if name != "":
            with pytest.raises(UserError, match="not a path within"):
                inside(folder, name, "modules.json")


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name != ""])
def test_an_index_of_weights_names_files_of_its_folder(base_folders, tmp_path, name):
    folder = shutil.copytree(base_folders["bert"], tmp_path / "model")
    shutil.copytree(base_folders["bert"], tmp_path / "other")
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json: (.* is not a path within|not an index of)"):
        weight_files(folder)


@pytest.mark.parametrize("layout", [sentence_transformers_files, pylate_files])
@pytest.mark.parametrize("name", OUTSIDE[:4])
def test_modules_are_those_of_the_folder(base_folders, tmp_path, layout, name):
    folder = shutil.copytree(base_folders["bert"], tmp_path / "model")
    dense = {"in_features": 64, "out_features": 8, "bias": False}
    for place in (tmp_path, tmp_path / "other"):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(dense))
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", name)][:: 2 if layout is pylate_files else 1]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for kind, path in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text('{"model_type": "ColBERT"}')
    with pytest.raises(UserError, match=r"modules.json: .* is not a path within"):
        layout.read(folder)


@pytest.mark.parametrize("name", OUTSIDE[:5])
def test_layers_of_an_adapter_are_those_of_its_base(base_folders, tmp_path, name):
    """Reading is refused, and so is an export, which would write there."""
    _, folder = trained(base_folders["bert"], tmp_path / "final")
    config = json.loads((folder / FILE).read_text())
    layer = {"path": name, "in_features": 64, "out_features": 8, "bias": False, "activation": "Identity"}
    (folder / FILE).write_text(json.dumps(config | {"dense": [layer]}))
    with pytest.raises(UserError, match="not a path within"):
        loading.open_model(None, str(folder))
    done = subprocess.run(
        [sys.executable, "export.py", "--adapter", str(folder), "--output", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    ) if name == "../other" else None  # fmt: skip
    assert done is None or (done.returncode == 2 and "Traceback" not in done.stderr), done.stderr
    assert not (tmp_path / "other").exists()


def test_an_adapter_config_names_no_files(base_folders, tmp_path, monkeypatch):
    """What mlx-lm or PEFT might write beside it (model, data, paths) is never opened."""
    _, folder = trained(base_folders["bert"], tmp_path / "final")
    config = json.loads((folder / "adapter_config.json").read_text())
    strange = {
        "model": "/etc",
        "data": "../..",
        "base_model_name_or_path": "../../etc",
        "resume_adapter_file": "/etc/passwd",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | strange | {"adapter_path": "../other"}))
    opened, load = [], mx.load
    monkeypatch.setattr(mx, "load", lambda path, *a, **k: opened.append(Path(path)) or load(path, *a, **k))
    loading.open_model(None, str(folder))
    assert opened and {path.parent for path in opened} == {folder, base_folders["bert"]}


# --- code -----------------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_that_could_run_code():
    """In no source file: pickles, remote code, eval or exec of a text, yaml.load, np.load that would take objects."""
    calls = {"eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "torch.load", "joblib.load"}
    calls |= {"pickle.load", "pickle.loads", "marshal.loads", "shelve.open", "dill.load", "torch.hub.load"}
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                found += [
                    f"{path}: import {n}" for n in names if n in ("pickle", "dill", "joblib", "marshal", "shelve")
                ]
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found += [] if getattr(node.value, "value", True) is False else [f"{path}:{node.value.lineno}"]
            if not isinstance(node, ast.Call):
                continue
            name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in calls or (name == "np.load" and words.get("allow_pickle") != "False"):
                found.append(f"{path}:{node.lineno}: {name}")
    assert not found


def test_a_model_s_own_code_is_never_run(base_folders, tmp_path):
    """auto_map of config and tokenizer, and mlx-lm's model_file, name a Python file that would leave a trace."""
    folder, trace = shutil.copytree(base_folders["qwen3"], tmp_path / "model"), tmp_path / "it-ran"
    (folder / "modeling_own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    own = {"auto_map": {name: "modeling_own.Own" for name in ("AutoConfig", "AutoModel", "AutoTokenizer")}}
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | own))
    from mlx_retrieval.models.tokenizer import load_tokenizer
    from mlx_retrieval.training.chat.template import ChatTokenizer

    loading.build(str(folder))
    load_tokenizer(folder)
    ChatTokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_file": "modeling_own.py"}))
    with pytest.raises(UserError, match="asks to run code of its own"):
        loading.build(str(folder))
    assert not trace.exists()


# --- secrets --------------------------------------------------------------------------------------------------------

SECRETS = ("WANDB_API_KEY", "ES_API_KEY", "HF_TOKEN", "RERANK_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


@pytest.mark.slow
def test_secrets_of_the_environment_reach_no_file_and_no_screen(small, tmp_path):
    """Nothing that a run with W&B writes or prints, checkpoints included, holds a key that the environment has."""
    marks = {name: f"c0ffee{i}" * 5 for i, name in enumerate(SECRETS)}  # W&B takes keys of 40 digits
    rows = "".join(json.dumps({"query": f"query {i}", "document": f"document {i}"}) + "\n" for i in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    flags = ["--model", small, "--data", str(tmp_path / "rows.jsonl"), "--batch-size", "4", "--steps", "2", "--wandb"]
    flags += ["--eval-tasks", "--save-steps", "1", "--lora-rank", "2", "--output", str(tmp_path / "run")]
    environment = os.environ | marks | {"WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "train.py", *flags], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not [name for name, mark in marks.items() if mark in done.stdout + done.stderr]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any(path.name == "final" for path in tmp_path.rglob("*"))
    leaks = [(path, name) for path in files for name, mark in marks.items() if mark.encode() in path.read_bytes()]
    assert not leaks


def test_what_commands_report_of_the_machine_holds_no_secret(small, tmp_path):
    """Regression: the test ran a file without a command, which printed nothing, secrets or not."""
    assert "environ" not in backend.describe()
    marks = {name: f"c0ffee{i}" * 5 for i, name in enumerate(SECRETS)}
    for model, code, line in ((small, 0, "padding invariance"), (tmp_path / "none", 2, "none")):
        done = subprocess.run(
            [sys.executable, "embed.py", "--check", str(model)], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | marks, timeout=300,
        )  # fmt: skip
        output = done.stdout + done.stderr
        assert done.returncode == code and line in output, output
        assert "c0ffee" not in output
