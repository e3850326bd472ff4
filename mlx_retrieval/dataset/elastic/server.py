"""Connect to Elasticsearch: addresses, keys, retries while the server is unavailable, and errors in one line.

    ES_NODE=https://host:9200 ES_API_KEY=... python train.py --data es://index

ES_NODE defaults to http://localhost:9200. ES_INDEX is the index of `es://`. ES_API_KEY, or ES_USER and ES_PASSWORD,
are the credentials. ES_CA_CERTS is the file of a certificate authority. Credentials come from nowhere else, so that
none gets into a run's settings.
"""

import os
import random
import ssl
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from mlx_retrieval.utils import addresses
from mlx_retrieval.utils.errors import UserError

PATIENCE = 300.0  # seconds for which a server that has answered may be unavailable
FIRST_PATIENCE = 5.0  # the same before its first answer: a wrong address should be reported soon
AWAY = (429, 502, 503, 504)
SCHEMES = ("es", "http", "https")
PORTS = {"http": 9200, "https": 443}
KEEP_ALIVE = "5m"


class Address(NamedTuple):
    """The address of an index."""

    node: str
    index: str

    def __str__(self) -> str:
        return f"{self.node}/{self.index}"


class Closed(Exception):  # noqa: N818  (a signal)
    """The connection was closed while a call was waiting."""


class ViewLost(Exception):  # noqa: N818  (a signal: the reader opens a new view)
    """A point in time has expired, or was lost in a restart of the server."""


def is_address(source: str) -> bool:
    """Whether this is the address of an index, not a file."""
    return source.partition("://")[0] in SCHEMES and "://" in source


def parse(source: str) -> Address:
    """Return the address that es://INDEX or http[s]://HOST:PORT/INDEX gives. UserError if it gives none."""
    parts = addresses.split(source)
    if parts.username or parts.password:
        raise UserError("user and password belong into ES_USER and ES_PASSWORD, not into an address, which is saved")
    if parts.scheme == "es":
        node, index = os.environ.get("ES_NODE", "http://localhost:9200"), source.removeprefix("es://").strip("/")
        parts = addresses.split(node)
        name = "ES_NODE"
        if parts.username or parts.password:
            raise UserError("ES_NODE: user and password belong into ES_USER and ES_PASSWORD")
    else:
        folder, _, index = parts.path.rstrip("/").rpartition("/")
        node, name = f"{parts.scheme}://{parts.netloc}{folder}", source
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in PORTS or not parts.hostname or port == -1:
        given = f", not {node}" if name != source else ""
        raise UserError(f"{name}: an address such as http://localhost:9200 is needed{given}")
    if port is None:
        node = node.replace(parts.netloc, f"{parts.netloc}:{PORTS[parts.scheme]}", 1)
    index = index or os.environ.get("ES_INDEX", "")
    if not index or "/" in index:
        raise UserError(f"{source}: no index is named; es://INDEX names one, or ES_INDEX for es://")
    return Address(node.rstrip("/"), index)


def credentials() -> dict[str, Any]:
    """Return the credentials in the environment, as arguments of the client. UserError if they are incomplete."""
    say = os.environ.get
    out: dict[str, Any] = {}
    if say("ES_API_KEY") and (say("ES_USER") or say("ES_PASSWORD")):
        raise UserError("ES_API_KEY is set, and so is ES_USER or ES_PASSWORD: which of them?")
    if say("ES_API_KEY"):
        out["api_key"] = say("ES_API_KEY")
    elif say("ES_USER") or say("ES_PASSWORD"):
        if not (say("ES_USER") and say("ES_PASSWORD")):
            raise UserError("ES_USER and ES_PASSWORD must both be set")
        out["basic_auth"] = (say("ES_USER"), say("ES_PASSWORD"))
    if authority := say("ES_CA_CERTS"):
        try:
            ssl.create_default_context(cafile=authority)
        except OSError as error:  # ssl's errors are some
            raise UserError(f"ES_CA_CERTS: {authority}: no certificates ({error.strerror or error})") from error
        out["ca_certs"] = authority
    return out


