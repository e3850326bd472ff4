"""Rerankers' formats and scores, against transformers on small random models.

python -m pytest tests/inference/test_reranker_scores.py
"""

import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import torch
import transformers
from exported import run_export
from mlx.utils import tree_flatten
from random_families import publish_new
from random_models import word_tokenizer
from random_rerankers import (
    DOCUMENTS,
    ENCODERS,
    QUERY,
    TYPED,
    causal,
    cross_encoder,
    encoder_config,
    listwise,
    quantised,
    save,
)
from torch_checks import rewritten

import mine
import rerank
from mlx_retrieval import backend
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.inference import reranker
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.teacher import Teacher
from mlx_retrieval.models import compiled, cpu_model_runner, loading, pair_tokenizers, rerankers
from mlx_retrieval.models.batching import pad_rows
from mlx_retrieval.utils.errors import UserError

CAUSAL = {
    "qwen3": {},
    "qwen3, own head": {"tie_word_embeddings": False},
    "llama": {},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2},
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 2.0},
}


@pytest.mark.parametrize("name", CAUSAL)
def test_yes_no_equals_transformers_with_the_exact_prompt(name, tmp_path, qwen_tokenizer):
    theirs, folder = causal(name.split(",")[0], tmp_path / "model", qwen_tokenizer, **CAUSAL[name])
    ours = Reranker(str(folder), max_length=400, reranker_type="qwen3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prefix, suffix = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (pair_tokenizers.PREFIX, pair_tokenizers.SUFFIX)
    )
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    expected = []
    for document in DOCUMENTS:
        body = f"<Instruct>: {pair_tokenizers.INSTRUCTION}\n<Query>: {QUERY}\n<Document>: {document}"
        room = 400 - len(prefix) - len(suffix)
        ids = prefix + tokenizer(body, add_special_tokens=False)["input_ids"][:room] + suffix
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, -1]
        expected.append(torch.softmax(logits[[no, yes]], 0)[1].item())
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 1e-3  # or nothing was compared


@pytest.mark.parametrize("kind", ("qwen3", "gemma3_text"))
def test_the_shared_beginning_changes_no_score(kind, tmp_path, qwen_tokenizer, monkeypatch):
    _, folder = causal(kind, tmp_path / "model", qwen_tokenizer, **CAUSAL[kind])
    ours = Reranker(str(folder), max_length=300)
    assert ours.model.backbone.has_past
    shared = ours.score(QUERY, DOCUMENTS)
    calls = []
    past = ours.model.backbone.past
    monkeypatch.setattr(type(ours.model.backbone), "past", lambda *a: calls.append(a) or past(*a[1:]))
    np.testing.assert_array_equal(ours.score(QUERY, DOCUMENTS), shared)
    assert len(calls) == 1 and calls[0][1].shape[1] >= 90
    monkeypatch.setattr(reranker, "SHARED_BY", 1000)
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), shared, rtol=0, atol=1e-5)
    assert len(calls) == 1


@pytest.mark.compiled
@pytest.mark.skipif(not backend.FUSED, reason="on this device no graphs are kept")
def test_a_server_keeps_few_graphs_and_its_scores(tmp_path, qwen_tokenizer, monkeypatch):
    """Regression: queries and documents of other lengths each had a graph; 1,232 MB after a minute, from 796."""
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer, **CAUSAL["qwen3"])
    ours, met = Reranker(str(folder), max_length=300), defaultdict(set)
    groups = [(" ".join([QUERY] * (1 + i)), [f"{'a' * i} {text[:120]}" for text in DOCUMENTS]) for i in range(24)]
    expected = [ours.score(*group) for group in groups]
    monkeypatch.setattr(compiled, "SHAPES_SERVED", 2)
    monkeypatch.setattr(compiled, "SHAPES_OF_ONE", 1)
    functions = cpu_model_runner.CompiledFunctions
    forward = functions.forward
    monkeypatch.setattr(functions, "forward", lambda *args: met[args[0]].add(args[3].shape) or forward(*args))
    ours = Reranker(str(folder), max_length=300)
    ours.limit_shapes(models=2)
    for group, scores in zip(groups, expected, strict=True):
        np.testing.assert_allclose(ours.score(*group), scores, rtol=0, atol=1e-5)
        assert all(len(functions._compiled) <= 1 for functions in ours.runner._functions)
    assert max(map(len, met.values())) > 1


