"""The clients that people have, unmodified, against a live server: their vectors and orders are the library's.

python -m pytest -m slow tests/inference/test_server_clients.py

`pip install --no-deps -r tests/clients.txt` installs them, as .ci/run does; a test of one that is not there is skipped.
All tests share one server, `serve.py` in a process of its own, with small random models. The commands of
docs/serving.md that use curl are run against it.
"""

import importlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from random_rerankers import cross_encoder
from trained_models import trained

from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["a kidney stone is a hard piece of material", "the cat sat on the mat", "which animal did sit there?"]
QUERY = "what is a kidney stone"
KEY = "any"
COHERE_NAME = "embed-english-v3.0"  # LlamaIndex's clients of Cohere take its own names alone
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def live(small, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A server's address, and its models in this process."""
    folder = tmp_path_factory.mktemp("served")
    trained(small, folder / "docs")
    mx.random.seed(1)
    trained(small, folder / "code", keys=["q_proj"])
    trained(small, folder / "tokens", task="late", projection=16)
    cross_encoder("bert", folder / "rank")
    paths = {name: str(folder / name) for name in ("docs", "code", "rank", "tokens")}
    named = [f"{name}={path}" for name, path in (paths | {COHERE_NAME: paths["docs"]}).items()]
    command = [sys.executable, str(ROOT / "serve.py"), "--port", "0", "--model", *named]
    log = open(folder / "log", "w+")
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving docs, code, rank, tokens"), (folder / "log").read_text()
        url = line.split(" at ")[1].split(",")[0]
        wait_until_ready(url)
        yield SimpleNamespace(
            url=url,
            v1=f"{url}/v1",
            docs=embedder.load(paths["docs"]),
            code=embedder.load(paths["code"]),
            tokens=Reranker(paths["tokens"]),
            rank=Reranker(paths["rank"]),
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130 and process.stdout.read() == ""
        assert (folder / "log").read_text().count("loaded ") == len(named)
    finally:
        process.kill()
        process.wait()
        log.close()


def library(name: str) -> ModuleType:
    """Import a client; skip the test if it is not installed. One that is, and lacks a package itself, is an error."""
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:  # of the package around it
        found = None
    if found is None:
        pytest.skip(f"{name} is not installed: see tests/clients.txt")
    return importlib.import_module(name)


def wait_until_ready(url: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(f"{url}/ready", timeout=5).read()
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def same(found, model: embedder.Model, prompt: str = "document", texts=TEXTS, dimensions: int | None = None) -> None:
    expected = model.encode(texts, prompt=prompt, dimensions=dimensions)
    assert np.shape(found) == expected.shape and np.abs(np.float32(found) - expected).max() < 1e-5


def same_ranking(found: list[tuple[int, float]], model: Reranker, top: int | None = None) -> None:
    expected = model.rerank(QUERY, TEXTS, top)
    assert [index for index, _ in found] == [result["index"] for result in expected]
    assert np.allclose([score for _, score in found], [result["score"] for result in expected], atol=1e-5)


# --- the libraries of the APIs --------------------------------------------------------------------------------------


def test_openai(live):
    openai = library("openai")
    client = openai.OpenAI(base_url=live.v1, api_key=KEY)
    for model, name in ((live.docs, "docs"), (live.code, "code")):
        for settings in ({}, {"encoding_format": "float"}, {"dimensions": 16}):
            answer = client.embeddings.create(model=name, input=TEXTS, **settings)  # base64 by default
            same([row.embedding for row in answer.data], model, dimensions=settings.get("dimensions"))
            assert answer.model == name and answer.usage.total_tokens == model.count_tokens(TEXTS, "document")
    answer = client.embeddings.create(model="docs", input=QUERY, extra_body={"input_type": "query"}, user="me")
    same([answer.data[0].embedding], live.docs, "query", [QUERY])
    ids = [encoding.ids for encoding in live.docs.tokenizer.tokenizer.encode_batch(TEXTS)]
    same([row.embedding for row in client.embeddings.create(model="docs", input=ids).data], live.docs)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="docs", input=[[2940, 374, 264]])
    with pytest.raises(openai.NotFoundError, match="known: docs, code"):
        client.embeddings.create(model="text-embedding-3-small", input=TEXTS)
    assert [model.id for model in client.models.list()] == ["docs", "code", "rank", "tokens", COHERE_NAME]
    assert client.models.retrieve("docs").owned_by == "mlx-retrieval"


def test_cohere(live):
    cohere = library("cohere")
    for client in (cohere.Client(KEY, base_url=live.url), cohere.ClientV2(KEY, base_url=live.url)):
        limit = {"max_tokens_per_doc": 4096} if isinstance(client, cohere.ClientV2) else {}
        answer = client.rerank(model="rank", query=QUERY, documents=TEXTS, top_n=2, **limit)
        same_ranking([(row.index, row.relevance_score) for row in answer.results], live.rank, 2)
        answer = client.rerank(model="tokens", query=QUERY, documents=TEXTS)
        same_ranking([(row.index, row.relevance_score) for row in answer.results], live.tokens)
        for kind, prompt in (("search_query", "query"), ("search_document", "document")):
            types = ["float", "int8", "uint8", "binary", "ubinary"]
            settings = {"texts": TEXTS, "input_type": kind, "embedding_types": types, "truncate": "END"}
            embeddings = client.embed(model="docs", **settings).embeddings
            same(embeddings.float_, live.docs, prompt)
            vectors = live.docs.encode(TEXTS, prompt=prompt)
            bits = np.packbits(vectors > 0, axis=1).astype(int)
            assert np.array_equal(embeddings.ubinary, bits) and np.array_equal(embeddings.binary, bits - 128)
            assert np.abs(np.array(embeddings.int8) - 127 * vectors).max() < 0.51  # of 32 dimensions
            assert np.array_equal(np.array(embeddings.uint8) - 128, embeddings.int8)
    plain = cohere.Client(KEY, base_url=live.url).embed(model="docs", texts=TEXTS, input_type="search_query")
    same(plain.embeddings, live.docs, "query")
    with pytest.raises(cohere.errors.NotFoundError, match="known: docs"):
        client.embed(model="embed-v4.0", texts=TEXTS, input_type="search_query", embedding_types=["float"])


@pytest.fixture
def online(monkeypatch) -> None:
    """Let huggingface_hub send requests, which the tests forbid because there is no hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def test_huggingface_hub(live, online):
    client = library("huggingface_hub").InferenceClient(model=live.url, token=KEY)
    same(client.feature_extraction(TEXTS), live.docs)
    found = client.feature_extraction(TEXTS, normalize=True, truncate=True, truncation_direction="right", dimensions=8)
    same(found, live.docs, dimensions=8)
    same(client.feature_extraction(QUERY, prompt_name="query"), live.docs, "query", [QUERY])
    vectors = live.docs.encode([QUERY, *TEXTS], prompt="document")
    scores = client.sentence_similarity(QUERY, TEXTS, model=f"{live.url}/similarity")
    assert np.allclose(scores, vectors[1:] @ vectors[0], atol=1e-5)


def test_litellm(live, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it looks for one on the net
    litellm = library("litellm")
    litellm.suppress_debug_info = True
    for model, base in (
        ("openai/docs", live.v1),
        ("hosted_vllm/docs", live.v1),
        ("infinity/docs", f"{live.url}/infinity"),
        ("jina_ai/docs", f"{live.v1}/embeddings"),
        ("cohere/docs", f"{live.url}/v1/embed"),
    ):
        answer = litellm.embedding(model, TEXTS, api_base=base, api_key=KEY)
        same([row["embedding"] for row in answer.data], live.docs)
    for model, base in (
        ("cohere/rank", f"{live.url}/v1/rerank"),
        ("cohere/rank", f"{live.url}/v2/rerank"),
        ("jina_ai/rank", live.url),
        ("infinity/rank", f"{live.url}/infinity"),
        ("hosted_vllm/rank", live.v1),
        ("huggingface/rank", live.url),
    ):
        answer = litellm.rerank(model, QUERY, TEXTS, api_base=base, api_key=KEY, top_n=2)
        same_ranking([(row["index"], row["relevance_score"]) for row in answer.results], live.rank, 2)


def test_litellm_s_huggingface_embeddings(live, monkeypatch):
    """It asks the hub first for the kind of the model; the tests have no network."""
    litellm = library("litellm")
    from litellm.llms.huggingface.embedding import handler

    monkeypatch.setattr(handler, "get_hf_task_embedding_for_model", lambda **_: "feature-extraction")
    answer = litellm.embedding("huggingface/docs", TEXTS, api_base=live.url, api_key=KEY)
    same([row["embedding"] for row in answer.data], live.docs)


# --- LangChain ------------------------------------------------------------------------------------------------------


def test_langchain_openai(live):
    langchain_openai = library("langchain_openai")
    settings = {"base_url": live.v1, "api_key": KEY, "check_embedding_ctx_length": False}
    same(langchain_openai.OpenAIEmbeddings(model="docs", **settings).embed_documents(TEXTS), live.docs)
    queries = langchain_openai.OpenAIEmbeddings(
        model="docs", model_kwargs={"extra_body": {"input_type": "query"}}, **settings
    )
    same([queries.embed_query(QUERY)], live.docs, "query", [QUERY])


@pytest.fixture
def vocabulary(monkeypatch) -> None:
    """A vocabulary of bytes in place of OpenAI's, which would be downloaded."""
    tiktoken = library("tiktoken")
    small = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    for name in ("get_encoding", "encoding_for_model"):
        monkeypatch.setattr(tiktoken, name, lambda _: small)


def test_langchain_openai_without_the_setting_is_told_of_it(live, vocabulary):
    openai, langchain_openai = library("openai"), library("langchain_openai")
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain_openai.OpenAIEmbeddings(model="docs", base_url=live.v1, api_key=KEY).embed_documents(TEXTS)


def test_langchain_cohere(live):
    langchain_cohere = library("langchain_cohere")
    from langchain_core.documents import Document

    embeddings = langchain_cohere.CohereEmbeddings(model="docs", cohere_api_key=KEY, base_url=live.url)
    same(embeddings.embed_documents(TEXTS), live.docs)
    same([embeddings.embed_query(QUERY)], live.docs, "query", [QUERY])
    ranker = langchain_cohere.CohereRerank(model="rank", cohere_api_key=KEY, base_url=live.url, top_n=2)
    same_ranking([(row["index"], row["relevance_score"]) for row in ranker.rerank(TEXTS, QUERY)], live.rank, 2)
    documents = ranker.compress_documents([Document(text) for text in TEXTS], QUERY)
    found = [(TEXTS.index(each.page_content), each.metadata["relevance_score"]) for each in documents]
    same_ranking(found, live.rank, 2)


def test_langchain_huggingface(live, online):
    """It takes names of the hub alone; its client is given the address afterwards."""
    langchain_huggingface = library("langchain_huggingface")
    from huggingface_hub import InferenceClient

    embeddings = langchain_huggingface.HuggingFaceEndpointEmbeddings(model="owner/any", huggingfacehub_api_token=KEY)
    embeddings.client = InferenceClient(model=live.url)
    same(embeddings.embed_documents(TEXTS), live.docs)
    same([embeddings.embed_query(QUERY)], live.docs, texts=[QUERY])


# --- LlamaIndex -----------------------------------------------------------------------------------------------------


def test_llama_index_openai(live):
    module = library("llama_index.embeddings.openai")
    settings = {"api_base": live.v1, "api_key": KEY}
    same(module.OpenAIEmbedding(model_name="docs", **settings).get_text_embedding_batch(TEXTS), live.docs)
    queries = module.OpenAIEmbedding(
        model_name="docs", additional_kwargs={"extra_body": {"input_type": "query"}}, **settings
    )
    same([queries.get_query_embedding(QUERY)], live.docs, "query", [QUERY])


def test_llama_index_cohere(live):
    embeddings = library("llama_index.embeddings.cohere")
    rerank = library("llama_index.postprocessor.cohere_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    model = embeddings.CohereEmbedding(model_name=COHERE_NAME, base_url=live.url, api_key=KEY)
    same(model.get_text_embedding_batch(TEXTS), live.docs)
    same([model.get_query_embedding(QUERY)], live.docs, "query", [QUERY])
    ranker = rerank.CohereRerank(model="rank", base_url=live.url, api_key=KEY, top_n=2)
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    hits = ranker.postprocess_nodes(nodes, query_str=QUERY)
    same_ranking([(TEXTS.index(hit.text), hit.score) for hit in hits], live.rank, 2)


def test_llama_index_text_embeddings_inference(live):
    module = library("llama_index.embeddings.text_embeddings_inference")
    model = module.TextEmbeddingsInference(model_name="any", base_url=live.url)
    same(model.get_text_embedding_batch(TEXTS), live.docs)
    same([model.get_query_embedding(QUERY)], live.docs, texts=[QUERY])


# --- MTEB -----------------------------------------------------------------------------------------------------------


def test_mteb_s_model_of_openai_s_api(live, vocabulary):
    openai = library("openai")
    from mteb.models.model_implementations.openai_models import OpenAIModel

    client = openai.OpenAI(base_url=live.v1, api_key=KEY)
    model = OpenAIModel("openai/docs", max_tokens=8191, embed_dim=32, client=client)
    found = model.encode([{"text": TEXTS}], task_metadata=None, hf_split="test", hf_subset="default")
    same(found, live.docs)


# --- the examples and the documentation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "framework"), [("rag_langchain", "langchain_cohere"), ("rag_llamaindex", "llama_index.core")]
)
def test_the_examples_run(live, tmp_path, name, framework):
    library(framework)
    file = tmp_path / "docs.txt"
    file.write_text("\n".join(TEXTS))
    command = [
        sys.executable,
        str(ROOT / "examples" / f"{name}.py"),
        QUERY,
        "--documents",
        str(file),
        "--server",
        live.url,
    ]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [line.split("  ", 1) for line in done.stdout.splitlines()]
    expected = live.rank.rerank(QUERY, TEXTS)
    assert [text for _, text in found] == [result["document"] for result in expected]
    assert [score for score, _ in found] == [f"{result['score']:.4f}" for result in expected]


def test_the_documentation_names_the_versions_that_are_tested():
    needed = (ROOT / "tests" / "clients.txt").read_text().partition("# What they need.")[0]
    versions = dict(line.split("==") for line in needed.splitlines() if "==" in line)
    table = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert len(versions) == 10 and all(f"| {name} | {version} |" in table for name, version in versions.items())


def curl_commands() -> list[list[str]]:
    lines = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("curl ")]


def test_the_documentation_s_curl_lines(live):
    """Each is run as it stands there, but for the port."""
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    commands = curl_commands()
    assert len(commands) >= 15
    for words in commands:
        words = [word.replace("http://127.0.0.1:8000", live.url) for word in words]
        done = subprocess.run([*words, "--silent", "--show-error", "--fail-with-body"], capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}{done.stderr}"
        if "/metrics" not in words[1]:
            assert json.loads(done.stdout)
