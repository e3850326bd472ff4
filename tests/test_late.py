"""Late interaction from text to ranking: token vectors, what counts, search, training against torch, saved folders.

python -m pytest tests/test_late.py
"""

import json
import shutil
import string
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import random_encoders
import torch
from mlx.utils import tree_map

import export
import train
from mlx_retrieval.backbones import lora
from mlx_retrieval.evaluation import retrieval
from mlx_retrieval.exporters import parity
from mlx_retrieval.exporters import pylate_files as exporters_pylate_files
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading, maxsim, pylate_files
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.retrieval import late_interaction
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

TEXTS = ["a", "the boiler drips, and hisses; all night!", "", "bike " * 30, "été 🚲 <eos> [SEP]"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory, toy_tokenizer_folder) -> Path:
    """A random T5 encoder with a tokenizer."""
    folder = random_encoders.save("t5", tmp_path_factory.mktemp("models") / "t5")
    shutil.copytree(toy_tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


def late(folder, **flags) -> embedder.Model:
    model, config, base = loading.build(str(folder), task="late", **flags)
    return embedder.Model(model, config, config.tokenizer(base), "late")


# --- token vectors ---


def test_a_vector_for_every_token(minilm):
    """Unit vectors of transformers' states, in the texts' order; markers and special tokens count, padding does not."""
    from transformers import AutoModel, AutoTokenizer

    model = late(minilm)
    theirs, tokenizer = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    found = model.encode(TEXTS[:4], "query")
    for text, vectors in zip(TEXTS[:4], found, strict=True):
        with torch.no_grad():
            states = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states, dim=1).numpy()
        assert vectors.shape == expected.shape and vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    assert model.encode(TEXTS[0], "query").shape == (3, 384)
    with pytest.raises(UserError, match="neither dimensions nor precision"):
        model.encode(TEXTS, dimensions=64)


def test_punctuation_does_not_count_in_documents(minilm):
    plain, skipping = late(minilm), late(minilm, skiplist=list(string.punctuation))
    text = TEXTS[1]
    tokens = plain.tokenizer.tokenizer.encode(text).tokens
    kept = [token not in string.punctuation for token in tokens]
    assert not all(kept)
    expected = plain.encode([text], "document")[0][kept]
    np.testing.assert_allclose(skipping.encode([text], "document")[0], expected, rtol=0, atol=1e-6)
    assert len(skipping.encode([text], "query")[0]) == len(tokens)


@pytest.mark.parametrize("attended", [False, True])
def test_query_expansion(minilm, attended):
    """As ColBERT: mask tokens fill the query, seen by the others or not; they see the query either way."""
    from transformers import AutoModel, AutoTokenizer

    model = late(minilm, query_expansion=12, attend_expansion=attended)
    theirs, tokenizer = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    texts = ["why does it drip", "boiler"]
    for text, vectors in zip(texts, model.encode(texts, "query"), strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        missing = 12 - inputs["input_ids"].shape[1]
        ids = torch.nn.functional.pad(inputs["input_ids"], (0, missing), value=tokenizer.mask_token_id)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, missing), value=int(attended))
        with torch.no_grad():
            states = theirs(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states, dim=1).numpy()
        np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)
    longer = "why does it drip all night and hiss at me in the morning when it is cold"
    assert len(model.encode([longer], "query")[0]) == 12 < len(document := model.encode([longer], "document")[0])
    whole = late(minilm, query_expansion=12, query_max_length=100)
    assert len(whole.encode([longer], "query")[0]) == len(document)


# --- other libraries' folders ---


@pytest.mark.parametrize("expansion", [None, {"strategy": "fixed", "length": 24, "attend": False}], ids=str)
def test_folders_of_sentence_transformers(minilm, tmp_path, expansion):
    """A MultiVectorEncoder as the installed version saves it: projection, skip list, expansion, prompts, vectors."""
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    theirs = library.MultiVectorEncoder(str(minilm), device="cpu", prompts={"query": "search: ", "document": ""})
    theirs[0].query_expansion = expansion
    theirs[2].skiplist_words = list(string.punctuation)
    theirs[2].resolve_with_tokenizer(theirs.tokenizer)
    theirs.save(str(tmp_path / "model"))
    ours = embedder.load(tmp_path / "model")
    assert ours.late and ours.dimensions == 128 and ours.config.maxsim == "sum"
    texts = [text for text in TEXTS if text and "<" not in text]
    for role, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        for mine, other in zip(ours.encode(texts, role), encode(texts), strict=True):
            np.testing.assert_allclose(mine, np.array(other.tolist(), np.float32), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="those of a model for --task late, not embed"):
        loading.build(str(tmp_path / "model"), task="embed")