def test_a_window_that_mlx_lm_does_not_build_limits_the_sequence(tmp_path, qwen_tokenizer):
    _, folder = causal("mistral", tmp_path / "model", qwen_tokenizer, sliding_window=24)
    with pytest.raises(UserError, match="leaves no room"):
        Reranker(str(folder))


def test_no_vocabulary_wide_logits(tmp_path, qwen_tokenizer, monkeypatch):
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer)
    ours = Reranker(str(folder))
    table = type(ours.model.backbone.trunk.embed_tokens)
    monkeypatch.setattr(table, "as_linear", lambda *_: pytest.fail("all logits were computed"))
    assert ours.score(QUERY, DOCUMENTS).shape == (5,)


def test_quantised_language_model(tmp_path, qwen_tokenizer):
    """The two rows of a 4-bit vocabulary are what mlx-lm makes of the whole of it."""
    import mlx_lm.utils

    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer, tie_word_embeddings=False)
    packed = quantised(folder, tmp_path / "packed")
    ours = Reranker(str(packed))
    texts = ours.tokenizer([(QUERY, DOCUMENTS)]).texts
    expected = []
    model, _ = mlx_lm.utils.load_model(packed)
    for i in range(len(DOCUMENTS)):
        logits = model(pad_rows(texts, np.array([i])).ids)[0, int(texts.lengths[i]) - 1].astype(mx.float32)
        no, yes = (logits[token].item() for token in ours.tokenizer.answers)
        expected.append(1 / (1 + np.exp(no - yes)))
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)


# --- cross-encoders ---


