"""Chat fine-tuning: steps equal mlx-lm's where theirs is right, runs resume exactly, adapters work in mlx-lm.

python -m pytest tests/training/test_chat.py
"""

import functools
import gc
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mlx_retrieval.backend import device_memory, mx, nn

import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from random_models import changed, quantised, save

import train
from mlx_retrieval import backend
from mlx_retrieval.backbones.gradient_checkpointing import seed
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.base_trainer import learning_rate
from mlx_retrieval.training.chat import trainer as chat_trainer
from mlx_retrieval.training.chat import tuning
from mlx_retrieval.training.chat.data import ChatBatches
from mlx_retrieval.training.chat.run import prepare
from mlx_retrieval.training.chat.tuning import Optimizer, StopTraining, compiled, loss_of, tune
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = "what is a kidney stone how treated hard piece of material the cat sat on mat"


def rows(count: int, seed: int = 0, longest: int = 30) -> list[dict]:
    """Conversations of one to three questions and answers."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS.split(), rng.integers(1, longest)))

    def messages() -> list[dict]:
        turns = range(rng.integers(1, 4))
        return [{"role": role, "content": text()} for _ in turns for role in ("user", "assistant")]

    return [{"messages": messages()} for _ in range(count)]


@pytest.fixture
def settings(tmp_path, small, write_rows):
    """`settings(**changes)`: those of a small run on 22 conversations, with 7 to validate on."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(rows(22), "data/train.jsonl")
    write_rows(rows(7, 1), "data/valid.jsonl")

    def make(**changes) -> Settings:
        given = {"model": small, "data": [str(folder)], "steps": 6, "lora_rank": 4, "output": str(tmp_path / "run")}
        return for_task("chat", given | {"save_steps": 0, "learning_rate": 1e-2} | changes)

    return make


def trained(run) -> dict[str, mx.array]:
    return dict(tree_flatten(run.trainer.model.trainable_parameters()))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def metrics(folder: Path, kind: str = "train") -> list[dict]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["type"] == kind]


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.fixture
def batches(settings):
    """`batches(size, parts, **changes)`: those of the run, and its model with LoRA that does something."""

    def make(size: int, parts: int = 1, **changes) -> tuple[ChatBatches, nn.Module]:
        run = prepare(settings(**changes))
        mx.random.seed(1)
        model = run.trainer.model
        model.update(tree_map(lambda v: v + 0.05 * mx.random.normal(v.shape), model.trainable_parameters()))
        return ChatBatches(run.trainer.batches.rows, size, parts=parts), model

    return make


def test_the_loss_is_the_mean_over_what_is_trained_on(batches):
    """mlx-lm's also counts one token of padding after every text."""
    made, model = batches(5, mask_prompt=True)
    numbers = made.numbers(0)
    loss, count = loss_of(model, *made.make(numbers)[0].arrays)
    total, counted = 0.0, 0
    for i in numbers:  # each conversation alone, without padding
        ids, said = mx.array(made.rows.ids[i])[None], made.rows.trained[i][1:]
        losses = np.array(nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:]))[0]
        total, counted = total + losses[said].sum(), counted + said.sum()
    assert count.item() == counted and loss.item() == pytest.approx(total / counted, rel=1e-5)


def test_where_nothing_is_trained_on_the_loss_is_zero_and_so_is_the_gradient(batches):
    """mlx-lm's is not a number."""
    made, model = batches(2)
    ids = made.make(made.numbers(0))[0].ids
    nothing = (mx.zeros((2, ids.shape[1] - 1), mx.bool_), mx.array(1.0))
    (loss, count), gradient = nn.value_and_grad(model, loss_of)(model, ids, *nothing)
    assert loss.item() == count.item() == 0 and all(not v.any() for _, v in tree_flatten(gradient))


