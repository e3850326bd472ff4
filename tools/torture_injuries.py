"""What torture.py does to a command: damaged data and models, bad folders, closed descriptors, signals, wrong flags.

Each injury says what has to follow:

same      the command ends with 0 and the result that it has unharmed
accepted  it ends with 0; the result is complete and finite, but may differ
refused   it ends with 2 (embed.py --check: 1) and says why in a line
either    refused or accepted
stopped   accepted, or ended by the signal, or saved and 128 + the signal
"""

import random
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torture_commands import COMMANDS, Command
from torture_damage import (
    Apply,
    add_judgement,
    close,
    cut_weights,
    foreign_output,
    full_disk,
    half_a_pair,
    in_bytes,
    in_config,
    in_row,
    insert,
    nan_weights,
    other_kind,
    output_below_file,
    output_in_new_folder,
    output_kind,
    output_on_input,
    read_only,
    reader_leaves,
    replaced_by,
    scatter,
    send,
    typo,
    with_environment,
    with_number,
    with_query,
    with_words,
    without_files,
)


@dataclass(frozen=True)
class Injury:
    """Its name, the kinds of slot that it fits, what has to follow, and what it does.

    apply: (attempt, slot, random numbers) -> None. fits: a further condition on the command.
    """

    name: str
    kinds: tuple[str, ...]
    follows: str
    apply: Apply
    fits: Callable[[Command], bool] = lambda command: True


ITSELF = ("",)  # the kind of no slot: the command as a whole is damaged
LINES = ("rows", "texts", "chat", "beir", "queries")  # kinds that are JSON lines
FILES = (*LINES, "plain", "sources")
PLAIN_FILES = ("rows", "texts", "plain", "queries", "yaml")  # of one file
MODELS = ("embed", "rerank", "decoder", "adapter")


def _writes(command: Command) -> bool:
    return bool(command.output)


def _writes_a_file(command: Command) -> bool:
    return "." in command.output


def _writes_a_folder(command: Command) -> bool:
    return _writes(command) and not _writes_a_file(command)


def _prints(command: Command) -> bool:
    return not command.output


def _asks(command: Command) -> bool:
    return "{query}" in command.line


def _trains(command: Command) -> bool:
    return command.name.startswith("train")


def _takes_one_kind(command: Command) -> bool:
    # A teacher may be either; eval.py takes the task from the model; training may begin with any model.
    return command.name not in ("mine score", "eval embed") and not _trains(command)