@pytest.mark.parametrize("kind", ENCODERS)
def test_cross_encoders_equal_transformers(kind, tmp_path):
    theirs = cross_encoder(kind, tmp_path)
    ours = Reranker(str(tmp_path), max_length=100, raw_scores=True)
    assert ours.kind == "cross-encoder" and ours.config.activation == ""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    long = " ".join(["stone"] * 90)
    queries = [QUERY] * len(DOCUMENTS) + [long, long, QUERY]
    documents = [*DOCUMENTS, long, "a cat", long]
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (kind in TYPED)
    tokenizer.model_input_names = names
    tokens = tokenizer(queries, documents, truncation=True, max_length=100, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(**tokens).logits[:, 0].numpy()
    found = np.concatenate(ours.score_groups([(q, [d]) for q, d in zip(queries, documents, strict=True)]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.std(expected) > 1e-2
    if kind in TYPED:  # types of tokens matter, or they were not compared
        tokens["token_type_ids"][:] = 0
        with torch.no_grad():
            assert np.abs(theirs(**tokens).logits[:, 0].numpy() - expected).max() > 1e-2


def test_a_published_reranker_of_type_new_has_the_scores_of_transformers_gte(tmp_path):
    """As gte-multilingual-reranker-base is published: `new.` before the encoder's names, and code of its own."""
    theirs = cross_encoder("gte", tmp_path / "gte")
    plain = json.loads((tmp_path / "gte" / "config.json").read_text())["rope_parameters"]["rope_theta"]
    folder = rewritten(tmp_path / "gte", tmp_path / "new", lambda name: re.sub(r"^gte\.", "new.", name))
    names = read_safetensors(folder / "model.safetensors")
    publish_new(folder, rope_scaling=None, rope_theta=plain)
    assert {"new.encoder.layer.0.attention.qkv_proj.weight", "new.pooler.dense.weight", "classifier.weight"} <= {*names}
    ours = Reranker(str(folder), max_length=100, raw_scores=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gte")
    pairs = [QUERY] * len(DOCUMENTS), DOCUMENTS
    tokens = tokenizer(*pairs, truncation=True, max_length=100, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).logits[:, 0].numpy()
    assert ours.kind == "cross-encoder" and np.std(expected) > 1e-2
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)
    exported = run_export(tmp_path / "out", model=folder, task="rerank", skip_library_check=True)
    assert json.loads((exported / "config.json").read_text())["model_type"] == "gte"
    again = Reranker(str(exported), max_length=100, raw_scores=True)
    np.testing.assert_allclose(again.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)


def test_without_token_types_scores_equal_transformers(tmp_path):
    """Regression: with a tokenizer class that returns no types, transformers' model gets type 0 everywhere."""
    theirs = cross_encoder("bert", tmp_path)
    typed = Reranker(str(tmp_path), raw_scores=True).score(QUERY, DOCUMENTS)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings.pop("model_input_names")
    file.write_text(json.dumps(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(
        [QUERY] * len(DOCUMENTS), DOCUMENTS, truncation=True, padding=True, max_length=100, return_tensors="pt"
    )
    assert "token_type_ids" not in tokens
    with torch.no_grad():
        expected = theirs(**tokens).logits[:, 0].numpy()
    scores = Reranker(str(tmp_path), max_length=100, raw_scores=True).score(QUERY, DOCUMENTS)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert np.abs(scores - typed).max() > 1e-2


SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


@pytest.fixture(scope="module")
def plain_cross_encoder(tmp_path_factory) -> Path:
    """A cross-encoder whose files name no activation, as bge-reranker's."""
    folder = tmp_path_factory.mktemp("cross") / "plain"
    cross_encoder("bert", folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 100}))
    return folder


def declare(folder: Path, target: Path, settings: dict | None = None, **config) -> str:
    """Copy a folder, with keys added to config.json, and perhaps sentence-transformers' own settings file."""
    shutil.copytree(folder, target)
    (target / "config.json").write_text(json.dumps(json.loads((target / "config.json").read_text()) | config))
    if settings is not None:
        (target / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return str(target)


@pytest.mark.parametrize(
    ("declared", "sigmoid"),
    [
        ({}, True),
        ({"sentence_transformers": {"activation_fn": SIGMOID, "version": "5.0.0"}}, True),
        ({"sentence_transformers": {"activation_fn": IDENTITY, "version": "5.0.0"}}, False),
        ({"sentence_transformers": {"version": "5.0.0"}}, True),
        ({"sbert_ce_default_activation_function": IDENTITY}, False),
        ({"sbert_ce_default_activation_function": SIGMOID}, True),
        ({"sbert_ce_default_activation_function": None}, True),
        ({"sentence_transformers": {"activation_fn": "my_code.Activation"}}, True),
        ({"settings": {"model_type": "CrossEncoder", "activation_fn": IDENTITY}}, True),  # without modules.json
    ],
)
def test_activations_are_those_of_sentence_transformers(plain_cross_encoder, tmp_path, declared, sigmoid):
    """Regression: without a declaration, scores were logits; sentence-transformers gives their sigmoid."""
    library = pytest.importorskip("sentence_transformers")
    folder = declare(plain_cross_encoder, tmp_path / "model", **declared)
    ours, raw = (Reranker(folder, max_length=100, raw_scores=logits) for logits in (False, True))
    scores, logits = ours.score(QUERY, DOCUMENTS), raw.score(QUERY, DOCUMENTS)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)) if sigmoid else logits, rtol=0, atol=1e-6)
    pairs = [(QUERY, document) for document in DOCUMENTS]
    expected = library.CrossEncoder(folder, device="cpu", local_files_only=True).predict(pairs)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    order = [[result["index"] for result in each.rerank(QUERY, DOCUMENTS)] for each in (ours, raw)]
    assert order[0] == order[1]


@pytest.mark.parametrize("function", ["Sigmoid", "Identity"])
def test_activations_that_the_library_saved(plain_cross_encoder, tmp_path, function):
    library = pytest.importorskip("sentence_transformers")
    activation = getattr(torch.nn, function)()
    saved = library.CrossEncoder(str(plain_cross_encoder), device="cpu", activation_fn=activation)
    saved.save(str(tmp_path / "saved"), create_model_card=False)
    expected = saved.predict([(QUERY, document) for document in DOCUMENTS])
    ours = Reranker(str(tmp_path / "saved"), max_length=100)
    assert ours.config.activation == {"Sigmoid": "sigmoid", "Identity": ""}[function]
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-5)