def test_parts_of_a_batch_give_its_loss_and_gradient(batches):
    """Also where they count different numbers of tokens: mlx-lm's accumulation takes the mean of their means."""
    for size in (5, 1):
        found = []
        for parts in (1, 3):
            made, model = batches(size, parts, mask_prompt=True)
            loss, gradient = 0.0, None
            for part in made.make(made.epoch(0)[0]):
                (value, _), more = nn.value_and_grad(model, loss_of)(model, *part.arrays)
                loss += value.item() / parts
                gradient = more if gradient is None else tree_map(mx.add, gradient, more)
            found.append((loss, [(name, value / parts) for name, value in tree_flatten(gradient)]))
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
        for (name, one), (_, other) in zip(found[0][1], found[1][1], strict=True):
            assert mx.allclose(one, other, rtol=1e-3, atol=1e-6), name


# --- steps beside mlx-lm's own --------------------------------------------------------------------------------------


class Losses:
    """Collects the losses of `count` steps."""

    def __init__(self, count: int):
        self.count, self.values = count, []

    def on_train_loss_report(self, info: dict) -> None:
        self.values.append(info["train_loss"])
        if len(self.values) == self.count:
            raise StopTraining


def iterate(batches: list, **_) -> list:
    """In the place of mlx-lm's `iterate_batches`."""
    return batches


@pytest.mark.parametrize("changes", [{}, {"train_type": "dora", "num_layers": 1}, {"train_type": "full"}], ids=str)
def test_steps_are_mlx_lm_s_where_its_loss_is_right(settings, tmp_path, changes):
    """On batches without padding, and so without a token of it that counts: the same losses and weights, to the bit."""
    from mlx_lm.tuner.trainer import TrainingArgs
    from mlx_lm.tuner.trainer import train as their_train

    found = []
    for ours in (True, False):
        run = prepare(settings(max_length=12, **changes))
        parts = [part for k in range(4) for part in run.trainer.batches.make(run.trainer.batches.numbers(k))]
        parts = [part for part in parts if part.counted.all()]
        assert len(parts) == 4
        if ours:
            losses = Losses(4)
            tune(
                run.trainer.model,
                Optimizer(run.trainer.model.trainable_parameters(), 1e-2, 0.01, 0.0),
                parts,
                4,
                1,
                losses,
            )
        else:
            losses = Losses(5)
            arrays = [(part.ids, mx.array([[0, part.ids.shape[1]]] * len(part.ids))) for part in parts]
            args = TrainingArgs(iters=4, steps_per_report=1, adapter_file=str(tmp_path / "a.safetensors"))
            optimizer = optim.AdamW(1e-2, weight_decay=0.01, bias_correction=True)
            given = functools.partial(iterate, arrays)
            their_train(run.trainer.model, optimizer, [], args=args, iterate_batches=given, training_callback=losses)
        found.append((losses.values, trained(run)))
    assert found[0][0] == found[1][0]
    assert all(mx.array_equal(found[0][1][name], value) for name, value in found[1][1].items())


def test_mlx_lm_s_screen_does_not_show(settings, capfd):
    run = prepare(settings(max_length=20))
    parts = run.trainer.batches.make(run.trainer.batches.numbers(0))
    capfd.readouterr()  # of preparing: the line about memory
    tune(run.trainer.model, run.trainer.optimizer, parts, 1, 1, Losses(1))
    assert capfd.readouterr().out == ""


def test_clipping_and_the_rate_of_each_step(settings, tmp_path):
    """The optimizer gets the schedule's rate, and a gradient of the norm that is asked for."""
    run = prepare(settings(max_grad_norm=1e-9, weight_decay=0.0, steps=3, steps_per_report=1))
    training_run.run(run)
    rates = [record["learning_rate"] for record in metrics(tmp_path / "run")]
    assert rates == [learning_rate(run.settings, step) for step in (1, 2, 3)]
    assert run.trainer.optimizer.learning_rate.item() == pytest.approx(rates[-1])
    assert all(record["grad_norm"] > 1e-3 for record in metrics(tmp_path / "run"))
    state = dict(tree_flatten(run.trainer.optimizer.state))
    moments = [value for name, value in state.items() if name.endswith(".m")]
    assert moments and max(mx.abs(v).max().item() for v in moments) < 1e-9


