"""Every shape of the table by hand: its answer, its fields that are obeyed, ignored or refused, its errors.

python -m pytest tests/inference/test_server_shapes.py
"""

import base64
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from served import DOCUMENTS, Model, Reranker, refused, score, served
from starlette.testclient import TestClient

from mlx_retrieval.inference.serving.shapes.body import in_form
from mlx_retrieval.inference.serving.shapes.table import SHAPES, bodies

TEXTS = ["one text", "another one"]
SCORES = np.array([score("kidney", text) for text in DOCUMENTS], np.float32)
ORDER = np.argsort(-SCORES, kind="stable").tolist()


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with served(Reranker(), Model()) as client:
        yield client


def vectors(prompt: str = "document", texts=TEXTS) -> np.ndarray:
    return Model().encode(texts, prompt=prompt)


def post(client, path: str, **body):
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


# --- Cohere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "version"), [("/v1/rerank", "1"), ("/v2/rerank", "2")])
def test_cohere_reranks(client, path, version):
    asked = {"model": "rerank-v3.5", "query": "kidney", "documents": DOCUMENTS, "top_n": 3, "priority": 9}
    answer = post(client, path, **asked, max_tokens_per_doc=None)
    expected = [{"index": i, "relevance_score": float(SCORES[i])} for i in ORDER[:3]]
    assert answer["results"] == expected
    assert answer["meta"] == {"api_version": {"version": version}, "billed_units": {"search_units": 1}}
    refused(client.post(path, json=asked | {"rank_fields": ["title"]}), 400, "rank_fields", "text alone")
    refused(client.post(path, json=asked | {"max_chunks_per_doc": 10}), 400, "max_chunks_per_doc 10", "one piece")
    assert post(client, path, **asked, rank_fields=["text"], max_chunks_per_doc=1)["results"] == expected
    message = refused(client.post(path, json=asked | {"top_k": 3}), 400, "'top_k'", "did you mean top_n?")
    assert client.post(path, json=asked | {"top_k": 3}).json()["message"] == message


def test_cohere_v1_embeds(client):
    answer = post(client, "/v1/embed", texts=TEXTS, model="embed-v4", input_type="search_query", truncate="END")
    assert answer["response_type"] == "embeddings_floats" and answer["texts"] == TEXTS
    assert np.array_equal(np.float32(answer["embeddings"]), vectors("query"))
    answer = post(client, "/v1/embed", texts=TEXTS, embedding_types=["float", "int8"])
    assert answer["response_type"] == "embeddings_by_type" and set(answer["embeddings"]) == {"float", "int8"}
    assert np.array_equal(np.float32(answer["embeddings"]["float"]), vectors())


@pytest.mark.parametrize(
    ("input_type", "prompt"),
    [("search_query", "query"), ("search_document", "document"), ("classification", "document"), ("query", "query")],
)
def test_cohere_v2_embeds(client, input_type, prompt):
    answer = post(client, "/v2/embed", model="any", texts=TEXTS, input_type=input_type, output_dimension=2, priority=1)
    assert list(answer["embeddings"]) == ["float"]
    assert np.array_equal(np.float32(answer["embeddings"]["float"]), vectors(prompt)[:, :2])
    assert answer["meta"] == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 6}}
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    same = post(client, "/v2/embed", model="any", inputs=inputs, input_type=input_type, output_dimension=2)
    assert same["embeddings"] == answer["embeddings"] and same["texts"] == TEXTS


def test_floats_of_cohere_are_the_same_beside_other_types():
    """Regression: asked for together with int8, the vectors of a model that does not normalise had unit length."""
    model = Model()
    model.config = SimpleNamespace(**vars(Model.config) | {"normalize": False})
    with served(None, model) as client:
        embeddings = post(client, "/v2/embed", texts=TEXTS, embedding_types=["float", "int8", "uint8"])["embeddings"]
    assert np.array_equal(np.float32(embeddings["float"]), vectors())
    unit = vectors() / np.linalg.norm(vectors(), axis=1, keepdims=True)
    assert np.array_equal(embeddings["int8"], np.rint(127 * unit))
    assert np.array_equal(np.array(embeddings["uint8"]) - 128, embeddings["int8"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_type": "passage"}, ["'passage'", "known: query, document"]),
        ({"images": ["data:..."]}, ["images", "no images"]),
        ({"texts": []}, ["texts", "empty"]),
        ({"texts": None}, ["texts", "empty"]),
        ({"embedding_types": ["float16"]}, ["embedding_types[0]", "float"]),
        ({"truncate": "MIDDLE"}, ["truncate", "START"]),
        ({"output_dimension": 5}, ["output_dimension 5", "has 4"]),
        ({"inputs": [{"content": [{"type": "text", "text": "a"}]}]}, ["texts and inputs"]),
        ({"texts": None, "inputs": [{"content": [{"type": "image_url"}]}]}, ["inputs[0]", "no images"]),
        ({"texts": None, "inputs": [{"content": [{"type": "text", "txt": "a"}]}]}, ["'txt'", "did you mean text?"]),
    ],
)
def test_what_cohere_s_embed_refuses(client, change, words):
    asked = {"model": "any", "texts": TEXTS, "input_type": "search_document"} | change
    refused(client.post("/v2/embed", json=asked), 400, *words)