def test_other_activations_are_refused(plain_cross_encoder, tmp_path):
    folder = declare(plain_cross_encoder, tmp_path / "m", sentence_transformers={"activation_fn": "torch.nn.Softplus"})
    with pytest.raises(UserError, match="torch.nn.Softplus are not supported; known: Sigmoid, Identity"):
        Reranker(folder)


def test_large_logits_keep_their_ranking(plain_cross_encoder):
    """The sigmoid of 18 and of 20 are the same number in float32."""
    reranker = Reranker(str(plain_cross_encoder))
    reranker.model.head.out.bias = reranker.model.head.out.bias + 40
    results = reranker.rerank(QUERY, DOCUMENTS)
    raw = Reranker(str(plain_cross_encoder), raw_scores=True).rerank(QUERY, DOCUMENTS)
    assert {result["score"] for result in results} == {1.0}
    assert [result["index"] for result in results] == [result["index"] for result in raw]


def test_the_command_prints_either(plain_cross_encoder, tmp_path, capsys):
    file = tmp_path / "docs.txt"
    file.write_text("\n".join(DOCUMENTS))
    flags = ["--model", str(plain_cross_encoder), "--query", QUERY, "--documents", str(file), "--json"]
    printed = []
    for more in ([], ["--raw-scores"]):
        assert rerank.main([*flags, *more]) == 0
        printed.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    scores, logits = (np.array([row["score"] for row in rows]) for rows in printed)
    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-logits)), atol=1e-6)
    assert [row["index"] for row in printed[0]] == [row["index"] for row in printed[1]]
    arguments = rerank.parser().parse_args(["--serve", "--model", str(plain_cross_encoder), "--raw-scores"])
    assert rerank.open_reranker(arguments).config.activation == ""  # what the server answers with


def test_teachers_give_what_their_files_say_else_logits(plain_cross_encoder, tmp_path):
    """So that students of cross-encoders without a declaration learn what they learned before."""
    groups = [(QUERY, DOCUMENTS)]
    logits = Reranker(str(plain_cross_encoder), raw_scores=True).score(*groups[0])
    np.testing.assert_array_equal(Teacher(str(plain_cross_encoder)).score_groups(groups)[0], logits)
    declared = declare(plain_cross_encoder, tmp_path / "m", sentence_transformers={"activation_fn": SIGMOID})
    np.testing.assert_allclose(Teacher(declared).score_groups(groups)[0], 1 / (1 + np.exp(-logits)), atol=1e-6)
    np.testing.assert_array_equal(Teacher(declared, raw_scores=True).score_groups(groups)[0], logits)
    arguments = mine.parser().parse_args(["score", "--data", "a", "--output", "b", "--teacher", "c", "--raw-scores"])
    assert arguments.raw_scores


def test_classifier_of_several_labels_is_refused(tmp_path):
    cross_encoder("bert", tmp_path, labels=3)
    with pytest.raises(UserError, match="classifier of 3 labels"):
        Reranker(str(tmp_path))


def test_a_base_model_gets_a_fresh_head_and_keeps_its_pooler(tmp_path):
    model = transformers.BertModel(encoder_config("bert"))
    model.save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    built, config, _ = loading.build(str(tmp_path), task="rerank")
    assert config.activation == "sigmoid"
    pooler = read_safetensors(tmp_path / "model.safetensors")["pooler.dense.weight"]
    np.testing.assert_array_equal(built.head.dense.weight, pooler)
    assert {name for name, _ in tree_flatten(built.head.trainable_parameters())} == {"out.weight", "out.bias"}
    with pytest.raises(UserError, match="python train.py --task rerank trains one"):
        Reranker(str(tmp_path))  # its scores would be random


