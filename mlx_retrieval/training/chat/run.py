"""Prepares a chat run: checks, loads, wires. training/run.py carries it out.

python train.py --model mlx-community/Llama-3.2-3B-Instruct-4bit --batch-size 4 --iters 222 --num-layers 1 \\
    --grad-checkpoint --steps-per-eval 222 --val-batches 2 --steps-per-report 10 --save-every 222
python train.py --task chat --data conversations --mask-prompt --epochs 3 --output adapters/chat
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.backbones import ENCODERS, count_parameters, dequantized, load_backbone, lora
from mlx_retrieval.backbones.decoder import normalised
from mlx_retrieval.backbones.finding import for_mlx_lm
from mlx_retrieval.backbones.gradient_checkpointing import checkpoint_blocks
from mlx_retrieval.backbones.hub import read_config
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.dataset.row_formats import ignored_keys
from mlx_retrieval.dataset.rows import find_files, find_validation
from mlx_retrieval.models import kinds
from mlx_retrieval.training import improvement, nothing_learnt
from mlx_retrieval.training.chat import adapter
from mlx_retrieval.training.chat.data import ChatBatches, Conversations
from mlx_retrieval.training.chat.template import TEMPLATE_FILE, ChatTokenizer
from mlx_retrieval.training.chat.trainer import ChatTrainer
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.contents import ADAPTER, BASE, VALIDATION, Contents, base_contents
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.estimate import here
from mlx_retrieval.training.estimate_job import chat_job
from mlx_retrieval.training.example_rows import conversation_lines
from mlx_retrieval.training.headline import describe_rate, machine_lines, model_lines
from mlx_retrieval.training.length import describe_length, length_warnings, resolve_length
from mlx_retrieval.training.memory_lines import Outlook, decides
from mlx_retrieval.training.report import Report, loss_report
from mlx_retrieval.training.report_facts import model_defaults
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.starting_model import StartingModel
from mlx_retrieval.training.starting_model import find as find_start
from mlx_retrieval.utils.console import Lines, print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import gb, quantity, shell

MAX_LENGTH = 2048  # where --max-length is not given


@dataclass
class ChatRun:
    """A run that trains a chat model; see `training.run.Run`."""

    settings: Settings
    trainer: ChatTrainer
    start: StartingModel
    base: Path  # the base model's folder
    headline: Lines
    template: str  # ChatML in place of a chat template; "" = the tokenizer has its own
    quantised: bool  # whether the base model is
    outlook: Outlook

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.settings.folder

    def begin(self) -> None:
        """Write nothing: the steps need nothing in the run's folder."""

    def contents(self) -> Contents:
        """Return what the run's conversations and its base model hold."""
        trainer = self.trainer
        rows = trainer.batches.rows
        return {
            "data": rows.contents,
            "tokens": [Content("all conversations", int(rows.lengths.sum()), "tokens", str(rows.checksum))],
            VALIDATION: trainer.validation.rows.contents if trainer.validation else [],
            BASE: base_contents(self.base, self.folder),
            ADAPTER: self.start.contents(),
        }

    def renew(self, changed: set[str]) -> None:
        """Do nothing: chat runs have no guards."""

    def restore(self, changed: set[str]) -> None:
        """Do nothing: the trainer's state holds all results."""

    def print_results(self) -> str:
        """Print nothing: the losses have been reported, and chat runs have no other metrics."""
        return ""

    def results(self) -> dict:
        """Return the content of `results.json`: losses on the validation conversations, speed, memory."""
        state = self.trainer.state
        losses = {"before": state.before, "after": state.after}
        skipped = {"skipped_batches": state.skipped_batches} if self.settings.skip_bad_batches else {}
        return {
            **{when: loss if loss is None else {"validation_loss": loss} for when, loss in losses.items()},
            "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
            "peak_memory_bytes": backend.peak_memory(),
            "estimated_memory_bytes": self.outlook.expected.total,
            **skipped,
        }

    def report(self) -> Report:
        """Return what `report.html` says of the run: its validation loss."""
        report = loss_report(self.folder)
        report.defaults = model_defaults(self.settings, count_parameters(self.trainer.model)[0])
        return report

    def next_lines(self) -> Lines:
        """Return (name, text) lines about using the trained adapter."""
        model = improvement.model_to_use(self.folder)
        adapted = ("--model", for_mlx_lm(self.start.base, self.base), "--adapter-path", model)
        # Weights that were quantised again after fusing would keep little of the adapter.
        dequantize = ["--dequantize"] if self.quantised else []
        state = self.trainer.state
        speed = state.tokens / state.seconds if state.seconds else 0
        lines = [
            ("speed", f"{speed:,.0f} tokens/s, peak memory {gb(backend.peak_memory(), 2)} GB "
                      f"(estimated {gb(self.outlook.expected.total, 2)})"),
            ("next", shell("mlx_lm.generate", *adapted, "--prompt", "...")),
            ("fuse", shell("mlx_lm.fuse", *adapted, "--save-path", "fused", *dequantize)),
            ("export", shell("python", "export.py", "--adapter", model, "--output", "my-chat")),
        ]  # fmt: skip
        if self.template:
            lines.append(("template", f"copy {model / TEMPLATE_FILE} into the model's folder (and the fused one): "
                                      "its tokenizer has none, and mlx-lm looks for it there"))  # fmt: skip
        return lines

    def measure(self) -> dict:
        """For --dry-run: measure a step on the largest possible batch, print and return the figures."""
        seconds, counts = self.trainer.measure_step()
        plan = {
            "tokens": counts.tokens,
            "seconds_per_step": seconds,
            "tokens_per_second": counts.tokens / seconds,
            "peak_memory_bytes": backend.peak_memory(),
            "estimated_memory_bytes": self.outlook.expected.total,
        }
        print_lines(
            [
                ("largest", f"{counts.tokens:,} tokens, {1 - counts.tokens / counts.padded:.1%} padding"),
                ("one step", f"{seconds:.2f} s = {plan['tokens_per_second']:,.0f} tokens/s"),
                *self.outlook.measured_lines(plan["peak_memory_bytes"]),
                ("dry run", "nothing was trained or written"),
            ]
        )
        return plan


