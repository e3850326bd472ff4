"""serve.py: its flags, its files of keys, and one line for whatever is wrong.

python -m pytest tests/inference/test_serve_command.py
"""

import configparser
import io
import plistlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import serve
from mlx_retrieval.inference.serving import model_thread, run

PAGE = Path(serve.__file__).parent / "docs" / "serving.md"


@pytest.fixture
def started(monkeypatch) -> list:
    """What `run` is called with, in place of a server."""
    calls = []
    monkeypatch.setattr(run, "run", lambda models, settings, host, port: calls.append((models, settings, host, port)))
    return calls


def refused(capsys, *flags: str) -> str:
    assert serve.main([*flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("serve.py: ")
    return line


def test_models_by_their_names(small, started):
    assert serve.main(["--model", f"docs={small}", small, "--model", f"a b={small}"]) == 130
    (models, settings, host, port) = started[0]
    assert [(each.name, each.kind) for each in models.all] == [("docs", "embed"), (small, "embed"), ("a b", "embed")]
    assert (settings.keys, settings.docs, settings.origins, settings.access_log) == ((), True, (), None)
    assert (host, port, models.ready, models.max_memory) == ("127.0.0.1", 8000, False, None)


def test_every_flag_has_its_effect(small, started, tmp_path):
    keys, log = tmp_path / "keys.txt", tmp_path / "log.jsonl"
    keys.write_text("# of the web shop\nk-1\n\n  k-2 \n")
    flags = ["--lazy", "--max-memory", "0.5", "--host", "::1", "--port", "0", "--api-key-file", str(keys), "--no-docs"]
    flags += ["--cors", "https://a.org", "https://b.org", "--access-log", str(log), "--dtype", "bfloat16"]
    serve.main(["--model", f"docs={small}", *flags])
    (models, settings, host, port) = started[0]
    assert (models.ready, models.max_memory, host, port) == (True, 1 << 29, "::1", 0)
    assert (settings.keys, settings.docs, settings.origins) == (
        ("k-1", "k-2"),
        False,
        ("https://a.org", "https://b.org"),
    )
    assert settings.access_log.name == str(log) and log.exists()
    assert models.all[0].load().dtype == "bfloat16"
    serve.main(["--model", small, "--access-log", "-"])
    assert isinstance(started[1][1].access_log, io.TextIOBase)


def test_comments_in_a_file_of_keys(tmp_path):
    """Regression: what stood behind a key was a part of it, so the key itself was refused."""
    file = tmp_path / "keys.txt"
    file.write_text("# of the shops\nk-1  # web shop\nk#2\n  # closed\nk-3\t#old\n")
    assert serve.read_keys(str(file)) == ("k-1", "k#2", "k-3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a={small}", "a={small}"], "two models are called a"),
        (["={small}"], "NAME=PATH"),
        (["a="], "NAME=PATH"),
        (["a\n={small}"], "printable"),
        (["a=nowhere-at-all"], "no folder"),
        (["{small}", "--max-memory", "0"], "above 0"),
        (["{small}", "--max-memory", "nan"], "above 0"),
        (["{small}", "--max-memory", "inf"], "above 0, and finite"),
        (["{small}", "--max-memory", "1e300"], "above 0, and finite"),
        (["{small}", "--max-memory", "0.00001"], "more than --max-memory allows"),
        (["{small}", "--api-key-file", "{tmp}/none.txt"], "No such file"),
        (["{small}", "--api-key-file", "{tmp}/empty.txt"], "contains no key"),
        (["{small}", "--api-key-file", "{tmp}/odd.txt"], "odd.txt:2: a key is plain ASCII"),
        (["{small}", "--api-key-file", "{tmp}/latin.txt"], "not UTF-8"),
        (["{small}", "--access-log", "{tmp}/no/log.jsonl"], "No such file"),
    ],
)
def test_bad_input_is_one_line(small, tmp_path, capsys, started, flags, words):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    (tmp_path / "odd.txt").write_text("good\nclé\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"cl\xe9\n")
    assert words in refused(capsys, "--model", *(flag.format(small=small, tmp=tmp_path) for flag in flags))
    assert not started


def test_a_port_in_use_and_folders_of_other_things_are_one_line(small, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = refused(capsys, "--model", small, "--lazy", "--port", str(taken.getsockname()[1]))
    assert "already in use" in line
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "PEFT" in refused(capsys, "--model", str(tmp_path))


def test_flags_that_are_none(capsys):
    for flags, words in (
        (["--modle", "a"], "did you mean --model?"),
        ([], "--model"),
        (["--model", "a", "--prot", "1"], "--port"),
    ):
        with pytest.raises(SystemExit) as end:
            serve.main(flags)
        assert end.value.code == 2 and words in capsys.readouterr().err


# --- the files of docs/serving.md for systemd and launchd ------------------------------------------------------------


def block(beginning: str) -> str:
    """The block of the page that begins so."""
    (found,) = re.findall(rf"^```text\n({re.escape(beginning)}.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return found


def test_the_unit_for_systemd(tmp_path):
    text = block("[Unit]")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    python, script, *flags = shlex.split(unit["Service"]["ExecStart"])
    assert (
        Path(python).is_absolute() and script == "serve.py" and Path(unit["Service"]["WorkingDirectory"]).is_absolute()
    )
    assert serve.parser().parse_args(flags).api_key_file
    assert int(unit["Service"]["TimeoutStopSec"]) > run.SHUTDOWN_S + model_thread.STUCK_S
    if shutil.which("systemd-analyze"):
        folders = {python: sys.executable, unit["Service"]["WorkingDirectory"]: str(tmp_path), "User=retrieval\n": ""}
        for there, here in folders.items():
            text = text.replace(there, here)
        (tmp_path / "a.service").write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", tmp_path / "a.service"], capture_output=True, text=True)
        assert "a.service" not in done.stderr, done.stderr


def test_the_agent_for_launchd():
    agent = plistlib.loads(block("<?xml").encode())
    python, script, *flags = agent["ProgramArguments"]
    assert Path(python).is_absolute() and script == "serve.py" and serve.parser().parse_args(flags).port == 8000
    assert set(agent) == {
        "Label",
        "WorkingDirectory",
        "ProgramArguments",
        "RunAtLoad",
        "KeepAlive",
        "StandardErrorPath",
    }  # keys of launchd.plist(5)
    assert agent["RunAtLoad"] is True and agent["KeepAlive"] == {"SuccessfulExit": False}
