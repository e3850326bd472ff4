"""The names that users of other MLX code import: ../shared/RERANKERS.md as written, over rerank.py and train.py.

python -m pytest tests/test_mlx_cross_encoder.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from random_rerankers import ANSWERS, ASKED, DOCUMENTS, QUERY, causal, cross_encoder, listwise

import train
from mlx_cross_encoder import (
    MLXCrossEncoder,
    MLXCrossEncoderConfig,
    MLXCrossEncoderTrainer,
    Qwen3RerankerConfig,
    Qwen3RerankerTrainer,
    TriBridMLXReranker,
    from_env,
)
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.training import checkpoint, run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils import locks
from mlx_retrieval.utils.errors import UserError

QWEN, MINILM = "Qwen/Qwen3-Reranker-0.6B", "cross-encoder/ms-marco-MiniLM-L-6-v2"
MODE = {"RERANKER_MODE": "mlx"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, qwen_tokenizer) -> Path:
    """A folder in which hub names are folders of small random models."""
    folder = tmp_path_factory.mktemp("hub")
    for name in (QWEN, MINILM):
        (folder / name).parent.mkdir()
    causal("qwen3", folder / QWEN, qwen_tokenizer)
    causal("qwen3", folder / "Qwen" / "other", qwen_tokenizer, num_hidden_layers=2)
    cross_encoder("bert", folder / MINILM)
    listwise(folder, qwen_tokenizer)
    return folder


@pytest.fixture
def hub(models, tmp_path, monkeypatch) -> Path:
    """Makes an empty current folder, from which hub names lead to those models."""
    for name in ("Qwen", "cross-encoder", "list"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(count: int = 12) -> list[dict]:
    """Labelled pairs, as many positives as negatives."""
    return [
        {"query": ASKED[i % 3], "document": ANSWERS[(i + i // 3) % 3], "label": int(i // 3 % 3 == 0)}
        for i in range(count)
    ]


def qwen(**changes) -> Qwen3RerankerConfig:
    """A small run of four steps."""
    small = {"lora_rank": 4, "batch_size": 3, "gradient_accumulation_steps": 2, "num_epochs": 2, "max_length": 300}
    return Qwen3RerankerConfig(**{"model_name": QWEN, "learning_rate": 1e-3} | small | changes)


def minilm_config(**changes) -> MLXCrossEncoderConfig:
    small = {"num_epochs": 2, "batch_size": 6, "learning_rate": 1e-3, "max_length": 100}
    return MLXCrossEncoderConfig(**small | changes)


# --- the code of RERANKERS.md -----------------------------------------------------------------------------------------


def test_reranker_as_written(hub):
    reranker = TriBridMLXReranker(reranker_type="qwen3", model_name="Qwen/Qwen3-Reranker-0.6B")
    results = reranker.rerank(query=QUERY, documents=DOCUMENTS, top_n=2)
    assert [list(result) for result in results] == [["index", "score", "document"]] * 2
    scores = Reranker(QWEN).score(QUERY, DOCUMENTS)
    assert [r["index"] for r in results] == np.argsort(-scores)[:2].tolist()
    assert results[0]["score"] == float(scores.max()) and results[0]["document"] == DOCUMENTS[results[0]["index"]]
    assert reranker.score(QUERY, DOCUMENTS[1]) == pytest.approx(float(scores[1]), abs=1e-6)
    np.testing.assert_array_equal(reranker.score(QUERY, DOCUMENTS), scores)


@pytest.mark.slow
def test_qwen3_training_as_written(hub, capsys):
    train_data, eval_data = rows(40), rows(8)
    config = Qwen3RerankerConfig(
        model_name="Qwen/Qwen3-Reranker-0.6B",
        lora_rank=16,
        batch_size=4,
        gradient_accumulation_steps=8,
        num_epochs=3,
        learning_rate=2e-5,
    )
    trainer = Qwen3RerankerTrainer(config)
    trainer.prepare_model()
    before = trainer.score_pair(QUERY, DOCUMENTS[0])
    done = trainer.train(train_data, eval_data)
    trainer.save_adapter()
    assert done["steps"] == 4  # 3 epochs of 40 rows, 32 at a time
    assert "40 rows, batch 32, 4 steps = 3.2 epochs" in capsys.readouterr().out
    after = trainer.score_pair(QUERY, DOCUMENTS[0])
    assert after != before and before == pytest.approx(float(Reranker(QWEN).score(QUERY, DOCUMENTS[:1])[0]), abs=1e-6)
    environment = MODE | {"MLX_RERANKER_TYPE": "qwen3", "MLX_RERANKER_MODEL": QWEN, "MLX_RERANKER_MAX_LENGTH": "512"}
    used = from_env(environment | {"MLX_RERANKER_ADAPTER": "./adapters/qwen3-reranker-lora_best"})
    assert used.rerank(QUERY, DOCUMENTS, 1) and used.config.max_length == 512


def test_cross_encoder_as_written(hub):
    train_data, eval_data = rows(), rows(6)
    model = MLXCrossEncoder.from_pretrained("cross-encoder/ms-marco-MiniLM-L-6-v2")
    before = model.predict([("auth flow", "OAuth2 token exchange")])
    trainer = MLXCrossEncoderTrainer(
        model, MLXCrossEncoderConfig(pretrained_path="cross-encoder/ms-marco-MiniLM-L-6-v2")
    )
    trainer.train(train_data, eval_data)
    score = trainer.score_pair("auth flow", "OAuth2 token exchange")
    assert isinstance(score, float) and score != before[0]
    assert model.predict([("auth flow", "OAuth2 token exchange")])[0] == pytest.approx(score)
    saved = MLXCrossEncoder.from_pretrained("adapters/mlx-cross-encoder")
    assert saved.predict(("auth flow", "OAuth2 token exchange")) == pytest.approx(score, abs=1e-6)
    assert kinds.is_adapter(hub / "adapters" / "mlx-cross-encoder_best")


# --- in use -----------------------------------------------------------------------------------------------------------


def test_predict(hub):
    model = MLXCrossEncoder.from_pretrained(MINILM, max_length=100)
    scores = model.predict([(QUERY, document) for document in DOCUMENTS])
    assert scores.dtype == np.float32 and scores.shape == (5,)
    np.testing.assert_allclose(scores, Reranker(MINILM, max_length=100).score(QUERY, DOCUMENTS), atol=1e-5)
    assert model.predict([QUERY, DOCUMENTS[1]]) == pytest.approx(scores[1], abs=1e-5)
    assert model.predict([]).shape == (0,)
    with pytest.raises(UserError, match="of the type qwen3; use TriBridMLXReranker"):
        MLXCrossEncoder.from_pretrained(QWEN)


@pytest.mark.parametrize(
    ("names", "model", "kind"),
    [
        (("cross-encoder", "cross_encoder", "Cross-Encoder", None), MINILM, "cross-encoder"),
        (("listwise", "jina", None), "list", "listwise"),
        (("qwen3", None), None, "qwen3"),
    ],
)
def test_types(hub, names, model, kind):
    assert {TriBridMLXReranker(name, model).kind for name in names} == {kind}


def test_environment(hub):
    assert from_env({}) is None and from_env({"RERANKER_MODE": "cloud", "MLX_RERANKER_TYPE": "nonsense"}) is None
    assert from_env(MODE | {"MLX_RERANKER_MODEL": MINILM, "MLX_RERANKER_MAX_LENGTH": ""}).kind == "cross-encoder"
    used = from_env({"RERANKER_MODE": " MLX ", "MLX_RERANKER_MAX_LENGTH": "300"})
    assert used.kind == "qwen3" and used.config.max_length == 300


@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory) -> str:
    """An adapter of the small Qwen3-Reranker."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    trainer = Qwen3RerankerTrainer(qwen(model_name=str(models / QWEN), num_epochs=1, adapter_path=str(folder)))
    trainer.train(rows(6))
    return str(folder)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TYPE": "bm25"}, "TYPE bm25: known are qwen3, cross-encoder, cross_encoder, listwise, jina, late"),
        ({"TYPE": "qwen3", "MODEL": MINILM}, "TYPE qwen3 needs a language model"),
        ({"TYPE": "listwise", "MODEL": QWEN, "ADAPTER": "adapter"}, "TYPE listwise: .* is of the kind qwen3"),
        ({"TYPE": "cross-encoder"}, "MODEL is missing"),
        ({"MODEL": "nowhere"}, "MODEL nowhere: no folder"),
        ({"MODEL": "./nowhere"}, "MODEL ./nowhere: no folder"),
        ({"MODEL": "Qwen"}, "MODEL Qwen: no config.json"),
        ({"ADAPTER": "./nowhere"}, "ADAPTER ./nowhere: no saved adapter's folder"),
        ({"ADAPTER": QWEN}, f"ADAPTER {QWEN}: no saved adapter's folder"),
        (
            {"MODEL": "Qwen/other", "ADAPTER": "adapter"},
            "ADAPTER .* was trained on .*, and Qwen/other is another model",
        ),
        ({"MAX_LENGTH": "long"}, "MAX_LENGTH long: not a whole number above 0"),
        ({"MAX_LENGTH": "0"}, "MAX_LENGTH 0: not a whole number above 0"),
        ({"MAX_LENGTH": "5.5"}, "MAX_LENGTH 5.5: not a whole number above 0"),
        ({"MAX_LENGTH": "40"}, "MAX_LENGTH 40 leaves no room"),
        ({"MAX_LENGTH": "500", "MODEL": MINILM, "TYPE": "cross-encoder"}, "MAX_LENGTH: the model has 130 positions"),
    ],
)
def test_wrong_variables_are_named(hub, adapter, variables, message):
    given = {f"MLX_RERANKER_{name}": adapter if value == "adapter" else value for name, value in variables.items()}
    with pytest.raises(UserError, match=f"^MLX_RERANKER_{message}"):
        from_env(MODE | given)


