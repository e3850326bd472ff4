"""`--dtype`: every command, notebook function and architecture computes in the dtype that it is asked for.

python -m pytest tests/test_dtype.py

Training's own flag is tested in tests/training/test_flags.py.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from beir_folders import write_folder
from random_models import recast, texts
from trained_models import trained

import embed
import eval as evaluation
import mine
import mlx_cross_encoder
import rerank
import search
from mlx_retrieval import backbones, backend
from mlx_retrieval.backbones import dtype_name, load_backbone
from mlx_retrieval.evaluation import comparison
from mlx_retrieval.exporters.weights import merge
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.run import load_retriever
from mlx_retrieval.mining.teacher import Teacher
from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import FILE, RetrievalConfig
from mlx_retrieval.retrieval.searcher import Searcher
from mlx_retrieval.utils.errors import SettingError, UserError

ROOT = Path(__file__).resolve().parent.parent
HALF = ("bfloat16", "float16")
TEXTS = ["where is Kyoto", "a boiler that drips at night", "a bike"]


class Loaded(Exception):  # noqa: N818  (no error: it ends a command once its model is loaded)
    """Raised in place of all that a command does with its model."""


@pytest.fixture
def adapter(base_folders, tmp_path) -> Path:
    """An adapter that was trained with --dtype bfloat16, on a float32 checkpoint."""
    return trained(base_folders["qwen3"], tmp_path / "adapter", dtype="bfloat16")[1]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "bert", "4-bit"])
@pytest.mark.parametrize("dtype", HALF)
def test_states_have_the_dtype_and_are_near_those_in_float32(base_folders, as_metal, kind, dtype):
    backbone, (ids, lengths) = load_backbone(base_folders[kind], dtype=dtype), texts((9, 5))
    states = backbone.hidden_states(ids, lengths)
    assert states.dtype == getattr(mx, dtype) and dtype_name(backbone) == dtype
    exact = load_backbone(base_folders[kind], dtype="float32").hidden_states(ids, lengths)
    assert exact.dtype == mx.float32
    a, b = np.array(states.astype(mx.float32))[0], np.array(exact)[0]
    assert not np.array_equal(a, b)
    assert ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).min() > 0.999


@pytest.mark.parametrize(("is_gpu", "expected"), [(False, "float32"), (True, "bfloat16")])
def test_auto_is_the_checkpoint_s_on_gpus_and_float32_on_cpus(base_folders, tmp_path, monkeypatch, is_gpu, expected):
    folder = recast(base_folders["qwen3"], tmp_path / "model", mx.bfloat16)
    monkeypatch.setattr(backend, "IS_GPU", is_gpu)
    assert dtype_name(load_backbone(folder)) == expected
    assert dtype_name(load_backbone(folder, dtype="float16")) == "float16"


def test_weights_that_a_library_s_model_keeps_in_full_precision_stay_so(base_folders, monkeypatch):
    kept = "input_layernorm.weight"
    predicate = property(lambda self: lambda name: kept not in name)  # as mlx-lm's models have it
    monkeypatch.setattr(backbones.decoder.Decoder, "cast_predicate", predicate, raising=False)
    monkeypatch.setattr(backbones.decoder.Decoder, "adapted", property(lambda self: self))
    layer = load_backbone(base_folders["qwen3"], dtype="float16").layers[0]
    assert layer.input_layernorm.weight.dtype == mx.float32
    assert layer.post_attention_layernorm.weight.dtype == mx.float16


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: embedder.load(folder, dtype="bfloat"),
        lambda folder: Reranker(str(folder), reranker_type="qwen3", dtype="bfloat"),
        lambda folder: load_backbone(folder, dtype="bfloat"),
    ],
)
def test_an_unknown_dtype_is_an_error_with_the_near_miss(base_folders, load):
    with pytest.raises(SettingError, match="--dtype bfloat: not one of auto, .*; did you mean bfloat16"):
        load(base_folders["qwen3"])


# --- notebooks --------------------------------------------------------------------------------------------------------


def test_models_of_notebooks(base_folders, as_metal):
    base = str(base_folders["qwen3"])
    models = {
        "load": embedder.load(base, dtype="float16"),
        "retriever": load_retriever(base, dtype="float16"),
        "teacher": Teacher(base, "embedder", dtype="float16").model,
        "judge": Teacher(base, "reranker", reranker_type="qwen3", dtype="float16").model,
        "reranker": Reranker(base, reranker_type="qwen3", dtype="float16"),
        "other names": mlx_cross_encoder.TriBridMLXReranker("qwen3", base, dtype="float16"),
    }
    assert {name: model.dtype for name, model in models.items()} == dict.fromkeys(models, "float16")
    vectors, exact = models["load"].encode(TEXTS), embedder.load(base, dtype="float32").encode(TEXTS)
    assert vectors.dtype == np.float32 and (vectors != exact).any() and (vectors * exact).sum(axis=1).min() > 0.9999
    scores = models["reranker"].score(TEXTS[0], TEXTS[1:])
    exact = Reranker(base, reranker_type="qwen3").score(TEXTS[0], TEXTS[1:])
    assert scores.dtype == np.float32 and (scores != exact).any() and np.abs(scores - exact).max() < 0.02


def test_a_cross_encoder_under_other_names(base_folders, tmp_path):
    folder = trained(base_folders["bert"], tmp_path / "adapter", task="rerank", reranker="cross-encoder")[1]
    model = mlx_cross_encoder.MLXCrossEncoder.from_pretrained(str(folder), dtype="float16")
    assert model.dtype == "float16"
    model.name = str(base_folders["bert"])
    config = mlx_cross_encoder.MLXCrossEncoderConfig()
    assert mlx_cross_encoder.MLXCrossEncoderTrainer(model, config).config.dtype == "float16"


def test_an_adapter_asks_for_the_dtype_of_its_training_unless_another_is_asked_for(adapter, base_folders):
    assert RetrievalConfig.read(adapter).dtype == "bfloat16"
    assert embedder.load(adapter).dtype == "bfloat16"
    assert embedder.load(adapter, dtype="auto").dtype == embedder.load(adapter, dtype="float32").dtype == "float32"
    assert embedder.load(base_folders["qwen3"], adapter).dtype == "bfloat16"
    settings = json.loads((adapter / FILE).read_text())
    (adapter / FILE).write_text(json.dumps(settings | {"dtype": "bf16"}))
    with pytest.raises(UserError, match="dtype bf16: not one of auto"):
        embedder.load(adapter)
    del settings["dtype"]  # as versions before --dtype wrote it
    (adapter / FILE).write_text(json.dumps(settings))
    assert embedder.load(adapter).dtype == "float32"


def test_an_index_of_one_dtype_is_searched_in_another(adapter, monkeypatch):
    """The fingerprint leaves the dtype out: vectors are the same up to rounding."""
    models = [embedder.load(adapter, dtype=name) for name in ("float32", "bfloat16")]
    assert models[0].fingerprint() == models[1].fingerprint()
    searcher = Searcher.__new__(Searcher)
    searcher._model_name, searcher._dtype = str(adapter), "float16"
    searcher.index = type("Index", (), {"info": type("Info", (), {"fingerprint": models[0].fingerprint()})})
    assert searcher.model.dtype == "float16"


def test_mining_starts_over_for_another_dtype(adapter):
    """Its cache would else mix vectors of both."""
    teachers = [Teacher(str(adapter), "embedder", dtype=name) for name in ("auto", "float32", "bfloat16")]
    assert teachers[0].fingerprint == teachers[1].fingerprint != teachers[2].fingerprint
    identities = [mine.run._identity(teacher.model) for teacher in teachers]
    assert identities[0] == identities[1] != identities[2] and mine.run._identity(None) == ""


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch) -> list[str | None]:
    """The dtypes with which commands open models. The second model ends a command, or the first without another."""
    dtypes: list[str | None] = []

    def open_model(model, adapter=None, **flags):
        dtypes.append(flags["dtype"])
        raise Loaded

    monkeypatch.setattr(loading, "open_model", open_model)
    return dtypes


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (embed, "--model {model} --input {rows} --output vectors.npy"),
        (embed, "--model {model} --to es://docs"),
        (embed, "--check {model}"),
        (evaluation, "--model {model} --eval-tasks {folder}"),
        (evaluation, "--model {model} --eval-tasks {folder} --task rerank"),
        (evaluation, "--model {model} --eval-tasks {folder} --task rerank --first-stage {model}"),
        (evaluation, "--compare {model} {other} --eval-tasks {folder}"),
        (rerank, "--model {model} --reranker-type qwen3 --query where --documents {rows}"),
        (rerank, "--model {model} --reranker-type qwen3 --serve"),
        (rerank, "--embedding-model {model} --serve"),
        (rerank, "--check {model} --reranker-type qwen3"),
        (search, "index {folder} --model {model}"),
        (search, "search where --rerank {reranker}"),
        (mine, "negatives --data {rows} --model {model} --output mined.jsonl"),
        (mine, "negatives --data {rows} --by bm25 --reranker {model} --reranker-type qwen3 --output mined.jsonl"),
        (mine, "score --data {rows} --teacher {model} --output scored.jsonl"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_command_passes_its_flag_on(base_folders, rows, tmp_path, monkeypatch, loaded, command, words):
    monkeypatch.chdir(tmp_path)
    reranker = trained(base_folders["bert"], tmp_path / "reranker", task="rerank", reranker="cross-encoder")[1]
    loaded.clear()
    places = {"model": base_folders["qwen3"], "other": base_folders["bert"], "rows": rows, "folder": ROOT / "eval-data"}
    words = words.format(**places, reranker=reranker).split()
    for flag, dtype in ((["--dtype", "float16"], "float16"), ([], None)):
        with pytest.raises(Loaded):
            command.main([*words, *flag])
        assert loaded.pop() == dtype and not loaded


def test_search_eval_passes_its_flag_on(monkeypatch, tmp_path):
    def made(index, model=None, reranker=None, field=None, dtype=None):
        raise Loaded(dtype)

    monkeypatch.setattr(search, "Searcher", made)
    queries = tmp_path / "queries.jsonl"
    queries.write_text(json.dumps({"query": "where", "path": "a.py"}) + "\n")
    for words in (["eval", str(queries)], ["search", "where"]):
        with pytest.raises(Loaded, match="float16"):
            search.main([*words, "--dtype", "float16"])


def test_a_search_says_that_its_dtype_is_slow_here(base_folders, monkeypatch, capsys):
    model = embedder.load(base_folders["qwen3"], dtype="float16")

    class Found:
        def __init__(self, *_):
            self.index = SimpleNamespace(
                info=SimpleNamespace(complete=True, is_corpus=True, language="english"), root=Path()
            )
            self.model, self.search, self.unfinished = model, lambda *_: [], ""

    monkeypatch.setattr(search, "Searcher", Found)
    for is_gpu, mode, said in ((False, "--semantic", True), (False, "--bm25", False), (True, "--semantic", False)):
        monkeypatch.setattr(backend, "IS_GPU", is_gpu)
        assert search.main(["search", "where", mode]) == 0
        assert ("computes in float16, which is slow on CPUs" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("command", "wanted", "near"),
    [
        (embed, "bfloat", "; did you mean bfloat16?"),
        (evaluation, "bf16", "; did you mean bfloat16?"),
        (rerank, "FP32", "; did you mean float32?"),
        (rerank, "int8", ""),
    ],
)
def test_another_dtype_is_refused_with_the_near_miss(command, wanted, near, capsys):
    with pytest.raises(SystemExit):
        command.main(["--model", "m", "--dtype", wanted])
    assert f"--dtype: {wanted} is not one of auto, float32, bfloat16, float16{near}\n" in capsys.readouterr().err


def test_the_headline_of_evaluations_says_the_dtype(base_folders, tmp_path, as_metal, capsys, monkeypatch):
    rows = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    folder = write_folder(
        tmp_path / "task", rows, [{"_id": "q", "text": "drips"}], "query-id\tcorpus-id\tscore\nq\td1\t1\n"
    )
    task, model = str(folder), str(base_folders["qwen3"])
    assert evaluation.main(["--model", model, "--eval-tasks", task, "--dtype", "float16"]) == 0
    assert f"{model} computes in float16\n" in capsys.readouterr().err
    shutil.copytree(base_folders["bert"], tmp_path / "other")
    names = [model, str(tmp_path / "other")]
    comparison.evaluations_of(names, [task], dtype="bfloat16")
    assert [f"{name} computes in bfloat16" for name in names] == capsys.readouterr().err.splitlines()


def test_a_dtype_that_is_slow_here_is_said(base_folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "texts.txt").write_text("one\n")
    words = ["--model", str(base_folders["qwen3"]), "--input", str(tmp_path / "texts.txt"), "--overwrite"]
    words += ["--output", str(tmp_path / "vectors.npy"), "--dtype"]
    monkeypatch.setattr(embedder.Model, "encode", lambda *_, **__: np.ones((1, 64), np.float32))
    for is_gpu, dtype, slow in ((False, "float16", True), (False, "float32", False), (True, "float16", False)):
        monkeypatch.setattr(backend, "IS_GPU", is_gpu)
        assert embed.main([*words, dtype]) == 0
        assert ("computes in float16, which is slow on CPUs" in capsys.readouterr().err) is slow


# --- exports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_an_adapter_trained_in_half_precision_is_merged_into_the_checkpoint_s_own_weights(
    base_folders, tmp_path, train_type
):
    """Not into weights that were rounded to compute."""
    import export

    folder = trained(base_folders["qwen3"], tmp_path / "adapter", train_type, dtype="bfloat16")[1]
    written = []

    class Writer:
        lines = ()

        def __init__(self, job, model, config, base):
            merge(model.backbone)
            written.append((model.backbone.adapted, config))

        def fill(self, folder):
            (folder / "config.json").write_text("{}")

    from mlx_retrieval.exporters import embedding

    original, embedding.EmbeddingWriter = embedding.EmbeddingWriter, Writer
    try:
        export.export(export.Export(adapter=str(folder), output=str(tmp_path / "out"), format="mlx"))
    finally:
        embedding.EmbeddingWriter = original
    model, config = written[0]
    weights = mx.load(str(folder / "adapters.safetensors"))
    checkpoint = mx.load(str(base_folders["qwen3"] / "model.safetensors"))
    name = "model.layers.1.self_attn.q_proj"
    if train_type == "lora":
        update = 1.5 * (weights[f"{name}.lora_a"] @ weights[f"{name}.lora_b"]).T
        expected = checkpoint[f"{name}.weight"] + update
    else:
        expected = weights[f"{name}.weight"].astype(mx.float32)
    merged = model.layers[1].self_attn.q_proj.weight
    assert merged.dtype == mx.float32
    np.testing.assert_allclose(np.array(merged), np.array(expected), atol=1e-6)
    assert config.dtype == "auto"  # an export's dtype is that of its weights
