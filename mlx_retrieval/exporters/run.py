"""Write an export: open the model, mix and merge its weights, hand it to the writer of its kind, compare, report.

export(Export(adapter="adapters/best", output="my-model"))
"""

import sys
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.backbones import resolve
from mlx_retrieval.exporters.job import Export, check_output
from mlx_retrieval.exporters.limits import MISSED
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import shell


def export(job: Export) -> Path:
    """Write and check the folder that `job` describes, print a table of what was done, and return the folder.

    Quantised weights that miss their limit are a line of the table, and a warning on standard error. A UserError leaves
    nothing behind, and a folder that was there before as it was.
    """
    return export_with_warnings(job)[0]


def export_with_warnings(job: Export, program: str = "export.py") -> tuple[Path, list[str]]:
    """Return the folder that `export` returns, and its warnings. `program`: the name that they begin with."""
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
        print(f"{program}: warning: {text}", file=sys.stderr)
    return output, missed


def next_commands(job: Export, task: str, dense: bool) -> list[str]:
    """Return the commands that take the exported folder of a retrieval model."""
    commands = []
    if job.gguf_ready:
        flags = ["--sentence-transformers-dense-modules"] if dense else []
        commands.append(shell("python", "convert_hf_to_gguf.py", job.output, *flags))
    rerank = ["--task", "rerank"] if task == "rerank" else []
    return [*commands, shell("python", "eval.py", *rerank, "--model", job.output)]
