"""Two ranks train as one: real processes over the ring on loopback, and the pure parts of training/distributed.py.

python -m pytest tests/training/test_distributed.py
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from simulated_ranks import on_ranks

import train
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference import text_vectors
from mlx_retrieval.training import distributed, run
from mlx_retrieval.training.checkpoint import last_step
from mlx_retrieval.utils.errors import SettingError, UserError

ROOT = Path(__file__).resolve().parent.parent.parent
WORDS = ("boiler", "drips", "night", "bike", "squeaks", "rains", "cold", "grey", "morning", "town")
VECTORS = "{root}/teacher.safetensors"
CASES = {
    "embed": [],
    # Dropout is drawn by micro-batch, so one rank and two agree where their plans do: four parts, here.
    "dropout": ["--gradient-accumulation-steps", "4", "--lora-dropout", "0.2"],
    "late": ["--task", "late", "--projection-dim", "8"],
    "rerank": ["--task", "rerank", "--loss", "info_nce", "--random-negatives", "3"],
    "sources": ["--config", "{root}/sources.yaml"],
    "full": ["--train-type", "full", "--learning-rate", "5e-5"],
    "vectors": ["--distill-weight", "0.5", "--teacher-projection", "--teacher-vectors", VECTORS, "--guide", VECTORS],
}
QUICK = ("embed",)
# A rank that runs commands one after the other, each in a folder of its own: argv[1] has both, for each rank.
# In step 3 of a run whose folder is called "signalled", rank 1 gets a signal.
DRIVER = """
import json, os, signal, sys
import train
from mlx_retrieval.training import distributed, run, trainer
from mlx.utils import tree_flatten
distributed.wait_for_main = lambda error: None  # rank 0 goes on with the next command
original, update, kept, done = run.run, trainer.Trainer.update, [], []
def signalled(self, batch, step):
    if self.folder.name == "signalled" and step == 3 and not distributed.is_main():
        os.kill(os.getpid(), signal.SIGTERM)
    return update(self, batch, step)
trainer.Trainer.update = signalled
run.run = lambda job, chosen=False: (kept.append(job.trainer), original(job, chosen))[1]
for folder, argv in json.loads(sys.argv[1])[int(os.environ["MLX_RANK"])]:
    kept.clear()
    os.chdir(folder)
    try:
        code = train.main(argv)
    except SystemExit as stop:
        code = stop.code
    digests = [distributed.digest(dict(tree_flatten(t.model.trainable_parameters()))) for t in kept]
    told = [f"{digest} at {t.state.step}" for digest, t in zip(digests, kept, strict=True)]
    done.append([code, *told])
print("OUTCOME " + json.dumps(done), flush=True)
"""
# A rank that runs the command argv[3:]; in step 4 rank argv[1] gets the signal argv[2].
VICTIM = """
import os, sys
import train
from mlx_retrieval.training import trainer
update = trainer.Trainer.update
def stricken(self, batch, step):
    if step == 4 and os.environ["MLX_RANK"] == sys.argv[1]:
        os.kill(os.getpid(), int(sys.argv[2]))
    return update(self, batch, step)
trainer.Trainer.update = stricken
sys.exit(train.main(sys.argv[3:]))
"""


def write(file: Path, rows: Sequence[dict]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_rows(count: int = 60) -> list[dict]:
    """Rows with hard negatives, texts of 1 to 60 words."""
    rng = np.random.default_rng(0)

    def text(i: int, longest: int) -> str:
        return f"{i} " + " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    return [{"query": text(i, 12), "positive": text(i, 60), "negatives": [text(i + 99, 60)]} for i in range(count)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def launch(hosts: Path, code: str, *arguments: str) -> list[subprocess.Popen]:
    """Two ranks, started by hand so that each one's exit code is seen."""
    hosts.write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(2)]))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLX_HOSTFILE": str(hosts)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    line = [sys.executable, "-c", code, *arguments]
    return [subprocess.Popen(line, env=environment | {"MLX_RANK": rank}, **pipes) for rank in "01"]


