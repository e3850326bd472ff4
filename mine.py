"""Mine training data from what is at hand.

python mine.py code src --output pairs.jsonl                           # (docstring, code) pairs of a source tree
python mine.py code a/src b/lib --output pairs.jsonl --languages python rust
python mine.py negatives --data pairs.jsonl --corpus corpus.jsonl --model M --output mined.jsonl      # hard negatives
python mine.py score --data mined.jsonl --teacher MODEL --output scored.jsonl         # a teacher's scores of all those
python train.py --data mined.jsonl

In Python: `code_pairs.pairs`, `negatives.mine`, `teacher.Teacher`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.dataset.source_code.languages import BY_SUFFIX, LANGUAGES
from mlx_retrieval.mining import code_pairs, negatives_command, teacher
from mlx_retrieval.mining import output as mining_output
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.console import print_lines, print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar


def mine_code(args: argparse.Namespace) -> None:
    """Write the pairs of `args.paths` to `args.output`, all or nothing, and print what was counted."""
    output = Path(args.output).expanduser()
    mining_output.check_output(output, args.overwrite)
    if not 0 < args.min_lines <= args.max_lines:
        raise UserError(f"--min-lines {args.min_lines} --max-lines {args.max_lines}: needs 0 < min <= max")
    rules = code_pairs.Rules(args.languages, args.min_lines, args.max_lines, args.include_tests, args.keep_duplicates)
    counts = code_pairs.Counts()
    draft = output.with_name(f".{output.name}.new")
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as file, progress_bar() as progress:
            for pair in code_pairs.pairs(args.paths, rules, counts, progress):
                file.write(json.dumps(pair._asdict(), ensure_ascii=False) + "\n")
        print_counts(counts)
        if not counts.pairs:
            raise UserError(f"{' '.join(args.paths)}: no pair found in {counts.files.total()} source files")
        draft.replace(output)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
    print_lines(
        [
            ("written", f"{output} ({counts.pairs.total():,} pairs)"),
            ("next", f"python train.py --data {output} --output adapters/code"),
        ]
    )


def print_counts(counts: code_pairs.Counts) -> None:
    """Two tables: by language, and by the reason of what was left out."""
    columns = (counts.files, counts.definitions, counts.pairs)
    rows = [[name, *(f"{column[name]:,}" for column in columns)] for name in LANGUAGES if counts.files[name]]
    if len(rows) > 1:
        rows.append(["all", *(f"{column.total():,}" for column in columns)])
    print_rows("Mined", ("language", "files", "definitions", "pairs"), rows)
    rows = []
    for reasons, left_out, unit in (
        (code_pairs.FILE_REASONS, counts.left_out_files, "files"),
        (code_pairs.REASONS, counts.left_out, "definitions"),
    ):
        for reason, meaning in reasons.items():
            if left_out[reason]:
                of = "folders" if reason.startswith("folder") else unit
                rows.append(
                    [f"{reason}: {meaning}", f"{left_out[reason]:,} {of.removesuffix('s' * (left_out[reason] == 1))}"]
                )
    if rows:
        print_rows("Left out", ("reason", "count"), rows)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Mine training data. `mine.py COMMAND --help` tells the rules.")
    commands = parser.add_subparsers(required=True, metavar="command")
    reasons = [f"  {name}: {text}" for name, text in (code_pairs.FILE_REASONS | code_pairs.REASONS).items()]
    suffixes = {name: [s for s, language in BY_SUFFIX.items() if language.name == name] for name in LANGUAGES}
    code = commands.add_parser(
        "code",
        help="(docstring, function or class) pairs from source trees",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write (docstring, code) pairs of source trees as rows that train.py reads. The query is the\n"
        "docstring, or else the comment directly above, up to its first section (parameters, returns,\n"
        "examples, ...), 600 characters at most unless the first paragraph is longer. The positive is the\n"
        "function or class without its docstring and those of the functions and classes inside it.",
        epilog="left out are:\n"
        + "\n".join(reasons)
        + "\n\nlanguages:\n"
        + "\n".join(f"  {name}: {' '.join(endings)}" for name, endings in suffixes.items()),
    )
    code.add_argument("paths", nargs="+", metavar="PATH", help="folders and files; rules look only at what is below")
    code.add_argument(
        "--output", required=True, metavar="FILE", help="JSON lines: query, positive, path, line, name, ..."
    )
    code.add_argument("--overwrite", action="store_true", help="replace --output where it exists")
    code.add_argument(
        "--languages", nargs="+", choices=LANGUAGES, default=(), metavar="NAME", help="only these (default: all)"
    )
    code.add_argument(
        "--min-lines", type=int, default=2, metavar="N", help="fewest lines of code (default: %(default)s)"
    )
    code.add_argument(
        "--max-lines", type=int, default=150, metavar="N", help="most lines of code (default: %(default)s)"
    )
    code.add_argument("--include-tests", action="store_true", help="mine tests, too")
    code.add_argument("--keep-duplicates", action="store_true", help="keep duplicates, near duplicates, same queries")
    code.set_defaults(run=mine_code)
    negatives_command.add_command(commands)
    teacher.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    backend.prepare()
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except (UserError, FloatingPointError) as error:
        print(f"mine.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
