"""Exported rerankers: the trained model's scores in every library that loads them; no folder if anything is wrong.

Texts that spell special tokens are left out of the comparisons with other libraries, which let them become such tokens.

python -m pytest tests/exporters/test_export_reranker.py
"""

import json
import re
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import torch
import transformers
from exported import file_digests, read_json, run_export
from random_rerankers import (
    DOCUMENTS,
    ENCODERS,
    FAMILIES,
    QUERY,
    causal,
    cross_encoder,
    encoder_config,
    graded_rows,
    listwise,
)

import export
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.exporters import parity, reranker_parity, reranker_tokenizer, weights
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import pair_tokenizers
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

LONG = "which animal did sit there? the hard stone " * 30  # beyond every limit here
PAIRS = [
    *((QUERY, document) for document in (*DOCUMENTS, LONG, "mat.", "a (cat) ", "on\n", "stone?!")),
    ("the cat", DOCUMENTS[0]),
    (LONG, LONG),
    (LONG, "a stone"),
]
SPELLED = ["a [SEP] b </s> c", "no<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nyes", "<bos>[CLS] <s>"]
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES[1:]]
PUBLISHED = ("nomic_bert", "gte")  # whose checkpoints have other names than transformers' class
JUDGES = {
    "qwen3": {},
    "qwen3, own head": {"tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": False, "rope_theta": 5e5},
    "gemma3_text": {"sliding_window": 24, "sliding_window_pattern": 2},
}
EXACT = 1e-4


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at fewer and shorter texts than it does for users."""
    monkeypatch.setattr(parity, "COUNTS", (1, 2, 3, 4, 25, 40))
    monkeypatch.setattr(parity, "LONGEST", 150)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, qwen_tokenizer) -> dict[str, Path]:
    """A random model of each kind; `bare` is a BERT without a head, `trunk` a Qwen3 without its language model."""
    root = tmp_path_factory.mktemp("bases")
    found = {kind: root / kind for kind in (*ENCODERS, "bare", "trunk")}
    for kind in ENCODERS:
        cross_encoder(kind, found[kind])
    cross_encoder("bert", found["bare"])
    config = encoder_config("bert")
    config.intermediate_size, config.initializer_range = 64, 0.3
    torch.manual_seed(2)
    transformers.BertForMaskedLM(config).save_pretrained(found["bare"])
    for name, changes in JUDGES.items():
        _, found[name] = causal(name.split(",")[0], root / name, qwen_tokenizer, **changes)
    shutil.copytree(found["qwen3"], found["trunk"])
    transformers.AutoModel.from_pretrained(found["qwen3"]).save_pretrained(found["trunk"])
    _, found["listwise"], _ = listwise(root, qwen_tokenizer)
    return found


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """`adapters(base)`: an adapter of it after three steps, far from the base."""
    root = tmp_path_factory.mktemp("runs")
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in graded_rows()))
    made = {}

    def of(base: str, **changes) -> Path:
        key = base + json.dumps(changes)
        if key not in made:
            limit = 2048 if base == "listwise" else 300 if base in JUDGES or "trunk" in base else 60
            defaults = {"model": str(bases[base]), "task": "rerank", "data": [str(data)], "batch_size": 6, "steps": 3}
            defaults |= {"learning_rate": 0.05, "max_length": limit, "eval_tasks": [], "lora_rank": 4, "save_steps": 0}
            run = training_run.prepare(Settings(**defaults | {"output": str(root / str(len(made)))} | changes))
            for step in range(3):
                run.trainer.update(run.trainer.batches.batch(step), step + 1)
            made[key] = root / f"{len(made)}-final"
            files.write_folder(made[key], run.trainer.save_model)
        return made[key]

    return of


def scores(reranker: Reranker, wanted=PAIRS) -> np.ndarray:
    return np.concatenate(reranker.score_groups([(query, [document]) for query, document in wanted]))


def library_scores(folder: Path, wanted=PAIRS) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    return np.array(model.predict(wanted, batch_size=4).tolist())


def transformers_scores(folder: Path) -> np.ndarray:
    """transformers alone, from nothing but the folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.num_labels == 1
    queries, documents = map(list, zip(*PAIRS, strict=True))
    with torch.no_grad():
        tokens = tokenizer(queries, documents, truncation=True, padding=True, return_tensors="pt")
        return model(**tokens).logits[:, 0].numpy()