class Server:
    """Calls to a server, repeated with growing pauses while it is unavailable.

    Args:
        address: of an index.
        patience: seconds for which a server that has answered may be unavailable.

    `client` is an `elasticsearch.Elasticsearch`.
    """

    def __init__(self, address: Address, patience: float = PATIENCE):
        from elasticsearch import Elasticsearch

        self.address, self.patience = address, patience
        options = {"request_timeout": 60, "max_retries": 0, "retry_on_timeout": False} | credentials()
        self.client = Elasticsearch(address.node, **options)
        self._answered = False
        self._closed = threading.Event()

    def open(self) -> None:
        """Allow calls again after `close`."""
        self._closed.clear()

    def close(self) -> None:
        """Make waiting calls raise Closed, in all threads."""
        self._closed.set()

    def call(self, method: Callable, **body: Any) -> Any:
        """Call a method of the client and return its response. UserError in one line, ViewLost, or Closed."""
        import elasticsearch

        start, pause, is_reported = time.monotonic(), 0.25, False
        while not self._closed.is_set():
            try:
                answer = method(**body)
                self._answered = True
                return answer
            except elasticsearch.TransportError as error:
                self._refuse_for_good(error)
                reason = str(error.message)
            except elasticsearch.ApiError as error:
                if error.status_code not in AWAY:
                    raise self._explained(error) from error
                reason = f"{error.status_code} {error.message}"
            waited = time.monotonic() - start
            if waited + pause > (self.patience if self._answered else FIRST_PATIENCE):
                raise UserError(f"{self.address.node}: no answer from Elasticsearch in {waited:.0f} s ({reason[:200]})")
            if self._answered and waited > 2 and not is_reported:
                is_reported = True
                print(f"{self.address.node}: unavailable ({reason[:120]}); trying again", file=sys.stderr)
            self._closed.wait(pause * (1 + random.random()))
            pause = min(2 * pause, 10.0)
        raise Closed

    def _refuse_for_good(self, error: Exception) -> None:
        """UserError if waiting does not help."""
        import elasticsearch

        if isinstance(error, elasticsearch.SSLError):
            raise UserError(f"{self.address.node}: {error.message} (ES_CA_CERTS names an authority's file)") from error
        if not isinstance(error, (elasticsearch.ConnectionError, elasticsearch.ConnectionTimeout)):
            raise UserError(f"{self.address.node}: {error.message}") from error

    def _explained(self, error: Any) -> Exception:
        """Return the exception to raise for an error response."""
        import elasticsearch

        node, index = self.address
        if isinstance(error, elasticsearch.UnsupportedProductError):
            return UserError(f"{node}: the server is not Elasticsearch 8 or 9 (OpenSearch is not supported)")
        body, status = str(error.body), error.status_code
        if "search_context_missing" in body:
            return ViewLost(body)
        if status == 406 or "media_type_header" in body:
            return UserError(f"{node}: this Elasticsearch is of a major version that is not supported; 8 and 9 are")
        if status == 401:
            given = "was refused" if credentials().keys() - {"ca_certs"} else "is needed"
            return UserError(f"{node}: ES_API_KEY, or ES_USER and ES_PASSWORD, {given} (401)")
        if status == 403:
            return UserError(f"{node}: the key or user may not do this with {index} (403: {error.message})")
        if "index_not_found" in body:
            return UserError(f"{node}: no index {index}")
        return UserError(f"{node}: {status} {_reason(error)[:300]}")


def _reason(error: Any) -> str:
    """Return the innermost reason in an error response."""
    details = error.body.get("error", {}) if isinstance(error.body, dict) else {}
    causes = details.get("root_cause") if isinstance(details, dict) else None
    return str(causes[0].get("reason", error.message)) if causes else str(error.message)


class View:
    """A point in time of an index: searches through it see the same documents.

    `reopen` replaces one that is lost; the new one may show newer documents.
    """

    def __init__(self, server: Server):
        self.server, self._id = server, None

    def reopen(self) -> None:
        """Open a point in time, instead of the current one if there is one."""
        self._id = None  # a lost one need not be closed
        index = self.server.address.index
        self._id = self.server.call(self.server.client.open_point_in_time, index=index, keep_alive=KEEP_ALIVE)["id"]

    def search(self, **body: Any) -> dict:
        """Return the response to a search. ViewLost if the view must be reopened; partial responses are errors."""
        if self._id is None:
            self.reopen()
        answer = self.server.call(
            self.server.client.search,
            pit={"id": self._id, "keep_alive": KEEP_ALIVE},
            allow_partial_search_results=False,
            **body,
        )
        self._id = answer.get("pit_id", self._id)  # every response may bring a new id
        return answer

    def close(self) -> None:
        """Release the view on the server; if unreachable, the server expires it."""
        import elasticsearch

        if self._id is not None:
            last, self._id = self._id, None
            try:
                self.server.client.options(ignore_status=404, request_timeout=5).close_point_in_time(id=last)
            except (elasticsearch.TransportError, elasticsearch.ApiError):
                return
