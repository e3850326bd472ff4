"""Export a trained model as a folder that other libraries load.

python export.py --adapter adapters/best --output my-model                      # for sentence-transformers
python export.py --adapter adapters/best --output my-model-4bit --format mlx --quantize 4
python export.py --adapter adapters/best --output my-model --merge-with-base auto     # keeps more of the base model
python export.py --adapter a/best --merge-with b/best c/best --output my-model        # the mean of three trained models
python export.py --adapter adapters/best --output my-model --gguf-ready         # and prints llama.cpp's next command
python export.py --model tuned --keep-layers 0 2 4 --output student             # to be trained by tuned's vectors
python export.py --model intfloat/e5-small-v2 --output e5-8bit --format mlx --quantize 8      # an untrained base model
python export.py --model Qwen/Qwen3-Reranker-0.6B --task rerank --output r --format mlx --quantize 4
python export.py --adapter adapters/chat/final --output my-chat                  # a chat model, for mlx-lm

from export import Export, export
export(Export(adapter="adapters/best", output="my-model"))                      # the same from Python

The adapter is merged into the weights. Every exported folder of a retrieval model also holds retrieval_config.json, so
`embed.py`, `rerank.py`, `eval.py` and `train.py` take it as --model. A folder appears under its name only after its
vectors, a reranker's scores, or a chat model's logits, were compared with those of the original model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.exporters.job import DTYPES, FORMATS, TASKS, Export, check_output, share_of
from mlx_retrieval.exporters.limits import MISSED
from mlx_retrieval.exporters.soup import METHODS
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import Parser, command
from mlx_retrieval.utils.text import shell

__all__ = ["Export", "export"]


def export(job: Export) -> Path:
    """Write and check the folder that `job` describes, print a table of what was done, and return the folder.

    Quantised weights that miss their limit are a line of the table, and a warning on standard error. A UserError leaves
    nothing behind, and a folder that was there before as it was.
    """
    return _export(job)[0]


def _export(job: Export) -> tuple[Path, list[str]]:
    """Return the folder that `export` returns, and its warnings."""
    from mlx_retrieval.backbones import resolve
    from mlx_retrieval.models import kinds, loading
    from mlx_retrieval.utils import files
    from mlx_retrieval.utils.console import print_lines
    from mlx_retrieval.utils.errors import UserError

    output = Path(job.output).expanduser()
    sources = [Path(name).expanduser() for name in (job.adapter, *job.merge_with) if name]
    if job.model:
        sources.append(resolve(job.model))
    check_output(output, job.overwrite, sources)
    if job.is_chat:
        from mlx_retrieval.exporters.chat import ChatWriter

        writer = ChatWriter(job)
        name, base, commands = writer.base_model, writer.base, [writer.next_command]
    else:
        task = {"task": job.task} if job.task else {}
        if job.task:
            wanted = kinds.RERANKING if job.task == "rerank" else kinds.EMBEDDING
            kinds.require(wanted, job.model, job.adapter, job.task)
        # Merged in float32, whatever the adapter was trained in; an export asks for no dtype but that of its weights.
        model, config, base = loading.open_model(job.model, job.adapter, dtype="float32", **task)
        config.dtype = "auto"
        if job.merge_with:
            from mlx_retrieval.exporters.soup import mix

            mix(model, config, job.merge_with, job.merge_method)
        if job.merge_with_base is not None:
            from mlx_retrieval.exporters.blend import blend_with_base

            original = loading.open_model(job.model, job.adapter, bare=True, dtype="float32")[0]
            adapter = Path(job.adapter)
            how = (model, original, config, base, adapter, job.merge_method)
            job.merge_with_base = blend_with_base(job.merge_with_base, *how)
        if config.task == "rerank":
            if job.keep_layers:
                raise UserError("--keep-layers is for embedding models, and this is a reranker")
            from mlx_retrieval.exporters.reranker import RerankerWriter as Writer
        else:
            from mlx_retrieval.exporters.embedding import EmbeddingWriter as Writer
        writer, name = Writer(job, model, config, base), job.model or config.base_model
        commands = next_commands(job, config.task, bool(config.dense))
    check_output(output, job.overwrite, [base])
    print_lines([("device", backend.describe()), ("model", name)])
    files.write_folder(output, writer.fill)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    written = ("written", f"{output}, {size / 1e6:,.1f} MB")
    print_lines([*writer.lines, written, *(("next", command) for command in commands)])
    missed = [text for name, text in writer.lines if name == MISSED]
    for text in missed:
        print(f"export.py: warning: {text}", file=sys.stderr)
    return output, missed


def next_commands(job: Export, task: str, dense: bool) -> list[str]:
    """Return the commands that take the exported folder of a retrieval model."""
    commands = []
    if job.gguf_ready:
        flags = ["--sentence-transformers-dense-modules"] if dense else []
        commands.append(shell("python", "convert_hf_to_gguf.py", job.output, *flags))
    rerank = ["--task", "rerank"] if task == "rerank" else []
    return [*commands, shell("python", "eval.py", *rerank, "--model", job.output)]


def parser() -> argparse.ArgumentParser:
    """Return the parser of this command's flags."""
    out = Parser(
        prog="export.py",
        description="Export a trained model, its adapter merged, as a folder that other libraries load.",
        epilog="Exit codes: 0 = written and checked; 1 = written, but quantised weights miss their limit; 2 = bad "
        "input or a failed check, and nothing was written.",
    )
    out.add_argument("--adapter", metavar="DIR", help="adapter folder, for example adapters/best")
    out.add_argument(
        "--model",
        "--model-path",
        metavar="MODEL",
        help="base model, a folder, GGUF or hub name: without --adapter it is exported itself, with it the adapter is "
        "put on it (default: the base model that the adapter was trained on)",
    )
    out.add_argument(
        "--task",
        choices=TASKS,
        help="what a base model is used for: embed = one vector a text, late = one vector a token, rerank = a score a "
        "query and document (default: the task that the model's files tell)",
    )
    out.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    out.add_argument(
        "--format",
        choices=FORMATS,
        help="the library to write for: sentence-transformers, mlx = mlx_lm.load, hf = transformers' own classes "
        "(default: sentence-transformers, and mlx for a chat adapter)",
    )
    out.add_argument(
        "--quantize",
        type=int,
        choices=(4, 8),
        help="bits a weight of linear layers and embeddings, with --format mlx (default: not quantised)",
    )
    out.add_argument(
        "--gguf-ready",
        action="store_true",
        help="write weights and settings as llama.cpp's convert_hf_to_gguf.py reads them, in one dtype, and print the "
        "command to run next",
    )
    out.add_argument(
        "--merge-with-base",
        type=share_of,
        metavar="X|auto",
        help="share of the trained weights, the rest being the base model's, which forgets less: 1 = the trained "
        "model; auto = the share of 0, 0.1 ... 1 that is best on what the run was judged on while its --guard tasks "
        "hold, with a table (default: 1)",
    )
    out.add_argument(
        "--merge-with",
        nargs="+",
        default=(),
        metavar="MODEL",
        help="mix the adapter's model with these, adapters or whole models of the same shape: each weight becomes the "
        "mean of all models'",
    )
    out.add_argument(
        "--merge-method",
        choices=METHODS,
        default=METHODS[0],
        help="how --merge-with and --merge-with-base go from one weight to the other: on a straight line, or slerp = "
        "on an arc, with one MODEL (default: %(default)s)",
    )
    out.add_argument(
        "--keep-layers",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="keep only these layers of --model, by their numbers from 0 in ascending order: a smaller, faster model "
        "to train by the vectors of the whole one (default: all)",
    )
    out.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: the base model's)")
    out.add_argument("--overwrite", action="store_true", help="replace the exported folder in --output")
    out.add_argument(
        "--skip-library-check",
        action="store_true",
        help="do not load the folder with sentence-transformers, or a chat model's with transformers, to compare; this "
        "toolkit always loads and compares it",
    )
    return out


@command("export.py", explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a limit is missed, or 2 for an error the user can fix."""
    backend.prepare()
    args = parser().parse_args(argv)
    try:
        _, missed = _export(Export(**vars(args)))
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("interrupted, nothing was written") from stop
    return 1 if missed else 0


if __name__ == "__main__":
    imports.hide("wandb")
    sys.exit(main())
