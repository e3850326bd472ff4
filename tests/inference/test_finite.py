"""No command writes, prints or indexes a figure from vectors or scores that are not finite.

python -m pytest tests/inference/test_finite.py
"""

import json
import shlex
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from beir_folders import write_folder
from broken_models import TEXTS, WORD, with_a_broken_word

import data_loader
import embed
import eval as evaluation
import export
import mine
import rerank
import search
from mlx_retrieval.exporters import parity, weights
from mlx_retrieval.exporters.embedding import EmbeddingWriter
from mlx_retrieval.inference import checks, embedder, finite, quantization
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.mining.teacher import Teacher
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(scope="module")
def broken(small, tmp_path_factory) -> str:
    """Folder of a model in which the word `whale` has a vector of NaN."""
    return with_a_broken_word(small, tmp_path_factory.mktemp("broken") / "my model")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "docs.jsonl"
    rows = [{"_id": f"d{i}", "text": text} for i, text in enumerate(TEXTS)]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(TEXTS)]
    return write_folder(tmp_path / "beir", corpus, [{"_id": "q", "text": "bike"}], "q\td2\t1\n")


def command(model: str, name: str = "embed.py") -> str:
    return shlex.join(["python", name, "--check", model])


@pytest.mark.parametrize("task", ["embed", "late"])
def test_encode_names_the_first_text_and_the_next_command(broken, monkeypatch, task):
    monkeypatch.setattr(embedder, "CHUNK", 2)
    model = embedder.load(broken, task=task)
    assert len(model.encode(TEXTS[::2])) == 2
    with pytest.raises(finite.NonFiniteError) as caught:
        model.encode([TEXTS[0], TEXTS[0], TEXTS[2], "a  " + TEXTS[1] + " word" * 40])
    message = str(caught.value)
    assert "the vectors of 1 of 4 texts are not finite, the first is number 4" in message
    assert message.startswith(broken) and '"a the whale sings word' in message and '…"' in message
    assert message.endswith(command(broken)) and caught.value.numbers == [3]
    assert isinstance(caught.value, UserError) and isinstance(caught.value, FloatingPointError)


@pytest.mark.parametrize("precision", quantization.PRECISIONS)
def test_embed_writes_nothing_and_names_the_line(broken, documents, tmp_path, capsys, precision):
    """Regression: float32 rows of NaN were written, with exit 0 and "unit length"."""
    before = sorted(tmp_path.iterdir())
    flags = ["--precision", precision]
    if precision in quantization.CALIBRATED:
        np.save(tmp_path / "r.npy", np.array([[-1.0] * 32, [1.0] * 32], np.float32))
        before, flags = sorted(tmp_path.iterdir()), [*flags, "--ranges", str(tmp_path / "r.npy")]
    output = ["--output", str(tmp_path / "v.npy")]
    assert embed.main(["--model", broken, "--input", str(documents), *output, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f'{documents}:2, "the whale sings"' in err and command(broken) in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("task", ["embed", "late"])
def test_evaluation_names_the_document(broken, folder, capsys, task):
    """Regression: late interaction printed figures of a document of NaN."""
    flags = ["--task", task, "--model", broken, "--eval-tasks"]
    assert evaluation.main([*flags, str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and 'beir: document d1, "the whale sings"' in err and command(broken) in err
    (folder / "corpus.jsonl").write_text((folder / "corpus.jsonl").read_text().replace("whale", "seal"))
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "the whale"}) + "\n")
    assert evaluation.main([*flags, str(folder)]) == 2
    assert 'beir: query q, "the whale"' in capsys.readouterr().err


@pytest.mark.slow
def test_search_indexes_and_finds_nothing(broken, folder, tmp_path, capsys):
    index = str(tmp_path / "index")
    assert search.main(["index", str(folder), "--model-path", broken, "--index", index]) == 2
    assert f'{folder}: document d1, "the whale sings"' in capsys.readouterr().err
    (folder / "corpus.jsonl").write_text('{"_id": "d0", "text": "a boiler drips"}\n')
    assert search.main(["index", str(folder), "--model-path", broken, "--index", index]) == 0
    capsys.readouterr()
    assert search.main(["search", "the whale", "--index", index]) == 2
    out, err = capsys.readouterr()
    assert out == "" and '"the whale"' in err and command(broken) in err


def test_mining_and_teachers(broken, tmp_path, write_rows, capsys):
    rows = [{"query": "bike", "positive": TEXTS[2]}, {"query": "boiler", "positive": TEXTS[1]}]
    pairs, output = write_rows(rows, "pairs.jsonl"), tmp_path / "mined.jsonl"
    assert mine.main(["negatives", "--data", str(pairs), "--model", broken, "--output", str(output)]) == 2
    assert f'{pairs}:2, "the whale sings"' in capsys.readouterr().err and not output.exists()
    corpus = write_rows([{"text": "a boiler"}, {"text": "a\nwhale"}], "corpus.jsonl")
    rows[1]["positive"] = TEXTS[0]
    flags = ["--data", str(write_rows(rows, "pairs.jsonl")), "--corpus", str(corpus), "--model", broken]
    assert mine.main(["negatives", *flags, "--output", str(output)]) == 2
    assert f'{corpus}:2, "a whale"' in capsys.readouterr().err
    scored = write_rows([{"query": "bike", "documents": ["boiler", "the whale"], "scores": [1, 0]}], "scored.jsonl")
    assert mine.main(["score", "--data", str(scored), "--teacher", broken, "--output", str(output)]) == 2
    assert f'{scored}:1, "the whale"' in capsys.readouterr().err
    with pytest.raises(finite.NonFiniteError, match="whale sings"):
        Teacher(broken, "embedder").score_groups([("bike", TEXTS)])
    with pytest.raises(finite.NonFiniteError, match="whale sings"):
        Teacher(broken, "reranker", reranker_type="qwen3").score_groups([("bike", TEXTS)])


def test_rerankers_name_the_document(broken, documents, capsys):
    with pytest.raises(finite.NonFiniteError, match="the scores of 1 of 3 texts .* number 2, .the whale sings"):
        Reranker(broken, reranker_type="qwen3").rerank("bike", TEXTS)
    flags = ["--model", broken, "--reranker-type", "qwen3", "--query", "bike", "--documents", str(documents)]
    assert rerank.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == "" and f'{documents}:2, "the whale sings"' in err and command(broken, "rerank.py") in err


def test_an_export_is_not_written(broken, tmp_path, capsys, monkeypatch):
    """With the word in the texts that exports are compared on."""
    output = tmp_path / "out"
    monkeypatch.setattr(parity, "OTHER_SCRIPTS", ("a whale",))
    assert export.main(["--model", broken, "--output", str(output), "--skip-library-check"]) == 2
    assert '"a whale"' in (err := capsys.readouterr().err) and command(broken) in err
    assert not output.exists()
    monkeypatch.setattr(EmbeddingWriter, "_vectors", lambda *_: {})  # as if the original were sound
    monkeypatch.setattr(weights, "check_finite", lambda _: None)
    assert export.main(["--model", broken, "--output", str(output), "--skip-library-check"]) == 2
    err = capsys.readouterr().err
    assert "the exported model are not finite" in err and "nothing was written" in err and not output.exists()


def test_weights_that_are_not_finite_are_not_exported(broken, tmp_path, capsys):
    """Regression: no text of the comparison has the word, so the export passed with a cosine of 1."""
    output = tmp_path / "out"
    assert export.main(["--model", broken, "--output", str(output), "--skip-library-check"]) == 2
    err = capsys.readouterr().err
    assert "embed_tokens.weight (32 of " in err and "; row " in err and "nothing was written" in err
    assert not output.exists()


@pytest.mark.parametrize("form", ["mlx", "pt"])
def test_every_written_tensor_is_looked_at(form, tmp_path):
    table = mx.ones((9, 4)).at[mx.array([2, 5])].add(mx.array([[0, mx.inf, 0, 0], [mx.nan] * 4]))
    for damaged, words in (
        ({"table": table}, r"table \(5 of 36 numbers; row 2, 5\)"),
        ({"bias": table[5]}, r"bias \(4 of 4"),
    ):
        with pytest.raises(UserError, match=words):
            weights.write(tmp_path, {"ids": mx.arange(3), "ones": mx.ones(3)} | damaged, form)
        assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="large"):  # finite in float32
        weights.write(tmp_path, {"large": mx.full((2, 2), 1e5).astype(mx.float16)}, form)


