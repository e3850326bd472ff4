"""Make a model of your own from a folder of documents, without questions: read, ask, filter, train, export, index.

python adapt.py handbook --model sentence-transformers/all-MiniLM-L6-v2 --output handbook-model
python adapt.py handbook --model M --output handbook-model --budget 20m          # as much as there is time for
python adapt.py handbook --model M --output handbook-model --dry-run             # what would be read, and how long
python adapt.py handbook --model M --output handbook-model --generator mlx:Qwen/Qwen3-4B-Instruct-2507
python adapt.py handbook --model M --output handbook-model --generator http://localhost:8080    # a chat server
python adapt.py handbook --model M --output handbook-model --stages read questions              # these alone

The same command goes on where it was stopped, and does again only what new documents or other settings concern.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.adaptation.job import GUARD_TOLERANCE, TRAINED_SHARE, Adaptation, seconds_of
from mlx_retrieval.dataset import choice, chunks
from mlx_retrieval.dataset.documents.folder import MAX_FILE_SIZE
from mlx_retrieval.mining.questions import filtering, prompts, without_model
from mlx_retrieval.mining.questions.base import MOST
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import COMPILE_HELP, DEQUANTIZE_HELP, DTYPE_HELP, Parser, command

STAGES = ("read", "questions", "filter", "negatives", "train", "export", "evaluate", "index", "report")
EPILOG = (
    "Exit codes: 0 done, 2 bad input, or too few questions to train on: the folder is indexed with MODEL all the same; "
    "130 stopped by Ctrl-C. Nothing that is done is lost: the same command goes on. "
    "GENERATOR_API_KEY in the environment is the key of a chat server."
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    out = Parser(
        prog="adapt.py",
        description="Train an embedding model on questions about your own documents, and index them with it.",
        epilog=EPILOG,
    )
    flag = out.add_argument
    flag("documents", metavar="FOLDER", type=Path, help="markdown, text, reStructuredText, HTML, PDF, Word, CSV, JSON "
         "lines, source code; .gitignore is obeyed")  # fmt: skip
    flag("--model", required=True, metavar="MODEL", help="embedding model to train: folder, GGUF or hub name")
    flag("--output", required=True, metavar="DIR", type=Path, help="folder for everything that is made")

    group = out.add_argument_group("documents")
    flag = group.add_argument
    flag("--chunk-size", type=int, default=chunks.MAX_CHARACTERS, metavar="N", help="maximum characters in a chunk "
         "(default: %(default)s)")  # fmt: skip
    flag("--overlap", type=int, default=chunks.OVERLAP, metavar="N", help="characters, in whole lines, that parts of "
         "one section share at most (default: %(default)s)")  # fmt: skip
    flag("--max-file-size", type=int, default=MAX_FILE_SIZE, metavar="N", help="leave out files of more than N bytes "
         f"(default: {MAX_FILE_SIZE:,})")  # fmt: skip
    flag("--exclude", action="append", default=[], metavar="PATTERN", help="leave out matching files, in the syntax of "
         ".gitignore; repeatable")  # fmt: skip

    group = out.add_argument_group("questions")
    flag = group.add_argument
    flag("--generator", default=without_model.NAME, metavar="none|mlx:MODEL|URL", help="who writes questions: none = "
         "those in the texts, else titles, headings and parts of them serve as such; mlx:MODEL = a chat model in this "
         "process; URL = a chat server of OpenAI's shape (default: %(default)s)")  # fmt: skip
    flag("--questions", type=int, choices=range(1, MOST + 1), metavar="N", help=f"questions a chunk, 1 to {MOST} "
         "(default: 1 without a model, 2 with one)")  # fmt: skip
    flag("--styles", nargs="+", default=[], metavar="STYLE", help=f"kinds of questions to draw from: "
         f"{', '.join(prompts.STYLES)}; without a model {', '.join(without_model.STYLES)} (default: all)")  # fmt: skip
    flag("--prompt", type=Path, metavar="FILE", help="what a model is asked, with the fields {text}, {title}, "
         "{headings}, {count}, {style} (default: the toolkit's own; see docs/adapting.md)")  # fmt: skip
    flag("--found-among", type=int, default=filtering.K, metavar="N", help="keep a question if the untrained model "
         "finds its chunk among the first N (default: %(default)s, and at most a tenth of the chunks)")  # fmt: skip
    flag("--reranker", metavar="MODEL", help="let this reranker judge that, of the model's first "
         f"{filtering.CANDIDATES}")  # fmt: skip

    group = out.add_argument_group("training")
    flag = group.add_argument
    flag("--negatives", type=int, default=1, metavar="N", help="hard negatives to mine for a question; 0 = none "
         "(default: %(default)s)")  # fmt: skip
    flag("--holdout", type=float, default=choice.SHARE, metavar="X", help="share of the questions that the model is "
         f"judged on, of documents that it is not trained on; {choice.LEAST} to {choice.MOST} questions "
         "(default: %(default)s)")  # fmt: skip
    flag("--config", type=Path, metavar="FILE", help="YAML of further settings of train.py, such as learning_rate")
    flag("--hold", nargs="*", metavar="PATH", help="files of rows, as of train.py --data, and folders of source code, "
         "whose texts keep the vectors that the base model gives them, so that less is forgotten; nothing = none "
         "(default: the toolkit's own texts and code)")  # fmt: skip
    flag("--guard", nargs="*", metavar="TASK", help="evaluation folders on which the model must not get worse: as "
         "much of the base model is merged in as that takes; nothing = no guard (default: eval-data, the toolkit's "
         "own)")  # fmt: skip
    flag("--guard-tolerance", type=float, default=GUARD_TOLERANCE, metavar="X", help="nDCG@10 that each guard may "
         "lose (default: %(default)s)")  # fmt: skip
    flag("--trained-share", type=float, default=TRAINED_SHARE, metavar="X", help="share of the trained weights in the "
         "export, the rest being the base model's; less if a guard demands it (default: %(default)s)")  # fmt: skip
    flag("--eval-tasks", nargs="+", default=[], metavar="TASK", help="evaluation folders or MTEB tasks to evaluate as "
         "well, before and after")  # fmt: skip

    group = out.add_argument_group("run")
    flag = group.add_argument
    flag("--budget", type=seconds_of, metavar="TIME", help="time for everything, such as 20m or 1h30m: questions are "
         "asked about as many chunks, and as many steps are taken, as it allows (default: all)")  # fmt: skip
    flag("--dry-run", action="store_true", help="read the documents, measure this machine, and say how many questions "
         "there would be and how long it would take; nothing is written")  # fmt: skip
    flag("--stages", nargs="+", default=[], choices=STAGES, help="do these alone (default: all that are not done)")
    flag("--redo", nargs="+", default=[], choices=STAGES, help="do these again, although nothing has changed")
    flag("--seed", type=int, default=0, metavar="N", help="of everything that is drawn at random (default: 0)")
    flag("--dtype", choices=backend.DTYPES, help=DTYPE_HELP)
    flag("--compile", choices=backend.COMPILE, default="auto", help=COMPILE_HELP)
    flag("--dequantize", choices=backend.DEQUANTIZE, default="auto", help=DEQUANTIZE_HELP)
    return out


@command("adapt.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 2 for an error of the user, or 130 after Ctrl-C."""
    backend.prepare()
    args = vars(parser().parse_args(argv))
    backend.set_compile(args["compile"])
    backend.set_dequantize(args["dequantize"])
    only, redo, is_dry = (args.pop(name) for name in ("stages", "redo", "dry_run"))
    job = Adaptation(**args)
    from mlx_retrieval.adaptation import run  # loads LanceDB, which takes a second

    if is_dry:
        run.dry_run(job)
    else:
        run.run(job, only, redo)
    return 0


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