def test_a_damaged_adapter_is_named(hub, adapter):
    broken = hub / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="^MLX_RERANKER_ADAPTER broken: no retrieval_config.json"):
        from_env(MODE | {"MLX_RERANKER_ADAPTER": "./broken"})
    with pytest.raises(UserError, match="^adapter_path .*was trained on"):
        TriBridMLXReranker("qwen3", "Qwen/other", adapter)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("qwen3", marks=pytest.mark.slow), "cross-encoder"])
def test_training_is_that_of_train_py(kind, hub, write_rows):
    """The same weights bit for bit, and the scores of what is saved are the trainer's."""
    if kind == "qwen3":
        trainer = Qwen3RerankerTrainer(qwen(adapter_path="ours", lora_dropout=0.1))
    else:
        trainer = MLXCrossEncoderTrainer(MLXCrossEncoder.from_pretrained(MINILM), minilm_config(output_dir="ours"))
    trainer.train(rows(), rows(6))
    base = {"qwen3": QWEN, "cross-encoder": MINILM}[kind]
    folder = write_rows(rows(), "train.jsonl").parent
    write_rows(rows(6), "valid.jsonl")
    own = {"lora_rank": 4, "lora_dropout": 0.1, "max_length": 300, "gradient_accumulation_steps": 2}
    if kind == "cross-encoder":
        own = {"train_type": "full", "max_length": 100, "gradient_accumulation_steps": 1}
    shared = {"batch_size": 6, "steps": 4, "eval_steps": 2, "eval_tasks": [], "learning_rate": 1e-3}
    train.train(Settings(model=base, task="rerank", data=[str(folder)], output="theirs", **shared | own))
    pairs = [(hub / "ours", hub / "theirs" / "final"), (hub / "ours_best", hub / "theirs" / "best")]
    improved = pairs[1][1].is_dir()
    assert pairs[1][0].is_dir() == improved == (kind == "cross-encoder")
    pairs = pairs if improved else pairs[:1]
    for ours, theirs in pairs:
        names = {path.name for path in theirs.glob("*.safetensors")} - {checkpoint.OPTIMIZER}
        assert {path.name for path in ours.glob("*.safetensors")} == names
        assert len(names) == 1 + (kind == "cross-encoder")
        for name in names:
            found, expected = read_safetensors(ours / name), read_safetensors(theirs / name)
            assert found.keys() == expected.keys()
            for key in found:
                np.testing.assert_array_equal(np.array(found[key]), np.array(expected[key]), err_msg=key)
    scores = trainer.model.score(QUERY, DOCUMENTS)
    np.testing.assert_array_equal(TriBridMLXReranker(kind, base, "ours").score(QUERY, DOCUMENTS), scores)
    trainer.save_adapter("elsewhere") if kind == "qwen3" else trainer.save("elsewhere")
    np.testing.assert_array_equal(TriBridMLXReranker(None, None, "elsewhere").score(QUERY, DOCUMENTS), scores)
    np.testing.assert_array_equal(Reranker("ours").score(QUERY, DOCUMENTS), scores)
    assert trainer.rerank(QUERY, DOCUMENTS, 1)[0]["score"] == pytest.approx(float(scores.max()), abs=1e-6)


