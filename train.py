"""Train a retrieval model.

python train.py                                         the model and data that come with the toolkit, a minute
python train.py --model Qwen/Qwen3-Embedding-0.6B --data pairs.jsonl --batch-size 256 --steps 2000
python train.py --model mlx-community/Llama-3.2-3B-Instruct-4bit --iters 222 --num-layers 1 --grad-checkpoint
                                                        a chat model, on the conversations in data/
python train.py --config adapters/config.yaml --output again     the settings of another run, flags win
python train.py --resume --output adapters              continue a run that was stopped
"""

import dataclasses
import gc
import json
import string
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import backend
from backend import UserError

import config
import kernels
import locks
from flags import from_flags, read_yaml

DESCRIPTION = "Train a retrieval model: LoRA, DoRA or all weights, exact large batches, evaluation through MTEB."
EPILOG = "Exit codes: 0 done, 2 bad input (nothing is lost), 130 and 143 stopped by Ctrl-C or SIGTERM, saved."


class Evaluations:
    """Evaluates the model as it stands, and keeps the first and the newest result for the final table.

    `evaluate` gives the result.
    """

    def __init__(self, evaluate: Callable[[], "Evaluation"], folder: Path):  # noqa: F821
        self.evaluate, self.file = evaluate, folder / "before.json"
        self.before = self.after = None

    def __call__(self, step: int) -> "Evaluation":  # noqa: F821
        result = self.evaluate()
        if step == 0:
            self.before = result
            self.file.write_text(json.dumps(dataclasses.asdict(result)), encoding="utf-8")
        else:
            self.after = result
        return result

    def recall_before(self) -> None:
        """A resumed run's result from before training, as it was saved then."""
        from eval import Evaluation

        if self.file.is_file():
            self.before = Evaluation(**json.loads(self.file.read_text(encoding="utf-8")))


@dataclass
class Run:
    """A run that is wired and checked, but has not begun; nothing is written yet."""

    settings: config.Settings
    folder: Path
    trainer: "Trainer"  # noqa: F821  (imported when a run is made, so that --help is quick)
    evaluations: Evaluations | None
    retrieval: "RetrievalConfig"  # noqa: F821
    headline: list[tuple[str, str]]


def build_model(settings: config.Settings) -> tuple["RetrievalModel", "RetrievalConfig", Path]:  # noqa: F821
    """The model that is to be trained, as `checkpoint.build` gives it."""
    import checkpoint

    return checkpoint.build(
        settings.model,
        projection=settings.projection_dim,
        reranker=settings.reranker_type,
        task=settings.task,
        pooling=settings.pooling,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        bidirectional=settings.bidirectional,
        max_length=settings.max_length,
        query_max_length=settings.query_max_length or settings.query_expansion,  # ColBERT cuts where it fills
        matryoshka_dims=settings.matryoshka_dims or None,
        maxsim=settings.maxsim,
        skiplist=list(string.punctuation) if settings.skip_punctuation else None,
        query_expansion=settings.query_expansion,
        attend_expansion=settings.attend_expansion,
        impute=settings.impute,
        instruction=settings.instruction,
    )


def evaluation_of(
    settings: config.Settings,
    model: "RetrievalModel",  # noqa: F821
    retrieval: "RetrievalConfig",  # noqa: F821
    tokenizer: "TextTokenizer",  # noqa: F821
) -> Callable[[], "Evaluation"]:  # noqa: F821
    """What evaluates the model as it stands at the moment of a call."""
    if retrieval.task == "rerank":
        from rerank import Reranker
        from rerank_eval import evaluate_reranker

        reranker = Reranker.of(model, retrieval, tokenizer, settings.model)
        return lambda: evaluate_reranker(reranker, settings.eval_tasks, depth=settings.rerank_depth)[1]
    from embed import Model
    from eval import evaluate

    in_use = Model(model, retrieval, tokenizer, settings.model)
    return lambda: evaluate(in_use, settings.eval_tasks)