@pytest.mark.parametrize("kind", ("bert", "roberta", "modernbert"))
def test_a_fresh_head_begins_as_in_transformers(kind, tmp_path):
    """Regression: biases were drawn at random, and ModernBERT's layers were too large and too small."""
    config = encoder_config(kind)
    config.hidden_size = 128
    theirs = dict(transformers.AutoModelForSequenceClassification.from_config(config).named_parameters())
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    word_tokenizer(tmp_path, kind == "roberta")
    head = loading.build(str(tmp_path), task="rerank")[0].head
    for stem, layer in rerankers.TENSORS[kind].items():
        for name, value in head[layer].parameters().items():
            expected = theirs[f"bert.{stem}.{name}" if stem.startswith("pooler") else f"{stem}.{name}"]
            spread = expected.std(correction=0).item()
            error = spread * (2 / value.size) ** 0.5  # standard deviation of the difference of two means
            assert float(value.mean()) == pytest.approx(expected.mean().item(), abs=4 * error), (layer, name)
            assert float(mx.std(value)) == pytest.approx(spread, rel=0.3, abs=1e-9)


def test_decoder_with_a_score_layer(tmp_path, qwen_tokenizer):
    _, folder = causal("qwen3", tmp_path / "causal", qwen_tokenizer)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels, config.pad_token_id = 1, 0
    theirs = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    save(theirs, tmp_path / "scores", qwen_tokenizer)
    ours = Reranker(str(tmp_path / "scores"), raw_scores=True)
    assert ours.kind == "cross-encoder"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "scores")
    for document in DOCUMENTS[:3]:
        with torch.no_grad():
            expected = theirs(**tokenizer([QUERY], [document], return_tensors="pt")).logits.item()
        np.testing.assert_allclose(ours.score(QUERY, [document]), [expected], atol=1e-4)


# --- listwise ---


