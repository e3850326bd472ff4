"""Turn texts into vectors, and find out whether a model is sound.

from embed import load
model = load("adapters/final")                       # an adapter on its base, a base model, or a hub name
vectors = model.encode(texts, prompt="query")        # numpy float32 (N, D), unit length, in the texts' order

python embed.py --model adapters/final --input docs.jsonl --output vectors.npy
python embed.py --model adapters/final --input docs.jsonl --output vectors.npy --dimensions 256 --precision int8
python embed.py --model adapters/final --to es://docs --field vector          # into the index, for search.py --store
python embed.py --check adapters/final               # exit code 1 where a check fails
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.utils.errors import UserError

__all__ = ["Model", "load"]

import numpy as np

from mlx_retrieval.dataset.text_files import read_texts
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.inference.quantization import (
    CALIBRATED,
    FEWEST_TEXTS,
    PRECISIONS,
    check,
    quantise,
    row_bytes,
)
from mlx_retrieval.inference.quantization import ranges as ranges_of


def read_ranges(path: Path) -> np.ndarray:
    """The ranges that an earlier run wrote; UserError where the file holds no such array."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--ranges {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--ranges {path}: no array that numpy.save wrote") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise UserError(f"--ranges {path}: no array of floating-point numbers")
    return array


def write_arrays(arrays: dict[Path, np.ndarray]) -> None:
    """Write .npy files, all or none: first beside their places, then moved there."""
    temporary = {path: path.with_name(f".{path.name}.new") for path in arrays}
    path = None
    try:
        for path, array in arrays.items():
            with open(temporary[path], "wb") as file:
                np.save(file, array)
        for path in arrays:
            temporary[path].replace(path)
    except OSError as error:
        for leftover in temporary.values():
            leftover.unlink(missing_ok=True)
        raise UserError(f"--output {path}: {error.strerror}") from error


def embed_file(args: argparse.Namespace) -> str:
    """Embed `--input` into `--output`; returns the line that says what was written."""
    texts, bounds, output = list(read_texts(Path(args.input), args.field)), None, Path(args.output)
    if not texts:
        raise UserError(f"{args.input}: no text in it")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output}: not a file in a folder that exists")
    if args.ranges and args.precision not in CALIBRATED:
        raise UserError(f"--ranges: --precision {args.precision} has none, only {' and '.join(CALIBRATED)}")
    calibrates = args.precision in CALIBRATED and not args.ranges
    if calibrates and len(texts) < FEWEST_TEXTS:
        raise UserError(
            f"--precision {args.precision} takes the ranges of each dimension from at least {FEWEST_TEXTS} texts, and "
            f"{args.input} has {len(texts)}: give those of the documents with --ranges FILE.npy (queries and documents "
            "must share them)"
        )
    if args.ranges:
        bounds = read_ranges(Path(args.ranges))
    model = load(args.model, args.adapter, max_length=args.max_length)
    check(args.precision, max(len(texts), FEWEST_TEXTS), args.dimensions or model.dimensions, bounds)
    vectors = model.encode(texts, args.prompt, dimensions=args.dimensions)
    if model.late:
        beside = output.with_name(f"{output.stem}.lengths.npy")
        write_arrays({output: np.concatenate(vectors), beside: np.array([len(v) for v in vectors])})
        count = f"{len(texts):,} texts, {sum(map(len, vectors)):,} token vectors of {model.dimensions} dimensions"
        return f"{output}: {count}, float32, one text after another; {beside}: how many each text has"
    arrays, calibrated = {}, ""
    if calibrates:
        beside = output.with_name(f"{output.stem}.ranges.npy")
        arrays[beside] = bounds = ranges_of(vectors)
        told = f"ranges in {beside}: give them with --ranges for queries"
        calibrated = f"; calibrated on the {len(texts):,} texts of the input; {told}"
    count, dimensions = vectors.shape
    write_arrays(arrays | {output: quantise(vectors, args.precision, bounds)})
    kinds = {
        "float32": "float32, unit length" if model.config.normalize else "float32",
        "binary": "binary in int8",
        "ubinary": "binary in uint8",
    }
    kind = kinds.get(args.precision, args.precision)
    size = f"{row_bytes(args.precision, dimensions):,} bytes a vector"
    return f"{output}: {count:,} vectors of {dimensions} dimensions, {kind}, {size}{calibrated}"


