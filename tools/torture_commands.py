"""The commands that torture.py runs, what each reads and writes, and how its result is read back.

A command's line has {slots}: inputs, which are copied into the case's folder and may be damaged there, and {out}, where
it is to write. `result` returns what the command computed, in a form that two runs can be compared by, and raises
ValueError if that is missing, incomplete or not finite: then exit code 0 was a lie.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VECTOR_COLUMN = re.compile(r"v\d+")
SMALL_RUN = "--steps 3 --batch-size 4 --lora-rank 2 --learning-rate 1e-3 --seed 5 --output {out}"


def vectors(out: Path, printed: str) -> list:
    """Return the vectors of a file that embed.py wrote, by the ending of its name, float (N, D)."""
    if out.suffix == ".npy":
        array = np.load(out, allow_pickle=False)
    elif out.suffix == ".parquet":
        import pyarrow.parquet as parquet

        table = parquet.read_table(out)
        array = np.array(table.column(table.column_names.index("vector")).to_pylist())
    elif out.suffix == ".jsonl":
        array = np.array([json.loads(line)["vector"] for line in out.read_text("utf-8").splitlines()])
    else:
        with open(out, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        array = np.array([[float(row[name]) for name in row if VECTOR_COLUMN.fullmatch(name)] for row in rows])
    if array.ndim != 2 or not np.isfinite(array).all():
        raise ValueError(f"{out.name}: shape {array.shape}, finite: {bool(np.isfinite(array).all())}")
    return array.round(5).tolist()


def count_texts(path: Path) -> int:
    """Return the number of texts of a file: lines of .txt, blank ones too, or JSON lines that are not blank."""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return len(lines) if path.suffix == ".txt" else sum(bool(line.strip()) for line in lines)


def weights(out: Path, printed: str) -> object:
    """Return a digest of every tensor below a folder, by its file and name."""
    from safetensors.numpy import load_file

    folder = out / "final" if (out / "config.yaml").exists() else out  # a run is done when it has that folder
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder.name}: no weights in it")
    digests = {}
    for file in files:
        for name, array in load_file(file).items():
            if not np.isfinite(array.astype(np.float32)).all():
                raise ValueError(f"{file.name}: {name} is not finite")
            digests[f"{file.name} {name}"] = hashlib.sha256(array.tobytes()).hexdigest()
    return digests


def figures(out: Path, printed: str) -> object:
    """Return the figures of a JSON file of results: every number in it, by its place, times left out."""
    found: dict[str, float] = {}

    def walk(value: object, place: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{place}/{key}")
        elif isinstance(value, list):
            for i, item in enumerate(value):
                walk(item, f"{place}/{i}")
        elif isinstance(value, float) and not {"seconds", "time"} & set(place.replace("_", "/").split("/")):
            if not math.isfinite(value):
                raise ValueError(f"{place} is {value}")
            found[place] = round(value, 6)

    walk(json.loads(out.read_text("utf-8")), "")
    if not found:
        raise ValueError(f"{out.name}: no figures in it")
    return found


def rows(out: Path, printed: str) -> object:
    """Return the rows of a file of JSON lines, the paths of mined files cut to their names."""
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    if not lines:
        raise ValueError(f"{out.name}: no rows")
    return [json.dumps(row, sort_keys=True) for row in lines]


def ranking(out: Path, printed: str) -> object:
    """Return what `rerank.py --json` printed: a document's number and score a line."""
    lines = [json.loads(line) for line in printed.splitlines()]
    scores = [row["score"] for row in lines]
    if not lines or not np.isfinite(scores).all() or scores != sorted(scores, reverse=True):
        raise ValueError("no ranking was printed")
    return [(row["index"], round(row["score"], 5)) for row in lines]


def hits(out: Path, printed: str) -> object:
    """Return what `search.py search --json` printed: path, line and score of each hit."""
    results = json.loads(printed)["results"]
    if not results:
        raise ValueError("nothing was printed")
    return [(hit["path"], hit["line"], round(hit["score"], 5)) for hit in results]


def lines(out: Path, printed: str) -> object:
    """Return the lines that were printed, without those that give a time or a place."""
    if not printed.strip():
        raise ValueError("nothing was printed")
    return [line for line in printed.splitlines() if "second" not in line and "/" not in line]