@pytest.mark.parametrize("flags", [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"projection": 16, "skiplist": list(string.punctuation), "query_prompt": "find: "},
                 marks=pytest.mark.slow),
    {"query_expansion": 20, "max_length": 40, "query_max_length": 20, "maxsim": "sum"},
], ids=str)  # fmt: skip
def test_exported_folders(minilm, tmp_path, monkeypatch, flags):
    """PyLate's layout, read by sentence-transformers: MaxSim scores as before, and here everything as it was."""
    monkeypatch.setattr(parity, "COUNTS", (1, 4, 25))  # fewer and shorter texts than users' exports are checked with
    monkeypatch.setattr(parity, "LONGEST", 30)
    library = pytest.importorskip("sentence_transformers")
    mx.random.seed(0)
    model, config, _ = loading.build(str(minilm), task="late", **flags)
    adapter_config = lora.adapt(model.backbone, rank=4)
    model.update(tree_map(lambda v: v + 0.02 * mx.random.normal(v.shape), model.trainable_parameters()))
    files.write_folder(tmp_path / "adapter", lambda where: loading.save_model(where, model, adapter_config, config))
    before = embedder.load(tmp_path / "adapter")
    texts = [text for text in TEXTS if text and "<" not in text]
    sides = [before.encode(texts, role) for role in ("query", "document")]
    expected = np.array(maxsim.maxsim(*map(late_interaction._pad, sides), "sum"))
    command = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")]
    assert export.main(command) == 0
    theirs = library.MultiVectorEncoder(str(tmp_path / "out"), device="cpu")
    found = [
        [np.array(v.tolist(), np.float32) for v in encode(texts)]
        for encode in (theirs.encode_query, theirs.encode_document)
    ]
    np.testing.assert_allclose(maxsim.maxsim(*map(late_interaction._pad, found), "sum"), expected, rtol=0, atol=1e-4)
    again = embedder.load(tmp_path / "out")
    if flags:
        with pytest.raises(UserError, match="PyLate's layout"):
            spoilt = again.config.override(pool_prompt=False)
            exporters_pylate_files.write(tmp_path, spoilt, [101, 102], 384)
    assert (again.config.task, again.config.maxsim) == ("late", config.maxsim)
    for role, vectors in zip(("query", "document"), sides, strict=True):
        for mine, other in zip(again.encode(texts, role), vectors, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)
    if not flags:
        assert "MultiVectorEncoder" in (tmp_path / "out" / "README.md").read_text()
        assert export.main([*command, "--gguf-ready", "--overwrite"]) == 2


