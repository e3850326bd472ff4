"""Run a server in this process until it is told to end."""

import functools
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_retrieval.backend import mx

import uvicorn
from fastapi import FastAPI

from mlx_retrieval import backend
from mlx_retrieval.inference.serving.app import ServerSettings, create_app
from mlx_retrieval.inference.serving.engine import Limits
from mlx_retrieval.inference.serving.guard import ImpatientProtocol
from mlx_retrieval.inference.serving.served_models import ServedModels, prepare
from mlx_retrieval.utils.errors import UserError

# Bytes of freed arrays that mlx keeps for reuse on CPUs. A server meets ever new sizes, and memory grew until mlx kept
# the 256 MB that it may in commands; the C library reuses freed memory as well.
CACHE_BYTES = 32 << 20
SHUTDOWN_S = 10  # seconds that requests may go on after Ctrl-C or SIGTERM


def run(
    models: ServedModels, settings: ServerSettings | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve until Ctrl-C, which raises KeyboardInterrupt once the requests in progress are answered, or SIGTERM.

    Args:
        port: 0 = any free one; the printed line names it.

    Raises UserError as `create_app` does, if the address cannot be listened on, and if a model cannot be loaded.
    """
    settings = settings or ServerSettings()
    app = create_app(models, settings)
    listener = listen(host, port)
    if not backend.IS_GPU:
        mx.set_cache_limit(CACHE_BYTES)
    for each in models.all:
        if each.model is not None:
            prepare(each.model, len(models.all))
    names = ", ".join(each.name for each in models.all)
    access = "with an API key" if settings.keys else "without an API key"
    print(f"serving {names} at {url_of(host, listener)}, {access}; press Ctrl-C to stop", flush=True)
    server = server_of(app, settings.limits)
    app.state.service.stop = functools.partial(setattr, server, "should_exit", True)
    with _telling():
        server.run(sockets=[listener])
    if models.failure is not None:
        raise models.failure


def server_of(app: FastAPI, limits: Limits) -> uvicorn.Server:
    """Return the server of an app, ready to run; it waits for slow clients as long as the limits say."""
    config = uvicorn.Config(
        app,
        http=functools.partial(ImpatientProtocol, limits=limits),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return uvicorn.Server(config)


def url_of(host: str, listener: socket.socket) -> str:
    """Return the address of a server that listens there."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


@contextmanager
def _telling() -> Iterator[None]:
    """Print on standard error which models are loaded and evicted."""
    log = logging.getLogger(__package__)
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; UserError if it cannot."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 65,536
        raise UserError(f"port {port}: between 0 and 65,535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    # Connections inherit this. asyncio sets it only for sockets of its own; without it every answer took 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