def test_numbers_that_are_not_finite_end_the_run_with_its_last_good_state(settings, tmp_path):
    with pytest.raises(UserError, match=r"step 2: .*not finite; the state after step 1 is saved") as caught:
        train.train(settings(learning_rate=1e37, warmup=0.0, max_grad_norm=0.0, schedule="constant"))
    assert "train.jsonl:" in str(caught.value)
    saved = last_step(tmp_path / "run")
    assert saved.name == "step-000001"
    assert json.loads((saved / "trainer_state.json").read_text())["step"] == 1
    assert int(read_safetensors(saved / "optimizer.safetensors")["step"].item()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("parts", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bad_batches_are_skipped_counted_and_told(settings, tmp_path, monkeypatch, capsys, parts):
    """--skip-bad-batches: no update, the step goes on, the count survives a resume, which is still exact."""
    original = ChatBatches._part
    monkeypatch.setattr(ChatBatches, "_part", lambda self, rows, share: original(self, rows, share * (3 not in rows)))
    changes = {"skip_bad_batches": True, "batch_size": 4, "gradient_accumulation_steps": parts, "steps_per_report": 1}
    changes |= {"steps": 12, "lora_dropout": 0.2, "save_steps": 1, "keep": 0}
    assert train.train(settings(**changes, output=str(tmp_path / "whole")))["skipped_batches"] == 2
    told = [line for line in capsys.readouterr().out.splitlines() if "the batch is skipped" in line]
    assert len(told) == 2 and all(line.endswith("train.jsonl:4") for line in told)
    records = metrics(tmp_path / "whole")
    sick = [record["step"] for record in records if record["loss"] is None]
    assert len(sick) == 2 and records[-1]["skipped_batches"] == 2
    weights = [files(tmp_path / "whole" / f"step-{step:06}")["adapters.safetensors"] for step in range(1, 13)]
    assert [step for step in range(2, 13) if weights[step - 1] == weights[step - 2]] == [s for s in sick if s > 1]
    train.train(settings(**changes, stop_after=sick[0]))
    resumed = train.resumed_settings({"resume": True, "output": str(tmp_path / "run")})
    assert train.train(resumed)["skipped_batches"] == 2
    assert files(tmp_path / "run" / "final") == files(tmp_path / "whole" / "final")


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_reports_and_saves(settings, tmp_path, capsys):
    results = train.train(settings(steps=20, eval_steps=10, save_steps=8, steps_per_report=5, val_batches=-1))
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == [
        "best", "final", "step-000008", "step-000016", "step-000020",
    ]  # fmt: skip
    assert sorted(p.name for p in (run / "final").iterdir()) == [
        "adapter_config.json", "adapters.safetensors", "config.yaml", "optimizer.safetensors", "trainer_state.json",
    ]  # fmt: skip
    records, evaluations = metrics(run), metrics(run, "eval")
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert [record["step"] for record in evaluations] == [0, 10, 20]
    losses = [record["metrics"]["validation_loss"] for record in evaluations]
    assert losses == [results["before"]["validation_loss"], losses[1], results["after"]["validation_loss"]]
    assert losses[2] < losses[0] - 0.3 and records[3]["loss"] < records[0]["loss"]
    rows_read = prepare(settings(dry_run=True)).trainer.batches.rows
    assert sum(r["tokens"] for r in records[:1]) > 0 and records[-1]["epoch"] == pytest.approx(20 / 6, abs=1e-3)
    state = json.loads((run / "final" / "trainer_state.json").read_text())
    assert state["tokens"] == sum(record["tokens"] for record in records) and state["data"] == rows_read.checksum
    for word in ("20 steps = 3.3 epochs", "7 conversations", "an estimate", "mlx_lm.generate", "mlx_lm.fuse"):
        assert word in out
    assert (run / "curves.png").is_file() and results["tokens_per_second"] > 0


def test_the_validation_loss_is_that_of_all_conversations(settings):
    """Whatever the batches; mlx-lm's drops the last ones and needs as many as a batch."""
    losses = []
    for size in (1, 4, 50):
        trainer = prepare(settings(batch_size=size, val_batches=-1)).trainer
        losses.append(trainer.evaluate(0)["validation_loss"])
    held_out, total = trainer.validation.rows, 0.0
    for ids in map(mx.array, held_out.ids):
        total += nn.losses.cross_entropy(trainer.model(ids[None, :-1]), ids[None, 1:]).sum().item()
    assert losses == pytest.approx([total / (held_out.lengths - 1).sum()] * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "steps", "first"),
    [
        pytest.param({}, 40, 17, marks=pytest.mark.slow),
        pytest.param({"grad_checkpoint": True}, 12, 5, marks=pytest.mark.slow),
        ({"gradient_accumulation_steps": 3, "num_layers": 1}, 12, 5),
        pytest.param({"train_type": "dora"}, 12, 5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_resume_is_exact(settings, tmp_path, changes, steps, first):
    """40 steps are 17 and 23 more, with dropout, to the last bit of weights, optimizer and validation loss."""
    changes = {"steps": steps, "lora_dropout": 0.2, "eval_steps": 6, "max_length": 40, **changes}
    whole = settings(**changes, output=str(tmp_path / "whole"))
    train.train(whole)
    train.train(settings(**changes, stop_after=first))
    assert not (tmp_path / "run" / "final").exists()
    train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / "run")}))
    assert files(tmp_path / "run" / "final") == files(tmp_path / "whole" / "final")
    assert metrics(tmp_path / "run", "eval") == metrics(tmp_path / "whole", "eval")
    wall = ("seconds", "tokens_per_second", "peak_memory_bytes")
    told = [[{k: v for k, v in r.items() if k not in wall} for r in metrics(tmp_path / n)] for n in ("run", "whole")]
    assert told[0] == told[1] and told[0]  # what was trained since the last report is remembered too
    states = [json.loads((tmp_path / name / "final" / "trainer_state.json").read_text()) for name in ("run", "whole")]
    assert [state | {"seconds": 0} for state in states] == [states[0] | {"seconds": 0}] * 2


