"""What requests ask of a real tokenizer: token ids as input, texts that are cut or refused, tokens that are shown.

python -m pytest tests/inference/test_server_tokens.py
"""

import functools
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from random_models import word_tokenizer
from random_rerankers import causal, cross_encoder, listwise
from served import refused
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from trained_models import trained

from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.serving.app import create_app
from mlx_retrieval.inference.serving.served_models import ServedModels
from mlx_retrieval.inference.serving.tokens import texts_of_ids
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

TEXTS = ["where is Kyoto", "a kidney stone forms in the kidney"]
LONG = " ".join(f"word{i}" for i in range(400))


@pytest.fixture(scope="module")
def model(small) -> embedder.Model:
    return embedder.load(small, max_length=64)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory) -> Reranker:
    folder = tmp_path_factory.mktemp("cross") / "bert"
    cross_encoder("bert", folder)
    return Reranker(str(folder), max_length=24)


@pytest.fixture(scope="module")
def client(model) -> Iterator[TestClient]:
    with TestClient(create_app(ServedModels.of(None, model)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def ranking(reranker) -> Iterator[TestClient]:
    with TestClient(create_app(ServedModels.of(reranker, None)), raise_server_exceptions=False) as client:
        yield client


def ids_of(model, text: str, special: bool = True) -> list[int]:
    return model.tokenizer.tokenizer.encode(text, add_special_tokens=special).ids


def embedded(client, path: str = "/v1/embeddings", **body) -> np.ndarray:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    rows = answer.json()
    if path == "/v1/embeddings":
        rows = [row["embedding"] for row in rows["data"]]
    return np.float32(rows["embeddings"]["float"] if path == "/v2/embed" else rows)


def test_token_ids_are_the_texts_that_they_are_of(client, model):
    ids = [ids_of(model, text) for text in TEXTS]
    assert ids[0][0] == ids[1][0]  # <bos>
    expected = model.encode(TEXTS, prompt="document")
    assert np.abs(embedded(client, input=ids) - expected).max() < 1e-6
    assert np.abs(embedded(client, input=ids[0]) - expected[:1]).max() < 1e-6
    assert np.abs(embedded(client, "/embed", inputs=ids) - expected).max() < 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[1:],  # without <bos>, as other vocabularies' ids come
        lambda ids: [2940, 374, 74001],
        lambda ids: [*ids, 10**9],
        lambda ids: [*ids, 1 << 40],
        lambda ids: [ids[0], -1],
        lambda ids: [*ids, ids[0]],  # a special token in the midst
        lambda ids: [],
    ],
)
def test_ids_that_are_not_the_model_s_own_are_refused(client, model, change):
    ids = change(ids_of(model, TEXTS[0]))
    response = client.post("/v1/embeddings", json={"input": [ids_of(model, TEXTS[1]), ids]})
    refused(response, 400, "input[1]", "check_embedding_ctx_length=False")


def test_ids_that_spell_a_text_in_another_way_are_refused(client, model):
    """As a vocabulary of the same words would, whose ids mean others here."""
    whole = ids_of(model, "kidney", special=False)
    letters = [token for letter in "kidney" for token in ids_of(model, letter, special=False)]
    assert whole != letters
    refused(client.post("/v1/embeddings", json={"input": [[ids_of(model, "a")[0], *letters]]}), 400, "input[0]")


def word_pieces(folder: Path) -> Path:
    """A tokenizer as BERT's, of some words and all letters of them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "'", "s", ".", "(", ")"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def sentence_pieces(folder: Path) -> Path:
    """A tokenizer as XLM-RoBERTa's, whose unknown token may stand within a word."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "\u2581the", "\u2581cat", "\u2581", "s", "'", ".", "(", ")"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0 - i / 9) for i, piece in enumerate(pieces)], unk_id=3))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("make", [word_tokenizer, word_pieces, sentence_pieces])
def test_an_unknown_token_is_a_part_of_its_text(tmp_path, make):
    """Regression: the ids of a text with an emoji were refused as another model's."""
    tokenizer = TextTokenizer(make(tmp_path), {}, {"document": 64})
    texts = ["the cat \U0001f951", "\U0001f951", "cat\U0001f951s the", "(\U0001f951)'s \U0001f951 cat", "the cats."]
    rows = [encoding.ids for encoding in tokenizer.tokenizer.encode_batch(texts)]
    assert any(tokenizer.tokenizer.token_to_id(word) in rows[1] for word in ("[UNK]", "<unk>"))
    same = texts_of_ids(tokenizer, rows, "input")
    assert (
        tokenizer(same, "document").ids.tolist()
        == tokenizer(texts, "document").ids.tolist()
        == [*chain.from_iterable(rows)]
    )
    with pytest.raises(UserError, match=r"input\[1\]: these token ids"):
        texts_of_ids(tokenizer, [rows[0], [*rows[0][:-1], rows[0][0], rows[0][-1]]], "input")