C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ODD_QUERIES = ("\udced\udca0\udcbd half", "a\tb\nc", "\u202e", "'; --", "é" * 9000)
CRLF = re.compile(rb"(?<!\r)\n")
INJURIES: dict[str, tuple[Injury, ...]] = {
    "judgements": (
        Injury("graded twice", ("beir",), "accepted", add_judgement("{query}\t{document}\t0")),
        Injury("unknown document judged", ("beir",), "accepted", add_judgement("{query}\tnowhere\t1")),
        Injury("unknown query judged", ("beir",), "accepted", add_judgement("nobody\t{document}\t1")),
        Injury("a grade that is no number", ("beir",), "refused", add_judgement("{query}\t{document}\tgood")),
    ),
    "data": (
        Injury("byte order mark", (*LINES, "plain", "yaml"), "same", in_bytes(lambda b, r: b"\xef\xbb\xbf" + b)),
        Injury("Windows line ends", (*LINES, "plain", "yaml"), "same", in_bytes(lambda b, r: CRLF.sub(b"\r\n", b))),
        Injury("no last line end", (*LINES, "plain", "yaml"), "same", in_bytes(lambda b, r: b.rstrip(b"\n"))),
        Injury("blank lines", ("rows", "texts", "beir", "yaml"), "same", in_bytes(lambda b, r: b + b"\n\n")),
        Injury("scattered bytes", (*FILES, "yaml"), "either", in_bytes(scatter)),
        Injury("NUL byte", (*FILES, "yaml"), "either", in_bytes(insert(b"\0"))),
        Injury("Latin-1 letter", (*FILES, "yaml"), "either", in_bytes(insert(b"\xe9"))),
        Injury("cut in half", FILES, "either", in_bytes(lambda b, r: b[: len(b) // 2])),
        Injury("empty", PLAIN_FILES, "either", in_bytes(lambda b, r: b"")),
        Injury("only blank lines", ("rows", "texts", "queries"), "refused", in_bytes(lambda b, r: b"\n \n")),
        Injury("compressed by name only", LINES, "either", in_bytes(lambda b, r: b"\x1f\x8b\x08" + b)),
        Injury("half a surrogate pair", LINES, "accepted", in_row(half_a_pair)),
        Injury("a long row", LINES, "either", in_row(lambda row, r: row | {"text": "word " * 150_000})),
        Injury("null for optional keys", ("rows",), "accepted", in_row(lambda row, r: row | {"rank": None})),
        Injury("a number for a text", ("rows", "texts"), "refused", in_row(lambda row, r: dict.fromkeys(row, 7))),
        Injury("label-like key", ("rows",), "refused", in_row(lambda row, r: row | {"is_relevant": 0})),
        Injury("missing", (*FILES, "index", "yaml"), "refused", replaced_by(lambda path: None)),
        Injury("a folder for a file", PLAIN_FILES, "refused", replaced_by(Path.mkdir)),
    ),
    "model": (
        Injury("cut weights", MODELS, "refused", cut_weights),
        Injury("weights that are not finite", MODELS, "refused", nan_weights),
        Injury("broken settings", MODELS, "refused", in_config(lambda text: text[: len(text) // 2])),
        Injury("settings of zero", MODELS, "refused", in_config(lambda text: "{}")),
        Injury("no weights", MODELS, "refused", without_files("*.safetensors")),
        Injury("no tokenizer", ("embed", "rerank", "decoder"), "refused", without_files("tokenizer*", "vocab*")),
        Injury("an empty folder", MODELS, "refused", replaced_by(Path.mkdir)),
        Injury("a file for a folder", MODELS, "refused", replaced_by(lambda path: path.write_text("x"))),
        Injury("the other kind of model", ("embed", "rerank"), "refused", other_kind, _takes_one_kind),
        Injury("a typo in the path", MODELS, "refused", typo),
    ),
    "output": (
        Injury("output over an input", ITSELF, "refused", output_on_input, _writes),
        Injury("output over a person's file", ITSELF, "refused", foreign_output, _writes_a_file),
        Injury("a person's file in the output folder", ITSELF, "either", foreign_output, _writes_a_folder),
        Injury("output below a file", ITSELF, "refused", output_below_file, _writes),
        Injury("output in a new folder", ITSELF, "either", output_in_new_folder, _writes),
        Injury("output of the other kind", ITSELF, "refused", output_kind, _writes),
        Injury("full disk", ITSELF, "refused", full_disk, _writes),
        Injury("read-only folder", ITSELF, "refused", read_only, _writes),
    ),
    "process": (
        Injury("stdin closed", ITSELF, "same", close(0)),
        Injury("stdout closed", ITSELF, "same", close(1)),
        Injury("stderr closed", ITSELF, "same", close(2)),
        Injury("everything closed", ITSELF, "same", close(0, 1, 2)),
        Injury("reader leaves", ITSELF, "same", reader_leaves, _writes),
        Injury("reader leaves early", ITSELF, "either", reader_leaves, _prints),
        Injury("20 columns", ITSELF, "same", with_environment(COLUMNS="20")),
        Injury("C locale", ITSELF, "same", with_environment(**C_LOCALE)),
        Injury("no home", ITSELF, "same", with_environment(HOME="/nonexistent")),
        Injury("SIGTERM", ITSELF, "stopped", send(signal.SIGTERM)),
        Injury("SIGHUP", ITSELF, "stopped", send(signal.SIGHUP), _trains),
        Injury("SIGINT", ITSELF, "stopped", send(signal.SIGINT)),
    ),
    "flags": (
        Injury("unknown flag", ITSELF, "refused", with_words("--ouptut-folder", "x")),
        Injury("a word too many", ITSELF, "refused", with_words("superfluous", "words")),
        Injury("not a number", ("option",), "refused", with_number("many", "", "1e", "0x10", "--")),
        Injury("impossible number", ("option",), "refused", with_number("-3", "nan", "-1e400")),
        Injury("huge number", ("option",), "either", with_number("99999999999999999999", "1e400", "inf")),
        Injury("an odd query", ITSELF, "accepted", with_query(*ODD_QUERIES), _asks),
        Injury("an empty query", ITSELF, "either", with_query("", " "), _asks),
    ),
}  # fmt: skip


def slots_of(injury: Injury, command: Command) -> list[str]:
    """Return the slots of a command that an injury fits: "" is the command itself; [] if it does not fit."""
    if not injury.fits(command):
        return []
    kinds = {"": "", **{slot: kind for slot, (_, kind) in command.inputs.items()}}
    if command.options:
        kinds["option"] = "option"
    return [slot for slot, kind in kinds.items() if kind in injury.kinds]


def choose(number: int, pick: random.Random) -> tuple[Command, list[tuple[Injury, str]]]:
    """Return a case: a command, and one to three injuries with the slots that they damage, each of another area.

    Every injury leads a case in its turn, so that none is rare; its command and the further injuries are drawn.
    """
    areas = list(INJURIES)
    leads = [(area, injury) for area in areas for injury in INJURIES[area]]
    area, injury = leads[number % len(leads)]
    command = pick.choice([command for command in COMMANDS if slots_of(injury, command)])
    chosen = {area: injury}
    for other in pick.sample(areas, pick.choices((0, 1, 2), (6, 3, 1))[0]):
        if fitting := [injury for injury in INJURIES[other] if slots_of(injury, command)]:
            chosen.setdefault(other, pick.choice(fitting))
    return command, [(chosen[area], pick.choice(slots_of(chosen[area], command))) for area in areas if area in chosen]


def expected(injuries: list[Injury]) -> str:
    """Return what has to follow from several injuries together."""
    follows = {injury.follows for injury in injuries}
    for outcome in ("stopped", "refused", "either", "accepted"):
        if outcome in follows:
            return "stopped or refused" if outcome == "stopped" and follows & {"refused", "either"} else outcome
    return "same"
