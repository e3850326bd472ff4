"""Every check of embed.py --check passes sound models and names the one thing that is broken.

python -m pytest tests/inference/test_checks.py
"""

import dataclasses
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_map

import data_loader
import embed
from mlx_retrieval import backend
from mlx_retrieval.backbones import lora, set_dtype
from mlx_retrieval.inference import checks, embedder
from mlx_retrieval.models import heads, loading, retrieval_config
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

TINY = Path(__file__).resolve().parent.parent.parent / "gemma-3-tiny-mlx"
NOT_BROKEN = "adapter changes the embedding"  # does not apply to a base model


@pytest.fixture
def model(small) -> embedder.Model:
    return embedder.load(small)


def failed(model: embedder.Model) -> list[str]:
    return [finding.name for finding in checks.examine(model, data_loader.make_batch) if finding.passed is False]


def save_adapter(small: str, folder: Path, strength: float, dropout: float = 0.0) -> Path:
    """An adapter as training saves one, its second matrices random times `strength`."""
    model, config, _ = loading.build(small)
    adapter_config = lora.adapt(model.backbone, dropout=dropout)
    mx.random.seed(0)
    model.update(tree_map(lambda v: v + strength * mx.random.normal(v.shape), model.trainable_parameters()))
    files.write_folder(folder, lambda target: loading.save_model(target, model, adapter_config, config))
    return folder


# --- sound models ---