def index(out: Path, printed: str) -> object:
    """Return the number of chunks of an index, by its table."""
    import lancedb

    tables = lancedb.connect(str(out))
    names = tables.table_names()
    if not names:
        raise ValueError("no table in the index")
    return {name: tables.open_table(name).count_rows() for name in names}


def adaptation(out: Path, printed: str) -> object:
    """Return what an adaptation was trained on, a digest of what training made of it, and the size of its index."""
    if not (out / "report.html").read_text("utf-8").rstrip().endswith("</html>"):
        raise ValueError("report.html: not complete")
    trained = [json.loads(line) for line in (out / "mined.jsonl").read_text("utf-8").splitlines()]
    texts = [(row["query"], row["positive"], row["negatives"]) for row in trained]  # not the source, which is a path
    return texts, weights(out / "run", printed), index(out / "index", printed)


@dataclass(frozen=True)
class Command:
    """A command line, its inputs by slot, the name of its output, and how its result is read.

    inputs: slot -> (path below the folder of inputs, kind). kind: rows, texts, plain, chat, beir, sources, queries,
    index, yaml: data; embed, rerank, decoder, adapter: models; run: a stopped run, which the command changes.
    output: name of the file or folder that it writes at {out}; "" = none.
    options: flags that take a number. reads: the slot that `result` is given.
    """

    name: str
    line: str
    inputs: dict[str, tuple[str, str]]
    result: Callable[[Path, str], object]
    output: str = ""
    options: tuple[str, ...] = ("--max-length",)
    reads: str = "out"

    @property
    def script(self) -> str:
        return self.line.split()[0]