def collect(processes: list[subprocess.Popen], seconds: float = 300) -> list[SimpleNamespace]:
    """(code, out, err) of each, without what mlx's ring says; one that hangs is killed and fails the test."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=seconds)
            err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("[ring]"))
            found.append(SimpleNamespace(code=process.returncode, out=out, err=err))
    finally:
        for process in processes:
            process.kill()
    return found


class Work:
    """Folders and commands of this module's runs, and how the launches ended."""

    def __init__(self, root: Path, model: str):
        self.root, self.model = root, model
        self.rows = make_rows()
        self.data = write(root / "train.jsonl", self.rows)
        self.outcomes: dict[str, tuple] = {}
        self.ended: dict[str, list[SimpleNamespace]] = {}

    def argv(self, name: str, *more: str, data: Path | str | None = None) -> list[str]:
        values = {"model": self.model, "output": self.root / name, "batch-size": 12, "save-steps": 2}
        values |= {"steps": 4, "learning-rate": 1e-3, "lora-rank": 4, "rank-timeout": 120}
        values |= {} if "--config" in more else {"data": data or self.data}
        flags = [text for key, value in values.items() for text in (f"--{key}", str(value))]
        return [*flags, "--eval-tasks", "--skip-eval-init", *(word.format(root=self.root) for word in more)]

    def resume(self, name: str) -> list[str]:
        return ["--resume", "--output", str(self.root / name)]

    def weights(self, name: str, which: str = "final") -> np.ndarray:
        files = sorted((self.root / name / which).glob("*.safetensors"))
        tensors = [mx.load(str(file)) for file in files if file.name != "optimizer.safetensors"]
        return np.concatenate([np.array(v).reshape(-1) for part in tensors for _, v in sorted(part.items())])

    def losses(self, name: str) -> list[float]:
        records = [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]
        return [record["loss"] for record in records if record["type"] == "train"]

    def saved(self, name: str) -> int:
        return json.loads((last_step(self.root / name) / "trainer_state.json").read_text())["step"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, small) -> Work:
    """The data of all runs."""
    work = Work(tmp_path_factory.mktemp("ranks"), small)
    write(work.root / "split" / "train.jsonl", work.rows[:48])
    write(work.root / "split" / "valid.jsonl", work.rows[48:])
    texts = {(row["query"], "query") for row in work.rows}
    texts |= {(text, "document") for row in work.rows for text in (row["positive"], *row["negatives"])}
    keys = [vector_key(*text) for text in sorted(texts)]
    vectors = np.random.default_rng(0).normal(size=(len(keys), 24)).astype(np.float32)
    text_vectors.write(work.root / "teacher.safetensors", keys, vectors, {"model": "random"})
    pairs = [{"text1": r["query"], "text2": r["positive"], "score": i % 7 / 6} for i, r in enumerate(work.rows)]
    sources = [{"data": str(work.data), "query_prompt": "question: "}]
    sources += [{"data": str(write(work.root / "scored.jsonl", pairs)), "loss": "cosent"}]
    (work.root / "sources.yaml").write_text(json.dumps({"sources": sources}))  # JSON is YAML
    return work


def together(work: Work, name: str, lines: dict[str, list[tuple[str, list[str]]]]) -> None:
    """Run commands, of each rank its own, in as few processes as can be: most of their time is Python starting."""
    both = collect(launch(work.root / f"{name}.json", DRIVER, json.dumps(list(zip(*lines.values(), strict=True)))))
    done = [line for ended in both for line in ended.out.splitlines() if line.startswith("OUTCOME ")]
    assert len(done) == 2, [ended.err for ended in both]
    told = [json.loads(line.removeprefix("OUTCOME ")) for line in done]
    work.outcomes |= dict(zip(lines, zip(*told, strict=True), strict=True))
    work.ended[name] = both


