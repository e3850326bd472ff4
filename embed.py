"""Turn texts into vectors, or check that a model is sound.

from embed import load
model = load("adapters/final")                       # an adapter on its base model, a base model, or a hub name
vectors = model.encode(texts, prompt="query")        # numpy float32 (N, D), unit length, in the texts' order

python embed.py --model adapters/final --input docs.jsonl --output vectors.npy
python embed.py --model adapters/final --input docs.jsonl --output vectors.npy --dimensions 256 --precision int8
python embed.py --model adapters/final --to es://docs --field vector          # into the index, for search.py --store
python embed.py --check adapters/final               # exit code 1 if a check fails
python embed.py --models                             # the families of models that load
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import device_errors

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.dataset import columns
from mlx_retrieval.dataset.text_files import read_text_rows
from mlx_retrieval.inference import dtypes, quantization, vector_files
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.inference.quantization import CALIBRATED, FEWEST_TEXTS, PRECISIONS
from mlx_retrieval.models import families
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command, user_path
from mlx_retrieval.utils.console import console, print_lines, wrapped
from mlx_retrieval.utils.errors import Place, UserError
from mlx_retrieval.utils.outputs import check_output
from mlx_retrieval.utils.text import quantity, shell

__all__ = ["Model", "load"]

# Attributes of the flags that have an effect on every job, and with --to.
COMPUTING = ("dtype", "compile", "dequantize")
TO_INDEX = (
    "to",
    "model",
    "adapter",
    "max_length",
    "field",
    "es_fields",
    "word_fields",
    "language",
    "overwrite",
    *COMPUTING,
)


def read_ranges(path: Path) -> np.ndarray:
    """Read (2, D) ranges that an earlier run wrote; UserError if the file is not a float array."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"--ranges {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"--ranges {path}: not an array written by numpy.save") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise UserError(f"--ranges {path}: not an array of floating-point numbers")
    return array


def check_outputs(args: argparse.Namespace, *paths: Path) -> None:
    """Raise UserError if one of the files to write is an input, or exists without --overwrite."""
    for path in paths:
        check_output(path, args.overwrite, (args.input, args.ranges, args.model, args.adapter))


def embed_file(args: argparse.Namespace) -> str:
    """Embed `--input` into `--output`; return the line that tells what was written."""
    output, ranges = Path(args.output), None
    vector_files.check_ending(output)
    calibrates = args.precision in CALIBRATED and not args.ranges
    ranges_file = output.with_name(f"{output.stem}.ranges.npy")
    check_outputs(args, output, *[ranges_file] * calibrates)
    texts = list(read_text_rows(Path(args.input), args.field))
    if not texts:
        raise UserError(f"{args.input}: contains no text")
    if args.ranges and args.precision not in CALIBRATED:
        raise UserError(f"--ranges: only for --precision {' and '.join(CALIBRATED)}, not {args.precision}")
    if calibrates and len(texts) < FEWEST_TEXTS:
        raise UserError(
            f"--precision {args.precision} takes the range of each dimension from at least {FEWEST_TEXTS} texts, and "
            f"{args.input} has {len(texts)}: pass the documents' ranges with --ranges FILE.npy (queries and documents "
            "must share them)"
        )
    if args.ranges:
        ranges = read_ranges(Path(args.ranges))
    model = load(args.model, args.adapter, args.dtype, max_length=args.max_length)
    dtypes.warn("embed.py", model)
    if model.late:
        if args.precision != "float32":
            raise UserError(f"--precision {args.precision}: the token vectors of {model.name} are written as float32")
        vector_files.check_late(output)
        check_outputs(args, *[vector_files.lengths_file(output)] * (output.suffix == ".npy"))
    dimensions = args.dimensions or model.dimensions
    quantization.check(args.precision, max(len(texts), FEWEST_TEXTS), dimensions, ranges)
    try:
        vectors = model.encode([text.text for text in texts], args.prompt, dimensions=args.dimensions)
    except NonFiniteError as error:
        raise error.placed(lambda number: str(Place(args.input, texts[number].line))) from error
    if model.late:
        vector_files.write(output, texts, vectors)
        tokens = quantity(sum(map(len, vectors)), "token vector")
        count = f"{quantity(len(texts), 'text')}, {tokens} of {model.dimensions} dimensions"
        beside = f"one text after another; {vector_files.lengths_file(output)}: the number of vectors of each text"
        return f"{output}: {count}, float32" + f", {beside}" * (output.suffix == ".npy")
    arrays, calibrated = {}, ""
    if calibrates:
        arrays[ranges_file] = ranges = quantization.ranges(vectors)
        advice = f"ranges in {ranges_file}: pass them with --ranges for queries"
        calibrated = f"; calibrated on the {quantity(len(texts), 'text')} of the input; {advice}"
    count, dimensions = vectors.shape
    vector_files.write(output, texts, quantization.quantise(vectors, args.precision, ranges), arrays)
    forms = {
        "float32": "float32, unit length" if model.config.normalize else "float32",
        "binary": "binary in int8",
        "ubinary": "binary in uint8",
    }
    form = forms.get(args.precision, args.precision)
    size = f"{quantization.row_bytes(args.precision, dimensions):,} bytes a vector"
    return f"{output}: {quantity(count, 'vector')} of {dimensions} dimensions, {form}, {size}{calibrated}"


