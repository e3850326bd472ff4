"""Serve embedding models, rerankers and late-interaction models over HTTP, for the clients that people have.

python serve.py --model adapters/final                                   # answers to any name
python serve.py --model docs=adapters/docs/best code=adapters/code/best rank=adapters/cross/best --port 8000
python serve.py --model a=adapters/a/best b=adapters/b/best --lazy --max-memory 8 --api-key-file keys.txt

curl http://127.0.0.1:8000/v1/embeddings --json '{"model": "docs", "input": ["where is Kyoto"], "input_type": "query"}'

The shapes of OpenAI, Cohere (v1 and v2), Jina and Text Embeddings Inference are in docs/serving.md, and at /docs.
"""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.errors import Place, UserError

LONGEST_NAME = 100  # characters of a model's name, as in requests
COMMENT = re.compile(r"(^|\s)#.*")  # in a file of keys, which may contain the character
GB = 1 << 30


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's flags."""
    out = Parser(prog="serve.py", description="Serve embedding, late-interaction and reranking models over HTTP.")
    out.add_argument(
        "--model",
        required=True,
        nargs="+",
        action="extend",
        metavar="NAME=PATH",
        help="a model and the name by which requests choose it; PATH is an adapter folder, a base model's folder or "
        "GGUF, or a hub name; without NAME= it is the name too. A single model of a kind answers to any name",
    )
    out.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    out.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    out.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    memory = out.add_argument_group("memory")
    memory.add_argument("--lazy", action="store_true", help="load each model when a request first asks for it")
    memory.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="most memory of all models' weights, in GB of 2^30 bytes; the least recently used one makes room "
        "(default: no limit)",
    )
    server = out.add_argument_group("server")
    server.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    server.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0 = any free one (default: 8000)"
    )
    server.add_argument(
        "--api-key-file",
        type=user_path,
        metavar="FILE",
        help="file of keys, one a line, of which clients must send one; # at a line's start or after a space = comment",
    )
    server.add_argument(
        "--cors",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="let web pages of these origins, such as https://example.org, send requests; * = all (default: none)",
    )
    server.add_argument(
        "--access-log",
        type=user_path,
        metavar="FILE",
        help="append a JSON object a request to this file; - = standard error",
    )
    server.add_argument("--no-docs", action="store_true", help="do not describe the endpoints at /docs")
    return out


def read_sources(words: Sequence[str]) -> dict[str, str]:
    """Return the paths of models by their names; UserError for a name that is empty, too long or given twice."""
    sources: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        path = path if equals else name
        if not (name and path):
            raise UserError(f"--model {word}: NAME=PATH, or only a path")
        if len(name) > LONGEST_NAME or not name.isprintable():
            raise UserError(f"--model {word[:60]!r}: a name is at most {LONGEST_NAME} printable characters")
        if name in sources:
            raise UserError(f"--model: two models are called {name}; give them names, NAME=PATH")
        sources[name] = path
    return sources


def read_keys(path: str | None) -> tuple[str, ...]:
    """Return the keys of a file; UserError if it has none, or one that no header can hold."""
    if path is None:
        return ()
    keys = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8") from error
    for number, line in enumerate(lines, start=1):
        key = COMMENT.sub("", line).strip()
        if not key:
            continue
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"{Place(path, number)}: a key is plain ASCII")
        keys.append(key)
    if not keys:
        raise UserError(f"{path}: contains no key")
    return tuple(keys)


@contextlib.contextmanager
def opened_log(path: str | None) -> Iterator[TextIO | None]:
    """Give the file of the access log, if there is to be one."""
    if path in (None, "-"):
        yield sys.stderr if path else None
    else:
        with open(path, "a", encoding="utf-8") as file:
            yield file


def serve(args: argparse.Namespace) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    if args.max_memory is not None and not 0 < args.max_memory * GB < math.inf:
        raise UserError(f"--max-memory {args.max_memory:g}: above 0, and finite")
    sources, keys = read_sources(args.model), read_keys(args.api_key_file)
    from mlx_retrieval.inference.serving.app import ServerSettings
    from mlx_retrieval.inference.serving.run import run
    from mlx_retrieval.inference.serving.served_models import ServedModels, Source

    most = None if args.max_memory is None else int(args.max_memory * GB)
    models = ServedModels.open([Source(*source) for source in sources.items()], most, args.dtype)
    models.ready = args.lazy
    with opened_log(args.access_log) as log:
        settings = ServerSettings(keys=keys, docs=not args.no_docs, origins=tuple(args.cors), access_log=log)
        run(models, settings, host=args.host, port=args.port)


@command("serve.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for a user's error, 130 after Ctrl-C."""
    backend.prepare()
    args = parser().parse_args(argv)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    with contextlib.suppress(KeyboardInterrupt):  # the way to end a server: no message
        serve(args)
    return 130


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