ROWS = ("rows.jsonl", "rows")
EVAL = ("eval", "beir")
BERT = ("bert", "embed")
CROSS = ("cross", "rerank")
DOCUMENTS = ("documents.jsonl", "texts")
TRAINING = ("--steps", "--batch-size", "--learning-rate", "--max-length")
COMMANDS = (
    Command("train embed", f"train.py --model {{model}} --data {{rows}} --eval-tasks {{eval}} {SMALL_RUN}",
            {"model": BERT, "rows": ROWS, "eval": EVAL}, weights, "run", TRAINING),
    Command("train late", f"train.py --task late --model {{model}} --data {{rows}} --eval-tasks {{eval}} {SMALL_RUN}",
            {"model": BERT, "rows": ROWS, "eval": EVAL}, weights, "run", TRAINING),
    Command("train rerank", "train.py --task rerank --model {model} --data {rows} --eval-tasks {eval} --rerank-depth 5 "
            f"{SMALL_RUN}",
            {"model": CROSS, "rows": ("negatives.jsonl", "rows"), "eval": EVAL}, weights, "run", TRAINING),
    Command("train chat", f"train.py --task chat --model {{model}} --data {{chat}} --mask-prompt {SMALL_RUN}",
            {"model": ("llama", "decoder"), "chat": ("chat", "chat")}, weights, "run", ("--steps", "--batch-size")),
    Command("train --config", "train.py --config {settings} --model {model} --data {rows} --eval-tasks --output {out}",
            {"model": BERT, "rows": ROWS, "settings": ("settings.yaml", "yaml")}, weights, "run", TRAINING),
    Command("train --resume", "train.py --resume --output {run}", {"run": ("prepared/stopped", "run")}, weights, "", (),
            "run"),
    Command("eval embed", "eval.py --model {model} --eval-tasks {eval} --output {out}",
            {"model": BERT, "eval": EVAL}, figures, "figures.json"),
    Command("eval late", "eval.py --model {model} --eval-tasks {eval} --output {out}",
            {"model": ("prepared/late/final", "adapter"), "eval": EVAL}, figures,
            "figures.json"),
    Command("eval rerank", "eval.py --task rerank --model {model} --depth 4 --eval-tasks {eval} --output {out}",
            {"model": CROSS, "eval": EVAL}, figures, "figures.json", ("--max-length", "--depth")),
    Command("embed .npy", "embed.py --model {model} --input {texts} --output {out}",
            {"model": BERT, "texts": DOCUMENTS}, vectors, "vectors.npy", ("--max-length", "--dimensions")),
    Command("embed .csv", "embed.py --model {model} --input {texts} --output {out}",
            {"model": ("prepared/embed/final", "adapter"), "texts": ("plain.txt", "plain")}, vectors, "vectors.csv",
            ("--max-length", "--dimensions")),
    Command("embed .jsonl", "embed.py --model {model} --input {texts} --output {out}",
            {"model": BERT, "texts": ("plain.txt", "plain")}, vectors, "vectors.jsonl"),
    Command("embed .parquet", "embed.py --model {model} --input {texts} --output {out}",
            {"model": BERT, "texts": DOCUMENTS}, vectors, "vectors.parquet"),
    Command("embed --check", "embed.py --check {model}", {"model": BERT}, lines, "", ()),
    Command("rerank", "rerank.py --model {model} --query {query} --documents {texts}",
            {"model": CROSS, "texts": DOCUMENTS}, lines, "", ("--max-length", "--top")),
    Command("rerank --json", "rerank.py --model {model} --query {query} --documents {texts} --json",
            {"model": CROSS, "texts": DOCUMENTS}, ranking, "", ("--max-length", "--top")),
    Command("search index", "search.py index {sources} --model-path {model} --index {out}",
            {"model": BERT, "sources": ("sources", "sources")}, index, "index", ("--chunk-size", "--overlap")),
    Command("search search", "search.py search {query} --index {index} --model-path {model} --json",
            {"model": BERT, "index": ("prepared/index", "index")}, hits, "", ("--top", "--weight")),
    Command("search eval", "search.py eval {queries} --index {index} --model-path {model} --output {out}",
            {"model": BERT, "index": ("prepared/index", "index"), "queries": ("queries.jsonl", "queries")}, figures,
            "figures.json", ("--weight",)),
    Command("mine code", "mine.py code {sources} --output {out}", {"sources": ("sources", "sources")}, rows,
            "mined.jsonl", ("--min-lines", "--max-lines")),
    Command("mine negatives", "mine.py negatives --data {rows} --corpus {texts} --output {out}",
            {"rows": ROWS, "texts": DOCUMENTS}, rows, "mined.jsonl", ("--take", "--skip")),
    Command("mine negatives by model",
            "mine.py negatives --data {rows} --model {model} --relative-margin off --output {out}",
            {"rows": ROWS, "model": BERT}, rows, "mined.jsonl", ("--take", "--range-max")),
    Command("mine score", "mine.py score --data {rows} --teacher {model} --output {out}",
            {"rows": ("negatives.jsonl", "rows"), "model": CROSS}, rows, "scored.jsonl"),
    Command("adapt", "adapt.py {documents} --model {model} --config {settings} --chunk-size 400 --questions 4 "
            "--found-among 100 --hold --guard --output {out}",
            {"documents": ("sources", "sources"), "model": BERT, "settings": ("settings.yaml", "yaml")}, adaptation,
            "adapted", ("--chunk-size", "--overlap", "--found-among", "--negatives")),
    Command("export embed", "export.py --adapter {adapter} --model {model} --output {out} --skip-library-check",
            {"adapter": ("prepared/embed/final", "adapter"), "model": BERT}, weights, "exported", ()),
    Command("export rerank", "export.py --adapter {adapter} --model {model} --output {out} --skip-library-check",
            {"adapter": ("prepared/rerank/final", "adapter"), "model": CROSS}, weights, "exported", ()),
)  # fmt: skip


# What the commands above need and a command has to make first, below the folder of inputs: name -> command line.
PREPARED = {
    "embed": "train.py --model {inputs}/bert --data {inputs}/rows.jsonl --eval-tasks --steps 3 --batch-size 4 "
    "--lora-rank 2 --output {out}",
    "late": "train.py --task late --model {inputs}/bert --data {inputs}/rows.jsonl --eval-tasks --steps 3 "
    "--batch-size 4 --lora-rank 2 --output {out}",
    "rerank": "train.py --task rerank --model {inputs}/cross --data {inputs}/negatives.jsonl --eval-tasks --steps 3 "
    "--batch-size 4 --lora-rank 2 --output {out}",
    "stopped": "train.py --model {inputs}/bert --data {inputs}/rows.jsonl --eval-tasks --steps 4 --batch-size 4 "
    "--lora-rank 2 --save-steps 1 --stop-after 2 --output {out}",
    "index": "search.py index {inputs}/sources --model-path {inputs}/bert --index {out}",
}
QUERIES = [
    {"query": "computes the area of a circle", "path": "area.rs"},
    {"query": "puts an item at the end of the queue", "path": "queue.go"},
    {"query": "joins words with a separator", "path": "Text.java"},
]
SETTINGS = "steps: 3\nbatch-size: 4\nlora-rank: 2\n"