def test_steps_and_batches():
    """batch_size x gradient_accumulation_steps rows a step, at most all; as many steps as the epochs need."""

    def of(count: int, **changes) -> tuple:
        settings = Qwen3RerankerConfig(**changes).settings("m", "qwen3", count)
        return settings.batch_size, settings.gradient_accumulation_steps, settings.steps, settings.eval_steps

    assert of(1000) == (32, 8, 94, 32)
    assert of(20) == (20, 8, 3, 1)
    assert of(64, num_epochs=0.5) == (32, 8, 1, 2)
    assert of(64, batch_size=8, gradient_accumulation_steps=1, eval_steps=5) == (8, 1, 24, 5)
    config = Qwen3RerankerConfig(lora_alpha=8, lora_target_modules=["q_proj"], warmup_ratio=0.2, task_instruction="Do")
    settings = config.settings("m", "qwen3", 10)
    assert (settings.lora_alpha, settings.lora_keys, settings.warmup) == (8, ["q_proj"], 0.2)
    assert settings.instruction == "Do"
    assert (settings.lora_rank, settings.learning_rate, settings.max_length) == (16, 2e-5, 512)
    assert config.folders()[1] == Path("adapters/qwen3-reranker-lora_best")


@pytest.mark.slow
def test_no_step_is_best_that_is_worse_than_the_untrained_model(hub):
    """Labels of eval_data that contradict train_data's: every step is worse than none. One of an earlier run goes."""
    opposite = [row | {"label": 1 - row["label"]} for row in rows()]
    config = qwen(num_epochs=8, gradient_accumulation_steps=4, learning_rate=3e-3)
    last, best, folder = config.folders()
    done = Qwen3RerankerTrainer(config).train(rows(), rows())
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {r["step"]: r["metrics"]["validation_loss"] for r in records if r["type"] == "eval"}
    assert len(losses) == 9 and done["best_step"] == min(losses, key=losses.get) > 0 and done["steps"] == 8
    assert (best / loading.ADAPTERS).read_bytes() == (folder / "best" / loading.ADAPTERS).read_bytes()
    assert {path.name for path in best.iterdir()} == {path.name for path in last.iterdir()}
    config = qwen(num_epochs=8, gradient_accumulation_steps=4, learning_rate=3e-3, overwrite=True)
    done = Qwen3RerankerTrainer(config).train(rows(), opposite)
    assert done["best_step"] == 0 and not best.exists() and not (folder / "best").exists() and last.is_dir()