@pytest.mark.slow
def test_a_longer_run_is_exact(settings, tmp_path):
    """A finished run goes on, however often it is stopped; --epochs name its new end as well."""
    train.train(settings(steps=6, lora_dropout=0.2, eval_steps=4, output=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for name, changes in (("whole", {"epochs": 2.0}), ("run", {"steps": 12, "stop_after": 8}), ("run", {})):
        train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / name)} | changes))
    assert files(tmp_path / "run" / "final") == files(tmp_path / "whole" / "final")
    assert metrics(tmp_path / "run", "eval") == metrics(tmp_path / "whole", "eval")
    assert [record["step"] for record in metrics(tmp_path / "run", "eval")] == [0, 4, 6, 8, 12]


def test_checkpointed_blocks_drop_others_in_every_step(settings):
    """A compiled step would draw their seeds once; here a step's seed decides."""
    trainers = [prepare(settings(lora_dropout=0.5, grad_checkpoint=value)).trainer for value in (False, True)]
    assert [trainer.compiled for trainer in trainers] == [True, False]
    trainer, losses = trainers[1], Losses(4)
    mx.random.seed(1)
    parameters = trainer.model.trainable_parameters()
    trainer.model.update(tree_map(lambda v: v + 0.1 * mx.random.normal(v.shape), parameters))

    def parts():
        for value in (1, 1, 2, 2):
            seed(value)
            yield trainer.batches.make(trainer.batches.numbers(0))[0]

    with compiled(trainer.compiled):
        tune(trainer.model, Optimizer(trainer.model.trainable_parameters(), 0.0, 0.0, 0.0), parts(), 4, 1, losses)
    assert losses.values[0] == losses.values[1] != losses.values[2] == losses.values[3]


def test_resume_refuses_other_conversations(settings, tmp_path, write_rows):
    train.train(settings(stop_after=2))
    write_rows(rows(22, seed=5), "data/train.jsonl")
    resumed = train.resumed_settings({"resume": True, "output": str(tmp_path / "run")})
    message = r"train.jsonl: 22 conversations as then, .*\n.*all conversations: [\d,]+ tokens"
    with pytest.raises(UserError, match=message):
        train.train(resumed)
    (tmp_path / "run" / "contents.json").unlink()  # as an earlier version leaves it
    with pytest.raises(UserError, match="conversations are not those"):
        train.train(resumed)