def test_long_texts_are_cut_as_asked(client, model):
    room = model.tokenizer.room("document")
    start, end = model.encode([LONG], prompt="document"), None
    assert np.abs(embedded(client, input=[LONG]) - start).max() < 1e-6
    assert np.abs(embedded(client, "/v2/embed", texts=[LONG], truncate="END") - start).max() < 1e-6
    encoding = model.tokenizer.tokenizer.encode(LONG, add_special_tokens=False)
    end = model.encode([LONG[encoding.offsets[-room][0] :]], prompt="document")
    assert np.abs(embedded(client, "/v2/embed", texts=[LONG], truncate="START") - end).max() < 1e-6
    assert np.abs(embedded(client, "/embed", inputs=[LONG], truncation_direction="Left") - end).max() < 1e-6
    assert np.abs(start - end).max() > 1e-3
    for path, body in (
        ("/v2/embed", {"texts": [TEXTS[0], LONG], "truncate": "NONE"}),
        ("/embed", {"inputs": [TEXTS[0], LONG], "truncate": False}),
        ("/v1/embeddings", {"input": [TEXTS[0], LONG], "truncate": False}),
    ):
        field = next(iter(body))
        refused(client.post(path, json=body), 400, f"{field}[1]", f"at most {room}")
    short = embedded(client, "/v2/embed", texts=TEXTS, truncate="NONE")
    assert np.abs(short - model.encode(TEXTS, prompt="document")).max() < 1e-6


@pytest.mark.parametrize("kind", ["qwen3", "cross-encoder", "listwise", "late"])
def test_queries_that_are_too_long_are_refused_where_texts_are_not_to_be_cut(tmp_path, small, qwen_tokenizer, kind):
    """Regression: only documents were looked at, so the query was cut without a word."""
    if kind == "cross-encoder":
        cross_encoder("bert", folder := tmp_path / "model")
    elif kind == "late":
        trained(small, folder := tmp_path / "model", task="late", projection=16)
    else:
        make = listwise if kind == "listwise" else functools.partial(causal, kind)
        _, folder, *_ = make(tmp_path, qwen_tokenizer)
    model = Reranker(str(folder), max_length=160 if kind == "qwen3" else 64)
    asked = {"query": LONG, "texts": ["stone", "the cat"], "truncate": False}
    with TestClient(create_app(ServedModels.of(model, None)), raise_server_exceptions=False) as client:
        refused(client.post("/rerank", json=asked), 400, "query: longer than the model takes")
        asked |= {"query": "a", "texts": ["stone", LONG]}
        refused(client.post("/rerank", json=asked), 400, "texts: 1 of 2 are longer")
    assert model.count_cut("a stone", ["stone", "the cat"]) == (False, 0)


@pytest.mark.slow
def test_documents_are_cut_to_the_tokens_that_are_asked_for(ranking, reranker):
    documents = ["a kidney stone is a hard piece of material", "the cat sat on the mat"]
    body = {"query": "what is a kidney stone", "documents": documents}
    results = ranking.post("/v2/rerank", json=body | {"max_tokens_per_doc": 3}).json()["results"]
    scores = reranker.score(body["query"], ["a kidney stone", "the cat sat"])
    assert np.allclose([row["relevance_score"] for row in results], np.sort(scores)[::-1], atol=1e-6)
    plain = ranking.post("/v2/rerank", json=body).json()["results"]
    assert ranking.post("/v2/rerank", json=body | {"max_tokens_per_doc": 4096}).json()["results"] == plain
    texts = {"query": body["query"], "texts": [*documents, "stone " * 40]}
    refused(ranking.post("/rerank", json=texts | {"truncate": False}), 400, "texts: 1 of 3 are longer")
    assert len(ranking.post("/rerank", json=texts | {"truncate": True}).json()) == 3


@pytest.mark.slow
def test_raw_scores_are_those_before_the_sigmoid(ranking, reranker):
    body = {"query": "the cat", "texts": ["the cat sat", "a stone"]}
    scores, raw = (
        {row["index"]: row["score"] for row in ranking.post("/rerank", json=body | {"raw_scores": value}).json()}
        for value in (False, True)
    )
    assert reranker.config.activation == "sigmoid"
    assert np.allclose([1 / (1 + np.exp(-raw[i])) for i in (0, 1)], [scores[0], scores[1]], atol=1e-6)


def test_tokens_are_shown(client, model):
    (row,) = client.post("/tokenize", json={"inputs": TEXTS[0], "model": model.name}).json()
    assert [token["id"] for token in row] == ids_of(model, TEXTS[0])
    assert row[0]["special"] and row[0]["start"] is None
    assert "".join(TEXTS[0][token["start"] : token["stop"]] for token in row[1:]) == TEXTS[0]
    asked = {"inputs": [TEXTS[0]], "model": model.name}
    assert client.post("/tokenize", json=asked | {"add_special_tokens": False}).json() == [row[1:]]
    (prompted,) = client.post("/tokenize", json=asked | {"prompt_name": "query"}).json()
    assert len(prompted) > len(row)
    refused(client.post("/tokenize", json={"inputs": "a", "prompt_name": "qury"}), 400, "'qury'", "known: query")
    refused(client.post("/tokenize", json={"inputs": [[1, 2]]}), 400, "no token ids")
    long = {"inputs": ["a " * 300_000] * 2}  # each token took 500 bytes and more, of up to 16 million
    refused(client.post("/tokenize", json=long), 400, "inputs: 1,200,000 characters together")


def test_the_model_is_described_as_by_tei(client, model):
    info = client.get("/info").json()
    assert info["models"] == [{"id": model.name, "kind": "embed"}] and info["model_id"] == model.name
    assert info["model_type"] == {"embedding": {"pooling": "mean"}} and info["max_input_length"] == 64
    assert info["model_dtype"] == "float32"
