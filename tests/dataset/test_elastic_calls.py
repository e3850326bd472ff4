"""Requests to Elasticsearch and the handling of its responses, against a stub: contracts, not a test of the server.

python -m pytest tests/dataset/test_elastic_calls.py
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest

from mlx_retrieval.dataset import columns
from mlx_retrieval.dataset.elastic import documents
from mlx_retrieval.dataset.elastic import rows as elastic_rows
from mlx_retrieval.dataset.elastic import server as connection
from mlx_retrieval.dataset.elastic.documents import Documents
from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.held_out import hold_out
from mlx_retrieval.dataset.row_formats import Example, examples_of
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.utils import errors


class Stub:
    """A server that answers with `answers(method, path, body)`, (status, JSON), and records its requests in `asked`."""

    def __init__(self):
        self.asked, self.answers, self.headers = [], None, {"X-Elastic-Product": "Elasticsearch"}
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do(self):
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
                path = self.path.partition("?")[0]
                stub.asked.append((self.command, path, body, {k.lower(): v for k, v in self.headers.items()}))
                status, answer = stub.answers(self.command, path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {**stub.headers, "Content-Type": "application/json"}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do  # noqa: N815  (http.server's names)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = connection.Address(f"http://127.0.0.1:{self.server.server_port}", "docs")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stub(monkeypatch):
    for name in ("ES_NODE", "ES_INDEX", "ES_API_KEY", "ES_USER", "ES_PASSWORD", "ES_CA_CERTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(connection.random, "random", lambda: 0.0)
    made = Stub()
    yield made
    made.server.shutdown()


class Shard:
    """Responses of an index with documents of these sources; views are numbered, and those in `lost` have expired."""

    def __init__(self, sources):
        self.sources, self.views, self.lost = sources, 0, set()

    def __call__(self, method, path, body):
        if path == "/docs/_pit":
            self.views += 1
            return 200, {"id": f"view {self.views}"}
        if path == "/_pit":
            return 200, {"succeeded": True}
        if path.startswith("/docs/_settings"):
            return 200, {"docs": {"settings": {"index": {"uuid": "stub"}}}}
        if path == "/docs/_field_caps":
            return 200, {"fields": {name: {} for source in self.sources for name in source}}
        if body["pit"]["id"] in self.lost:
            cause = {"type": "search_context_missing_exception", "reason": "No search context found"}
            return 404, {"error": {"root_cause": [cause], "type": "search_phase_execution_exception"}, "status": 404}
        bounds = [f["range"]["_seq_no"] for f in body["query"]["bool"]["filter"] if "range" in f]
        low, high = (bounds[0].get("gte", 0), bounds[0].get("lt", 1 << 40)) if bounds else (0, 1 << 40)
        numbers = [n for n in range(len(self.sources)) if low <= n < high]
        total = {"count": len(numbers), "max": max(numbers, default=None), "sum": sum(numbers)}
        if "aggs" in body:
            kind = body["aggs"]["all"]
            if "stats" in kind:
                return 200, {"pit_id": body["pit"]["id"], "aggregations": {"all": total}}
            width = kind["histogram"]["interval"]
            keys = sorted({n // width * width for n in numbers})
            buckets = [{"key": k, "doc_count": sum(k <= n < k + width for n in numbers)} for k in keys]
            return 200, {"aggregations": {"all": {"buckets": buckets}}}
        after = body.get("search_after", [-1])[0]
        hits = [
            {"_index": "docs", "_id": str(n), "_source": self.sources[n], "sort": [n, n]} for n in numbers if n > after
        ]
        return 200, {"pit_id": body["pit"]["id"] + "'", "hits": {"hits": hits[: body["size"]]}}


def rows_of(stub, count=40, **options):
    stub.answers = Shard([{"query": f"q{i}", "title": f"t{i}", "snippet": "s"} for i in range(count)])
    return ElasticRows(stub.address, columns.parse("query=query,document=title+snippet,rank=rank"), **options)


def test_views_change_their_names_and_pages_follow(stub, monkeypatch):
    stub.answers = Shard([{"text": f"t{i}"} for i in range(2500)])
    documents = Documents(stub.address, ["text"])
    assert [hit["_id"] for hit in documents.read(0, 2500)] == [str(i) for i in range(2500)]
    searches = [body for _, path, body, _ in stub.asked if path == "/_search"]
    assert [s["pit"]["id"] for s in searches] == ["view 1", "view 1'", "view 1''"]
    assert [s.get("search_after") for s in searches] == [None, [999, 999], [1999, 1999]]
    assert all(s["_source"] == ["text"] and s["track_total_hits"] is False for s in searches)
    documents.close()
    assert stub.asked[-1][:3] == ("DELETE", "/_pit", {"id": "view 1'''"})


def test_a_range_of_a_lost_view_is_read_again(stub):
    stub.answers = shard = Shard([{"text": f"t{i}"} for i in range(1500)])
    documents = Documents(stub.address, ["text"])
    shard.lost.add("view 1'")  # between the first page and the second
    assert [hit["_id"] for hit in documents.read(0, 1500)] == [str(i) for i in range(1500)]
    assert shard.views == 2


@pytest.mark.parametrize("status", [429, *(pytest.param(code, marks=pytest.mark.slow) for code in (502, 503, 504))])
def test_a_busy_server_is_asked_again(stub, status):
    rows = rows_of(stub)
    answer, left = stub.answers, [3]

    def busy(method, path, body):
        left[0] -= 1
        return (status, {"error": "busy", "status": status}) if left[0] >= 0 else answer(method, path, body)

    stub.answers = busy
    before = len(stub.asked)
    assert rows.documents.survey().count == 40
    assert len(stub.asked) == before + 4


def test_patience_has_an_end_and_pauses_grow(stub):
    rows = rows_of(stub)
    stub.answers = lambda *_: (503, {"error": "away", "status": 503})
    rows.documents.server.patience = 2.0
    before = len(stub.asked)
    with pytest.raises(errors.UserError, match=r"no answer from Elasticsearch in \d s \(503"):
        rows.documents.survey()
    assert 2 <= len(stub.asked) - before <= 4  # after 0, 0.25, 0.75 and 1.75 s: no storm


def test_a_waiting_call_can_be_cancelled(stub):
    rows = rows_of(stub)
    stub.answers = lambda *_: (503, {"error": "away", "status": 503})
    threading.Timer(0.5, rows.documents.server.close).start()
    with pytest.raises(connection.Closed):
        rows.documents.survey()


@pytest.mark.parametrize(
    "status, answer, message",
    [
        (400, {"error": {"type": "media_type_header_exception", "reason": "Accept version"}}, "major version"),
        (406, {"error": "Content-Type header is not supported"}, "major version"),
        (401, {"error": {"type": "security_exception"}}, "is needed"),
        (403, {"error": {"type": "security_exception"}}, "may not do this with docs"),
        (404, {"error": {"type": "index_not_found_exception"}}, "no index docs"),
        (400, {"error": {"root_cause": [{"reason": "failed to parse query"}]}}, "failed to parse query"),
    ],
)
def test_refused_requests_are_reported_and_not_repeated(stub, status, answer, message):
    stub.answers = lambda *_: (status, answer)
    with pytest.raises(errors.UserError, match=message) as told:
        ElasticRows(stub.address, columns.parse("query=q,document=d"))
    assert len(stub.asked) == 1 and "\n" not in str(told.value)


def test_a_server_that_is_not_elasticsearch_is_refused(stub):
    stub.headers = {}
    stub.answers = lambda *_: (200, {"fields": {}})
    with pytest.raises(errors.UserError, match="OpenSearch is not supported"):
        ElasticRows(stub.address, columns.parse("query=q,document=d"))


def test_keys_go_into_headers_only(stub, monkeypatch):
    monkeypatch.setenv("ES_API_KEY", "secret-key")
    rows_of(stub)
    assert {headers["authorization"] for *_, headers in stub.asked} == {"ApiKey secret-key"}
    assert {headers["accept"] for *_, headers in stub.asked} == {
        "application/vnd.elasticsearch+json; compatible-with=8"
    }
    monkeypatch.setenv("ES_USER", "someone")
    with pytest.raises(errors.UserError, match="which of them"):
        rows_of(stub)


@pytest.mark.parametrize(
    "source, environment, expected",
    [
        ("es://docs", {}, ("http://localhost:9200", "docs")),
        ("es://docs", {"ES_NODE": "https://far:9243"}, ("https://far:9243", "docs")),
        ("es://docs", {"ES_NODE": "https://far"}, ("https://far:443", "docs")),
        ("es://", {"ES_INDEX": "named"}, ("http://localhost:9200", "named")),
        ("http://host/docs", {}, ("http://host:9200", "docs")),
        ("https://host:9200/behind/proxy/docs", {}, ("https://host:9200/behind/proxy", "docs")),
        ("https://host:9200", {"ES_INDEX": "named"}, ("https://host:9200", "named")),
    ],
)
def test_addresses(monkeypatch, source, environment, expected):
    for name in ("ES_NODE", "ES_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert connection.parse(source) == expected


@pytest.mark.parametrize(
    "source, environment, message",
    [
        ("es://", {}, "no index is named"),
        ("https://me:secret@host:9200/docs", {}, "belong into ES_USER and ES_PASSWORD"),
        ("es://docs", {"ES_NODE": "https://me:secret@host:9200"}, "belong into ES_USER and ES_PASSWORD"),
        ("es://docs", {"ES_NODE": "localhost:9200"}, "ES_NODE: an address such as"),
        ("es://docs", {"ES_NODE": "http://host:many"}, "ES_NODE: an address such as"),
    ],
)
def test_invalid_addresses(monkeypatch, source, environment, message):
    for name in ("ES_NODE", "ES_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UserError, match=message) as told:
        connection.parse(source)
    assert "secret" not in str(told.value)


def test_a_wrong_authority_file_is_reported(stub, monkeypatch, tmp_path):
    monkeypatch.setenv("ES_CA_CERTS", str(tmp_path / "some.pem"))
    for text in (None, "no certificate"):
        if text:
            (tmp_path / "some.pem").write_text(text)
        with pytest.raises(errors.UserError, match=r"ES_CA_CERTS: .*some\.pem: no certificates"):
            connection.Server(stub.address)


def test_nobody_answers(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PATIENCE", 0.5)
    with pytest.raises(errors.UserError, match="no answer from Elasticsearch"):
        ElasticRows(connection.parse("http://127.0.0.1:9/docs"), columns.parse("query=q,document=d"))


# --- fields ---


def test_rows_are_made_of_fields():
    mapping = columns.parse("query=q, document=title+meta.text,rank=place")
    source = {"q": ["what"], "title": "A", "meta": {"text": "B"}, "place": 3, "other": 1}
    assert columns.row_of(source, mapping) == {"query": "what", "document": "A\nB", "rank": 3}
    assert columns.row_of({"q": "what", "title": "", "meta.text": "B"}, mapping) == {"query": "what", "document": "B"}
    assert columns.joined({"a": ["x", "y"], "b": 3}, ["a", "b", "c"]) == "x\ny\n3"
    assert columns.row_of({"q": "\ud800", "title": "\ud83d"}, mapping) == {"query": "\ufffd", "document": "\ufffd"}
    lists = columns.parse("query=q,positive=p,negatives=n,scores=s")
    row = columns.row_of({"q": "a", "p": "b", "n": ["c"], "s": [1.0, 0.5]}, lists)
    assert examples_of(row)[0] == [Example("a", "b", ("c",), 1, (1.0, 0.5))]


@pytest.mark.parametrize(
    "text, message",
    [
        ("query", "not of the form"),
        ("query=", "not of the form"),
        ("query=a++b", "not of the form"),
        ("title=q", "no key 'title'"),
        ("query=a,question=b", "question twice"),
        ("query=a,query=b", "query twice"),
    ],
)
def test_invalid_mappings(text, message):
    with pytest.raises(errors.UserError, match=message):
        columns.parse(text)


def test_an_index_of_other_fields_is_told_its_columns(stub):
    stub.answers = Shard([{"question": "Why?", "reply": "Because it is old.", "id": "7"}])
    with pytest.raises(errors.UserError) as error:
        ElasticRows(stub.address, columns.parse(columns.ELASTIC_DEFAULT))
    assert str(error.value).endswith("(there: id, question, reply); try --columns query=question,document=reply")
    rows = ElasticRows(stub.address, columns.parse("query=question,document=reply"))
    assert rows.readings == [f"{stub.address}: question -> query, reply -> document"]
    with pytest.raises(errors.UserError, match=r"no field repli .*did you mean reply"):
        ElasticRows(stub.address, columns.parse("query=question,document=repli"))


def test_a_mapping_that_makes_no_row(stub):
    stub.answers = Shard([{"q": "x"}])
    with pytest.raises(errors.UserError, match="--columns: no positive"):
        ElasticRows(stub.address, columns.parse("query=q"))


def test_nothing_to_read_is_not_an_error(stub):
    """As when all documents have their vectors. Elasticsearch refuses a histogram with intervals of 0."""
    stub.answers = Shard([{"text": "t"}])
    documents = Documents(stub.address, ["text"])
    stub.answers.sources = []
    assert documents.ranges(documents.survey()) == []
    assert not any("histogram" in body.get("aggs", {}).get("all", {}) for _, _, body, _ in stub.asked)


def test_an_index_is_a_source(stub):
    assert isinstance(rows_of(stub), Source)


def test_no_more_than_a_few_blocks_are_held(stub, monkeypatch):
    monkeypatch.setattr(documents, "RANGE", 8)
    monkeypatch.setattr(elastic_rows, "BLOCK", 4)
    rows, held, seen = rows_of(stub, 1000), 0, set()
    for n in islice(rows.numbers(0, 0), 1000):
        held = max(held, sum(len(documents) for _, documents in rows._recent))
        seen.add(rows.where(n))
    assert len(seen) == 1000 and 32 <= held <= 3 * 2 * 32


@pytest.mark.parametrize("block", [1, 16], ids=["several blocks", "one block"])
def test_documents_written_during_an_epoch_are_in_the_next_one(stub, monkeypatch, block):
    """Regression: an epoch was surveyed as soon as the last block of the one before had been read ahead."""
    monkeypatch.setattr(documents, "RANGE", 8)
    monkeypatch.setattr(elastic_rows, "BLOCK", block)
    rows = rows_of(stub, 40)
    numbers = rows.numbers(0, 0)
    drawn = [rows.where(next(numbers)) for _ in range(39)]
    cursor = json.loads(json.dumps(rows.cursor(39)))
    time.sleep(0.05)  # whatever is read ahead has been read
    stub.answers.sources.append({"query": "new", "title": "new", "snippet": "s"})
    drawn += [rows.where(next(numbers)) for _ in range(1 + 41)]
    assert len(set(drawn[:40])) == 40 and len(set(drawn[40:])) == 41
    assert sum(place.endswith("document 40") for place in drawn) == 1
    numbers.close()
    assert rows.cursor(40)["epoch"] == rows.cursor(80)["epoch"] == 1 and rows.cursor(39) == cursor

    again = rows_of(stub, 41)  # stopped at 39, resumed when the document is there: the same rows
    again.restore(cursor, 39)
    assert [again.where(n) for n in islice(again.numbers(0, 39), 42)] == drawn[39:]


def test_questions_are_held_out_of_an_index(stub, monkeypatch):
    """Their documents are left out as they come, and a resumed run draws the same rows."""
    monkeypatch.setattr(documents, "RANGE", 8)
    monkeypatch.setattr(elastic_rows, "BLOCK", 4)
    rows = rows_of(stub, 120)
    held = hold_out(rows, 0.05)
    assert isinstance(held.rows, Source) and len(held.questions.queries) == 40 == held.left_out
    drawn = [(n, held.rows[n].query) for n in islice(held.rows.numbers(0, 0), 200)]
    asked = set(held.questions.queries.values())
    assert {query for _, query in drawn} == {f"q{i}" for i in range(120)} - asked
    cursor = json.loads(json.dumps(held.rows.cursor(150)))
    again = hold_out(rows_of(stub, 120), 0.05)
    assert again.questions == held.questions
    again.rows.restore(cursor, 150)
    assert [(n, again.rows[n].query) for n in islice(again.rows.numbers(0, 150), 50)] == drawn[150:]


def test_an_index_of_which_nothing_is_usable(stub):
    rows = rows_of(stub, skip_bad=True)
    stub.answers.sources = [{"query": "", "title": "", "snippet": ""}] * 40
    with pytest.raises(errors.UserError, match="no usable document"):
        next(rows.numbers(0, 0))
