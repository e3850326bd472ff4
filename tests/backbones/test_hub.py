"""Finding and reading models: every fault of a folder has its own clear error, and no pickle is opened.

python -m pytest tests/backbones/test_hub.py
"""

import json
import pickle
import re
import shutil
import socket
from pathlib import Path

from mlx_retrieval.backend import mx

import pytest
import random_models
from mlx.utils import tree_flatten

from mlx_retrieval.backbones import load_backbone, resolve
from mlx_retrieval.backbones.finding import toolkit_relative
from mlx_retrieval.backbones.hub import read_config, read_weights, weight_files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import CHECKOUT

KINDS = ("qwen3", "bert")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Return folders of an intact decoder and encoder."""
    root = tmp_path_factory.mktemp("models")
    return {kind: random_models.save(kind, root / kind, num_hidden_layers=2) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, originals, tmp_path) -> Path:
    """Return a copy that a test may damage."""
    return shutil.copytree(originals[request.param], tmp_path / "model")


def shard(folder: Path) -> list[str]:
    """Split model.safetensors into three shards with an index. Return their names."""
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-00003.safetensors" for i in range(3)]
    index = {name: files[i % 3] for i, name in enumerate(sorted(weights))}
    for file in files:
        part = {name: weights[name] for name in weights if index[name] == file}
        mx.save_safetensors(str(folder / file), part, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return files


def refused(folder: Path, message: str) -> str:
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(folder)
    return str(caught.value)


# --- weights --------------------------------------------------------------------------------------------------------


def test_shards_make_the_same_model(folder, originals):
    expected = dict(tree_flatten(load_backbone(folder).parameters()))
    files = shard(folder)
    assert [file.name for file in weight_files(folder)] == files
    actual = dict(tree_flatten(load_backbone(folder).parameters()))
    assert set(actual) == set(expected)
    assert all(mx.array_equal(actual[name], expected[name]) for name in expected)


def test_missing_shards_are_all_named(folder):
    files = shard(folder)
    for file in files[1:]:
        (folder / file).unlink()
    message = refused(folder, "shards named by model.safetensors.index.json are missing")
    assert files[1] in message and files[2] in message and files[0] not in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "\xff"])
def test_a_broken_index(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    refused(folder, "index.json: not valid JSON" if text in "{\xff" else "index.json: not an index of safetensors")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"model: no weights \(model\*\.safetensors\)")


class Bomb:
    """Create a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "exploded")))
    refused(folder, "no weights")
    assert not (folder / "exploded").exists()


def spoil_start(data: bytes) -> bytes:
    return b"\xff" * 16 + data[16:]


