"""The card of an exported folder: what the run's files say, and nothing where they are gone.

python -m pytest tests/exporters/test_model_card.py
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from mlx_retrieval.exporters import model_card
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.settings_file import write_yaml

BEFORE, AFTER, LATER = {"ndcg_at_10": 0.41237}, {"ndcg_at_10": 0.65432, "validation_loss": 1.5}, {"ndcg_at_10": 0.6}
CONFIG = RetrievalConfig(
    base_model="owner/base",
    query_prompt="find: ",
    task_prompts={"STS": "same | <unused1>"},
    max_length=300,
    query_max_length=40,
    dimensions=64,
    matryoshka_dims=[16, 32],
    pool_special=False,
)


@pytest.fixture
def best(tmp_path) -> Path:
    """The folder `best` of a run of 20 steps that was best at step 10."""
    folder = tmp_path / "run" / "best"
    folder.mkdir(parents=True)
    records = [
        {
            "type": "eval",
            "step": step,
            "metrics": figures,
            "tasks": {"eval-data": {"ndcg_at_10": figures["ndcg_at_10"]}},
        }
        for step, figures in ((0, BEFORE), (10, AFTER), (20, LATER))
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    write_yaml(Settings(data=["/home/me/pairs.jsonl"], lora_rank=7, steps=20, loss="info_nce"), folder / "config.yaml")
    (folder / "trainer_state.json").write_text('{"step": 10}')
    return folder


def card(adapter: Path | None, form: str = "sentence-transformers", base: str = "owner/base") -> str:
    return model_card.write(CONFIG, base, adapter, form, "bfloat16", "my-model")


def front_matter(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_figures_are_those_of_the_exported_step(best):
    text = card(best)
    assert "| eval-data | nDCG@10 | 0.4124 | 0.6543 |" in text and "0.6000" not in text
    assert "| average | validation loss | - | 1.5000 |" in text and "| average | nDCG@10" not in text
    assert "10 steps" in text


def test_figures_of_other_weights_are_not_in_the_metadata(best, tmp_path):
    assert front_matter(card(best))["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.6543
    text = model_card.write(CONFIG, "owner/base", best, "mlx", "4 bits", "my-model", measured=False)
    assert "model-index" not in front_matter(text) and "before it was quantised" in text
    assert "| eval-data | nDCG@10 | 0.4124 | 0.6543 |" in text
    assert Export(output="o", adapter=str(tmp_path / "a")).is_measured
    for flags in ({"format": "mlx", "quantize": 4}, {"merge_with_base": 0.5}, {"merge_with": ["b"]}, {"model": "m"}):
        assert not Export(output="o", adapter=str(tmp_path / "a"), **flags).is_measured


def test_settings_data_and_how_texts_are_read(best):
    text = card(best)
    for row in (
        "lora-rank | 7 |",
        "loss | info_nce |",
        "attention | every token sees",
        "weights | bfloat16 |",
        "seed | 0 |",
    ):
        assert f"| {row}" in text
    assert "learning-rate" not in text and "lora-keys" not in text  # not set
    assert "Data: `pairs.jsonl`." in text and "/home/me" not in text
    assert "40 of a query, 300 of a document" in text and "the first 16, 32 dimensions" in text
    assert '| query | `"find: "` |' in text and r'| STS | `"same \| <unused1>"` |' in text
    assert "the mean of the token states, without the tokenizer's own tokens" in text


def test_front_matter(best, tmp_path):
    said = front_matter(card(best))
    assert said["base_model"] == "owner/base" and said["library_name"] == "sentence-transformers"
    assert said["pipeline_tag"] == "sentence-similarity" and "sentence-transformers" in said["tags"]
    assert front_matter(card(best, "hf"))["library_name"] == "transformers"
    local = card(best, "mlx", str(tmp_path / "base"))
    assert "base_model" not in front_matter(local) and str(tmp_path) not in local and "`base`" in local


@pytest.mark.parametrize(("form", "library"), [("sentence-transformers", True), ("mlx", False), ("hf", False)])
def test_how_to_load_it(best, form, library):
    text = card(best, form)
    assert ('SentenceTransformer("my-model")' in text) == library and 'load("my-model")' in text


@pytest.mark.parametrize("task", ["embed", "late", "rerank"])
def test_the_card_s_imports_exist(task):
    """A late model's card named a module that had moved."""
    config = dataclasses.replace(CONFIG, task=task, reranker="qwen3" if task == "rerank" else "")
    text = model_card.write(config, "owner/base", None, "mlx", "bfloat16", "my-model")
    imports = re.findall(r"^from .* import .*$", text, re.MULTILINE)
    assert imports
    for line in imports:
        exec(line, {})


def test_before_from_a_resumed_run(best):
    """Whose metrics begin later; `before.json` has kept them."""
    (best.parent / "metrics.jsonl").unlink()
    (best.parent / "before.json").write_text(json.dumps({"tasks": {"eval-data": BEFORE}}))
    assert "| eval-data | nDCG@10 | 0.4124 | - |" in card(best)


def test_without_the_runs_files(tmp_path):
    (tmp_path / "adapter").mkdir()
    text = card(tmp_path / "adapter")
    assert "no longer says how it was trained" in text and "## Figures" not in text
    assert "a fine-tuned `owner/base`" in text
    alone = card(None)
    assert "## Training" not in alone and "fine-tuned" not in alone