@pytest.fixture(scope="module")
def work(files: Work) -> Work:
    """The same, after the runs of the quick tests."""
    root, argv = files.root, files.argv
    batches = run.prepare(train.from_flags("", "", argv("none"))[0]).trainer.batches
    changed = batches.row_numbers(2)[3]  # which the first batch does not have
    rows = [row | {"query": "another"} if i == changed else row for i, row in enumerate(files.rows)]
    elsewhere = write(root / "elsewhere" / "train.jsonl", rows).parent
    here = str(root)
    commands = {name: argv(name, *CASES[name]) for name in QUICK} | {
        "stopped": argv("by-two", "--stop-after", "2"),
        "resumed": files.resume("by-two"),
        "signalled": argv("signalled"),
    }
    lines = {name: [(here, command)] * 2 for name, command in commands.items()} | {
        # The settings name the same file, but what is in it differs from machine to machine.
        "unequal": [(str(folder), argv("unequal", data="train.jsonl")) for folder in (root, elsewhere)],
        "chat": [(here, argv("no", "--task", "chat"))] * 2,
        "seed": [(here, argv("no", "--seed", seed)) for seed in "01"],
        "file": [(here, argv("no", data=name)) for name in ("train.jsonl", "missing.jsonl")],
        "finished": [(here, files.resume("by-two"))] * 2,
    }
    together(files, "quick", lines)
    return files


@pytest.fixture(scope="module")
def more(work: Work) -> Work:
    """The same, after the runs of the slow tests."""
    argv = work.argv
    assert train.main(argv("by-one", "--stop-after", "2")) == 0
    patient = ["--early-stopping", "1", "--eval-steps", "1", "--learning-rate", "1e-30"]  # too little to change a score
    commands = {name: argv(name, *flags) for name, flags in CASES.items() if name not in QUICK} | {
        "taken over": work.resume("by-one"),
        "stopped, for one": argv("by-two-and-one", "--stop-after", "2"),
        "no gain": argv("patience", *patient, data=work.root / "split"),
        "dry run": argv("dry", "--dry-run"),
        "longer": [*work.resume("patience"), "--steps", "5", "--early-stopping", "0"],
    }
    together(work, "slow", {name: [(str(work.root), command)] * 2 for name, command in commands.items()})
    return work


@pytest.fixture(scope="module")
def lost(files: Work) -> Work:
    """The same, after runs in which a rank is killed or hangs."""
    root, argv = files.root, files.argv

    def strike(name: str, victim: int, number: int, *more: str) -> list[str]:
        return [str(victim), str(int(number)), *argv(name, *more)]

    halted = launch(root / "h.json", VICTIM, *strike("halted", 1, signal.SIGSTOP, "--rank-timeout", "15"))
    (root / "victim.py").write_text(VICTIM)
    line = [Path(sys.executable).with_name("mlx.launch"), "-n", "2", "--backend", "ring", "-p", free_port()]
    line += [sys.executable, root / "victim.py", *strike("killed", 1, signal.SIGKILL)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)  # the launcher reads its input
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    files.ended["killed"] = collect([subprocess.Popen(list(map(str, line)), env=environment, text=True, **pipes)])
    files.ended["killed-first"] = collect(launch(root / "k.json", VICTIM, *strike("killed-first", 0, signal.SIGKILL)))
    try:
        files.ended["halted"] = collect(halted[:1])
    finally:
        halted[1].kill()
        halted[1].communicate()
    return files


# --- two ranks are one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_two_ranks_train_what_one_trains(request, work, name):
    """Losses within 1e-5, adapters too but for single weights; both ranks end with the same bits.

    Adam divides each gradient by its own size: where one is nearly 0, rounding decides about its sign, and a weight
    may end up anywhere within steps * rate. So all weights are compared together.
    """
    if name not in QUICK:
        request.getfixturevalue("more")
    first, second = work.outcomes[name]
    assert first == second and first[0] == 0 and first[1].endswith(" at 4")
    assert train.main(work.argv(f"{name}-alone", *CASES[name])) == 0
    expected = work.weights(f"{name}-alone")
    np.testing.assert_allclose(work.losses(name), work.losses(f"{name}-alone"), rtol=1e-5)
    way = np.linalg.norm(expected - work.weights(f"{name}-alone", "step-000002"))  # that of the last two steps
    apart = work.weights(name) - expected
    assert np.linalg.norm(apart) < 5e-3 * way and np.mean(np.abs(apart) > 1e-5) < 0.01


