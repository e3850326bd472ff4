"""The one table of families is what the code loads, what embed.py prints, and what the documentation says.

python -m pytest tests/models/test_model_families.py
"""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

import embed
from mlx_retrieval.backbones import ENCODERS, MODULES
from mlx_retrieval.models import families
from mlx_retrieval.models.heads import POOLING
from mlx_retrieval.utils.console import console

ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_module_has_a_row():
    assert {family.module for family in families.FAMILIES} == {*MODULES, families.decoder}
    assert len(families.FAMILIES) == len(MODULES) + 1
    assert all(families.family_of(kind).module is module for kind, module in ENCODERS.items())
    assert families.family_of("qwen2").module is families.decoder


def test_rows_are_sound():
    for family in families.FAMILIES:
        assert (ROOT / family.file).is_file() and family.pooling in POOLING
        assert all(name.count("/") == 1 for name in family.models) and family.models


def test_the_library_that_was_compared_is_no_newer_than_the_installed_one():
    name, _, version = families.CHECKED.partition(" ")
    assert name == "transformers" and Version(version) <= Version(metadata.version(name))
    assert all(family.checked.startswith(families.CHECKED) for family in families.FAMILIES)


def test_the_page_and_the_readme_say_what_the_table_says():
    page, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/models.md", "README.md"))
    remedy = "python -m mlx_retrieval.models.families"
    assert page == families.page(), remedy
    assert max(map(len, page.splitlines())) < 200
    assert readme == families.with_names(readme), remedy
    assert f"[These load](docs/models.md): {families.names()}." in " ".join(readme.split())


def test_the_readmes_list_is_written_from_the_table(monkeypatch):
    text = "# a\n\nFirst. [These load](docs/models.md): one\nand two. Last.\n\nOther."
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES[1:3])
    assert families.with_names(text) == (
        "# a\n\nFirst. [These load](docs/models.md): ModernBERT and MPNet. Last.\n\nOther."
    )


@pytest.mark.parametrize("width", [60, 120])
def test_embed_lists_them(capsys, monkeypatch, width):
    monkeypatch.setattr(console(), "_width", width)
    assert embed.main(["--models"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for family in families.FAMILIES:
        assert family.title in out and family.file in out
        assert all(name in out for name in (*family.models, *family.model_types))
        assert f"checked {family.checked}" in words
    assert "'search_query: ' and 'search_document: '" in words
    assert all(len(line) <= width for line in out.splitlines() if " " in line.strip()[13:])


def test_models_goes_with_nothing_else(capsys):
    with pytest.raises(SystemExit):
        embed.main(["--models", "--model", "m", "--check", "m"])
    assert "--models embeds nothing: leave out --model, --check" in capsys.readouterr().err