# --- Jina and OpenAI ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "prompt", "dimensions"),
    [
        ({"task": "retrieval.query"}, "query", 4),
        ({"task": "retrieval.passage", "normalized": True, "late_chunking": False}, "document", 4),
        ({"task": "text-matching", "dimensions": 3, "truncate": True}, "document", 3),
        ({"task": "code.query", "normalized": False, "embedding_type": "float"}, "query", 4),
    ],
)
def test_jina_embeds(client, asked, prompt, dimensions):
    answer = post(
        client, "/v1/embeddings", model="jina-embeddings-v3", input=[{"text": text} for text in TEXTS], **asked
    )
    found = np.float32([row["embedding"] for row in answer["data"]])
    expected = vectors(prompt)[:, :dimensions]
    assert np.allclose(found, expected, atol=1e-6)
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6} and answer["object"] == "list"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"late_chunking": True}, ["late_chunking", "one by one"]),
        ({"return_multivector": True}, ["return_multivector", "/embed_all"]),
        ({"task": "retrieval.qury"}, ["'retrieval.qury'", "known: query, document"]),
        ({"task": "retrieval.query", "input_type": "query"}, ["task", "only one"]),
        ({"embedding_typ": "float"}, ["'embedding_typ'", "did you mean embedding_type?"]),
    ],
)
def test_what_jina_s_embeddings_refuse(client, asked, words):
    refused(client.post("/v1/embeddings", json={"input": TEXTS} | asked), 400, *words)


def test_jina_reranks(client):
    asked = {"model": "jina-reranker-v2", "query": "kidney", "documents": DOCUMENTS, "return_documents": True}
    answer = post(client, "/v1/rerank", **asked, truncation=True, max_chunk_per_doc=1)
    assert [row["document"]["text"] for row in answer["results"]] == [DOCUMENTS[i] for i in ORDER]
    assert answer["usage"]["total_tokens"] == sum(len(f"kidney {text}".split()) for text in DOCUMENTS)
    refused(client.post("/v1/rerank", json=asked | {"max_chunk_per_doc": 4}), 400, "max_chunk_per_doc 4")


def test_infinity_returns_documents_as_texts(client):
    asked = {"query": "kidney", "documents": DOCUMENTS, "return_documents": True}
    answer = post(client, "/infinity/rerank", **asked)
    assert [row["document"] for row in answer["results"]] == [DOCUMENTS[i] for i in ORDER]
    assert post(client, "/infinity/embeddings", input=TEXTS, modality="text")["data"][0]["index"] == 0
    two = {"input": TEXTS, "dimensions": 2}
    assert (
        post(client, "/infinity/embeddings", output_dimension=2, **two)["data"]
        == post(client, "/infinity/embeddings", **two)["data"]
    )
    response = client.post("/infinity/embeddings", json=two | {"output_dimension": 3})
    refused(response, 400, "dimensions and output_dimension")


def test_the_models_are_listed_as_by_openai(client):
    listing = client.get("/v1/models").json()
    assert listing["object"] == "list" and [card["id"] for card in listing["data"]] == ["a-reranker", "a-model"]
    assert client.get("/v1/models/a-model").json() == listing["data"][1]
    refused(client.get("/v1/models/another"), 404, "'another'")


# --- Text Embeddings Inference --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_tei_embeds(client, path):
    assert np.array_equal(np.float32(post(client, path, inputs=TEXTS, truncate=True, normalize=True)), vectors())
    answer = post(client, path, inputs="one text", prompt_name="query", dimensions=2, truncation_direction="Right")
    assert np.array_equal(np.float32(answer), vectors("query", ["one text"])[:, :2])
    response = client.post(path, json={"inputs": TEXTS, "normalize": False})
    assert refused(response, 400, "normalize", "unit length") == response.json()["error"]
    refused(client.post(path, json={"inputs": TEXTS, "promptname": "query"}), 400, "did you mean prompt_name?")


