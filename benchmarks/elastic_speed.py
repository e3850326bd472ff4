"""Elasticsearch as a source: documents a second into batches, and the share of a training step spent waiting for data.

    pip install -r benchmarks/requirements.txt
    python tools/elasticsearch_server.py fetch
    python benchmarks/elastic_speed.py --data ../shared/data/medquad          # three minutes on 2 cores

A real server runs beside the training, on the same cores, with the rows of train.jsonl. Batches alone are drawn over
one epoch, from the server and from the file; then all-MiniLM-L6-v2 is trained on both, and `train.py --profile` says
how long a step waits. Figures in benchmarks/README.md.
"""

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import elasticsearch_server
from sides import minilm

from data_loader import Batches
from mlx_retrieval import backend
from mlx_retrieval.dataset import sources
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.training import run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

INDEX = "benchmark"
FIELDS = "query=query,document=document"


def fill(running: elasticsearch_server.Running, file: Path) -> int:
    """Put the rows of a file into the index; return their number."""
    from elasticsearch import helpers

    texts = {"query": {"type": "text"}, "document": {"type": "text"}}
    body = {"settings": {"number_of_shards": 2, "number_of_replicas": 0}, "mappings": {"properties": texts}}
    running.ask("PUT", f"/{INDEX}", body)
    client = server.Server(server.Address(running.url, INDEX)).client
    with file.open(encoding="utf-8") as lines:
        rows = ({"_index": INDEX, "_id": str(i), **json.loads(line)} for i, line in enumerate(lines))
        return helpers.bulk(client, rows, refresh=True)[0]


def drain(settings: Settings) -> float:
    """Return the documents a second that become batches of token ids, over one epoch."""
    rows = sources.open_source(settings.data, sources.ReadOptions(settings.columns))
    batches = Batches(rows, load(minilm(), max_length=settings.max_length).tokenizer, settings.batch_size)
    count = len(rows) // settings.batch_size
    began = time.perf_counter()
    for _ in batches.stream(0, count):
        pass
    return count * settings.batch_size / (time.perf_counter() - began)


def waiting(settings: Settings) -> tuple[float, float]:
    """Return (seconds of a training step, share of it spent waiting for data)."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = run.prepare(settings).measure()
    return found["step"], found["data"] / found["step"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Documents a second from Elasticsearch, and what training waits.")
    parser.add_argument("--data", default="../shared/data/medquad", help="folder with train.jsonl")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--steps", type=int, default=20, help="training steps that are measured")
    args = parser.parse_args()
    file = Path(args.data) / "train.jsonl"
    folder = Path(tempfile.mkdtemp(prefix="elasticsearch-"))
    folder.chmod(0o755)
    with elasticsearch_server.running(folder) as running, tempfile.TemporaryDirectory() as output:
        os.environ["ES_NODE"] = running.url
        count, table = fill(running, file), []
        for name, source in (("Elasticsearch", f"es://{INDEX}"), ("file", str(file))):
            settings = Settings(
                model=minilm(),
                data=[source],
                columns=FIELDS,
                batch_size=args.batch_size,
                max_length=args.max_length,
                profile=args.steps,
                eval_tasks=[],
                output=output,
            )
            speed = drain(settings)
            seconds, share = waiting(settings)
            table.append((name, f"{speed:,.0f}", f"{args.batch_size / seconds:,.0f}", f"{share:.2%}"))
    print_lines(
        [
            ("machine", f"{backend.describe()}; {time.strftime('%Y-%m-%d')}"),
            ("server", f"Elasticsearch {elasticsearch_server.VERSION}, 512 MB heap, on the same cores"),
            ("rows", f"{count:,}, two shards; batches of {args.batch_size}, {args.max_length} tokens of a text"),
        ]
    )
    print_rows("", ("source", "into batches /s", "in training /s", "step waits"), table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
