"""Arbitrary rows, flags and YAML files are accepted, or refused with a message: no traceback, no hang.

python -m pytest tests/test_fuzz.py
"""

import contextlib
import dataclasses
import gzip
import io
import json
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from data_loader import Batches
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.training.rerank_batches import GroupBatch, GroupMaker
from mlx_retrieval.training.settings_file import read_yaml, write_yaml
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
same_folder = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])

# --- rows -----------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "\x00", "\ud800", "<eos>", "<unused0>", "é" * 3, "\u202e"])
NUMBERS = st.integers(-2, 3) | st.floats(width=32) | st.sampled_from([10**400, -0.0, 2**63, True])
VALUES = st.recursive(
    TEXTS | NUMBERS | st.none(), lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXTS, v, max_size=2), max_leaves=5
)
KEYS = ("query", "document", "positive", "anchor", "negative", "negatives", "documents", "scores", "label", "rank")
KEYS += ("question", "text", "pos", "neg", "pos_scores", "neg_scores", "prompt", "negative_1", "title", "bm25_score")
STRANGE = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5)
WORDS = st.text("ab \ud800é", min_size=1, max_size=8)
SOUND = st.fixed_dictionaries(
    {"query": WORDS, "document": WORDS},
    optional={"rank": st.integers(0, 3), "negatives": WORDS | st.lists(WORDS, max_size=3), "label": NUMBERS},
)
SEVERAL = st.integers(0, 3).flatmap(
    lambda n: st.fixed_dictionaries(
        {"question": WORDS, "pos": st.lists(WORDS, max_size=3)},
        optional={
            "neg": st.lists(WORDS | st.fixed_dictionaries({"title": TEXTS, "text": WORDS}), max_size=2),
            "scores": st.lists(NUMBERS, min_size=n, max_size=n),
        },
    )
)
JUDGED = st.integers(1, 4).flatmap(
    lambda n: st.fixed_dictionaries(
        {"query": WORDS, "documents": st.lists(WORDS, min_size=n, max_size=n), "scores": st.lists(NUMBERS, max_size=n)}
    )
)
LINES = st.one_of(
    *((rows | VALUES).map(lambda row: json.dumps(row).encode()) for rows in (SOUND, JUDGED, SEVERAL, STRANGE)),
    st.binary(max_size=30),
    st.sampled_from(
        [
            b"",
            b"\r",
            b"[",
            b',{"query": "q", "document": "d"}',
            b"]",
            b"[" * 5000,
            b'{"query": ' + b"9" * 5000 + b"}",
            b"\xef\xbb\xbf{}",
            b"NaN",
        ]
    ),
)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(ROOT / "gemma-3-tiny-mlx", {"query": "<unused0>"}, {"query": 8, "document": 8})


@same_folder
@given(lines=st.lists(LINES, max_size=6), skip=st.booleans(), zipped=st.booleans(), cut=st.integers(0, 40))
def test_rows_and_batches(tmp_path, tokenizer, lines, skip, zipped, cut):
    """A file of rows is refused with the line, or every row can be read and made into batches."""
    file = tmp_path / ("rows.jsonl.gz" if zipped else "rows.jsonl")
    content = b"\n".join(lines)
    packed = gzip.compress(content) if zipped else content
    file.write_bytes(packed[: len(packed) - cut] if zipped and cut < 5 else packed)
    try:
        rows = Rows([file], skip)
    except UserError as error:
        assert str(file) in str(error) and len(str(error)) < 1000
        return
    assert len(rows) and (skip or not rows.skipped)
    for i in range(len(rows)):
        example = rows[i]
        assert all(isinstance(text, str) and text.strip() for text in (example.query, example.positive))
        assert np.isfinite(example.scores).all() and example.rank >= 1 and str(file) in rows.where(i)
    kinds = [{}, {"make": GroupMaker(rows, 1), "kind": GroupBatch}]
    for kind in kinds:
        with contextlib.suppress(UserError):
            batches = Batches(rows, tokenizer if not kind else _pairs(tokenizer), min(2, len(rows)), **kind)
            for k in range(3):  # crosses epochs
                batch = batches.batch(k)
                assert len(batch.rows) == batches.size and batch.tokens > 0 and batch.texts.ids.min() >= 0