def list_prompt(query: str, documents: list[str], instruction: str = "") -> str:
    """jina-reranker-v3's prompt, written out as ../shared/RERANKERS.md has it."""
    passages = "\n".join(f'<passage id="{i}">\n{d}<|embed_token|>\n</passage>' for i, d in enumerate(documents))
    told = f"<instruct>\n{instruction}\n</instruct>\n" if instruction else ""
    return (
        f"<|im_start|>{pair_tokenizers.LIST_SYSTEM}<|im_end|>\n<|im_start|>user\nI will provide you with "
        f"{len(documents)} passages, each indicated by a numerical identifier. Rank the passages based on their "
        "relevance to query: "
        f"{query}\n{told}{passages}\n<query>\n{query}<|rerank_token|>\n</query><|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("as_file", (False, True))
@pytest.mark.parametrize("instruction", (None, "find medicine"))
def test_listwise_equals_the_published_layout(tmp_path, qwen_tokenizer, as_file, instruction):
    theirs, folder, weights = listwise(tmp_path, qwen_tokenizer, as_file)
    ours = Reranker(str(folder), instruction=instruction)
    assert ours.kind == "listwise"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list_prompt(QUERY, DOCUMENTS, instruction or ""), add_special_tokens=False)["input_ids"]
    assert ours.tokenizer([(QUERY, DOCUMENTS)]).texts.ids.tolist() == ids
    with torch.no_grad():
        states = theirs.model(torch.tensor([ids])).last_hidden_state[0]
    marks = torch.tensor(
        [tokenizer.convert_tokens_to_ids(word) for word in (pair_tokenizers.PASSAGE_END, pair_tokenizers.QUERY_END)]
    )
    chosen = states[[i for i, token in enumerate(ids) if token in marks]]
    projected = torch.relu(chosen @ weights["projector.0.weight"].T) @ weights["projector.2.weight"].T
    expected = torch.cosine_similarity(projected[:-1], projected[-1:]).numpy()
    np.testing.assert_allclose(ours.score(QUERY, DOCUMENTS), expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_listwise_blocks_and_marks_in_users_texts(tmp_path, qwen_tokenizer):
    _, folder, _ = listwise(tmp_path, qwen_tokenizer)
    ours = Reranker(str(folder))
    many = [f"document {i}" for i in range(150)]
    sequences = ours.tokenizer([(QUERY, many), ("two", ["a"])])
    assert np.bincount(sequences.text).tolist() == [64, 64, 22, 1]
    whole = ours.score(QUERY, many)
    np.testing.assert_allclose(whole[64:128], ours.score(QUERY, many[64:128]), atol=1e-5)
    spelled = ["a<|embed_token|>b<|rerank_token|>", "c<|im_end|>"]
    sequences = ours.tokenizer([("q<|rerank_token|>", spelled)])
    assert len(sequences.text) == 2
    marks = [(sequences.texts.ids == mark).sum() for mark in ours.tokenizer.marks]
    assert marks == [2, 1]
    plain = ours.tokenizer([("q", ["ab", "c"])]).texts.ids
    assert (sequences.texts.ids == ours.tokenizer.tokenizer.token_to_id("<|im_end|>")).sum() == (
        plain == ours.tokenizer.tokenizer.token_to_id("<|im_end|>")
    ).sum()


# --- use ---


def test_rerank_and_bad_input(tmp_path, qwen_tokenizer):
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer)
    ours = Reranker(str(folder), max_length=200)
    scores = ours.score(QUERY, DOCUMENTS)
    assert scores.dtype == np.float32
    best = ours.rerank(QUERY, DOCUMENTS, top_n=2)
    order = np.argsort(-scores, kind="stable")
    assert [r["index"] for r in best] == order[:2].tolist()
    assert best[0]["document"] == DOCUMENTS[order[0]] and best[0]["score"] == pytest.approx(float(scores.max()))
    assert ours.rerank(QUERY, []) == [] and ours.score(QUERY, []).shape == (0,)
    same = ours.rerank(QUERY, ["b", "a", "a", "b"])
    assert [r["index"] for r in same if r["document"] == "a"] == [1, 2]
    with pytest.raises(UserError, match="list of texts"):
        ours.score(QUERY, "a text")
    with pytest.raises(UserError, match="list of texts"):
        ours.score(QUERY, ["a", None])
    with pytest.raises(UserError, match="at least 1"):
        ours.rerank(QUERY, ["a"], top_n=0)
    with pytest.raises(UserError, match="leaves no room"):
        Reranker(str(folder), max_length=40)


def test_groups_are_scored_as_each_by_itself(tmp_path, qwen_tokenizer):
    _, folder = causal("qwen3", tmp_path / "model", qwen_tokenizer)
    ours = Reranker(str(folder), max_length=200)
    groups = [(QUERY, DOCUMENTS[:1]), ("cat", DOCUMENTS), ("none", []), ("mat", DOCUMENTS[1:3])]
    for (query, documents), found in zip(groups, ours.score_groups(groups), strict=True):
        alone = [float(ours.score(query, [document])[0]) for document in documents]
        np.testing.assert_allclose(found, np.array(alone, np.float32), atol=1e-5)


@pytest.mark.parametrize("kind", ("qwen3", "cross-encoder"))
def test_long_documents_are_cut_at_their_end(kind, tmp_path, qwen_tokenizer):
    if kind == "qwen3":
        causal("qwen3", tmp_path / "model", qwen_tokenizer)
    else:
        cross_encoder("bert", tmp_path / "model")
    ours = Reranker(str(tmp_path / "model"), max_length=120 if kind == "cross-encoder" else 160)
    sequences = ours.tokenizer([(QUERY, ["stone " * 300, "stone"])])
    assert sequences.cut == 1 and sequences.texts.lengths[0] == ours.config.max_length
    long, short = (sequences.texts.part(i, i + 1).ids.tolist() for i in (0, 1))
    end = len(ours.tokenizer.suffix) if kind == "qwen3" else len(ours.tokenizer.frame[2])
    assert long[-end:] == short[-end:]
    np.testing.assert_allclose(ours.score(QUERY, ["stone " * 300]), ours.score(QUERY, ["stone " * 900]), atol=1e-6)
    assert ours.cut == 2