@pytest.mark.slow
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_exactly(settings, tmp_path, monkeypatch):
    from mlx_retrieval.training.reporting import Reporter

    train.train(settings(lora_dropout=0.2, output=str(tmp_path / "whole")))
    original = Reporter.step

    def step(self, record):
        original(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = settings(lora_dropout=0.2, steps_per_report=1)
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", step)
        with pytest.raises(SystemExit) as stopped:
            train.train(chosen)
    assert stopped.value.code == 143 and last_step(tmp_path / "run").name in ("step-000003", "step-000004")
    train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / "run")}))
    assert files(tmp_path / "run" / "final") == files(tmp_path / "whole" / "final")


def test_early_stopping_and_best_go_by_the_validation_loss(settings, tmp_path, capsys):
    train.train(settings(steps=30, eval_steps=1, early_stopping=3, learning_rate=1e-12))
    steps = [record["step"] for record in metrics(tmp_path / "run", "eval")]
    assert len(steps) < 15 and "no better for 3 evaluations" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best").exists()  # no step was better than the untrained model
    assert (tmp_path / "run" / "final").is_dir()


def test_a_dry_run_measures_and_writes_nothing(settings, tmp_path, capsys):
    plan = train.train(settings(dry_run=True))
    assert plan["tokens_per_second"] > 0 and plan["peak_memory_bytes"] > 0
    assert "nothing was trained" in capsys.readouterr().out and not (tmp_path / "run").exists()


