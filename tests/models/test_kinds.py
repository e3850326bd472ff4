"""What kind of model a folder holds, by its files or its name, and the line for a command that wants another kind.

python -m pytest tests/models/test_kinds.py
"""

import json
import shutil
from pathlib import Path

import pytest
from beir_folders import write_folder
from random_rerankers import cross_encoder

import embed
import eval as evaluation
import export
import mine
import rerank
import search
import train
from mlx_retrieval.backbones import finding
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.models.kinds import detect_kind
from mlx_retrieval.models.retrieval_config import FILE
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(scope="module")
def cross(tmp_path_factory) -> str:
    """Folder of a cross-encoder."""
    folder = tmp_path_factory.mktemp("models") / "cross"
    cross_encoder("bert", folder)
    return str(folder)


def test_base_models(small, tmp_path, minilm, cross):
    assert detect_kind(cross) == "rerank"
    assert detect_kind(small) == detect_kind(str(minilm)) == "embed"
    shutil.copytree(small, tmp_path / "Some-Reranker-0.6B")
    assert detect_kind(str(tmp_path / "Some-Reranker-0.6B")) == "rerank"


@pytest.mark.parametrize("task", ["embed", "late", "rerank"])
def test_an_adapter_tells_its_task(task, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / FILE).write_text(json.dumps({"task": task, "reranker": "qwen3"}))
    assert detect_kind(str(tmp_path)) == task


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config_sentence_transformers.json": {"model_type": "ColBERT"}}, "late"),
        ({"config_sentence_transformers.json": {"model_type": "MultiVectorEncoder"}, "modules.json": []}, "late"),
        ({"config_sentence_transformers.json": {"model_type": "CrossEncoder"}, "modules.json": []}, "rerank"),
        ({"modules.json": []}, "embed"),
        ({"config.json": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}}, "rerank"),
    ],
)
def test_files_of_other_libraries(files, kind, tmp_path):
    for name, content in ({"config.json": {"model_type": "bert"}} | files).items():
        (tmp_path / name).write_text(json.dumps(content))
    assert detect_kind(str(tmp_path)) == kind


def test_only_a_models_own_name_counts(small, tmp_path):
    """Regression: any folder on the way to it did, so that its embeddings were refused."""
    folder = str(shutil.copytree(small, tmp_path / "reranking" / "base"))
    assert detect_kind(folder) == "embed" and len(embedder.load(folder).encode("a text")) == 32