@pytest.mark.slow
def test_real_weights_are_sound(minilm, capsys):
    assert embed.main(["--check", str(minilm)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert list(rows) == ["model", *checks.CHECKS, "verdict"]
    not_applicable = {name for name, words in rows.items() if words[:2] == ["not", "applicable"]}
    assert not_applicable == {NOT_BROKEN, "prompts"}
    assert all(words[0] == "ok" for name, words in rows.items() if name not in {"model", "verdict", *not_applicable})


def test_the_toolkits_own_model_is_sound():
    findings = {finding.name: finding for finding in checks.check(str(TINY), data_loader.make_batch)}
    assert [name for name, finding in findings.items() if not finding.passed] == [NOT_BROKEN]
    assert findings[NOT_BROKEN].passed is None
    limits = ("2e-02", "2e-02") if backend.IS_GPU else ("1e-04", "1e-05")  # its weights are bfloat16
    for name, limit in zip(("padding invariance", "order and batching"), limits, strict=True):
        assert f"limit {limit}" in findings[name].detail
    assert "8 reserved tokens" in findings["special tokens not injectable"].detail
    assert "query 512, document 512" in findings["truncation"].detail


def test_a_sound_adapter_passes_all_checks_and_keeps_its_dropout(small, tmp_path):
    folder = save_adapter(small, tmp_path / "adapter", 0.05, dropout=0.25)
    model = embedder.load(folder)
    before = model.encode(checks.TEXTS)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert all(finding.passed for finding in findings.values()), findings
    assert "dropout 0.25 set to 0" in findings["training and use agree"].detail
    layers = [module for module in model.model.modules() if isinstance(module, backend.nn.Dropout)]
    assert layers and all(layer._p_1 == 0.75 for layer in layers) and not model.model.training
    assert np.array_equal(model.encode(checks.TEXTS), before)
    on_base = {finding.name: finding for finding in checks.check(small, data_loader.make_batch, str(folder))}
    assert on_base[NOT_BROKEN] == findings[NOT_BROKEN]


def test_long_limits_are_looked_at_but_not_embedded(small, monkeypatch):
    long, widths = embedder.load(small, max_length=1500), []
    kind, original = type(long.model.backbone), type(long.model.backbone).hidden_states

    def recorded(self, ids, lengths):
        widths.append(ids.shape[1])
        return original(self, ids, lengths)

    monkeypatch.setattr(kind, "hidden_states", recorded)
    findings = {finding.name: finding for finding in checks.examine(long, data_loader.make_batch)}
    assert "query 1,500, document 1,500" in findings["truncation"].detail
    assert checks.LONGEST <= max(widths) < 1100 and long.tokenizer.max_lengths["query"] == 1500


def test_late_interaction_is_checked_token_by_token(small, monkeypatch):
    model, config, folder = loading.build(small, projection=8, task="late")
    late = embedder.Model(model, config, config.tokenizer(folder), "late")
    findings = {finding.name: finding for finding in checks.examine(late, data_loader.make_batch)}
    assert [name for name, finding in findings.items() if not finding.passed] == [NOT_BROKEN], findings
    tokens = int(late.tokenizer([*checks.TEXTS], "document").lengths.sum())
    assert int(findings["order and batching"].detail.split()[4]) > 0.8 * tokens
    original = heads.LateHead.__call__

    def leaking(self, states, batch):
        vectors = original(self, states, batch)
        return heads.mx.where(vectors != 0, vectors + 0.1 * states.shape[1], 0)

    monkeypatch.setattr(heads.LateHead, "__call__", leaking)
    assert "padding invariance" in failed(late)


def test_half_precision_has_a_wider_limit(model):
    set_dtype(model.model.backbone, mx.bfloat16)
    passed, detail = checks.padding(model)
    assert passed and "limit 2e-02" in detail


# --- broken models ---


@pytest.mark.slow
def test_padding_that_leaks(model, monkeypatch):
    kind, original = type(model.model.backbone), type(model.model.backbone).hidden_states

    def leaking(self, ids, lengths):
        states = original(self, ids, lengths)
        return states + 0.1 * states.mean(axis=1, keepdims=True)

    monkeypatch.setattr(kind, "hidden_states", leaking)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert findings["padding invariance"].passed is False
    assert float(findings["padding invariance"].detail.split()[2]) > 1e-4  # "worst difference 1.2e-02 of ..."


def test_padding_that_leaks_only_in_what_encode_compiles(model, monkeypatch):
    original = model.runner.micro_batches

    def cut(tokens, budget, pad_id):
        for index, rows in original(tokens, budget, pad_id):
            yield index, rows._replace(end=mx.full(rows.end.shape, rows.ids.shape[1], mx.int32))

    monkeypatch.setattr(model.runner, "micro_batches", cut)
    assert "order and batching" in failed(model) and "padding invariance" not in failed(model)


def test_pooling_that_is_another_in_training(model, monkeypatch):
    original = heads.EmbeddingHead.__call__

    def pooled(self, states, batch):
        if not self.training:
            return original(self, states, batch)
        return heads.unit(heads.pool(states, batch, "last"))

    monkeypatch.setattr(heads.EmbeddingHead, "__call__", pooled)
    assert failed(model) == ["training and use agree"]


def test_training_that_forgets_prompts(model, monkeypatch):
    original = data_loader.make_batch

    def without(examples, rows, tokenizer):
        return original(examples, rows, lambda texts, name: tokenizer(texts, None))

    monkeypatch.setattr(data_loader, "make_batch", without)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert [name for name, finding in findings.items() if finding.passed is False] == ["training and use agree"]
    assert "other tokens" in findings["training and use agree"].detail


def test_adapter_that_changes_nothing(small, tmp_path, capsys):
    folder = save_adapter(small, tmp_path / "adapter", 0.0)
    assert embed.main(["--check", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert err == f"embed.py: FAILED: {NOT_BROKEN}\n"
    (line,) = (line for line in out.splitlines() if "FAILED" in line)
    assert line.startswith(NOT_BROKEN) and "0.0e+00, must exceed 1e-06" in line


def test_numbers_that_are_not_finite(model, capsys, monkeypatch):
    """In one row of the vocabulary that only the emoji needs, so that no other text shows it."""
    (token,) = set(model.tokenizer(["🔥"]).ids.tolist()[-2:-1])
    table = model.model.backbone.trunk.embed_tokens
    table.weight = mx.where(mx.arange(len(table.weight))[:, None] == token, mx.nan, table.weight)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert [name for name, finding in findings.items() if finding.passed is False] == [
        checks.WEIGHTS,
        "finite and unit length",
    ]
    assert findings["finite and unit length"].detail.endswith(": emoji")
    assert "embed_tokens.weight (1 of " in findings[checks.WEIGHTS].detail
    model.model.update(tree_map(lambda v: v * mx.nan, model.model.parameters()))
    monkeypatch.setattr(embedder, "load", lambda *_: model)
    assert embed.main(["--check", "m"]) == 1
    names = capsys.readouterr().err.removeprefix("embed.py: FAILED: ").strip().split(", ")
    of_numbers = {"padding invariance", "training and use agree", "finite and unit length", "order and batching"}
    assert set(names) == {*of_numbers, checks.WEIGHTS, "prompts"}


def test_vectors_that_are_not_of_unit_length(model, monkeypatch):
    monkeypatch.setattr(heads, "unit", lambda vectors: vectors)
    assert failed(model) == ["finite and unit length"]


def cut_tokens(change) -> object:
    """A tokenizer's call whose over-long texts are changed after all: `change(ids, limit)`."""
    original = TextTokenizer.__call__

    def call(self, texts, name=None):
        made = original(self, texts, name)
        limit = self.max_lengths.get(name, 0)
        rows = [row.tolist() for row in np.split(made.ids, made.offsets[1:-1])]
        rows = [change(row, limit) if len(row) == limit else row for row in rows]
        lengths = np.array([len(row) for row in rows], np.int32)
        return dataclasses.replace(made, ids=np.concatenate(rows).astype(np.int32), lengths=lengths)

    return call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, limit: [*ids[:-1], ids[-2]], "loses its closing tokens"),
        (lambda ids, limit: [ids[1], *ids[1:]], "loses its opening tokens"),
        (lambda ids, limit: [*ids[:-1], ids[-2], ids[-1]], "has 65 tokens, limit 64"),
        (lambda ids, limit: ids[:-3] + ids[-1:], "has 62 tokens, limit 64"),
    ],
)
def test_truncation_that_is_wrong(small, monkeypatch, change, message):
    model = embedder.load(small, max_length=64)
    assert checks.truncation(model)[0]
    monkeypatch.setattr(TextTokenizer, "__call__", cut_tokens(change))
    passed, detail = checks.truncation(model)
    assert passed is False and message in detail


def test_special_tokens_that_come_through(model, monkeypatch):
    def naive(self, prompt, text, head):
        return self._plain(prompt + text)

    monkeypatch.setattr(TextTokenizer, "_disarmed", naive)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert [name for name, finding in findings.items() if finding.passed is False] == ["special tokens not injectable"]
    assert "a text without prompt that spells '<pad>' has" in findings["special tokens not injectable"].detail


def test_special_tokens_that_are_only_taken_out_once(model, monkeypatch):
    """`<e<eos>os>` becomes `<eos>` where spellings are taken out of the text."""

    def once(self, prompt, text, head):
        return self._plain(prompt + self._spelled.sub("", text))

    monkeypatch.setattr(TextTokenizer, "_disarmed", once)
    assert checks.injection(model)[0] is False


def test_prompts_as_reserved_words(model):
    """A tokenizer that guards the special tokens but not those of its prompts."""
    model.tokenizer._reserved = {t: w for t, w in model.tokenizer._reserved.items() if "unused" not in w}
    passed, detail = checks.injection(model)
    assert passed is False and "<unused" in detail


def test_order_that_is_lost(model, monkeypatch):
    original = model.runner.micro_batches
    monkeypatch.setattr(model.runner, "micro_batches", lambda *a: ((np.sort(i), rows) for i, rows in original(*a)))
    assert "order and batching" in failed(model)


def test_prompts_that_are_not_used(model):
    model.tokenizer.prompts = dict.fromkeys(model.tokenizer.prompts, "")
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert [name for name, finding in findings.items() if finding.passed is False] == ["prompts"]


def test_errors_of_a_model_are_findings(model, monkeypatch):
    def broken(self, ids, lengths):
        raise ValueError("[matmul] shapes (1, 3) and (4, 1)\nsecond line")

    monkeypatch.setattr(type(model.model.backbone), "hidden_states", broken)
    findings = {finding.name: finding for finding in checks.examine(model, data_loader.make_batch)}
    assert findings["padding invariance"] == checks.Finding(
        "padding invariance", False, "ValueError: [matmul] shapes (1, 3) and (4, 1)"
    )
    assert findings["truncation"].passed and findings["special tokens not injectable"].passed


def test_what_cannot_be_loaded(tmp_path, capsys):
    assert embed.main(["--check", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    (tmp_path / loading.ADAPTER_CONFIG).write_text("{}")
    with pytest.raises(UserError, match=retrieval_config.FILE):
        checks.check(str(tmp_path), data_loader.make_batch)