def test_only_the_first_rank_speaks(work):
    out, silent = (ended.out for ended in work.ended["quick"])
    assert out.count("2 processes share") >= 4 and "step 4/4" in out
    assert all(line.startswith("OUTCOME") for line in silent.splitlines())


def test_a_stopped_run_goes_on_as_if_it_had_not_been(work):
    """Rank 0's folder is enough: settings, weights, optimizer and state reach the other from it."""
    for name in ("stopped", "resumed"):
        first, second = work.outcomes[name]
        assert first == second and first[0] == 0, name
    np.testing.assert_array_equal(work.weights("by-two"), work.weights("embed"))


@pytest.mark.slow
def test_runs_are_continued_by_any_number_of_ranks(more):
    for name in ("taken over", "stopped, for one", "dry run"):
        first, second = more.outcomes[name]
        assert first == second and first[0] == 0, name
    assert train.main(more.resume("by-two-and-one")) == 0
    for name in ("by-one", "by-two-and-one"):
        assert np.abs(more.weights(name) - more.weights("embed")).max() < 1e-5
        assert len(more.losses(name)) == 4


@pytest.mark.slow
def test_all_stop_where_the_first_saw_no_gain(more):
    first, second = more.outcomes["no gain"]
    assert first == second and first[0] == 0 and first[1].endswith(" at 2")
    assert (more.root / "patience" / "final").is_dir()


@pytest.mark.slow
def test_all_go_on_with_a_run_that_had_ended(more):
    first, second = more.outcomes["longer"]
    assert first == second and first[0] == 0 and first[1].endswith(" at 5") and more.saved("patience") == 5


# --- what cannot go on ends, and says so ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, words", [
    ("chat", "--task chat works in one process only"),
    ("seed", "at the settings: seed is 0 on rank 0 and 1 on rank 1"),
    ("file", "missing.jsonl"),
    ("finished", "is finished"),
])  # fmt: skip
def test_a_mistake_of_one_is_told_by_all(work, name, words):
    assert [outcome[0] for outcome in work.outcomes[name]] == [2, 2]
    assert all(words in ended.err for ended in work.ended["quick"])
    assert not (work.root / "no").exists()


def test_unequal_data_end_in_the_step_that_meets_them(work):
    """The files differ in a row of the third batch only. Regression: the ring takes whatever comes, or hangs."""
    assert [outcome[0] for outcome in work.outcomes["unequal"]] == [2, 2]
    for ended in work.ended["quick"]:
        assert "do not agree, at step 3: the batch is " in ended.err
    assert "the state after step 2 is saved" in work.ended["quick"][0].err and work.saved("unequal") == 2


def test_a_signal_to_one_rank_stops_all_after_the_same_step(work):
    first, second = work.outcomes["signalled"]
    assert first == second and first[0] == 128 + signal.SIGTERM and first[1].endswith(" at 3")
    assert work.saved("signalled") == 3 and "step 3 is saved. Continue: " in work.ended["quick"][0].out


@pytest.mark.slow
def test_a_lost_rank_ends_the_others_with_what_is_saved(lost):
    """Under mlx.launch, which ends with 0 all the same and sends SIGTERM to those that are left."""
    (launcher,) = lost.ended["killed"]
    (told,) = [line for line in launcher.err.splitlines() if line.startswith("train.py")]
    assert "another rank was lost, at step 4" in told and "the state after step 3 is saved" in told
    assert told.endswith(f"python train.py --resume --output {lost.root / 'killed'}")
    assert "rank 0 exited with code 3" in launcher.err and launcher.code == 0
    assert lost.saved("killed") == 3 and not (lost.root / "killed" / "final").exists()
    assert train.main(lost.resume("killed")) == 0 and len(lost.losses("killed")) == 4


@pytest.mark.slow
def test_without_the_first_rank_the_last_checkpoint_remains(lost):
    dead, second = lost.ended["killed-first"]
    assert (
        dead.code == -signal.SIGKILL and second.code == distributed.EXIT_RANK_LOST and lost.saved("killed-first") == 2
    )
    assert len(second.err.splitlines()) == 1 and "another rank was lost, at step 4" in second.err


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up(lost):
    (first,) = lost.ended["halted"]
    assert first.code == distributed.EXIT_RANK_LOST and lost.saved("halted") == 3
    (line,) = first.err.splitlines()
    assert "said nothing for 15 seconds" in line and "the state after step 3 is saved" in line


