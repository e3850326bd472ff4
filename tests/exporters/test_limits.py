"""How far an exported model may be from the original one: one table in code and documentation, reachable and checked.

python -m pytest tests/exporters/test_limits.py
"""

import re
from pathlib import Path

import numpy as np
import pytest
from exported import run_export

import export
from mlx_retrieval.exporters import limits, parity, reranker_parity
from mlx_retrieval.exporters.job import DTYPES
from mlx_retrieval.utils.errors import UserError

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "export.md"


def test_the_documentation_has_the_table():
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in DOCUMENT.read_text().splitlines()]
    rows = [row for row in rows if len(row) == 4 and re.fullmatch(r"[\d.]+", row[1])]
    names = {"`--quantize 8`": "8 bits", "`--quantize 4`": "4 bits"}
    table = {names.get(name, name): (float(cosine), float(score.split()[0])) for name, cosine, _, score in rows}
    assert table == {form: (limit.cosine, limit.score) for form, limit in limits.LIMITS.items()}
    for _, least, measured, _ in rows:  # by the real model
        assert float(measured) >= float(least)


def test_every_form_has_a_limit_and_a_way_on():
    assert set(limits.LIMITS) == {*DTYPES, limits.quantised_form(8), limits.quantised_form(4)}
    for form in limits.LIMITS:
        assert bool(limits.advice(form)) == (form != "float32")
    cosines = [limit.cosine for limit in limits.LIMITS.values()]
    assert cosines == sorted(cosines, reverse=True)


def vectors(cosine: float) -> tuple[parity.Vectors, parity.Vectors]:
    """Vectors of which one has this cosine to its counterpart."""
    exact = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    off = np.array([[cosine, np.sqrt(1 - cosine**2)], [0.0, 1.0]], np.float32)
    return {None: off}, {None: exact}


@pytest.mark.parametrize("form", limits.LIMITS)
def test_limits_of_vectors(form):
    least = limits.LIMITS[form].cosine
    near, far = vectors(least + 1e-5), vectors(least - 1e-3)
    assert f"of at least {least}" in parity.accept(*near, "it", form)
    with pytest.raises(UserError, match=f"at least {least} is required for {form}"):
        parity.accept(*far, "it", form)
    assert parity.compare_quantised(*near, form)[1] == ""
    assert f"{form} miss their limit" in parity.compare_quantised(*far, form)[1]


@pytest.mark.parametrize("form", limits.LIMITS)
@pytest.mark.parametrize("scale", [1, 10])
def test_limits_of_scores(form, scale):
    """Of logits, the limit is a share of their range."""
    expected = np.array([0.0, 1.0], np.float32) * scale
    most = max(limits.LIMITS[form].score, reranker_parity.EXACT) * scale
    assert "worst difference" in reranker_parity.accept(expected + 0.9 * most, expected, "it", form)
    assert reranker_parity.compare_quantised(expected + 0.9 * most, expected, form)[1] == ""
    with pytest.raises(UserError, match=f"is allowed for {form}"):
        reranker_parity.accept(expected + 1.1 * most, expected, "it", form)
    assert f"{form} miss their limit" in reranker_parity.compare_quantised(expected + 1.1 * most, expected, form)[1]


@pytest.mark.slow
@pytest.mark.parametrize("misses", [True, False])
def test_a_quantised_export_says_that_it_misses_its_limit(base_folders, tmp_path, monkeypatch, capsys, misses):
    """Regression: it passed, whatever it lost."""
    limit = limits.Limit(0.9999999, 0.5) if misses else limits.Limit(0.0, 0.5)
    monkeypatch.setitem(limits.LIMITS, "4 bits", limit)
    flags = [
        "--model",
        str(base_folders["qwen3"]),
        "--output",
        str(tmp_path / "out"),
        "--format",
        "mlx",
        "--quantize",
        "4",
    ]
    assert export.main(flags) == (1 if misses else 0)
    out, err = capsys.readouterr()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (limits.MISSED in out) == misses
    warning = err.replace("\n", "")
    assert ("export.py: warning: 4 bits miss their limit: a worst cosine of 0." in warning) == misses
    assert ("at least 0.9999999; --quantize 8 keeps more" in warning) == misses


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"dtype": each} for each in DTYPES] + [{"quantize": 8}, {"quantize": 4}], ids=str)
def test_the_limits_are_within_reach_of_real_weights(minilm, tmp_path, monkeypatch, capsys, flags):
    if "quantize" in flags:  # whose products take twenty times as long on CPUs: a third of the texts
        texts = parity.check_texts
        monkeypatch.setattr(parity, "check_texts", lambda limit: texts(limit)[1::3])
    run_export(tmp_path / "out", model=minilm, format="mlx", **flags)
    assert limits.MISSED not in capsys.readouterr().out