# --- embed.py --check and rerank.py --check ---


def test_check_looks_at_the_weights_themselves(broken, small, capsys):
    """Regression: no text of the checks has the word, so all of them said ok."""
    assert embed.main(["--check", broken]) == 1
    out, err = capsys.readouterr()
    failing = [line for line in out.splitlines() if "FAILED" in line]
    assert len(failing) == 1 and failing[0].startswith(checks.WEIGHTS) and WORD[-2:] in failing[0]
    assert "embed_tokens.weight (" in failing[0] and "rows; tokens " in failing[0]
    assert out.splitlines()[-1].split(maxsplit=1) == [
        "verdict",
        f"not fit for use, as 1 of {len(checks.CHECKS)} checks failed: {checks.WEIGHTS}",
    ]
    assert err == f"embed.py: FAILED: {checks.WEIGHTS}\n"


def test_check_looks_at_the_adapters_weights(small, tmp_path):
    from mlx_retrieval.backend import mx

    from mlx_retrieval.backbones import lora
    from mlx_retrieval.models import loading
    from mlx_retrieval.utils import files

    model, config, _ = loading.build(small)
    adapter_config = lora.adapt(model.backbone)
    files.write_folder(tmp_path / "a", lambda target: loading.save_model(target, model, adapter_config, config))
    weights = mx.load(str(tmp_path / "a" / loading.ADAPTERS))
    name = next(name for name in weights if name.endswith("lora_a"))
    weights[name] = mx.where(mx.arange(weights[name].size).reshape(weights[name].shape) == 3, mx.inf, weights[name])
    mx.eval(weights)
    mx.save_safetensors(str(tmp_path / "a" / loading.ADAPTERS), weights)
    passed, detail = checks.weights(embedder.load(tmp_path / "a"))
    assert not passed and "lora_a (1 of " in detail


def test_a_sound_model_is_fit_for_use(small, capsys):
    findings = checks.check(small, data_loader.make_batch)
    assert checks.report(small, findings) == []
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["verdict", "fit for use"]


def test_rerankers_are_checked_too(broken, small, capsys):
    flags = ["--reranker-type", "qwen3"]
    assert rerank.main(["--check", small, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split(maxsplit=1) == ["verdict", "fit for use"]
    assert rerank.main(["--check", broken, *flags]) == 1
    out, err = capsys.readouterr()
    assert "embed_tokens.weight (" in out and err == f"rerank.py: FAILED: {checks.WEIGHTS}\n"
    with pytest.raises(SystemExit):
        rerank.main(["--check", small, "--query", "x"])