def spoil_header(data: bytes) -> bytes:
    return data[:8] + data[8:].replace(b'"data_offsets"', b'"data_offsetz"', 1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", "not readable as safetensors"),
        (lambda data: data[:5], "not readable as safetensors"),
        (lambda data: data[:100], "not readable as safetensors"),
        (spoil_start, "not readable as safetensors"),
        (spoil_header, "not readable as safetensors"),
        (lambda data: b"\x02\0\0\0\0\0\0\0[]" + data, "not readable as safetensors"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            r"not .* \(a Git LFS pointer; run",
        ),
        (lambda data: data[:-1], r"truncated, [\d,]+ of [\d,]+ bytes"),
        (lambda data: data[: len(data) // 2], "truncated"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_safetensors(folder, spoil, message, sharded):
    """The error names the file before anything is computed: mlx reads lazily and would fail in the middle of a run."""
    name = shard(folder)[2] if sharded else "model.safetensors"
    (folder / name).write_bytes(spoil((folder / name).read_bytes()))
    refused(folder, f"{re.escape(name)}: {message}")


def test_a_dtype_that_mlx_does_not_know(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"Q99"', 1))
    refused(folder, "Q99")


def test_all_tensors_that_do_not_fit_are_named(folder):
    weights = read_weights(folder)
    mx.eval(weights)
    names = sorted(name for name in weights if "layer" in name and name.endswith("weight"))[:3]
    weights["colour"] = weights.pop(names[0])
    weights.pop(names[1])
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    message = refused(folder, re.escape(str(folder)))
    assert "colour" in message


def test_an_encoder_s_error_has_names_and_shapes(originals, tmp_path):
    folder = shutil.copytree(originals["bert"], tmp_path / "model")
    weights = read_weights(folder)
    mx.eval(weights)
    weights["colour"] = mx.zeros((2, 3))
    weights.pop("embeddings.LayerNorm.bias")
    weights["embeddings.word_embeddings.weight"] = mx.zeros((7, 64))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    message = refused(folder, "3 tensors do not fit the model")
    assert "unknown colour (2, 3)" in message and "missing embeddings.LayerNorm.bias (64,)" in message
    assert "embeddings.word_embeddings.weight is (7, 64), not (512, 64)" in message


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no config.json, so this is not a model's folder"),
        ("{", "config.json: not valid JSON"),
        ("", "config.json: not valid JSON"),
        (b"\xff\xfe", "config.json: not valid JSON"),
        ("{}", "config.json: no model_type"),
        ("[]", "config.json: no model_type"),
        ("3", "config.json: no model_type"),
        ('{"model_type": null}', "config.json: no model_type"),
        ('{"model_type": "flying-saucer"}', "model type 'flying-saucer' is supported neither here .* nor by"),
        ('{"model_type": "electra"}', "model type 'electra' is supported neither here"),
        ('{"model_type": "llama"}', r"mlx-lm cannot load it \(TypeError: .*hidden_size"),
    ],
)
def test_configs_that_cannot_be_used(originals, tmp_path, text, message):
    folder = shutil.copytree(originals["qwen3"], tmp_path / "model")
    if text is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(folder, message)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_size_that_is_missing(originals, tmp_path, name):
    """Regression: without one of BERT's sizes, loading ended in a KeyError."""
    refused(random_models.changed(originals["bert"], tmp_path / "model", **{name: None}), f"config.json: no {name}")


def test_code_that_comes_with_a_model_is_never_run(folder):
    (folder / "modeling.py").write_text(f"open({str(folder / 'exploded')!r}, 'w')\n")
    config = read_config(folder) | {"model_file": "modeling.py", "auto_map": {"AutoModel": "modeling.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, r"config.json: asks to run code of its own \(modeling.py\)")
    (folder / "config.json").write_text(json.dumps(config | {"model_file": None}))
    load_backbone(folder)
    assert not (folder / "exploded").exists()


# --- names ----------------------------------------------------------------------------------------------------------


def test_folders_are_found_by_path(originals, monkeypatch, tmp_path):
    assert resolve(str(originals["bert"])) == originals["bert"]
    monkeypatch.setenv("HOME", str(originals["bert"].parent))
    assert resolve("~/bert") == originals["bert"]
    monkeypatch.chdir(originals["bert"].parent)
    assert resolve("bert").resolve() == originals["bert"].resolve()
    assert toolkit_relative("bert") == str(originals["bert"].resolve())  # still found from elsewhere
    assert toolkit_relative("OWNER/NAME") == "OWNER/NAME"
    monkeypatch.chdir(tmp_path)
    assert resolve("tests") == CHECKOUT / "tests" and toolkit_relative("tests") == "tests"


def test_a_file_instead_of_a_folder(originals):
    with pytest.raises(UserError, match="this is a file; a model is a folder with config.json"):
        resolve(str(originals["bert"] / "model.safetensors"))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing/model", "a/b/c"])
def test_paths_are_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match=r"no folder /.*(missing|a/b/c)") as caught:
        resolve(name)
    assert "cache" not in str(caught.value)


def test_a_converted_folder_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve("gemma-3-270m-mlx")
    message = str(caught.value)
    assert f"no folder {tmp_path / 'gemma-3-270m-mlx'}" in message and "a hub name would be OWNER/NAME" in message
    assert "mlx_lm.convert --hf-path OWNER/gemma-3-270m --mlx-path gemma-3-270m-mlx" in message


def test_a_hub_name_without_a_hub(tmp_path, run_python):
    """The error comes without a try to reach the hub, and names the places searched and the command that helps."""
    code = """
import os, socket, sys
tried = []
socket.socket.connect = socket.getaddrinfo = lambda *args, **kwargs: tried.append(args)
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": sys.argv[1]}
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.backbones import resolve
import huggingface_hub
try:
    resolve("Qwen/Qwen3-Embedding-0.6B")
except UserError as error:
    print(error)
print(tried)
"""
    done = run_python(code, tmp_path / "cache")
    *message, tried = done.stdout.strip().split("\n")
    message = "\n".join(message)
    assert tried == "[]", done.stderr
    assert message.startswith("--model Qwen/Qwen3-Embedding-0.6B: no folder /")
    assert f"not in the cache {tmp_path / 'cache'}; and not from the Hub: HF_HUB_OFFLINE is set." in message
    assert "mlx_lm.convert --hf-path Qwen/Qwen3-Embedding-0.6B --mlx-path Qwen3-Embedding-0.6B-mlx" in message


def test_a_cached_model_needs_no_hub(tmp_path, run_python, originals):
    revision = "0" * 40
    cached = tmp_path / "models--someone--small"
    shutil.copytree(originals["bert"], cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    code = """
import os, sys
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": sys.argv[1]}
from mlx_retrieval.backbones import load_backbone, resolve
print(len(load_backbone(resolve("someone/small")).layers))
"""
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "2", done.stderr


def raised_by_the_hub() -> list[tuple[Exception, str]]:
    """Errors of huggingface_hub, and the end of the message about each."""
    from huggingface_hub import errors

    module = errors.HTTPError.__module__.split(".")[0]  # httpx, or what has taken its place
    client = __import__(module)
    response = client.Response(403, request=client.Request("GET", "http://hub.invalid"))
    wrapped = errors.LocalEntryNotFoundError("not in the cache")
    wrapped.__cause__ = errors.HfHubHTTPError("bad gateway", response=response)
    return [
        (errors.LocalEntryNotFoundError("not in the cache"), "not in the cache"),
        (errors.GatedRepoError("gated", response=response), "someone/something is gated: log in"),
        (errors.RepositoryNotFoundError("not found", response=response), "has no someone/something, or it is private"),
        (client.ProxyError("403 Forbidden"), r"cannot be reached \(403 Forbidden\)"),
        (client.ReadError("connection lost"), r"cannot be reached \(connection lost\)"),
        (wrapped, r"answers 403 \(bad gateway\)"),
        (OSError("no space left on device"), "OSError: no space left on device"),
    ]


@pytest.mark.parametrize("number", range(7))
def test_whatever_the_hub_raises(monkeypatch, number):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    error, message = raised_by_the_hub()[number]

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=f"not from the Hub: .*{message}") as caught:
        resolve("someone/something")
    assert ("On a machine with network" in str(caught.value)) == (number in (0, 3, 4))


@pytest.mark.parametrize("name", ["bad name/with spaces", "-x/y", "a/b--c"])
def test_names_that_the_hub_cannot_have(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for owner, function in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, function, lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match="not a valid hub name"):
        resolve(name)