@pytest.mark.slow
def test_a_second_run(hub, capsys):
    """The same trainer begins anew; another one must be told to replace what is there."""
    trainer = Qwen3RerankerTrainer(qwen())
    trainer.train(rows(), rows(6))
    last, best, _ = trainer.config.folders()
    first = (last / loading.ADAPTERS).read_bytes()
    trainer.train(rows())
    assert (last / loading.ADAPTERS).read_bytes() == first and not best.exists()
    with pytest.raises(UserError, match="qwen3-reranker-lora exists already: .*overwrite=True"):
        Qwen3RerankerTrainer(qwen()).train(rows())
    Qwen3RerankerTrainer(qwen(overwrite=True, seed=1)).train(iter(rows()))
    assert (last / loading.ADAPTERS).read_bytes() != first
    (hub / "notes").mkdir()
    (hub / "notes" / "thesis.txt").write_text("years of work")
    for config in (qwen(adapter_path="notes"), qwen(adapter_path="notes", overwrite=True)):
        with pytest.raises(UserError, match="notes: not an adapter's folder"):
            Qwen3RerankerTrainer(config).train(rows())
    with pytest.raises(UserError, match="notes: not an adapter's folder"):
        trainer.save_adapter("notes")
    assert (hub / "notes" / "thesis.txt").is_file()
    with pytest.raises(UserError, match="train first"):
        Qwen3RerankerTrainer(qwen()).save_adapter()