# --- the adapter elsewhere ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory, small) -> dict[str, str]:
    """Small models of other kinds, with the tiny model's tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("chat-models"), tmp_path_factory.mktemp("tokenizer")
    for file in (ROOT / "gemma-3-tiny-mlx").glob("tokenizer*.json"):
        shutil.copy(file, tokenizer)
    shape = {"vocab_size": 3072, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    llama = save("llama", folder / "transformers-llama", tokenizer=tokenizer, **shape)
    changed(llama, folder / "llama", rope_theta=5e5)
    save("qwen3", folder / "qwen3", tokenizer=tokenizer, **shape)
    quantised(folder / "qwen3", folder / "4-bit", dtype=mx.float32)
    config = json.loads((folder / "4-bit" / "config.json").read_text())
    (folder / "4-bit" / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    return {name: str(folder / name) for name in ("transformers-llama", "llama", "4-bit")} | {"gemma": small}


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("gemma", {}),
        ("llama", {"train_type": "dora"}),
        ("llama", {"train_type": "full"}),
        ("llama", {"train_type": "full", "num_layers": 1}),
        ("4-bit", {"num_layers": 2}),
    ],
    ids=str,
)
def test_mlx_lm_loads_the_adapter_and_fuses_it(settings, bases, tmp_path, monkeypatch, base, changes):
    """The same logits in memory, from `mlx_lm.load(adapter_path=...)`, and from what `mlx_lm.fuse` writes."""
    import mlx_lm
    from mlx_lm import fuse

    run = prepare(settings(model=bases[base], max_length=40, output=str(tmp_path / "a run"), **changes))
    training_run.run(run)
    final = tmp_path / "a run" / "final"
    run.trainer.model.eval()
    ids = mx.array(run.trainer.batches.rows.ids[0])[None]
    expected = run.trainer.model(ids)
    plain, _ = mlx_lm.load(bases[base])
    assert not mx.allclose(plain(ids), expected, atol=1e-2)
    loaded, tokenizer = mlx_lm.load(bases[base], adapter_path=str(final))
    loaded.set_dtype(mx.float32)
    assert mx.allclose(loaded(ids), expected, atol=1e-4)
    answers = [mlx_lm.generate(model, tokenizer, "the cat", max_tokens=5) for model in (loaded, run.trainer.model)]
    assert answers[0] == answers[1]
    command = shlex.split(dict(run.next_lines())["fuse"])  # as it is printed
    assert command[-1] == "--dequantize" if base == "4-bit" else "--dequantize" not in command
    command[command.index("fused")] = str(tmp_path / "fused")
    monkeypatch.setattr(sys, "argv", command)
    fuse.main()
    fused, _ = mlx_lm.load(str(tmp_path / "fused"))
    assert mx.allclose(fused(ids).astype(mx.float32), expected, atol=2e-3)


def test_rope_that_mlx_lm_does_not_read_is_a_warning(settings, bases):
    def told(base: str) -> list[str]:
        warnings = [line for name, line in prepare(settings(model=bases[base])).headline if name == "warning"]
        return [line for line in warnings if "too few" not in line]

    (line,) = told("transformers-llama")
    assert '"rope_theta": 500000.0' in line and "config.json" in line
    assert told("llama") == told("4-bit") == told("gemma") == []


def test_a_template_that_stands_in_is_saved_and_spoken_of(settings, small, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(small, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    train.train(settings(model=str(folder)))
    out = capsys.readouterr().out
    assert "ChatML, as the tokenizer has no template" in out and "chat_template.jinja into the model's folder" in out
    assert "<|im_start|>" in (tmp_path / "run" / "final" / "chat_template.jinja").read_text()


# --- what is said and refused ---------------------------------------------------------------------------------------


def headline(settings: Settings) -> str:
    return "\n".join(f"{name} {line}" for name, line in prepare(settings).headline)


def test_iters_and_epochs_are_computed_from_each_other(settings):
    assert "7 steps = 1.2 epochs" in headline(settings(steps=7))
    by_epochs = settings(steps=None, epochs=3)
    assert "3 epochs = 18 steps" in headline(by_epochs) and by_epochs.steps == 18
    neither = settings(steps=None)
    assert "1 epoch = 6 steps" in headline(neither) and neither.steps == 6
    with pytest.raises(UserError, match="--steps 6 and --epochs 3 disagree"):
        headline(settings(steps=6, epochs=3))
    with pytest.raises(UserError, match="--steps 0"):
        settings(steps=0)


def test_what_is_done_otherwise_is_said_once(settings, tmp_path, write_rows):
    told = headline(settings(batch_size=64, max_length=30))
    assert "--batch-size 64 is more than 22 conversations" in told and "batch 22" in told
    assert told.count("warning truncated ") == 2 and told.count(" of more than 30 tokens") == 2
    (tmp_path / "data" / "valid.jsonl").unlink()
    assert "validation none: no valid.jsonl" in headline(settings())
    write_rows([*rows(5), b"{"], "data/train.jsonl")
    with pytest.raises(UserError, match=r"train.jsonl:6: broken JSON"):
        headline(settings())
    assert "left out 1 bad row: " in headline(settings(skip_bad_rows=True))


def test_keys_that_are_not_read_are_said_once(settings, write_rows):
    write_rows([row | {"difficulty": "hard"} for row in rows(3)], "data/train.jsonl")
    write_rows([row | {"difficulty": "easy"} for row in rows(2, 1)], "data/valid.jsonl")
    assert headline(settings()).count("ignored keys that are not read: difficulty (5 rows)") == 1


def test_without_validation_a_run_trains(settings, tmp_path):
    (tmp_path / "data" / "valid.jsonl").unlink()
    results = train.train(settings())
    assert results["before"] is results["after"] is None
    assert not (tmp_path / "run" / "best").exists() and (tmp_path / "run" / "final").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 5000}, "--max-length 5000: the model has 2048 positions"),
        ({"num_layers": 9}, "--num-layers 9: the model has 3 layers"),
        ({"lora_keys": ["nothing"]}, "--lora-keys nothing match nothing"),
        ({"pooling": "mean"}, "--pooling is for --task embed, and this is chat"),
        ({"micro_batch_tokens": 5}, "--micro-batch-tokens is for --task embed or late or rerank"),
        ({"temperature": 0.1}, "--temperature is for"),
        ({"loss": "info_nce"}, "--loss is for"),
        ({"eval_tasks": ["eval-data"]}, "--eval-tasks is for"),
        ({"query_max_length": 9}, "--query-max-length is for"),
        ({"profile": 3}, "--profile is for"),
        ({"data": ["nowhere"]}, "--data nowhere: no such file or folder"),
    ],
)
def test_what_does_not_fit_is_refused(settings, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(settings(**changes))


def test_encoders_and_quantised_weights_are_refused(settings, minilm, bases):
    with pytest.raises(UserError, match="--task chat needs a language model, and .* is a bert"):
        prepare(settings(model=str(minilm)))
    with pytest.raises(UserError, match="quantised weights cannot be trained"):
        prepare(settings(model=bases["4-bit"], train_type="full"))


def test_chat_s_flags_are_refused_elsewhere(tmp_path, small, write_rows):
    data = write_rows([{"query": f"q{i}", "document": f"d{i}"} for i in range(8)])
    for changes in ({"mask_prompt": True}, {"val_batches": 2}, {"steps_per_report": 3}):
        chosen = Settings(model=small, data=[str(data)], batch_size=4, output=str(tmp_path / "run"), **changes)
        with pytest.raises(UserError, match=r"is for --task chat, and this is embed"):
            training_run.prepare(chosen)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"grad_checkpoint": True}, {"num_layers": 1}, {"batch_size": 8}], ids=str)
def test_the_estimate_is_near_the_peak(settings, bases, changes):
    gc.collect()
    others = mx.get_active_memory()  # models that other tests share
    run = prepare(settings(**{"model": bases["llama"], "batch_size": 4} | changes))
    run.trainer.measure_step()
    peak = mx.get_peak_memory() - others
    assert 0.6 < run.outlook.expected.total / peak < 1.6, (run.outlook, peak)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_that_people_know(settings, small, tmp_path, monkeypatch, capsys):
    """The command of docs/chat.md with a local model, in a folder with data/: conversations are recognised."""
    monkeypatch.chdir(tmp_path)
    flags = "--batch-size 4 --iters 8 --learning-rate 2e-4 --num-layers 1 --grad-checkpoint --steps-per-eval 8"
    flags += " --val-batches 2 --steps-per-report 4 --save-every 8"
    settings()
    assert train.main(["--model", small, *flags.split()]) == 0
    assert "data 22 conversations" in " ".join(capsys.readouterr().out.split())
    run = tmp_path / "adapters"
    assert [record["step"] for record in metrics(run)] == [4, 8]
    assert [record["step"] for record in metrics(run, "eval")] == [0, 8] and (run / "step-000008").is_dir()
    written = (run / "config.yaml").read_text()
    for line in ("task: chat", "steps: 8", "eval_steps: 8", "save_steps: 8", "num_layers: 1", "grad_checkpoint: true"):
        assert line in written
    assert train.main(["--model", small, *flags.split(), "--output", "adapters"]) == 2  # another run is there
    assert "--resume" in capsys.readouterr().err
    assert train.main(["--resume"]) == 2 and "is finished" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, small, write_rows):
    """From the command line, in a process of its own."""
    data = write_rows([{"messages": [{"role": "user", "content": "hi"}]}])
    command = [sys.executable, str(ROOT / "train.py"), "--model", small, "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert f"train.py: {data}:1: no assistant message" in done.stderr and not (tmp_path / "adapters").exists()


# --- memory on a Mac --------------------------------------------------------------------------------------------------


def test_on_macs_a_batch_is_cut_into_what_fits(settings, as_metal, monkeypatch):
    """By the estimate; and the run's settings say so, so that it is resumed the same."""
    assert prepare(settings()).settings.gradient_accumulation_steps == 0  # there is room for the whole batch
    sizes = [prepare(settings(gradient_accumulation_steps=n)).outlook.expected for n in (1, 2)]
    weights = sizes[1].weights + sizes[1].optimizer
    room = weights + int((sizes[0].step + sizes[1].step) / 2 / device_memory.share())
    monkeypatch.setattr(device_memory, "free", lambda: room)
    run = prepare(settings())
    assert run.settings.gradient_accumulation_steps == run.trainer.batches.parts == 2
    assert run.outlook.expected.step <= device_memory.share() * (room - weights)
    assert "2 micro-batches a batch" in dict(run.headline)["memory"]
    assert prepare(settings(gradient_accumulation_steps=1)).trainer.batches.parts == 1  # as it is asked for