def test_tei_reranks_at_the_path_of_others(client):
    answer = post(client, "/rerank", query="kidney", texts=DOCUMENTS, return_text=True, raw_scores=False, truncate=True)
    assert answer == [{"index": i, "score": float(SCORES[i]), "text": DOCUMENTS[i]} for i in ORDER]
    raw = post(client, "/rerank", query="kidney", texts=DOCUMENTS, raw_scores=True)
    assert [row["index"] for row in raw] == ORDER and set(raw[0]) == {"index", "score"}
    assert [row["score"] / 4 for row in raw] == [float(each) for each in SCORES[ORDER]]  # as the helper has them
    refused(client.post("/rerank", json={"query": "kidney", "texts": ["a", 1]}), 400, "texts[1]", "string")
    refused(client.post("/rerank", json={"query": "kidney"}), 400, "documents", "required")
    left = {"query": "a", "texts": ["a"], "truncation_direction": "Left"}
    refused(client.post("/rerank", json=left), 400, "truncation_direction", "at their end")


def test_tei_compares(client):
    answer = post(client, "/similarity", inputs={"source_sentence": TEXTS[0], "sentences": [*TEXTS, "a third"]})
    rows = vectors("document", [TEXTS[0], *TEXTS, "a third"])
    assert np.allclose(answer, rows[1:] @ rows[0])
    wrong = {"inputs": {"source_sentence": "a", "sentence": ["b"]}}
    refused(client.post("/similarity", json=wrong), 400, "'sentence'", "did you mean sentences?")
    none = {"inputs": {"source_sentence": "a", "sentences": []}}
    refused(client.post("/similarity", json=none), 400, "inputs.sentences", "empty")


def test_vectors_of_tokens_need_a_late_model(client):
    refused(client.post("/embed_all", json={"inputs": TEXTS}), 404, "late-interaction")


# --- forms of vectors -----------------------------------------------------------------------------------------------


def test_forms_of_vectors():
    rng = np.random.default_rng(0)
    unit = rng.normal(size=(50, 256)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert np.array_equal(np.float32(in_form(unit, "float")), unit)
    assert all(
        np.array_equal(np.frombuffer(base64.b64decode(text), "<f4"), row)
        for text, row in zip(in_form(unit, "base64"), unit, strict=True)
    )
    levels = np.array(in_form(unit, "int8"))
    assert levels.min() >= -128 and levels.max() <= 127 and np.abs(levels - 254 * unit).max() <= 0.5
    assert np.array_equal(np.array(in_form(unit, "uint8")), levels + 128)
    scores = levels @ levels.T / 254**2
    assert np.abs(scores - unit @ unit.T).max() < 0.01  # plain dot products compare them
    bits = np.packbits(unit > 0, axis=1)
    assert np.array_equal(np.array(in_form(unit, "ubinary")), bits)
    assert np.array_equal(np.array(in_form(unit, "binary")), bits.astype(int) - 128)
    one = np.eye(16, dtype=np.float32)
    assert np.array_equal(np.array(in_form(one, "int8")), 127 * np.eye(16))  # few dimensions: nothing is clipped


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.path)
def test_every_shape_refuses_unknown_fields_and_bodies_that_are_none(client, shape):
    """A misspelt field is named with its near miss; every error is in the form of the shape's API."""
    for body in bodies(shape):
        field = next(name for name, about in body.model_fields.items() if about.is_required() or name == "texts")
        content = {field: "a", f"{field}s": "b"}
        refused(client.post(shape.path, json=content), 400, f"'{field}s'", f"did you mean {field}?")
    for content in (b"[]", b"3", b"null", b"", b'"a"'):
        response = client.post(shape.path, content=content, headers={"Content-Type": "application/json"})
        message = refused(response, 400, "JSON object")
        assert response.json() == shape.error(400, message)


def test_the_documentation_lists_every_shape(client):
    assert client.get("/docs").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    assert {shape.path for shape in SHAPES if shape.listed} <= paths.keys() and "/" not in paths
    assert {"/health", "/ready", "/metrics", "/v1/models", "/info"} <= paths.keys()
    assert all(path["post"]["description"] for path in paths.values() if "post" in path)