def describe(settings: config.Settings, retrieval: "RetrievalConfig") -> str:  # noqa: F821
    """What becomes of a text, in words."""
    lengths = f"{retrieval.query_max_length} tokens of a query, {retrieval.max_length} of a document"
    if retrieval.task == "rerank":
        if retrieval.reranker != "listwise":
            lengths = f"{retrieval.max_length} tokens of query and document together"
        return f"{retrieval.reranker} reranker, {settings.loss}, {lengths}"
    if retrieval.task == "late":
        return f"a vector of {retrieval.dimensions} dimensions for every token, MaxSim ({retrieval.maxsim}), {lengths}"
    return f"{retrieval.pooling} pooling, {lengths}"


def prepare(settings: config.Settings) -> Run:
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    import checkpoint
    from data_loader import Rows, find_files, find_validation
    from models import count_parameters, lora
    from models.remat import checkpoint_blocks, seed
    from objectives import make as make_objective
    from objectives import make_batches
    from trainer import Trainer

    folder = Path(settings.output).expanduser()
    check_output(folder, settings)
    rows = Rows(find_files(settings.data), settings.skip_bad_rows)
    seed(settings.seed)  # a fresh projection
    model, retrieval, base = build_model(settings)
    settings.check_task(retrieval.task)
    if too_long := [d for d in settings.matryoshka_dims if d > retrieval.dimensions]:
        raise UserError(f"--matryoshka-dims {too_long[0]}: the model's vectors have {retrieval.dimensions} dimensions")
    seed(settings.seed)  # fresh LoRA weights
    adapter_config = lora.adapt(
        model.backbone,
        settings.train_type,
        settings.lora_rank,
        settings.lora_alpha,
        settings.lora_dropout,
        settings.lora_keys,
        settings.num_layers,
    )
    if retrieval.task == "rerank" or (settings.train_type == "full" and settings.num_layers == -1):
        model.head.unfreeze()
    everything, trainable = count_parameters(model)
    settings.settle(everything, retrieval.reranker)
    if settings.grad_checkpoint:
        checkpoint_blocks(model.backbone)
    tokenizer = retrieval.tokenizer(base)
    objective = make_objective(settings, retrieval, tokenizer, rows)
    batches = make_batches(settings, retrieval, rows, tokenizer, settings.batch_size, settings.seed)
    validation = None
    if held_out := find_validation(settings.data):
        held_out_rows = Rows(held_out, settings.skip_bad_rows)
        size = min(settings.batch_size, len(held_out_rows))
        validation = make_batches(settings, retrieval, held_out_rows, tokenizer, size)

    def save_model(target: Path) -> None:
        checkpoint.save_model(target, model, adapter_config, retrieval)
        settings.write(target / "config.yaml")

    evaluations = None
    if settings.eval_tasks:
        evaluations = Evaluations(evaluation_of(settings, model, retrieval, tokenizer), folder)
    trainer = Trainer(model, batches, objective, settings, folder, save_model, evaluations, validation)
    if settings.eval_tasks:
        from eval import load_tasks

        load_tasks(settings.eval_tasks)  # a wrong name or folder is told now, not after a hundred steps
    rank = f"r={settings.lora_rank}"
    trained = {"lora": f"LoRA {rank}", "dora": f"DoRA {rank}", "full": "all weights"}[settings.train_type]
    skipped = f", {len(rows.skipped)} bad rows left out" if rows.skipped else ""
    headline = [
        ("device", backend.describe()),
        ("model", f"{settings.model}: {everything:,} parameters, {trainable:,} trained ({trained})"),
        ("text", describe(settings, retrieval)),
        ("data", f"{len(rows):,} rows{skipped}, batch {settings.batch_size}, "
                 f"{settings.steps:,} steps = {settings.steps * settings.batch_size / len(rows):.1f} epochs, "
                 f"learning rate {settings.learning_rate:g}"),
    ]  # fmt: skip
    if backend.KERNELS and kernels.cold():
        headline.append(("kernels", "being compiled for this processor: about half a minute, once"))
    headline += [("left out", line) for line in rows.skipped[:20]]
    return Run(settings, folder, trainer, evaluations, retrieval, headline)