def prepare(settings: Settings) -> ChatRun:
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    settings.check_task("chat")
    files, held_out = find_files(settings.data), find_validation(settings.data)
    start = find_start(settings, chat=True)
    base = kinds.require_base(start.base)
    if (kind := read_config(base)["model_type"]) in ENCODERS:
        raise UserError(f"--task chat needs a language model, and {settings.model} is a {kind}")
    tokenizer = ChatTokenizer(base)
    settings.dtype = settings.dtype or (adapter.dtype_of(start.adapter) if start.adapter else "auto")
    backbone = load_backbone(base, False, settings.dtype, settings.dequantize)
    if settings.dequantize == "auto" and (way := dequantized.way(backbone)) in ("on", "blocks"):
        settings.dequantize = way  # a resumed run computes as it was begun
    if (settings.max_length or 0) > backbone.max_positions:
        raise UserError(f"--max-length {settings.max_length}: the model has {backbone.max_positions} positions")
    settings.max_length = settings.max_length or min(MAX_LENGTH, backbone.max_positions)

    def read(paths: list[Path]) -> Conversations:
        given = settings.max_length, settings.mask_prompt, settings.skip_bad_rows, settings.ignore_keys
        return Conversations(paths, tokenizer, *given)

    rows, valid = read(files), read(held_out) if held_out else None
    size = min(settings.batch_size, len(rows))
    parts = min(settings.gradient_accumulation_steps or 1, size)
    batches = ChatBatches(rows, size, settings.seed, parts, tokenizer.pad_id)
    validation = ChatBatches(valid, settings.batch_size, settings.seed, 1, tokenizer.pad_id) if valid else None
    improvement.check_evaluated(settings, bool(validation))
    resolve_length(settings, batches.per_epoch)
    length = describe_length(settings, batches.per_epoch)
    outlook = foresee(settings, base, batches)
    print_lines(outlook.lines())
    cutting = []
    if decides(outlook.job, here()):
        outlook.require_room()
        if (parts := outlook.job.parts) > 1:
            batches.parts = settings.gradient_accumulation_steps = parts
            cutting = [("memory", f"{parts} micro-batches a batch, which fit; the loss is that of the whole batch")]
    adapter_config = adapter.adapt(backbone, settings, start)
    if settings.grad_checkpoint:
        checkpoint_blocks(backbone)
    parameters, _ = count_parameters(backbone)
    defaults = resolve_defaults(settings, parameters)

    def save_model(target: Path) -> None:
        adapter.save(target, backbone, adapter_config)
        if tokenizer.template:
            (target / TEMPLATE_FILE).write_text(tokenizer.template, encoding="utf-8")
        write_yaml(settings, target / "config.yaml")

    trainer = ChatTrainer(backbone, batches, validation, settings, save_model)
    headline = [
        ("device", backend.describe()),
        *model_lines(settings, backbone, backbone, start.describe(settings)),
        ("text", describe(settings, tokenizer)),
        ("data", f"{quantity(len(rows), 'conversation')} of {rows.lengths.mean():,.0f} tokens on average, longest "
                 f"{rows.longest:,}; batch {size}, {length}, seed {settings.seed}"),
        ("rate", describe_rate(settings, defaults)),
        ("validation", quantity(len(valid), "conversation") if valid else "none: no valid.jsonl beside the data"),
    ]  # fmt: skip
    headline += conversation_lines(
        rows.where(0), rows.ids[0].tolist(), rows.trained[0].tolist(), tokenizer.tokenizer.decode
    )
    headline += cutting + machine_lines() + nothing_learnt.warnings(settings)
    ignored = rows.ignored + (valid.ignored if valid else Counter())
    headline += [("ignored", ignored_keys(ignored))] if ignored else []
    headline += warnings(settings, rows, valid) + rope_warning(base)
    quantised = lora.is_quantised(backbone)
    return ChatRun(settings, trainer, start, base, headline, tokenizer.template, quantised, outlook)