def describe(folder: Path, settings: dict, mask: dict | None = None) -> Path:
    """The files in which a late model without projection describes itself."""
    kinds = {"": "Transformer"} | ({"1_Mask": "MultiVectorMask"} if mask is not None else {})
    modules = [{"path": path, "type": f"somewhere.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    if mask is not None:
        (folder / "1_Mask").mkdir()
        (folder / "1_Mask" / "config.json").write_text(json.dumps(mask))
    return folder


def test_older_folders_of_pylate(tmp_path):
    """Prefixes as prompts, lengths, and its defaults: punctuation is skipped, queries are filled up."""
    said = {"model_type": "ColBERT", "query_prefix": "[Q] ", "document_prefix": "[D] ", "document_length": 180}
    fields = pylate_files.read(describe(tmp_path, said))
    assert (fields["query_prompt"], fields["document_prompt"]) == ("[Q] ", "[D] ")
    assert fields["skiplist"] == list(string.punctuation) and fields["maxsim"] == "sum"
    assert (fields["max_length"], fields["query_max_length"]) == (180, 32)
    assert (fields["query_expansion"], fields["attend_expansion"]) == (32, False)
    fields = pylate_files.read(describe(tmp_path, said | {"do_query_expansion": False, "skiplist_words": []}))
    assert fields["skiplist"] == [] and "query_expansion" not in fields


@pytest.mark.parametrize(
    ("settings", "mask", "message"),
    [
        ({}, {"skiplist_tasks": ["query", "document"]}, "only a skip list for documents"),
        ({}, {"keep_only_token_ids": [3]}, "only a skip list for documents"),
        ({"query_expansion": {"strategy": "ratio"}}, {}, "query expansion by ratio is not supported"),
    ],
)
def test_what_other_folders_do_is_refused(tmp_path, settings, mask, message):
    with pytest.raises(UserError, match=message):
        pylate_files.read(describe(tmp_path, {"model_type": "MultiVectorEncoder"} | settings, mask))


# --- search ---


@pytest.fixture
def corpus() -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(0)

    def vectors(count: int) -> np.ndarray:
        made = rng.normal(size=(count, 8)).astype(np.float32)
        return made / np.linalg.norm(made, axis=1, keepdims=True)

    documents = [vectors(n) for n in rng.integers(1, 30, 60)]
    documents[7] = vectors(0)  # nothing but punctuation
    return [vectors(n) for n in (1, 4, 9)], documents


@pytest.mark.parametrize("at_once", [1, 100, 1 << 16])
@pytest.mark.parametrize(("how", "impute"), [("mean", 0), ("sum", 0), ("mean", 40)])
def test_exhaustive_search_is_the_formula(corpus, monkeypatch, how, impute, at_once):
    monkeypatch.setattr(late_interaction, "TOKENS_AT_ONCE", at_once)
    queries, documents = corpus
    index = LateIndex(documents, how, impute)
    assert "all scored" in index.description
    everything = np.concatenate(documents)
    for query, ranking in zip(queries, index.search(queries, 60), strict=True):
        best = np.stack([(query @ d.T).max(axis=1) if len(d) else np.full(len(query), -1.0) for d in documents], axis=1)
        if impute:
            best = np.maximum(best, -np.sort(-query @ everything.T, axis=1)[:, impute - 1 : impute])
        scores = best.sum(axis=0) if how == "sum" else best.mean(axis=0)
        assert [i for i, _ in ranking] == sorted(range(60), key=lambda i: (-np.float32(scores[i]), i))
        np.testing.assert_allclose([score for _, score in ranking], sorted(scores, reverse=True), rtol=0, atol=1e-5)


# --- training ---


@pytest.fixture
def data(tmp_path) -> str:
    rng = np.random.default_rng(0)
    words = ("boiler", "drips", "night", "bike", "rains", "cold", "grey", "morning")
    rows = [
        {"query": f"{i} {' '.join(rng.choice(words, 4))}", "positive": f"{i} {' '.join(rng.choice(words, 12))}."}
        for i in range(40)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_t5_training_equals_torch(t5, data, tmp_path):
    """InfoNCE + margin over MaxSim with LoRA on q and v, as XTR-base was trained: twenty steps of the same loss."""
    from transformers import T5EncoderModel

    command = ["--model", str(t5), "--task", "late", "--data", data, "--lora-keys", "q", "v", "--lora-rank", "4"]
    command += ["--lora-alpha", "8", "--batch-size", "8", "--steps", "20", "--learning-rate", "1e-2", "--warmup", "5"]
    command += ["--temperature", "0.07", "--margin-weight", "0.1", "--eval-tasks", "--max-grad-norm", "1"]
    settings, _ = from_flags("", argv=[*command, "--output", str(tmp_path / "run")])
    trainer = training_run.prepare(settings).trainer
    fresh = {name: np.array(v) for name, v in train_parameters(trainer.model)}
    batches = [trainer.batches.batch(k) for k in range(20)]
    found = [trainer.update(batch, step)["loss"] for step, batch in enumerate(batches, start=1)]

    theirs = T5EncoderModel.from_pretrained(t5).eval()
    leaves = {name: torch.tensor(value, requires_grad=True) for name, value in fresh.items()}
    attach(theirs, leaves, scale=8 / 4)
    optimizer = torch.optim.AdamW(leaves.values(), lr=1.0, weight_decay=0.0)
    expected = []
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = train_rate(settings, step)
        optimizer.zero_grad()
        loss = torch_loss(theirs, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[-1] < 0.9 * found[0]


def train_rate(settings, step: int) -> float:
    from mlx_retrieval.training.trainer import learning_rate

    return learning_rate(settings, step)


def train_parameters(model) -> list:
    from mlx.utils import tree_flatten

    return tree_flatten(model.trainable_parameters())


def attach(model: torch.nn.Module, leaves: dict[str, torch.Tensor], scale: float) -> None:
    """LoRA on torch's T5, by hooks, under our names."""
    modules = dict(model.named_modules())

    def hook(a: torch.Tensor, b: torch.Tensor):
        return lambda module, inputs, output: output + scale * inputs[0] @ a @ b

    for name in {name.rsplit(".", 1)[0] for name in leaves}:
        (module,) = (m for path, m in modules.items() if path and name.endswith(path.removeprefix("encoder.")))
        module.register_forward_hook(hook(leaves[f"{name}.lora_a"], leaves[f"{name}.lora_b"]))


def torch_loss(model: torch.nn.Module, batch) -> torch.Tensor:
    """The same objective, written out with torch for whole padded batches."""
    texts = batch.texts
    width = int(texts.lengths.max())
    mask = np.arange(width) < texts.lengths[:, None]
    ids = np.zeros((len(texts), width), np.int64)
    ids[mask] = texts.ids
    real = torch.tensor(mask)
    states = model(input_ids=torch.tensor(ids), attention_mask=real.long()).last_hidden_state
    vectors = torch.nn.functional.normalize(states, dim=-1) * real[..., None]
    queries, documents = vectors[: batch.queries], vectors[batch.queries :]
    every = torch.einsum("qid,cjd->qicj", queries, documents)
    every = every.masked_fill(~real[batch.queries :][None, None], -torch.inf).max(-1).values
    tokens = real[: batch.queries]
    scores = ((every * tokens[..., None]).sum(1) / tokens.sum(1)[:, None])[batch.query]
    targets = torch.tensor(batch.document).long()
    others = torch.tensor(batch.relevant[batch.query]).scatter(1, targets[:, None], False)
    scores = scores.masked_fill(others, -torch.inf)
    positive = scores.gather(1, targets[:, None])[:, 0]
    hardest = scores.scatter(1, targets[:, None], -torch.inf).max(1).values
    hinge = torch.clamp(0.2 - (positive - hardest), min=0)
    return torch.nn.functional.cross_entropy(scores / 0.07, targets) + 0.1 * hinge.mean()


def test_a_late_run_is_saved_evaluated_and_used(t5, data, tmp_path):
    """The fresh projection comes back with the adapter; eval.py says what training said."""
    run = tmp_path / "run"
    command = ["--model", str(t5), "--task", "late", "--data", data, "--projection-dim", "16", "--batch-size", "8"]
    command += ["--steps", "3", "--skip-punctuation", "--impute", "50", "--learning-rate", "1e-3", "--output", str(run)]
    folder = beir(tmp_path / "task")
    assert train.main([*command, "--eval-tasks", str(folder)]) == 0
    said = RetrievalConfig.read(run / "final")
    assert (said.task, said.dimensions, said.impute, said.maxsim) == ("late", 16, 50, "mean")
    assert said.skiplist == list(string.punctuation)
    model = embedder.load(run / "final")
    assert model.late and {v.shape[1] for v in model.encode(TEXTS)} == {16}
    again = retrieval.evaluate(model, [str(folder)])
    results = json.loads((run / "results.json").read_text())
    assert again.average() == results["after"]
    (run / "final" / "heads.safetensors").unlink()
    with pytest.raises(UserError, match="no heads.safetensors"):
        embedder.load(run / "final")


def beir(folder: Path) -> Path:
    folder.mkdir()
    (folder / "qrels").mkdir()
    documents = [
        {"_id": f"d{i}", "title": "", "text": f"{word} boiler"} for i, word in enumerate(("cold", "grey", "hot"))
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": d["_id"], "text": d["text"]}) + "\n" for d in documents)
    )
    lines = [f"{d['_id']}\t{d['_id']}\t1" for d in documents]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")
    return folder


def test_scores_in_search_are_those_of_training(minilm):
    """One MaxSim: what the loss compares is what the search ranks by."""
    model = late(minilm)
    queries, documents = model.encode(TEXTS[:3], "query"), model.encode(TEXTS, "document")
    padded = [late_interaction._pad(side) for side in (queries, documents)]
    expected = np.array(maxsim.maxsim(*padded))
    for row, ranking in zip(expected, LateIndex(documents).search(queries, 5), strict=True):
        np.testing.assert_allclose([dict(ranking)[i] for i in range(5)], row, rtol=0, atol=1e-6)
    assert mx.array(expected).max().item() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--projection-dim", "8"], "--projection-dim is for --task late"),
        (["--task", "late", "--query-expansion", "16"], "names no mask_token"),
        (["--task", "late", "--attend-expansion"], "--attend-expansion needs a --query-expansion"),
        (["--task", "late", "--loss", "nt_xent"], "takes neither"),
    ],
)
def test_flags_that_do_not_fit(t5, data, tmp_path, capsys, flags, message):
    command = ["--model", str(t5), "--data", data, "--batch-size", "8", "--eval-tasks", "--output", str(tmp_path / "r")]
    assert train.main([*command, *flags]) == 2
    assert message in capsys.readouterr().err
