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
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import backend
from backend import UserError

import numpy as np

from batching import Texts, micro_batches
from heads import RetrievalModel
from passes import Passes
from precision import CALIBRATED, FEWEST_TEXTS, PRECISIONS, check, quantise, row_bytes, truncate
from precision import ranges as ranges_of
from retrieval_config import RetrievalConfig
from tokens import TextTokenizer

CHUNK = 16_384  # texts that are tokenised and sorted by length together
TEXT_FIELDS = ("text", "document", "query", "positive")


class Model:
    """A retrieval model in use. Made by `load`; training makes one of the model it trains.

    `base` is the folder of the model that an adapter was loaded on; None where there is no adapter.
    """

    def __init__(
        self,
        model: RetrievalModel,
        config: RetrievalConfig,
        tokenizer: TextTokenizer,
        name: str,
        base: Path | None = None,
    ):
        self.model, self.config, self.tokenizer, self.name, self.base = model, config, tokenizer, name, base
        self.passes = Passes(model)

    @property
    def late(self) -> bool:
        """Whether a text becomes a vector a token."""
        return self.config.task == "late"

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.config.dimensions

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        show_progress: bool | None = None,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> np.ndarray | list[np.ndarray]:
        """Vectors of unit length, float32: (N, D) for a list, in its order; (D,) for one text.

        Models that compare by plain dot products, as their files say, give vectors of any length.
        A late-interaction model gives the vectors of a text's tokens instead: for a list, a list of (L_i, D).
        Stored in another precision they are int8 or uint8, (N, D), or (N, ceil(D / 8)) for "binary" and "ubinary".

        Args:
            texts: anything from an empty list up.
            prompt: "query", "document" or the name of a task's prompt puts that prompt of the model before each text;
                None puts none.
            show_progress: None = a bar for more than 2,000 texts, where standard error is a terminal.
            dimensions: keep only the first so many (Matryoshka), scaled to unit length again.
            batch_tokens: most tokens, padding included, in the backbone at once; None = what suits the device.
            precision: "float32", "int8", "uint8", "binary" or "ubinary", after truncation; see precision.py.
            ranges: (2, D) of each dimension, for int8 and uint8; queries and documents must share them. None takes
                them from these very texts, of which there must be 100: `precision.ranges(model.encode(sample))`.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, False, dimensions, batch_tokens, precision, ranges)[0]
        if prompt is not None and prompt not in self.config.prompts:
            raise UserError(f"prompt {prompt!r} is unknown; known: {', '.join(self.config.prompts)}")
        if dimensions is not None and not 0 < dimensions <= self.dimensions:
            raise UserError(f"dimensions {dimensions}: the model has {self.dimensions}")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a text")
        if self.late and (dimensions is not None or precision != "float32"):
            raise UserError("token vectors of a late-interaction model are whole and float32")
        check(precision, len(texts), dimensions or self.dimensions, ranges)
        if show_progress is None:
            show_progress = len(texts) > 2_000 and sys.stderr.isatty()
        whole = [None] * len(texts) if self.late else np.empty((len(texts), self.dimensions), np.float32)
        self.model.eval()
        with _bar(len(texts), show_progress) as advance:
            for first in range(0, len(texts), CHUNK):
                tokens = self.tokenizer(texts[first : first + CHUNK], prompt)
                budget = batch_tokens or backend.MICRO_BATCH_TOKENS
                cut = list(micro_batches(tokens, budget, self.tokenizer.pad_id))
                parts = self.passes.representations([rows for _, rows in cut])
                for (index, _), part in zip(cut, parts, strict=True):
                    if self.late:
                        for i, vectors in zip(
                            index, self._counting(np.array(part), tokens, index, prompt), strict=True
                        ):
                            whole[first + i] = vectors
                    else:
                        whole[first + index] = np.array(part)
                    advance(len(index))
        if self.late:
            return whole
        vectors = truncate(whole, dimensions, self.config.normalize)
        return vectors if precision == "float32" else quantise(vectors, precision, ranges)

    def _counting(self, part: np.ndarray, texts: Texts, index: np.ndarray, prompt: str | None) -> list[np.ndarray]:
        """The vectors of the tokens that count: of every one of these texts, (L_i, D)."""
        counts = part.any(axis=-1)
        if prompt == "document" and self.config.skiplist:
            counts &= texts.without(self.tokenizer.ids_of(self.config.skiplist), part.shape[1])[index]
        return [row[kept] for row, kept in zip(part, counts, strict=True)]


class _bar:  # noqa: N801  (used as a function)
    """A progress bar on standard error, or nothing."""

    def __init__(self, total: int, show: bool):
        self.total, self.show = total, show

    def __enter__(self):
        if not self.show:
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("embedding", BarColumn(), MofNCompleteColumn(), "texts", TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.progress.start()
        task = self.progress.add_task("", total=self.total)
        return lambda count: self.progress.advance(task, count)

    def __exit__(self, *_):
        if self.show:
            self.progress.stop()


def load(path: str | Path, adapter: str | Path | None = None, **overrides) -> Model:
    """Load a model for use.

    Args:
        path: an adapter folder (its base is found by itself), a base model's folder, or a hub name.
        adapter: an adapter folder to put on the base model `path`.
        overrides: settings that win over what is saved, for instance max_length, pooling, query_prompt.

    Raises UserError where anything is missing or does not fit.
    """
    import checkpoint

    base: str | None = str(path)
    if adapter is None and checkpoint.is_adapter(Path(path).expanduser()):
        base, adapter = None, path
    name = str(adapter or base).rstrip("/")
    model, config, folder = checkpoint.open_model(base, str(adapter) if adapter else None, **overrides)
    return Model(model, config, config.tokenizer(folder), name, folder if adapter else None)


def read_texts(path: Path, field: str | None = None) -> Iterator[str]:
    """Texts of a .txt file (one a line) or of JSON lines (`field`; default: title and text, or the first known)."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\n")
                if path.suffix == ".txt":
                    yield line
                elif line.strip():
                    yield _field_of(line, field, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def _field_of(line: str, field: str | None, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at character {error.pos + 1})") from error
    if isinstance(row, str):
        return row
    name = field or next((name for name in TEXT_FIELDS if name in row), None)
    if not isinstance(row, dict) or name is None or not isinstance(row.get(name), str):
        raise UserError(f"{where}: no text under {field or ' or '.join(TEXT_FIELDS)} (--field names another key)")
    title = row.get("title") if field is None else None
    return f"{title} {row[name]}" if title else row[name]


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
    from config import Settings
    from elastic import fields
    from elastic.index import write_vectors
    from work_folder import progress_bar

    made_of = fields.parse(args.es_fields or Settings().es_fields)
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
    import doctor

    findings = doctor.check(path, adapter)
    doctor.print_findings(path, findings)
    if failed := [finding.name for finding in findings if finding.passed is False]:
        print(f"embed.py: FAILED: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