def embed_index(args: argparse.Namespace) -> str:
    """Embed the documents of the Elasticsearch index `--to` into it; return the line that tells what was written."""
    from mlx_retrieval.retrieval.elastic_fields import BESIDES
    from mlx_retrieval.retrieval.elastic_index import write_vectors
    from mlx_retrieval.utils.progress import progress_bar

    row_fields = columns.parse(args.es_fields or columns.ELASTIC_DEFAULT, "--es-fields")
    texts = row_fields.get("document") or row_fields.get("positive")
    if not texts:
        raise UserError("--es-fields: document=FIELD+FIELD must name the fields to embed")
    words = None
    if args.word_fields is not None:
        words = {} if args.word_fields == "none" else columns.parse_keys(args.word_fields, "--word-fields", BESIDES)
    model, field = load(args.model, args.adapter, args.dtype, max_length=args.max_length), args.field or "vector"
    dtypes.warn("embed.py", model)
    with progress_bar("embedding", "documents") as progress:
        count, empty = write_vectors(model, args.to, field, texts, args.overwrite, progress, args.language, words)
    skipped = f"; skipped {quantity(empty, 'document')} without text" if empty else ""
    search = shell("python", "search.py", "search", "your question", "--store", args.to)
    written = f"{quantity(count, 'vector')} of {model.dimensions} dimensions in {field}"
    return f"{args.to}: {written}{skipped}. Next: {search}"