def test_train_py_resumes_a_run(hub):
    """What a run leaves behind when it is stopped is whole."""
    Qwen3RerankerTrainer(qwen(adapter_path="whole")).train(rows())
    Qwen3RerankerTrainer(qwen(adapter_path="half", stop_after=2)).train(rows())
    assert train.main(["--resume", "--output", "half_run"]) == 0
    name = Path("final") / loading.ADAPTERS
    assert Path("half_run", name).read_bytes() == Path("whole_run", name).read_bytes()


def test_other_formats_of_rows(hub):
    graded = [{"query": ASKED[i % 3], "positive": ANSWERS[i % 3], "negatives": [ANSWERS[i % 2]]} for i in range(6)]
    numbers = [row | {"label": np.float32(row["label"])} for row in rows(6)]
    trainer = MLXCrossEncoderTrainer(MLXCrossEncoder.from_pretrained(MINILM), minilm_config(train_type="lora"))
    assert trainer.train(graded)["steps"] == 2
    assert trainer.train(numbers, graded)["steps"] == 2
    trainer.config.skip_bad_rows = True
    assert trainer.train([*numbers, {"query": "alone"}])["steps"] == 2


def bad(**changes) -> list[dict]:
    return [*rows(3), rows()[0] | changes, *rows(3)]