def test_on_macs_what_cannot_fit_is_refused(settings, as_metal, monkeypatch):
    monkeypatch.setattr(device_memory, "free", lambda: 1000)
    with pytest.raises(UserError, match="a step takes about .* GB are free: .*--gradient-accumulation-steps"):
        prepare(settings())
    monkeypatch.setattr(backend, "IS_METAL", False)  # elsewhere it is a warning
    assert prepare(settings()).trainer.batches.parts == 1


# --- errors of the GPU ------------------------------------------------------------------------------------------------

WATCHDOG = "[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackError"


@pytest.fixture
def weak(monkeypatch):
    """`weak(tokens)`: the device fails at more tokens at once, after the step has put its results in place."""
    evaluate = mx.eval
    sizes = []

    def make(most: int) -> None:
        def loss(model, ids, *rest):
            sizes.append(ids.size)
            return loss_of(model, ids, *rest)

        def fail(*arrays):
            if any(size > most for size in sizes):
                sizes.clear()
                raise RuntimeError(WATCHDOG)
            sizes.clear()
            evaluate(*arrays)

        monkeypatch.setattr(tuning, "loss_of", loss)
        monkeypatch.setattr(mx, "eval", fail)

    return make


def test_a_step_is_repeated_in_more_parts_after_an_overload(settings, tmp_path, weak):
    """Regression: a traceback. The weights are those of a run that had as many parts from the start."""
    run = {"steps": 2, "batch_size": 6, "lora_dropout": 0.0, "data": settings().data}
    whole = training_run.prepare(settings(**run, gradient_accumulation_steps=2, output=str(tmp_path / "a"))).trainer
    training_run.take_steps(whole)
    widest = max(part.ids.size for k in range(2) for part in whole.batches.make(whole.batches.numbers(k)))
    one = training_run.prepare(settings(**run, output=str(tmp_path / "b"))).trainer
    one.validation = None
    weak(widest)
    training_run.take_steps(one)
    assert one.batches.parts == one.state.parts == 2 and one.state.step == 2
    expected = dict(tree_flatten(whole.model.trainable_parameters()))
    for name, value in tree_flatten(one.model.trainable_parameters()):
        assert mx.allclose(value, expected[name], atol=1e-6), name
    again = training_run.prepare(settings(**run, output=str(tmp_path / "c"))).trainer
    again.restore_state(one.state)
    assert again.batches.parts == 2


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_conversation_that_is_too_much_ends_the_run_and_doubtful_weights_are_not_saved(settings, weak, train_type):
    trainer = training_run.prepare(settings(steps=3, batch_size=2, train_type=train_type, save_steps=1)).trainer
    trainer.state.step = 1  # of which the weights are
    weak(1)
    with pytest.raises(UserError) as caught:
        training_run.take_steps(trainer)
    told = str(caught.value)
    assert WATCHDOG in told
    if train_type == "lora":
        assert "on a single conversation; --grad-checkpoint" in told and "the state after step 1 is saved" in told
    else:
        assert "only what was saved before is whole" in told and "--gradient-accumulation-steps 2" in told


def test_the_validation_loss_in_parts_is_the_same(settings, monkeypatch):
    trainer = training_run.prepare(settings()).trainer
    expected, calls = trainer.evaluate(0), []

    def loss(model, ids, *rest):
        calls.append(len(ids))
        if len(ids) > 2:
            raise RuntimeError(WATCHDOG)
        return loss_of(model, ids, *rest)

    monkeypatch.setattr(chat_trainer, "loss_of", loss)
    assert trainer.evaluate(0)["validation_loss"] == pytest.approx(expected["validation_loss"], rel=1e-5)
    assert max(calls) > 2
    calls.clear()
    trainer.evaluate(0)
    assert max(calls) <= 2
    monkeypatch.setattr(chat_trainer, "loss_of", loss_of)
    trainer.at_once = 3  # a batch of 4 is halved, and that is no failure of the device
    trainer.evaluate(0)
    assert trainer.at_once == 3