# --- the wrong kind, where it is taken ---


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Paths of inputs and outputs, by name; $NAME stands for one in the commands below."""
    (tmp_path / "docs.txt").write_text("a boiler\na bike\n")
    row = {"query": "a", "positive": "b", "negatives": ["c"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"query": "d"}) + "\n")
    beir = write_folder(tmp_path / "beir", [{"_id": "d", "text": "a"}], [{"_id": "q", "text": "a"}], "q\td\t1\n")
    output = str(tmp_path / "out")
    return {
        "DOCS": str(tmp_path / "docs.txt"),
        "ROWS": str(tmp_path / "rows.jsonl"),
        "BEIR": str(beir),
        "OUT": output,
        "NPY": output + ".npy",
    }


TAKES_EMBEDDINGS = {
    "embed": (embed, "--model $MODEL --input $DOCS --output $NPY"),
    "embed to es": (embed, "--model $MODEL --to es://nowhere"),
    "check": (embed, "--check $MODEL"),
    "index": (search, "index $BEIR --model-path $MODEL --index $OUT"),
    "negatives": (mine, "negatives --data $ROWS --model $MODEL --output $OUT"),
    "teacher": (mine, "score --data $ROWS --teacher $MODEL --teacher-kind embedder --output $OUT"),
    "serve": (rerank, "--serve --embedding-model $MODEL"),
    "first stage": (evaluation, "--task rerank --model $MODEL --first-stage $MODEL --eval-tasks $BEIR"),
}
TAKES_RERANKERS = {
    "rerank": (rerank, "--model $MODEL --query a --documents $DOCS"),
    "check": (rerank, "--check $MODEL"),
    "serve": (rerank, "--serve --model $MODEL"),
    "eval": (evaluation, "--task rerank --model $MODEL --eval-tasks $BEIR"),
    "judge": (mine, "negatives --data $ROWS --reranker $MODEL --output $OUT"),
    "teacher": (mine, "score --data $ROWS --teacher $MODEL --teacher-kind reranker --output $OUT"),
}
TAKES_ANY = {
    "train": (train, "--model $MODEL --data $ROWS --output $OUT --eval-tasks"),
    "train a reranker": (train, "--task rerank --model $MODEL --data $ROWS --output $OUT --eval-tasks"),
    "train a chat model": (train, "--task chat --model $MODEL --data $ROWS --output $OUT"),
    "eval": (evaluation, "--model $MODEL --eval-tasks $BEIR"),
    "export": (export, "--model $MODEL --output $OUT"),
}


def run(command, flags: str, files: dict[str, str], model: str, capsys) -> str:
    """Run a command that must refuse the model; return its one line."""
    words = [model if word == "$MODEL" else files[word[1:]] if word[0] == "$" else word for word in flags.split()]
    assert command.main(words) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if not line.startswith("mlx ")]
    assert not Path(files["OUT"]).exists() and "serving" not in out
    return line


@pytest.mark.parametrize("name", TAKES_EMBEDDINGS)
def test_a_reranker_is_no_embedding_model(name, cross, files, capsys):
    """Regression: a traceback, or vectors of dimension 0."""
    line = run(*TAKES_EMBEDDINGS[name], files, cross, capsys)
    assert f"{cross} is a reranker, which scores a query and a document together: rerank.py --model and " in line


@pytest.mark.parametrize("name", TAKES_RERANKERS)
def test_an_embedding_model_is_no_reranker(name, minilm, files, capsys):
    line = run(*TAKES_RERANKERS[name], files, str(minilm), capsys)
    assert f"{minilm} is an embedding model, which gives one vector a text: embed.py --model" in line


def test_a_trained_embedding_model_is_no_reranker(small, tmp_path):
    model, config, _ = loading.build(small)
    with pytest.raises(UserError, match="adapters/x is an embedding model"):
        Reranker.of(model, config, None, "adapters/x")


OTHERS = {
    "chat": {"adapters.safetensors": "", "adapter_config.json": '{"model": "base"}'},
    "chat, older": {"adapters.safetensors": "", "adapter_config.json": "{}", "config.yaml": "model: x\ntask: chat\n"},
    "peft": {"adapter_model.safetensors": "", "adapter_config.json": '{"peft_type": "LORA"}'},
    "run": {"config.yaml": "task: embed\n", "best/adapters.safetensors": "", "final/adapters.safetensors": ""},
    "gguf": {"model-q4.gguf": ""},
}
LINES = {
    "chat": "is a chat adapter, not a retrieval model: mlx_lm.generate --adapter-path takes it",
    "chat, older": "is a chat adapter, not a retrieval model",
    "peft": "is an adapter of PEFT: merge it into its base model there",
    "run": "is the folder of a run: give the adapter in it, {folder}/best or {folder}/final",
    "gguf": "not a GGUF",
}


@pytest.fixture(params=OTHERS)
def other(request, tmp_path: Path) -> tuple[str, str]:
    """A folder of something else, and the words for it."""
    folder = tmp_path / "folder"
    for name, content in OTHERS[request.param].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    name = f"{folder}/model-q4.gguf:" if request.param == "gguf" else folder
    return str(folder), f"{name} {LINES[request.param].format(folder=folder)}"


@pytest.mark.parametrize("command", [*TAKES_EMBEDDINGS.items(), *TAKES_RERANKERS.items(), *TAKES_ANY.items()], ids=str)
def test_folders_of_something_else(command, other, files, capsys):
    if command[0] == "first stage":
        pytest.skip("the reranker is refused first")
    folder, words = other
    if command[0] == "train a chat model" and "is a chat adapter" in words:
        words = "adapter_config.json: not an adapter's settings"  # a sound one goes on being trained
    assert words in run(*command[1], files, folder, capsys)


def test_adapters_are_no_base_models(tmp_path):
    """Where another adapter goes on top; train.py itself goes on with an adapter."""
    folder = tmp_path / "my adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / FILE).write_text(json.dumps({"task": "embed"}))
    with pytest.raises(UserError, match="my adapter is an adapter, and a base model is needed here") as refusal:
        loading.build(str(folder))
    assert f"python export.py --adapter '{folder}' --output DIR" in str(refusal.value)


def test_evaluation_and_export_take_the_task_from_the_model(cross, files, tmp_path, capsys):
    assert evaluation.main(["--model", cross, "--eval-tasks", files["BEIR"]]) == 0
    assert "reranks the first 100 documents of BM25" in capsys.readouterr().out
    for flags, words in ((["--precision", "int8"], "--precision: not"), (["--dimensions", "8"], "--dimensions: not")):
        assert evaluation.main(["--model", cross, "--eval-tasks", files["BEIR"], *flags]) == 2
        assert f"{words} for --task rerank, and {cross} is one" in capsys.readouterr().err
    assert loading.open_model(cross)[1].task == "rerank"  # as export.py and train.py open it
    assert loading.open_model(cross, task="embed")[1].task == "embed"


def test_a_first_stage_needs_a_reranker(small, files, capsys):
    assert evaluation.main(["--model", small, "--eval-tasks", files["BEIR"], "--first-stage", "bm25"]) == 2
    assert f"--first-stage: only for --task rerank, and {small} is no reranker" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["embed", "late"])
def test_the_task_does_not_make_a_reranker_an_embedding_model(task, cross, files, tmp_path, capsys):
    """Regression: `eval.py --model RERANKER --task embed` printed figures of no meaning."""
    words = f"{cross} is a reranker, which scores a query and a document together"
    assert words in run(evaluation, f"--model $MODEL --task {task} --eval-tasks $BEIR", files, cross, capsys)
    assert words in run(export, f"--model $MODEL --task {task} --output $OUT", files, cross, capsys)
    with pytest.raises(UserError, match=words):
        embedder.load(cross, task=task)


def test_an_embedding_model_is_not_exported_as_a_reranker(minilm, files, capsys):
    line = run(export, "--model $MODEL --task rerank --output $OUT", files, str(minilm), capsys)
    assert f"{minilm} is an embedding model" in line


def test_the_task_wins_over_a_name(small, tmp_path):
    folder = str(shutil.copytree(small, tmp_path / "some-reranker"))
    assert kinds.require(kinds.EMBEDDING, folder, task="embed") == "rerank"
    with pytest.raises(UserError, match="is a reranker"):
        kinds.require(kinds.EMBEDDING, folder)


def test_a_language_model_is_either(small):
    assert kinds.require(kinds.EMBEDDING, small) == kinds.require(kinds.RERANKING, small) == "embed"


# --- names that are nearly right ---


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("adapters/bset", "did you mean adapters/best?"),
        ("adpters/best", "did you mean adapters/best?"),
        ("./adapters/finl", "did you mean adapters/final?"),
        ("adapters/bxxxxset", "adapters holds best, final"),
        ("adapters/xxx/yyy", "adapters holds best, final"),
        ("my-modl", "did you mean my-model?"),
        ("models/be", "did you mean models/bert?"),
        ("models/llama", None),  # a folder of something else
        ("nosuch", None),
        ("nothing/alike", None),
        ("adapters/best/nothing", None),
    ],
)
def test_a_typo_in_a_path_suggests_what_there_is(name, near, tmp_path, monkeypatch):
    """Regression: `mlx_lm.convert --hf-path adapters/bset`, later `adapters/bxxxxset`, was suggested."""
    monkeypatch.chdir(tmp_path)
    for folder in ("adapters/best", "adapters/final", "adapters/.cache", "my-model", "models/bert"):
        Path(folder).mkdir(parents=True)
    for folder in ("adapters/best", "adapters/final"):
        (Path(folder) / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        finding.resolve(name)
    message = str(caught.value)
    assert f"; {near}" in message if near else "; did you" not in message and "holds" not in message
    assert ("mlx_lm.convert" in message) == (name == "nothing/alike")  # a hub name, and no folder `nothing`
    with pytest.raises(UserError, match="no such adapter folder") as caught:
        loading.open_model(None, name)
    assert str(caught.value).endswith(f"; {near}" if near else "no such adapter folder")


def test_a_run_without_a_best_step_names_its_last_one(tmp_path):
    """Training that improves nothing leaves no `best`, which the documentation's commands use."""
    (tmp_path / "mine" / "final").mkdir(parents=True)
    for open_it in (finding.resolve, lambda name: loading.open_model(None, name)):
        with pytest.raises(UserError, match="; the run there has no best step, and its last one is .*mine/final"):
            open_it(str(tmp_path / "mine" / "best"))