def foresee(settings: Settings, base: Path, batches: ChatBatches) -> Outlook:
    """Return what the run will take at most, before any weight is read."""
    backbone = load_backbone(base, False, settings.dtype, settings.dequantize)
    return Outlook.of(chat_job(settings, backbone, base, batches.widths(batches.longest()), batches.parts))


def describe(settings: Settings, tokenizer: ChatTokenizer) -> str:
    """Describe how a conversation becomes text, and which tokens are trained on."""
    form = "the tokenizer's chat template" if tokenizer.own_template else "ChatML, as the tokenizer has no template"
    trained = "the assistant's turns" if settings.mask_prompt else "all tokens"
    return f"{form}, trained on {trained}, {settings.max_length:,} tokens at most"


def warnings(settings: Settings, rows: Conversations, valid: Conversations | None) -> Lines:
    """Return a line for everything that differs from what the user may expect."""
    lines = []
    for name, some in (("", rows), (" for validation", valid)):
        if some is None:
            continue
        if some.truncated:
            lines.append(
                f"truncated {quantity(some.truncated, 'conversation')}{name} of more than {settings.max_length} tokens"
            )
        if some.empty:
            count = quantity(some.empty, "conversation")
            lines.append(f"left out {count}{name}: nothing to train on is within {settings.max_length} tokens")
        if some.last_only:
            lines.append(
                f"{quantity(some.last_only, 'conversation')}{name}: only the last turn is trained on, as the chat "
                "template renders earlier ones otherwise when more follows"
            )
        if some.skipped:
            lines.append(f"left out {quantity(len(some.skipped), 'bad row')}{name}: " + "; ".join(some.skipped[:20]))
    return length_warnings(settings, len(rows), "conversation") + [("warning", line) for line in lines]


def rope_warning(base: Path) -> Lines:
    """Return a line if mlx-lm would read another RoPE from config.json than the model is trained with here."""
    from mlx_lm.utils import _get_classes

    config = read_config(base)
    changes = {name: value for name, value in normalised(config).items() if name != "text_config"}
    _, arguments = _get_classes(config)
    try:
        missed = {k: v for k, v in changes.items() if getattr(arguments.from_dict(config), k, v) != v}
    except TypeError:  # without them, mlx-lm cannot build it at all
        missed = changes
    if not missed:
        return []
    line = (
        f"put {json.dumps(missed)[1:-1]} into {base / 'config.json'} before mlx_lm.generate: mlx-lm does not read it "
    )
    return [("warning", line + "where it stands, and would compute otherwise than is trained here")]