@pytest.mark.parametrize(
    ("train_data", "eval_data", "message"),
    [
        (bad(label=3), None, r"train_data\[3\]: label 3 is not a number from 0 to 1"),
        (bad(label=-0.1), None, r"train_data\[3\]: label -0.1 is not a number"),
        (bad(label=float("nan")), None, r"train_data\[3\]: label nan is not a number"),
        (bad(label="yes"), None, r"train_data\[3\]: label 'yes' is not a number"),
        (bad(label=None), None, r"train_data\[3\]: has the format query/document, but the rows before"),
        (bad(document=""), None, r"train_data\[3\]: document is empty"),
        (bad(document={1, 2}), None, r"train_data\[3\]: 'set' object"),
        ([*rows(3), ("query", "document", 1)], None, r"train_data\[3\]: not a JSON object"),
        ([*rows(3), {"query": "q", "positive": "d"}], None, r"train_data\[3\]: has the format query/document, but"),
        ([], None, "train_data: no usable row"),
        ("train.jsonl", None, "train_data: not a list of rows"),
        (rows()[0], None, "train_data: not a list of rows"),
        (None, None, "train_data: not a list of rows"),
        (rows(), [], "eval_data: no usable row"),
        (rows(), bad(label=2), r"eval_data\[3\]: label 2 is not a number"),
        (rows(), [{"query": "q", "document": "d"}], "eval_data: .*neither labels nor negatives"),
        ([{"query": "q", "document": "d"}] * 4, None, "train_data: the rows have neither labels nor negatives"),
    ],
)
def test_bad_rows_are_named_before_anything_is_trained(hub, train_data, eval_data, message, monkeypatch):
    monkeypatch.setattr(run, "run", lambda _: pytest.fail("trained"))
    trainer = Qwen3RerankerTrainer(qwen())
    with pytest.raises(UserError, match=f"^{message}") as caught:
        trainer.train(train_data, eval_data)
    assert "jsonl" not in str(caught.value) or train_data == "train.jsonl"
    assert 0 < trainer.score_pair(QUERY, DOCUMENTS[0]) < 1  # the base model is still of use
    monkeypatch.setattr(run, "run", lambda _: {})
    assert trainer.train(rows())["steps"] == 0  # and nothing stands in the way of another attempt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 0}, "lora_rank 0: must be above 0"),
        ({"batch_size": 0}, "batch_size 0: must be above 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0: must be above 0"),
        ({"num_epochs": 0}, "num_epochs 0: must be above 0"),
        ({"learning_rate": -1}, "learning_rate -1: must be above 0"),
        ({"max_length": -1}, "max_length -1: must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout 1.0: must be from 0"),
        ({"steps": 7, "dry_run": True}, "dry_run, steps: settings of train.py alone"),
        ({"model": QWEN}, "model: settings of train.py alone"),
    ],
)
def test_wrong_settings_are_told_at_once(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Qwen3RerankerConfig(**changes)
    with pytest.raises(TypeError, match="num_epoch"):
        Qwen3RerankerConfig(num_epoch=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target_modules": ["nothing"]}, "lora_target_modules nothing match nothing"),
        ({"model_name": "nowhere"}, "model_name nowhere: no folder"),
        ({"model_name": MINILM}, "reranker_type qwen3 needs a language model"),
        ({"max_length": 40}, "max_length 40 leaves no room"),
        ({"loss": "nt_xent"}, "loss nt_xent compares vectors"),
        ({"pooling": "mean"}, "pooling is for task embed"),
    ],
)
def test_what_does_not_fit_is_told_by_its_name(hub, changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Qwen3RerankerTrainer(qwen(**changes)).train(rows())


def test_a_run_s_folder_that_is_in_use_is_named(hub):
    """Errors from deep within a run name parameters, too."""
    in_use = locks.only_one(hub / "ours_run" / ".lock", "held")
    with in_use, pytest.raises(UserError, match="^adapter_path ours_run: another process is training there"):
        Qwen3RerankerTrainer(qwen(adapter_path="ours")).train(rows(6))


def test_errors_about_a_cross_encoder_name_its_own_parameters(hub):
    """Its config has pretrained_path and save_path, where a Qwen3-Reranker's has model_name and adapter_path."""
    assert minilm_config().parameters["output"] == "save_path"
    assert minilm_config(output_dir="here").parameters["output"] == "output_dir"
    trainer = MLXCrossEncoderTrainer(MLXCrossEncoder.from_pretrained(MINILM), minilm_config())
    trainer.name = "nowhere"
    with pytest.raises(UserError, match="^pretrained_path nowhere: no folder"):
        trainer.train(rows(6))


def test_cross_encoders_and_their_config_must_agree(hub, adapter):
    model = MLXCrossEncoder.from_pretrained(MINILM, max_length=90)
    with pytest.raises(UserError, match=f"^pretrained_path {QWEN}, but the model is {MINILM}"):
        MLXCrossEncoderTrainer(model, MLXCrossEncoderConfig(pretrained_path=QWEN))
    trainer = MLXCrossEncoderTrainer(model, minilm_config(max_length=None, train_type="lora"))
    trainer.train(rows(6))
    assert model.config.max_length == 90 and Reranker("adapters/mlx-cross-encoder").config.max_length == 90
    with pytest.raises(UserError, match="is an adapter: training starts from a base model"):
        MLXCrossEncoderTrainer(MLXCrossEncoder.from_pretrained("adapters/mlx-cross-encoder"), minilm_config())
