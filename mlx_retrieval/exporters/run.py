"""Write an export: open the model, mix and merge its weights, hand it to the writer of its kind, compare, report.

export(Export(adapter="adapters/best", output="my-model"))
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.backbones import resolve
from mlx_retrieval.exporters import publishing
from mlx_retrieval.exporters.job import Export, check_output
from mlx_retrieval.exporters.limits import MISSED
from mlx_retrieval.models import kinds, loading
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import Lines, print_lines, print_rows
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
    repository = None
    if job.push_to_hub and not job.dry_run:
        repository = publishing.Repository(job.push_to_hub, job.private, job.revision, job.overwrite_repository)
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
            how = (model, original, config, base, adapter, job.merge_method, job.guard, job.guard_tolerance)
            job.merge_with_base = blend_with_base(job.merge_with_base, *how, job.largest_share)
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
    if job.dry_run:
        sizes = sizes_in_advance(output, writer.fill)
        print_lines([*writer.lines, *would_write(job, sizes)])
        print_rows("", ("file", "bytes"), [(name, f"{size:,}") for name, size in sizes.items()])
    else:
        files.write_folder(output, writer.fill)
        lines = [*writer.lines, ("written", f"{output}, {publishing.total(publishing.file_sizes(output))}")]
    missed = [text for name, text in writer.lines if name == MISSED]
    if repository and not missed:
        print_lines(lines)
        lines = push(repository, output)
    if not job.dry_run:
        print_lines([*lines, *(("next", command) for command in commands)])
    for text in missed:
        unpushed = f". Not pushed: {shell('hf', 'upload', job.push_to_hub, output)} does" if repository else ""
        print(f"{program}: warning: {text}{unpushed}", file=sys.stderr)
    return output, missed


def push(repository: publishing.Repository, output: Path) -> Lines:
    """Upload an exported folder; errors and Ctrl-C say that it is there, and lines to print where it went."""
    try:
        return repository.upload(output)
    except UserError as error:
        raise UserError(f"{error}; the folder {output} is written") from error
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted while pushing; the folder {output} is written") from stop


def sizes_in_advance(output: Path, fill: Callable[[Path], None]) -> dict[str, int]:
    """Return the sizes of the files that `fill` writes, in bytes, by path. It fills a folder that is removed again."""
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=parent) as temporary:
        fill(Path(temporary))
        return publishing.file_sizes(Path(temporary))


def would_write(job: Export, sizes: dict[str, int]) -> Lines:
    """Return lines to print about what a dry run has not written and pushed."""
    lines = [("dry run", f"nothing was written; {job.output} would have {publishing.total(sizes)}")]
    if job.push_to_hub:
        branch = f", branch {job.revision}" if job.revision else ""
        lines.append(("dry run", f"would be pushed to {job.push_to_hub}{branch}{', private' * job.private}"))
    return lines


def next_commands(job: Export, task: str, dense: bool) -> list[str]:
    """Return the commands that take the exported folder of a retrieval model."""
    commands = []
    if job.gguf_ready:
        flags = ["--sentence-transformers-dense-modules"] if dense else []
        commands.append(shell("python", "convert_hf_to_gguf.py", job.output, *flags))
    rerank = ["--task", "rerank"] if task == "rerank" else []
    return [*commands, shell("python", "eval.py", *rerank, "--model", job.output)]