def test_ten_thousand_documents(tmp_path):
    cross_encoder("bert", tmp_path)
    ours = Reranker(str(tmp_path), max_length=32)
    documents = [f"stone {i % 7}" for i in range(10_000)]
    scores = ours.score(QUERY, documents)
    assert scores.shape == (10_000,)
    np.testing.assert_allclose(scores, np.tile(scores[:7], 1429)[:10_000], atol=1e-5)


def test_models_that_are_no_rerankers(small, tmp_path):
    from mlx_retrieval.backbones import lora

    model, config, _ = loading.build(small)
    adapter = lora.adapt(model.backbone)
    folder = tmp_path / "adapter"
    folder.mkdir()
    loading.save_model(folder, model, adapter, config)
    with pytest.raises(UserError, match="is an embedding model, which gives one vector a text"):
        Reranker(str(folder))
    with pytest.raises(UserError, match="needs a language model"):
        cross_encoder("bert", tmp_path / "bert")
        Reranker(str(tmp_path / "bert"), reranker_type="qwen3")
    with pytest.raises(UserError, match="lacks <.embed_token.>"):
        Reranker(small, reranker_type="listwise")


def test_late_models_rerank_too(minilm, tmp_path):
    from mlx_retrieval.backbones import lora
    from mlx_retrieval.inference.embedder import load
    from mlx_retrieval.models import maxsim
    from mlx_retrieval.retrieval.late_interaction import _pad

    model, config, _ = loading.build(str(minilm), task="late")
    adapter = lora.adapt(model.backbone)
    folder = tmp_path / "late"
    folder.mkdir()
    loading.save_model(folder, model, adapter, config)
    ours, other = Reranker(str(folder)), load(folder)
    assert ours.kind == "late"
    documents = [text for text in DOCUMENTS if text]
    vectors = other.encode([QUERY], "query"), other.encode(documents, "document")
    expected = np.array(maxsim.maxsim(*map(_pad, vectors), config.maxsim))[0]
    np.testing.assert_allclose(ours.score(QUERY, documents), expected, atol=1e-5)


def test_half_a_surrogate_pair_is_printed(tmp_path, capsysbinary, monkeypatch):
    """In the query as an odd byte of the command line, in the documents as JSON's escape; plain and --json."""

    class Echo:
        name, cut = "echo", 0

        def rerank(self, query, documents, top_n):
            return [{"index": i, "score": 0.5, "document": f"{query} {text}"} for i, text in enumerate(documents)]

    monkeypatch.setattr(rerank, "open_reranker", lambda args: Echo())
    monkeypatch.setattr(rerank.dtypes, "warn", lambda *_: None)  # it has no weights
    (tmp_path / "docs.jsonl").write_text(r'{"text": "half \ud83d emoji"}')
    flags = ["--model", "m", "--query", "whale\udcff", "--documents", str(tmp_path / "docs.jsonl")]
    for format in ([], ["--json"]):
        assert rerank.main(flags + format) == 0
        assert "whale\ufffd half \ufffd emoji".encode() in capsysbinary.readouterr().out


def test_command(tmp_path, capsys):
    cross_encoder("bert", tmp_path / "model")
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS if text))
    command = ["--model", str(tmp_path / "model"), "--query", QUERY, "--documents", str(file)]
    assert rerank.main([*command, "--top-n", "2", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = Reranker(str(tmp_path / "model")).rerank(QUERY, [text for text in DOCUMENTS if text], 2)
    assert [row["index"] for row in rows] == [row["index"] for row in expected]
    assert rerank.main(command) == 0 and "#" in capsys.readouterr().out
    file.write_text("")
    assert rerank.main(command) == 2 and "no document" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rerank.main(["--model", "x"])
    assert "--query" in capsys.readouterr().err