def check_output(folder: Path, settings: config.Settings) -> None:
    """Refuse to mix two runs in one folder."""
    import checkpoint

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: this is a file")
    if settings.resume or settings.overwrite or settings.dry_run or settings.profile:
        return
    if checkpoint.holds_run(folder):
        raise UserError(
            f"--output {folder}: another run is in this folder. Continue it with --resume, remove it with --overwrite, "
            "or name another folder"
        )


def resumed_settings(given: dict) -> config.Settings:
    """The settings of the run in --output; what is given besides must agree, or only tell when to stop."""
    folder = Path(given.get("output", config.Settings().output)).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: no run in {folder}")
    saved = config.Settings(**read_yaml(folder / "config.yaml"))
    free = {"resume", "stop_after", "output", "wandb", "wandb_project"}
    differing = [name for name, value in given.items() if name not in free and getattr(saved, name) != value]
    if differing:
        told = ", ".join(f"{config.flag(name)} was {getattr(saved, name)}" for name in differing)
        raise UserError(f"--resume continues the run as it was begun, but {told}")
    values = saved.to_dict() | {name: given[name] for name in free if name in given}
    return config.Settings(**values | {"stop_after": given.get("stop_after", 0), "overwrite": False})


def train(settings: config.Settings) -> dict:
    """Train as the settings say; returns what `results.json` holds."""
    if settings.task == "chat":
        from chat.run import prepare as prepare_chat

        check_output(Path(settings.output).expanduser(), settings)
        run = prepare_chat(settings)
    else:
        run = prepare(settings)
    gc.freeze()  # what is there now stays: no need to look through it at every collection
    return carry_out(run)


def carry_out(run: Run) -> dict:
    """Train a prepared run, or continue it; returns as `train`. UserError where another process uses its folder."""
    from reporting import print_lines

    settings = run.settings
    print_lines(run.headline)
    if settings.dry_run:
        return run.dry_run() if settings.task == "chat" else dry_run(run)
    if settings.profile:
        from profiling import profile

        return profile(run)
    with locks.only_one(run.folder / ".lock", f"--output {run.folder}: another process is training there"):
        return _carry_out(run)