def parser() -> Parser:
    """Return the parser of this command's flags."""
    out = Parser(
        prog="embed.py", description="Embed the texts of a file or of an Elasticsearch index, or check a model."
    )
    out.add_argument(
        "--model",
        "--model-path",
        type=user_path,
        metavar="MODEL",
        help="adapter folder, base model's folder or GGUF, or hub name",
    )
    out.add_argument(
        "--adapter", type=user_path, metavar="DIR", help="adapter folder to load on top of the base model --model"
    )
    out.add_argument(
        "--input",
        type=user_path,
        metavar="FILE",
        help='texts: JSON lines ("text", or "title" and "text", ...), or .txt with one a line',
    )
    out.add_argument(
        "--output",
        type=user_path,
        metavar="FILE",
        help="vectors, row n for text n, in the form that the name's ending tells: .npy = the numbers alone, for "
        "numpy.load; .csv, .jsonl, .parquet = ids and texts as well",
    )
    out.add_argument(
        "--field", metavar="KEY", help="key of the text in JSON rows; with --to: field of the vectors (default: vector)"
    )
    out.add_argument(
        "--to",
        metavar="es://INDEX",
        help="instead of --input and --output: embed the documents of an Elasticsearch index that have no vector yet, "
        "and write the vectors into the index",
    )
    default = "+".join(columns.parse(columns.ELASTIC_DEFAULT)["document"])
    out.add_argument(
        "--es-fields", metavar="TEXT", help=f"with --to: the fields to embed, document=FIELD+FIELD (default: {default})"
    )
    out.add_argument(
        "--word-fields",
        metavar="TEXT",
        help="with --to: further fields that a search by words looks at, each with a weight that search.py tune "
        "learns: path=FIELD,name=FIELD+FIELD,doc=FIELD, or none (default: as before, or none)",
    )
    out.add_argument(
        "--language",
        metavar="NAME",
        help="with --to: language of the stems and stop words of a search by words, such as german, or none (default: "
        "as before, or english)",
    )
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="replace --output if it exists; with --to: the vectors of another model",
    )
    out.add_argument(
        "--prompt",
        default="document",
        metavar="NAME",
        help="query, document, or the name of another prompt that the model has (default: document)",
    )
    out.add_argument(
        "--max-length", type=int, metavar="N", help="truncate texts after N tokens (default: as the model was saved)"
    )
    out.add_argument("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    out.add_argument("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    out.add_argument("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    out.add_argument(
        "--dimensions", type=int, metavar="N", help="keep only the first N dimensions (Matryoshka; default: all)"
    )
    out.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="how to store the vectors (default: float32, 4 bytes a dimension); int8, uint8: 1 byte a dimension; "
        "binary, ubinary: 1 bit a dimension",
    )
    out.add_argument(
        "--ranges",
        type=user_path,
        metavar="FILE.npy",
        help="range of each dimension for int8 and uint8, as an earlier run wrote it (default: taken from the input, "
        f"which must have at least {FEWEST_TEXTS} texts, and written beside the output)",
    )
    out.add_argument(
        "--check",
        type=user_path,
        metavar="MODEL",
        help="embed nothing, but check whether this adapter or model is sound; exit code 1 if a check fails",
    )
    out.add_argument(
        "--models", action="store_true", help="embed nothing, but list the families of models that load, then exit"
    )
    return out


@command("embed.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a check fails, 2 for an error the user can fix."""
    backend.prepare()
    flags = parser()
    args = flags.parse_args(argv)
    backend.set_compile(args.compile)
    backend.set_dequantize(args.dequantize)
    check_flags(flags, args)
    if args.models:
        list_models()
        return 0
    if args.check is not None:
        return check_model(args.check, args.adapter, args.dtype)
    print(embed_index(args) if args.to is not None else embed_file(args))
    return 0


def check_flags(flags: Parser, args: argparse.Namespace) -> None:
    """Exit if a flag is missing, or has no effect on what is to be done."""
    needed = {"--model": args.model, "--input": args.input, "--output": args.output}
    if args.models:
        return flags.take_only(args, ("models", *COMPUTING), "--models embeds nothing")
    if args.check is not None:
        return flags.take_only(args, ("check", "adapter", *COMPUTING), "--check embeds nothing")
    if args.to is not None:
        reason = "--to reads from an index and writes to it whole vectors of documents, in float32"
        flags.take_only(args, TO_INDEX, reason)
        del needed["--input"], needed["--output"]
    else:
        only = ("es_fields", "word_fields", "language")
        flags.take_none(args, only, "--es-fields, --word-fields and --language are for --to")
    if missing := [name for name, value in needed.items() if value is None]:
        flags.error(f"the following arguments are required: {', '.join(missing)} (or only --check MODEL)")


def list_models() -> None:
    """Print which families of models load: the table of models/families.py."""
    for _, line in wrapped([("", families.INTRODUCTION)]):
        console().print(line)
    for family in families.FAMILIES:
        console().print(f"\n{family.title}", style="bold")
        print_lines(wrapped(families.describe(family)))


def check_model(path: str, adapter: str | None, dtype: str | None = None) -> int:
    """Print the findings of every check and a verdict; return 1 if a check fails, else 0."""
    import data_loader
    from mlx_retrieval.inference import checks

    findings = checks.check(path, data_loader.make_batch, adapter, dtype)
    if failed := checks.report(path, findings):
        print(f"embed.py: FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
