"""What kind of model a folder holds, by its files or its name.

python -m pytest tests/models/test_loading.py
"""

import json
import shutil

import pytest
from random_rerankers import cross_encoder

from mlx_retrieval.models.loading import detect_kind
from mlx_retrieval.models.retrieval_config import FILE


def test_base_models(small, tmp_path, minilm):
    cross_encoder("bert", tmp_path / "cross")
    assert detect_kind(str(tmp_path / "cross")) == "rerank"
    assert detect_kind(small) == detect_kind(str(minilm)) == "embed"
    shutil.copytree(small, tmp_path / "Some-Reranker-0.6B")
    assert detect_kind(str(tmp_path / "Some-Reranker-0.6B")) == "rerank"


@pytest.mark.parametrize("task", ["embed", "late", "rerank"])
def test_an_adapter_tells_its_task(task, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / FILE).write_text(json.dumps({"task": task, "reranker": "qwen3"}))
    assert detect_kind(str(tmp_path)) == task


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config_sentence_transformers.json": {"model_type": "ColBERT"}}, "late"),
        ({"config_sentence_transformers.json": {"model_type": "MultiVectorEncoder"}, "modules.json": []}, "late"),
        ({"config_sentence_transformers.json": {"model_type": "CrossEncoder"}, "modules.json": []}, "rerank"),
        ({"modules.json": []}, "embed"),
        ({"config.json": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}}, "rerank"),
    ],
)
def test_files_of_other_libraries(files, kind, tmp_path):
    for name, content in ({"config.json": {"model_type": "bert"}} | files).items():
        (tmp_path / name).write_text(json.dumps(content))
    assert detect_kind(str(tmp_path)) == kind