def embed_index(args: argparse.Namespace) -> str:
    """Embed the documents of the Elasticsearch index `--to`, and write the vectors there; returns what to tell."""
    from mlx_retrieval.dataset.elastic import fields
    from mlx_retrieval.retrieval.elastic_index import write_vectors
    from mlx_retrieval.utils.progress import progress_bar

    made_of = fields.parse(args.es_fields or fields.DEFAULT)
    texts = made_of.get("document") or made_of.get("positive")
    if not texts:
        raise UserError("--es-fields: document=FIELD+FIELD names what is embedded")
    model, field = load(args.model, args.adapter, max_length=args.max_length), args.field or "vector"
    with progress_bar("embedding", "documents") as progress:
        done, empty = write_vectors(model, args.to, field, texts, args.overwrite, progress)
    left = f"; {empty:,} without text were left out" if empty else ""
    search = f'python search.py search "..." --store {args.to}'
    return f"{args.to}: {done:,} vectors of {model.dimensions} dimensions in {field}{left}. Next: {search}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Embed the texts of a file, or check a model.")
    parser.add_argument("--model", help="adapter folder, base model's folder, or hub name")
    parser.add_argument("--adapter", help="adapter folder to put on the base model --model")
    parser.add_argument("--input", help="JSON lines (text, or title and text, ...) or .txt, one a line")
    parser.add_argument("--output", help="file for numpy.load; row n belongs to text n")
    parser.add_argument("--field", help="key of the text in JSON rows; with --to, of the vectors (default: vector)")
    to = "embed an Elasticsearch index's documents instead, those without a vector, and write the vectors there"
    parser.add_argument("--to", metavar="es://INDEX", help=to)
    made_of = "with --to: document=FIELD+FIELD says what is embedded (default: title+snippet)"
    parser.add_argument("--es-fields", metavar="TEXT", help=made_of)
    parser.add_argument("--overwrite", action="store_true", help="with --to: replace another model's vectors")
    prompt = "query, document, or the name of another prompt that the model has (default: document)"
    parser.add_argument("--prompt", default="document", metavar="NAME", help=prompt)
    parser.add_argument("--max-length", type=int, metavar="N", help="cut texts after N tokens")
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep the first N dimensions (Matryoshka)")
    precision = "store vectors so (default: float32); int8 and uint8: a byte a dimension, binary and ubinary: a bit"
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help=precision)
    ranges = (
        "ranges of the dimensions for int8 and uint8, as an earlier run wrote them; without it, they are taken from "
        f"the input (at least {FEWEST_TEXTS} texts) and written beside the output"
    )
    parser.add_argument("--ranges", metavar="FILE.npy", help=ranges)
    sound = "embed nothing, but say whether this adapter or model is sound; exit code 1 names the checks that fail"
    parser.add_argument("--check", metavar="DIR", help=sound)
    args = parser.parse_args(argv)
    needed = {"--model": args.model, "--input": args.input, "--output": args.output}
    if args.to is not None:
        if args.input is not None or args.output is not None:
            parser.error("--to reads an index and writes into it: leave out --input and --output")
        needed = {"--model": args.model}
    if args.check is not None:
        if given := [name for name, value in needed.items() if value is not None]:
            parser.error(f"--check DIR embeds nothing: leave out {', '.join(given)}")
    elif missing := [name for name, value in needed.items() if value is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --check DIR alone)")
    try:
        if args.check is not None:
            return check_model(args.check, args.adapter)
        print(embed_index(args) if args.to is not None else embed_file(args))
    except UserError as error:
        print(f"embed.py: {error}", file=sys.stderr)
        return 2
    return 0


def check_model(path: str, adapter: str | None) -> int:
    """Print what doctor.py finds; 1 where a check fails."""
    from mlx_retrieval.inference import checks

    findings = checks.check(path, adapter)
    checks.print_findings(path, findings)
    if failed := [finding.name for finding in findings if finding.passed is False]:
        print(f"embed.py: FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