def mlx_lm_scores(folder: Path, ids: list[list[int]], answers: list[int]) -> np.ndarray:
    import mlx_lm

    model, _ = mlx_lm.load(str(folder))
    logits = [np.array(model(mx.array([row]))[0, -1].astype(mx.float32))[answers] for row in ids]
    return np.array([1 / (1 + np.exp(no - yes)) for no, yes in logits])


# --- the same scores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["", "sigmoid"])
@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind not in FAMILIES[1:]] + SLOW)
def test_cross_encoders(bases, adapters, tmp_path, kind, activation):
    adapter = adapters(kind, train_type="dora" if kind == "roberta" else "lora")
    if not activation:
        if kind not in ("bert", "modernbert"):
            pytest.skip("two are enough")
        adapter = shutil.copytree(adapter, tmp_path / "adapter")
        RetrievalConfig.read(adapter).override(activation=activation).write(adapter)
    ours = Reranker(str(adapter))
    assert ours.config.activation == activation
    expected = scores(ours)
    folder = run_export(tmp_path / "out", adapter=adapter)
    assert (
        np.abs(expected - scores(Reranker(str(bases[kind]), max_length=60))).max() > 0.01
    )  # training changed something
    np.testing.assert_allclose(library_scores(folder), expected, rtol=0, atol=EXACT)
    raw = transformers_scores(folder)
    np.testing.assert_allclose(1 / (1 + np.exp(-raw)) if activation else raw, expected, rtol=0, atol=EXACT)
    again = Reranker(str(folder))
    assert again.kind == "cross-encoder" and again.config.max_length == 60
    np.testing.assert_allclose(scores(again), expected, rtol=0, atol=EXACT)
    spelled = [(QUERY, text) for text in SPELLED]
    np.testing.assert_allclose(scores(again, spelled), scores(ours, spelled), rtol=0, atol=EXACT)
    if kind in PUBLISHED:
        return
    # Every tensor is one of transformers' class, and all that it has are there.
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert set(read_safetensors(folder / "model.safetensors")) == set(model.state_dict()) - {
        name for name in model.state_dict() if name.endswith(("position_ids", "token_type_ids"))
    }


@pytest.mark.parametrize("name", ["bare", "full"])
def test_a_head_that_the_base_does_not_have(bases, adapters, tmp_path, name):
    """A masked language model's own head is left out; so is what full training of all weights makes."""
    adapter = adapters("bare", **({"train_type": "full", "learning_rate": 0.01} if name == "full" else {}))
    folder = run_export(tmp_path / "out", adapter=adapter)
    expected = scores(Reranker(str(adapter)))
    assert np.std(expected) > 1e-3
    np.testing.assert_allclose(library_scores(folder), expected, rtol=0, atol=EXACT)
    assert read_json(folder)["architectures"] == ["BertForSequenceClassification"]
    assert not any(tensor.startswith("cls.") for tensor in read_safetensors(folder / "model.safetensors"))


def test_a_decoder_with_a_score_layer(bases, adapters, tmp_path):
    """Its base has a chat template, through which sentence-transformers would send pairs if it were kept."""
    base = shutil.copytree(bases["qwen3"], tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}")
    run = training_run.prepare(
        Settings(
            model=str(base),
            task="rerank",
            reranker_type="cross-encoder",
            data=[str(_rows(tmp_path))],
            batch_size=6,
            steps=2,
            learning_rate=0.05,
            max_length=200,
            eval_tasks=[],
            lora_rank=4,
            output=str(tmp_path / "run"),
        )
    )
    run.trainer.update(run.trainer.batches.batch(0), 1)
    files.write_folder(tmp_path / "adapter", run.trainer.save_model)
    folder = run_export(tmp_path / "out", adapter=tmp_path / "adapter", skip_library_check=False)
    expected = scores(Reranker(str(tmp_path / "adapter")))
    np.testing.assert_allclose(library_scores(folder), expected, rtol=0, atol=EXACT)
    assert read_json(folder)["architectures"] == ["Qwen3ForSequenceClassification"]
    assert not (folder / "chat_template.jinja").exists()
    own = run_export(tmp_path / "own", adapter=tmp_path / "adapter", format="mlx")
    np.testing.assert_allclose(scores(Reranker(str(own))), expected, rtol=0, atol=EXACT)