def _carry_out(run: Run) -> dict:
    import checkpoint
    from reporting import Reporter
    from trainer import Stopped

    begin(run)
    settings, trainer, evaluations = run.settings, run.trainer, run.evaluations
    with Reporter(
        run.folder,
        settings.steps,
        first_step=trainer.state.step,
        settings=settings.to_dict(),
        wandb=settings.wandb,
        wandb_project=settings.wandb_project,
    ) as report:
        if trainer.state.step == 0 and not settings.skip_eval_init:
            trainer.measure(0, report)
        try:
            trainer.run(report)
        except Stopped as stop:
            report.message(f"{stop}; step {trainer.state.step} is saved. Continue: {continue_command(run.folder)}")
            raise SystemExit(stop.code) from stop
    results = {"before": None, "after": None}
    if settings.task == "chat":
        results = run.results()
    elif evaluations:
        results = {
            when: result.average() if result else None
            for when, result in (("before", evaluations.before), ("after", evaluations.after))
        }
        if missing := (evaluations.after or evaluations.before).unreachable:
            results["unreachable"] = missing  # the averages are without these tasks
    checkpoint.write_file(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    conclude(run)
    return results


def begin(run: Run) -> None:
    """Make the run's folder, or find the place in it to continue from."""
    import checkpoint
    from reporting import print_lines

    if run.settings.overwrite:
        checkpoint.remove_run(run.folder)
    if run.settings.resume:
        checkpoint.recover(run.folder)
        if (run.folder / "final").is_dir():
            raise UserError(f"--resume: the run in {run.folder} is finished")
        if (last := checkpoint.last_step(run.folder)) is not None:
            run.trainer.resume(last)
            print_lines([("resumed", f"from {last}")])
        if run.evaluations:
            run.evaluations.recall_before()
    run.folder.mkdir(parents=True, exist_ok=True)
    run.settings.write(run.folder / "config.yaml")


def conclude(run: Run) -> None:
    """Say what was gained, where everything is, and what to do next."""
    from reporting import print_lines

    state, folder = run.trainer.state, run.folder
    if not (folder / "final").is_dir():
        print_lines([("stopped", f"at step {state.step}, saved"), ("continue", continue_command(folder))])
        return
    if run.evaluations and run.evaluations.after:
        from eval import print_comparison, print_table

        if run.evaluations.before:
            print_comparison(run.evaluations.before, run.evaluations.after)
        else:
            print_table(run.evaluations.after)
    lines = [("adapter", f"{folder / 'final'}")]
    if (folder / "best").is_dir():
        lines.append(("best", f"{folder / 'best'} (step {state.best_step})"))
    lines += [
        ("curves", f"{folder / 'curves.png'}"),
        ("metrics", f"{folder / 'metrics.jsonl'}"),
    ]
    if run.settings.task == "chat":
        lines += run.next_lines()
    else:
        lines.append(("next", next_command(folder / "final", run.retrieval.task)))
    print_lines(lines)


def next_command(adapter: Path, task: str) -> str:
    """What to try with a trained model."""
    if task == "rerank":
        return f'python rerank.py --model {adapter} --query "..." --documents eval-data/corpus.jsonl'
    return f"python embed.py --model {adapter} --input eval-data/corpus.jsonl --output vectors.npy"


def continue_command(folder: Path) -> str:
    """What to type to continue a run."""
    return f"python train.py --resume --output {folder}"


def dry_run(run: Run) -> dict:
    """Measure one step on the first batch, and say what the whole run would take; nothing is changed."""
    import time

    from backend import mx

    from reporting import print_lines

    trainer, settings = run.trainer, run.settings
    batch = trainer.batches.batch(0)
    trainer.gradient(batch, 1)  # the first call also compiles and allocates
    mx.reset_peak_memory()
    began = time.perf_counter()
    result, _ = trainer.gradient(batch, 1)
    seconds = time.perf_counter() - began
    peak = backend.peak_memory()
    texts, longest = len(batch.texts), int(batch.texts.lengths.max())
    plan = {
        "texts": texts,
        "tokens": batch.tokens,
        "padding": 1 - batch.tokens / result.padded_tokens,
        "micro_batches": result.micro_batches,
        "seconds_per_step": seconds,
        "tokens_per_second": batch.tokens / seconds,
        "seconds": seconds * settings.steps,
        "peak_memory_bytes": peak,
        "loss": result.loss.item(),
    }
    minutes, rest = divmod(round(plan["seconds"]), 60)
    print_lines(
        [
            ("first batch", f"{texts} distinct texts, {batch.tokens:,} tokens, longest {longest}"),
            ("plan", f"{result.micro_batches} micro-batches, {plan['padding']:.1%} padding"),
            ("one step", f"{seconds:.2f} s = {plan['tokens_per_second']:,.0f} tokens/s, loss {plan['loss']:.4f}"),
            ("memory", f"{peak / 1e9:.2f} GB at most"),
            ("all steps", f"{minutes} min {rest} s for {settings.steps:,} steps, without evaluations"),
            ("dry run", "nothing was trained or written"),
        ]
    )
    return plan


def main(argv: Sequence[str] | None = None) -> int:
    try:
        settings, given = from_flags(DESCRIPTION, EPILOG, argv)
        if settings.resume:
            settings = resumed_settings(given)
        elif settings.task is None:
            from chat.data import is_chat

            if is_chat(settings.data):
                settings = config.for_task("chat", given)
        train(settings)
    except (UserError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