# --- pure parts -------------------------------------------------------------------------------------------------------


def test_a_process_alone_exchanges_nothing(monkeypatch):
    monkeypatch.setattr(mx, "distributed", None)
    distributed.start()
    assert distributed.size() == 1 and distributed.is_main() and distributed.rank_label() == ""
    assert distributed.gather_bytes("x", b"data") == [b"data"] and distributed.all_max("x", 3, 4) == [3, 4]
    distributed.check_equal("x", {"a": 1})
    tree = {"a": mx.ones(3)}
    assert distributed.broadcast_arrays(tree) is tree and distributed.broadcast_object("x", lambda: tree) is tree
    with pytest.raises(UserError, match="as it was"), distributed.raise_together("x"):
        raise UserError("as it was")
    distributed.barrier()


def outcomes(function) -> list[str]:
    """What `function` does on each of two ranks: the error that it raises, with its type, or its result."""

    def attempt() -> str:
        try:
            return str(function())
        except UserError as error:
            return f"{type(error).__name__}: {error}"

    return on_ranks(2, attempt)


LONG = f"a run is in this folder {'and so on ' * 20}"


@pytest.mark.parametrize("reason", ["a run is here", LONG])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_is_told_wherever_the_others_are(failing, reason):
    """Regression: the others were in an exchange within the block, so that all ended with "gone different ways"."""

    def prepare(raises: bool) -> str:
        with distributed.raise_together("the preparation"):
            if raises:
                raise SettingError("{output}: {reason}", reason=reason)
            with distributed.raise_together("the inner part"):
                return distributed.broadcast_object("the questions", lambda: "asked")

    told = outcomes(lambda: prepare(distributed.rank() == failing))
    assert told[failing] == f"SettingError: --output: {reason}"
    assert told[1 - failing] == f"RankError: --output: {reason} (rank {failing})"
    assert outcomes(lambda: prepare(False)) == ["asked", "asked"]
    assert outcomes(lambda: prepare(True)) == [f"SettingError: --output: {reason}"] * 2


def test_an_error_of_one_in_a_step_is_told_by_the_first_which_saves():
    """Regression: it said that the ranks had gone different ways."""

    def step() -> None:
        if distributed.is_main():
            with distributed.rescuing(lambda: "; step 3 is saved"):
                distributed.all_max("step 4", 0)
        distributed.wait_for_main(UserError("rows.jsonl:7: the file was changed"))

    assert outcomes(step) == ["RankError: rows.jsonl:7: the file was changed (rank 1); step 3 is saved", "None"]


def test_ranks_at_different_places_end():
    (first, second) = outcomes(lambda: distributed.barrier(f"place {distributed.rank()}"))
    assert (
        first == second == "RankMismatch: the ranks have gone different ways: rank 0 at 'place 0', rank 1 at 'place 1'"
    )


def test_digests_tell_arrays_apart():
    arrays = {"a": mx.arange(10_000.0), "b": np.arange(3), "c": 7}
    same = {"c": 7, "b": np.arange(3), "a": mx.arange(10_000.0)}
    assert distributed.digest(arrays) == distributed.digest(same)
    others = [{"a": mx.arange(10_000.0).astype(mx.float16)}, {"a": mx.arange(10_000.0).reshape(100, 100)}]
    others += [{"a": mx.arange(10_000.0) * 2}, {"b": np.arange(4)}, {"c": 8}, {"d": 1}]
    assert len({distributed.digest(arrays | other) for other in [{}, *others]}) == len(others) + 1


def test_large_messages_are_cut_by_type_and_size(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_SIZE", 10)
    tree = {"a": mx.zeros(4), "b": mx.zeros((2, 3)), "c": [mx.zeros(1), mx.zeros(99)], "d": mx.zeros(2, mx.int32)}
    lots = [[key for key, _ in lot] for lot in distributed._buckets(tree)]
    assert lots == [["a", "b"], ["c.0"], ["c.1"], ["d"]]