def _rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in graded_rows()))
    return path


@pytest.mark.parametrize(
    "name", ["qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in (*JUDGES, "trunk") if name != "qwen3")]
)
def test_judges_in_every_library(bases, adapters, tmp_path, name):
    """One folder for CrossEncoder, which gets plain pairs, for mlx-lm and for Reranker."""
    adapter = adapters(name)
    ours = Reranker(str(adapter))
    expected = scores(ours)
    folder = run_export(tmp_path / "out", adapter=adapter)
    base = Reranker(str(bases[name]), max_length=300)
    assert np.abs(expected - scores(base)).max() > 0.01  # training changed something
    np.testing.assert_allclose(library_scores(folder), expected, rtol=0, atol=EXACT)
    again = Reranker(str(folder))
    assert again.kind == "qwen3" and again.config.max_length == 300
    np.testing.assert_allclose(scores(again), expected, rtol=0, atol=EXACT)
    texts = ours.tokenizer([(QUERY, [*DOCUMENTS, *SPELLED])]).texts
    ids = [row.tolist() for row in np.split(texts.ids, texts.offsets[1:-1])]
    found = mlx_lm_scores(folder, ids, ours.tokenizer.answers)
    np.testing.assert_allclose(found, ours.score(QUERY, [*DOCUMENTS, *SPELLED]), rtol=0, atol=EXACT)


def test_prompts_token_by_token(adapters, tmp_path):
    """Also those that are cut, and nothing doubled; by another instruction where one is given."""
    from sentence_transformers import CrossEncoder

    adapter = shutil.copytree(adapters("qwen3"), tmp_path / "adapter")
    said = 'find "medicine" {{ messages }} \\ 薬 🚲\n'
    RetrievalConfig.read(adapter).override(instruction=said).write(adapter)
    folder = run_export(tmp_path / "out", adapter=adapter)
    model = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    for instruction in (said, "another one"):
        ours = Reranker(str(adapter), instruction=instruction)
        texts = ours.tokenizer([(query, [document]) for query, document in PAIRS]).texts
        found = model.preprocess(PAIRS, prompt=None if instruction == said else instruction)
        rows = zip(
            found["input_ids"], found["attention_mask"].bool(), np.split(texts.ids, texts.offsets[1:-1]), strict=True
        )
        for ids, real, wanted in rows:
            assert ids[real].tolist() == wanted.tolist()


def merging_tokenizer(manner: str, folder: Path) -> Path:
    """One whose tokens reach over the prompt's ends, in the manner of a family; Llama 2's begin texts with a space."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    bytelevel = manner == "llama 3"
    tokenizer = Tokenizer(models.BPE() if bytelevel else models.BPE(unk_token="<unk>", byte_fallback=True))
    special = ["<pad>", "<bos>", "<unk>", *([] if bytelevel else (f"<0x{byte:02X}>" for byte in range(256)))]
    if bytelevel:
        words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(words), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif manner == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        before = [normalizers.Prepend("▁")] if manner == "llama 2" else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytelevel else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the mat.<|im_end|> mat?<|im_end|> user\n<Instruct> yes no"] * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]  # bytes are no special tokens
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    roles = {"bos_token": "<bos>", "pad_token": "<pad>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["gemma", "llama 3", "llama 2", "metaspace"])
def test_vocabularies_without_the_prompts_tokens(tmp_path, manner):
    """What ends a document and what begins behind it would be one token; the tokenizer is told to cut there."""
    plain, kind = merging_tokenizer(manner, tmp_path / "tokenizer"), "gemma3_text" if manner == "gemma" else "llama"
    _, base = causal(kind, tmp_path / "base", plain, **JUDGES[kind])
    folder = run_export(tmp_path / "out", model=base, task="rerank")
    assert "Split" in json.dumps(read_json(folder, "tokenizer.json")["pre_tokenizer"]["pretokenizers"][:2])
    ours, again = (Reranker(str(where), max_length=512) for where in (base, folder))
    for query, document in (*PAIRS, *((QUERY, text) for text in SPELLED)):
        wanted = ours.tokenizer([(query, [document])]).texts.ids.tolist()
        assert wanted.count(1) == 1 and again.tokenizer([(query, [document])]).texts.ids.tolist() == wanted
    np.testing.assert_allclose(library_scores(folder), scores(ours), rtol=0, atol=EXACT)


@pytest.mark.slow
def test_listwise(bases, adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parity, "LONGEST", 30)
    adapter = adapters("listwise")
    ours = Reranker(str(adapter))
    groups = [(QUERY, [*DOCUMENTS, LONG]), ("the cat", SPELLED), (LONG, DOCUMENTS[:2])]
    expected = np.concatenate(ours.score_groups(groups))
    assert np.abs(expected - np.concatenate(Reranker(str(bases["listwise"])).score_groups(groups))).max() > 0.01
    folder = run_export(tmp_path / "out", adapter=adapter)
    assert "sentence-transformers has no listwise rerankers" in capsys.readouterr().out
    again = Reranker(str(folder))
    assert again.kind == "listwise"
    np.testing.assert_allclose(np.concatenate(again.score_groups(groups)), expected, rtol=0, atol=EXACT)
    tensors = read_safetensors(folder / "model.safetensors")
    assert tensors["projector.0.weight"].shape == (24, 64) and tensors["projector.2.weight"].shape == (20, 24)
    mlx = run_export(tmp_path / "mlx", adapter=adapter, format="mlx")
    np.testing.assert_allclose(np.concatenate(Reranker(str(mlx)).score_groups(groups)), expected, rtol=0, atol=EXACT)
    assert set(read_safetensors(mlx / "projector.safetensors")) == {"linear1.weight", "linear2.weight"}
    import mlx_lm

    mlx_lm.load(str(mlx))


# --- other forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"), [("qwen3", 4), ("qwen3", 8), ("bare", 8), pytest.param("listwise", 4, marks=pytest.mark.slow)]
)
def test_quantised(adapters, tmp_path, capsys, name, bits):
    adapter = adapters(name)
    folder = run_export(tmp_path / "out", adapter=adapter, format="mlx", quantize=bits)
    assert read_json(folder)["quantization"]["bits"] == bits
    told = capsys.readouterr().out
    assert "quantised, against the original model: worst difference" in told
    ours = Reranker(str(folder))
    found = ours.score(QUERY, DOCUMENTS)
    if bits == 8:
        np.testing.assert_allclose(found, Reranker(str(adapter)).score(QUERY, DOCUMENTS), rtol=0, atol=0.25)
    if name == "qwen3":
        texts = ours.tokenizer([(QUERY, DOCUMENTS)]).texts
        ids = [row.tolist() for row in np.split(texts.ids, texts.offsets[1:-1])]
        np.testing.assert_allclose(mlx_lm_scores(folder, ids, ours.tokenizer.answers), found, rtol=0, atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "xlm-roberta"])
def test_hf_and_mlx_folders(adapters, tmp_path, name):
    adapter = adapters(name) if name == "qwen3" else adapters(name, train_type="lora")
    expected = scores(Reranker(str(adapter)))
    for form in ("hf", "mlx"):
        folder = run_export(tmp_path / form, adapter=adapter, format=form)
        np.testing.assert_allclose(scores(Reranker(str(folder))), expected, rtol=0, atol=EXACT)
        assert not (folder / "modules.json").exists()
    np.testing.assert_allclose(library_scores(tmp_path / "hf"), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(adapters, tmp_path, capsys, dtype):
    """Off by as much as rounded weights may be; what reads the folder agrees as exactly as always."""
    adapter = adapters("qwen3")
    folder = run_export(tmp_path / "out", adapter=adapter, dtype=dtype, skip_library_check=False)
    told = capsys.readouterr().out
    most, exact = {"bfloat16": "1e-01", "float16": "2e-02"}[dtype], f"{reranker_parity.EXACT:.0e}"
    assert re.search(rf"rerank.Reranker: worst difference \S+ of at most {most}", told)
    assert re.search(rf"CrossEncoder 6\S+: worst difference \S+ of at most {exact}", told)
    assert {str(v.dtype) for v in read_safetensors(folder / "model.safetensors").values()} == {f"mlx.core.{dtype}"}


def test_a_quantised_base_is_made_whole(bases, adapters, tmp_path, qwen_tokenizer):
    import mlx_lm.utils

    model, config = mlx_lm.utils.load_model(bases["qwen3, own head"])
    model, config = mlx_lm.utils.quantize_model(model, config, 32, 4)
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "config.json").write_text(json.dumps(config))
    mlx_lm.utils.save_model(packed, model)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(qwen_tokenizer / file, packed / file)
    folder = run_export(tmp_path / "out", model=packed, task="rerank", skip_library_check=False)
    ours = Reranker(str(packed), max_length=512)
    np.testing.assert_allclose(library_scores(folder), scores(ours), rtol=0, atol=EXACT)
    assert "quantization" not in read_json(folder)


# --- used again -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "bert", "listwise"])
def test_training_goes_on_from_an_exported_folder(adapters, tmp_path, name):
    """Which is a base like others: its scores at first, other ones after, and it can be exported again."""
    adapter = adapters(name) if name != "bert" else adapters("bert", train_type="lora")
    folder = run_export(tmp_path / "first", adapter=adapter)
    before = Reranker(str(folder)).score(QUERY, DOCUMENTS)
    limit = RetrievalConfig.read(folder).max_length
    run = training_run.prepare(
        Settings(
            model=str(folder),
            task="rerank",
            data=[str(_rows(tmp_path))],
            batch_size=6,
            steps=2,
            learning_rate=0.05,
            max_length=limit,
            eval_tasks=[],
            lora_rank=4,
            output=str(tmp_path / "run"),
        )
    )
    untrained = Reranker.of(run.trainer.model, run.retrieval, run.trainer.batches.tokenizer, "untrained")
    np.testing.assert_allclose(untrained.score(QUERY, DOCUMENTS), before, rtol=0, atol=EXACT)
    for step in range(2):
        run.trainer.update(run.trainer.batches.batch(step), step + 1)
    files.write_folder(tmp_path / "adapter", run.trainer.save_model)
    expected = Reranker(str(tmp_path / "adapter")).score(QUERY, DOCUMENTS)
    assert np.abs(expected - before).max() > 1e-3
    second = run_export(tmp_path / "second", adapter=tmp_path / "adapter")
    np.testing.assert_allclose(Reranker(str(second)).score(QUERY, DOCUMENTS), expected, rtol=0, atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "bert", "listwise"])
def test_exporting_an_exported_folder_changes_nothing(adapters, tmp_path, name):
    """But the card and the base model's name. An exported folder says itself that it reranks."""
    first = run_export(
        tmp_path / "first", adapter=adapters(name) if name != "bert" else adapters("bert", train_type="lora")
    )
    second = run_export(tmp_path / "second", model=first)
    a, b = file_digests(first), file_digests(second)
    different = {file for file in a.keys() | b.keys() if a.get(file) != b.get(file)}
    assert different == {"README.md", "retrieval_config.json"}


# --- the check, and what is refused ---------------------------------------------------------------------------------


def test_a_failed_check_leaves_nothing(adapters, tmp_path, monkeypatch, capsys):
    own, adapter = weights.merge, adapters("bert", train_type="lora")
    monkeypatch.setattr(reranker_parity, "EXACT", EXACT)  # GPUs may be further off

    def spoiled(backbone):
        names = own(backbone)
        backbone.layers[1].attention.self.query.weight = backbone.layers[1].attention.self.query.weight[::-1]
        return names

    monkeypatch.setattr(weights, "merge", spoiled)
    assert export.main(["--adapter", str(adapter), "--output", str(tmp_path / "out")]) == 2
    assert "the check failed: rerank.Reranker gives a score that differs by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["qwen3", "modernbert"])
def test_the_check_sees_what_only_sentence_transformers_reads(adapters, tmp_path, monkeypatch, name):
    from mlx_retrieval.exporters import reranker as exporters_reranker

    other = exporters_reranker.ACTIVATIONS | {
        "sigmoid": exporters_reranker.ACTIVATIONS[""],
        "": exporters_reranker.ACTIVATIONS["sigmoid"],
    }
    monkeypatch.setattr(exporters_reranker, "ACTIVATIONS", other)
    adapter = adapters(name) if name == "qwen3" else adapters(name, train_type="lora")
    with pytest.raises(UserError, match=r"the check failed: CrossEncoder 6\S+ gives a score"):
        run_export(tmp_path / "out", adapter=adapter, skip_library_check=False)
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_no_template_gives(adapters, tmp_path, monkeypatch):
    """Then mlx-lm's form keeps the template that the base has."""
    monkeypatch.setattr(reranker_tokenizer, "SUFFIX", pair_tokenizers.SUFFIX + "!")
    with pytest.raises(UserError, match="no chat template gives the prompt's tokens .* use --format mlx"):
        run_export(tmp_path / "out", adapter=adapters("qwen3"))
    folder = run_export(tmp_path / "mlx", adapter=adapters("qwen3"), format="mlx")
    assert not (folder / "chat_template.jinja").exists()
    np.testing.assert_allclose(scores(Reranker(str(folder))), scores(Reranker(str(adapters("qwen3")))), atol=EXACT)


def test_what_is_refused(bases, adapters, tmp_path, capsys):
    def told(*flags: str) -> str:
        assert export.main([*flags, "--output", str(tmp_path / "out")]) == 2
        assert not list(tmp_path.glob("*out*"))
        return capsys.readouterr().err

    adapter = str(adapters("qwen3"))
    assert "--gguf-ready is for embedding models" in told("--adapter", adapter, "--gguf-ready")
    assert "use --format mlx" in told("--adapter", adapter, "--quantize", "4")
    assert "an adapter's files tell what it was trained for" in told("--adapter", adapter, "--task", "rerank")
    assert "has no reranker head yet" in told("--model", str(bases["bare"]), "--task", "rerank")


def test_differences_of_scores(monkeypatch):
    monkeypatch.setattr(reranker_parity, "EXACT", EXACT)  # GPUs may be further off
    a, b = np.array([0.1, 0.9], np.float32), np.array([0.1, 0.9002], np.float32)
    assert "worst difference 2.0e-04 of at most 2e-02" in reranker_parity.accept(a, b, "it", "float16")
    with pytest.raises(UserError, match="the check failed: it gives a score"):
        reranker_parity.accept(a, b, "it")
    assert "of at most 8e-04" in reranker_parity.accept(10 * a, 10 * a + 5e-4, "it")  # logits, by their range
    for wrong in (np.array([0.1, np.nan]), np.array([0.1])):
        with pytest.raises(UserError, match="nothing was written"):
            reranker_parity.accept(wrong, b, "it")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3", "bert"])
def test_the_command_and_the_card(adapters, tmp_path, capsys, monkeypatch, name):
    monkeypatch.undo()  # the whole check
    adapter = adapters(name) if name == "qwen3" else adapters("bert", train_type="lora")
    assert export.main(["--adapter", str(adapter), "--output", str(tmp_path / "mine")]) == 0
    told = capsys.readouterr().out
    for part in (
        "rerank.Reranker: worst difference",
        "CrossEncoder 6",
        f"of at most {reranker_parity.EXACT:.0e}",
        "python eval.py --task rerank",
    ):
        assert part in " ".join(told.split())
    assert ("mlx_lm.load, its yes against its no" in told) == (name == "qwen3")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "pipeline_tag: text-ranking" in card and "library_name: sentence-transformers" in card
    assert "## Licence" in card and "Every text is put after the prompt" not in card
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == (3 if name == "qwen3" else 2)
    for block in blocks:
        exec(block, {})
    expected = Reranker(str(adapter)).score("where are the keys?", ["The keys are in the drawer."])[0]
    found = [float(number) for number in re.findall(r"(-?\d\.\d+(?:e-\d+)?)", capsys.readouterr().out)]
    np.testing.assert_allclose(found, [expected] * len(blocks), rtol=0, atol=1e-3)