def _pairs(tokenizer: TextTokenizer):
    """A tokenizer of groups that needs no reranker: each document is a text of its own."""

    class Sequences:
        def __init__(self, groups):
            documents = [document for _, texts in groups for document in texts]
            self.texts, self.text = tokenizer(documents, "document"), np.arange(len(documents))
            self.place = np.zeros(len(documents), np.int32)

    return Sequences


# --- flags and YAML -------------------------------------------------------------------------------------------------

FIELDS = [f.name for f in dataclasses.fields(Settings)]
WORD_VALUES = (
    "auto",
    "-1",
    "0",
    "1",
    "1e400",
    "nan",
    "-inf",
    "1_0",
    "٣",
    "",
    "embed",
    "late",
    "rerank",
    "chat",
    "--",
    "-",
)
SCALARS = st.sampled_from(WORD_VALUES) | st.text(max_size=6).filter(lambda text: "\x00" not in text)
FLAGS = st.lists(
    st.sampled_from(
        [f"--{name.replace('_', '-')}" for name in (*FIELDS, "config", "iters", "no-bidirectional", "nope")]
    )
    | SCALARS,
    max_size=6,
)


@same_folder
@given(argv=FLAGS.filter(lambda argv: not {"-h", "--help"} & {*argv}))
def test_flags(argv):
    """Flags give settings, or an error: argparse's with exit code 2, or a UserError."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            made, given_ = from_flags("", argv=argv)
        except UserError as error:
            assert str(error)
            return
        except SystemExit as stop:
            assert stop.code == 2
            return
    assert isinstance(made, Settings) and set(given_) <= set(FIELDS)
    assert made.steps is None or made.warmup_steps >= 0


YAML_VALUES = VALUES | st.dates() | st.binary(max_size=3) | st.sampled_from([*WORD_VALUES, float("nan"), float("inf")])
YAML_KEYS = (
    st.sampled_from([*FIELDS, "iters", "batch-size", "save-every"]) | st.text(max_size=5) | st.integers() | st.none()
)
MAPPINGS = st.dictionaries(YAML_KEYS, YAML_VALUES, max_size=3).map(lambda v: yaml.safe_dump(v, allow_unicode=True))
DOCUMENTS = (
    MAPPINGS.map(str.encode) | st.binary(max_size=30) | st.text(":{}[]-*&!? \nabsteps1", max_size=20).map(str.encode)
)
ODD = (
    b"(: 0000-00-00",
    b"learning_rate: 1%s" % (b"0" * 400),
    b"warmup: .inf",
    b"lora_alpha: .nan",
    b"steps: 1%s" % (b"0" * 400),
    b"steps: 1%s" % (b"0" * 5000),
    b"steps: 2024-99-99",
    b"a: &a [*a]",
    b"? [1]\n: 2",
    b"[" * 3000,
    b"steps: !!python/object/apply:os.getcwd []",
)


@same_folder
@given(document=DOCUMENTS)
def test_yaml_of_any_kind(tmp_path, document):
    read_one(tmp_path / "settings.yaml", document)


@pytest.mark.parametrize("document", ODD, ids=lambda document: document[:20].decode())
def test_yaml_that_confuses_its_reader(tmp_path, document):
    read_one(tmp_path / "settings.yaml", document)


def read_one(file: Path, document: bytes) -> None:
    """YAML gives settings that survive writing and reading, or one UserError. No YAML creates Python objects."""
    file.write_bytes(document)
    try:
        made = Settings(**read_yaml(file))
    except UserError as error:
        assert str(error)
        return
    assert made.steps is None or made.warmup_steps >= 0
    write_yaml(made, file)
    again = {"resume": False, "overwrite": False, "accept_changed_data": False}  # a new run
    assert Settings(**read_yaml(file)) == dataclasses.replace(made.with_absolute_paths(), **again)
