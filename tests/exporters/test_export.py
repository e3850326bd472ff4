"""Exported folders: the unmerged model's vectors in every library that loads them; no folder if anything is wrong.

python -m pytest tests/exporters/test_export.py
"""

import dataclasses
import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import random_encoders
import random_models
from exported import file_digests, read_json, run_export
from trained_models import trained

import export
from mlx_retrieval import backbones
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.exporters import gguf, job, limits, parity, sentence_transformers_files, weights
from mlx_retrieval.exporters import tokenizer as exporters_tokenizer
from mlx_retrieval.inference import embedder
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import CHECKOUT

GEMMA_PROMPTS = {"query": "task: search result | query: ", "document": "title: none | text: ", "STS": "same: "}
QWEN_PROMPTS = {"query": "Instruct: find the passages that answer the question\nQuery:", "document": ""}
WORDS = "what is a kidney stone and how is it treated the cat sat on the mat which animal did sit there"
# A training type for each kind of model, so that all are seen.
KINDS = {
    "bert": "lora",
    "xlm-roberta": "dora",
    "modernbert": "full",
    "t5": "dora",
    "gemma3_text": "lora",
    "qwen3": "lora",
    "llama": "full",
    "bidirectional": "lora",
}
QUICK = ("bert", "qwen3")
ALL_KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
POSITIONS = 700


def some_texts(count: int = 50, longest: int = 600) -> list[str]:
    """Texts of 1 to about `longest` tokens of the toy tokenizer, which knows these words."""
    lengths = np.geomspace(1, longest, count).astype(int)
    words = WORDS.split()
    return [" ".join(words[(i * i + 5 * n) % len(words)] for i in range(n)) for n in lengths]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, toy_tokenizer_folder) -> dict[str, Path]:
    """Random base models; three that describe themselves are saved by the installed sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    from tokenizers import Tokenizer, processors
    from torch.nn import Identity, Tanh

    root = tmp_path_factory.mktemp("bases")
    plain, framed = (shutil.copytree(toy_tokenizer_folder, root / name) for name in ("plain", "framed"))
    whole = Tokenizer.from_file(str(framed / "tokenizer.json"))
    special = [("<bos>", 2), ("<eos>", 1)]
    whole.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    whole.save(str(framed / "tokenizer.json"))
    for folder in (plain, framed):
        roles = json.loads((folder / "tokenizer_config.json").read_text())
        roles |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
        (folder / "tokenizer_config.json").write_text(json.dumps(roles))

    def described(name: str, trunk: Path, prompts: dict, pooling: str, *layers: Dense) -> Path:
        transformer = Transformer(str(trunk), max_seq_length=512)
        parts = [transformer, Pooling(64, pooling), *layers, Normalize()]
        model = library.SentenceTransformer(modules=parts, device="cpu", prompts=prompts)
        model.save(str(root / name), create_model_card=False)
        return root / name

    def saved(kind: str, tokenizer: Path = framed, name: str = "", **changes) -> Path:
        return random_models.save(kind, root / f"{name or kind}-trunk", tokenizer=tokenizer, **changes)

    window = {"sliding_window": 16, "max_position_embeddings": POSITIONS}
    gemma = saved("gemma3_text", bare=True, use_bidirectional_attention=True, **window)
    t5, modern = (random_encoders.save(kind, root / f"{kind}-trunk", d_kv=16) for kind in ("t5", "modernbert"))
    for folder in (t5, modern):
        shutil.copytree(framed, folder, dirs_exist_ok=True)
    flat = {"bias": False, "activation_function": Identity()}
    return {
        "bert": saved("bert", max_position_embeddings=POSITIONS),
        # Its positions begin behind the id of padding, which is 0 in the toy tokenizer.
        "xlm-roberta": saved("xlm-roberta", max_position_embeddings=POSITIONS, pad_token_id=0),
        "modernbert": modern,
        "t5": described("t5", t5, {}, "mean", Dense(64, 32, activation_function=Tanh())),
        "gemma3_text": described("gemma", gemma, GEMMA_PROMPTS, "mean", Dense(64, 96, **flat), Dense(96, 64, **flat)),
        "qwen3": described("qwen", saved("qwen3", bare=True), QWEN_PROMPTS, "lasttoken"),
        "llama": saved("llama", plain, tie_word_embeddings=False),
        "bidirectional": saved("gemma3_text", plain, "bidirectional", **window),
    }


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at fewer and shorter texts than it does for users."""
    monkeypatch.setattr(parity, "COUNTS", (1, 4, 25))
    monkeypatch.setattr(parity, "LONGEST", 30)


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """An adapter of every base, far from its base."""
    root = tmp_path_factory.mktemp("runs")
    flags = {"xlm-roberta": {"pooling": "cls"}, "bidirectional": {"bidirectional": True}}
    flags["llama"] = {"query_prompt": "what: ", "document_prompt": "it: "}
    return {
        kind: trained(bases[kind], root / kind / "final", how, **flags.get(kind, {}))[1] for kind, how in KINDS.items()
    }


@pytest.fixture(scope="module")
def vectors(adapters):
    """`vectors(kind)`: the unmerged model's, by the prompt's name; None: without one."""
    made = {}

    def of(kind: str) -> dict[str | None, np.ndarray]:
        if kind not in made:
            model, by_prompt = embedder.load(adapters[kind]), {}
            made[kind] = {}
            for name, prompt in {None: "", **model.config.prompts}.items():
                if prompt not in by_prompt:
                    by_prompt[prompt] = model.encode(some_texts(), name)
                made[kind][name] = by_prompt[prompt]
        return made[kind]

    return of


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(axis=1).min())


def sentence_transformer(folder: Path):
    import torch
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


# --- the same vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_sentence_transformers_and_embed_give_the_unmerged_models_vectors(bases, adapters, vectors, tmp_path, kind):
    expected = vectors(kind)
    few = some_texts()[::7]
    assert worst(expected[None][::7], embedder.load(bases[kind]).encode(few)) < 0.9  # training changed something
    folder = run_export(tmp_path / "out", adapter=adapters[kind])
    theirs, ours, seen = sentence_transformer(folder), embedder.load(folder), set()
    assert ours.config.prompts.keys() == expected.keys() - {None}
    for name, wanted in expected.items():
        # All texts under every prompt that is another text, a few where two prompts are the same.
        every = 7 if id(wanted) in seen else 1
        seen.add(id(wanted))
        found = theirs.encode(some_texts()[::every], prompt_name=name, batch_size=8)
        assert worst(found, wanted[::every]) >= 0.9999
        assert worst(ours.encode(few, name), wanted[::7]) >= 0.9999
    if len({text for text in ours.config.prompts.values() if text}) > 1:
        assert worst(expected["query"], expected["document"]) < 0.99  # the prompts count
    assert not any("lm_head" in name for name in mx.load(str(folder / "model.safetensors")))
    assert read_json(folder, "retrieval_config.json")["base_model"] == str(bases[kind])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_mlx_folders(adapters, vectors, tmp_path, kind):
    """mlx-lm gives the same states where it knows the architecture and it is causal; embed.load the same vectors."""
    folder = run_export(tmp_path / "out", adapter=adapters[kind], format="mlx")
    model = embedder.load(folder)
    assert worst(model.encode(some_texts(), "query"), vectors(kind)["query"]) >= 0.9999
    if kind in ("qwen3", "llama"):
        import mlx_lm

        loaded, tokenizer = mlx_lm.load(str(folder))
        ids, lengths = random_models.texts((29, 29))
        states = model.model.backbone.hidden_states(ids, lengths)
        np.testing.assert_allclose(np.array(loaded.model(ids)), np.array(states), atol=1e-4)
        expected = model.tokenizer(["the cat sat"]).ids.tolist()
        assert tokenizer._tokenizer("the cat sat")["input_ids"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama", "gemma3_text"])
def test_hf_folders_keep_the_whole_model(bases, adapters, vectors, tmp_path, kind):
    folder = run_export(tmp_path / "out", adapter=adapters[kind], format="hf")
    assert worst(embedder.load(folder).encode(some_texts(), "query"), vectors(kind)["query"]) >= 0.9999
    assert read_json(folder)["architectures"] == read_json(bases[kind])["architectures"]
    before, after = (mx.load(str(where / "model.safetensors")) for where in (bases[kind], folder))
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    assert not (folder / "modules.json").exists()


def test_a_bidirectional_model_that_was_trained_causal(bases, tmp_path):
    """It stays causal, with the window that its base has as a causal model."""
    _, adapter = trained(bases["gemma3_text"], tmp_path / "run" / "final", bidirectional=False)
    folder, few = run_export(tmp_path / "out", adapter=adapter), some_texts()[::5]
    model = embedder.load(adapter)
    assert not model.config.bidirectional and not embedder.load(folder).config.bidirectional
    assert worst(sentence_transformer(folder).encode(few, prompt_name="STS"), model.encode(few, "STS")) >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "whole", "without"),
    [("t5", "T5ForConditionalGeneration", ("decoder.", "lm_head.")), ("modernbert", "ModernBertForMaskedLM", ())],
)
@pytest.mark.parametrize("form", ["sentence-transformers", "hf"])
def test_checkpoints_of_more_than_the_encoder(bases, tmp_path, kind, whole, without, form):
    """Other names than the encoder alone has; what sentence-transformers has no use for is left out."""
    base = random_encoders.save(kind, tmp_path / "base", whole, **({"d_kv": 16} if kind == "t5" else {}))
    shutil.copytree(bases["bert"].parent / "framed", base, dirs_exist_ok=True)
    _, adapter = trained(base, tmp_path / "run" / "final", "full")
    folder = run_export(tmp_path / "out", adapter=adapter, format=form)
    before, after = (set(mx.load(str(where / "model.safetensors"))) for where in (base, folder))
    if form == "hf":
        assert after == before and read_json(folder)["architectures"] == [whole]
        return
    assert after == {name for name in before if not name.startswith(without)}
    assert read_json(folder)["architectures"] == ["T5EncoderModel" if kind == "t5" else whole]
    expected = embedder.load(adapter).encode(some_texts()[::7])
    assert worst(sentence_transformer(folder).encode(some_texts()[::7]), expected) >= 0.9999


@pytest.mark.parametrize("form", [pytest.param("sentence-transformers", marks=pytest.mark.slow), "mlx"])
def test_a_quantised_base_is_made_whole(bases, tmp_path, form):
    whole = random_models.save("qwen3", tmp_path / "whole", tokenizer=bases["bert"].parent / "framed")
    quantised = random_models.quantised(whole, tmp_path / "4-bit", mx.float32)
    _, adapter = trained(quantised, tmp_path / "run" / "final", pooling="last")
    expected = embedder.load(adapter).encode(some_texts(), "query")
    folder = run_export(tmp_path / "out", adapter=adapter, format=form)
    assert "quantization" not in read_json(folder) and "quantization_config" not in read_json(folder)
    assert not any("scales" in name for name in mx.load(str(folder / "model.safetensors")))
    if form == "mlx":
        found = embedder.load(folder).encode(some_texts(), "query")
    else:
        found = sentence_transformer(folder).encode(some_texts(), prompt_name="query")
    assert worst(found, expected) >= 0.9999


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["qwen3", pytest.param("t5", marks=pytest.mark.slow)])
def test_quantised_export(adapters, vectors, tmp_path, capsys, kind, bits):
    """Near the whole model, small on disk, and read by mlx-lm."""
    whole = run_export(tmp_path / "whole", adapter=adapters[kind], format="mlx")
    folder = run_export(tmp_path / "out", adapter=adapters[kind], format="mlx", quantize=bits)
    assert read_json(folder)["quantization"] == {"group_size": 32, "bits": bits}
    sizes = [(where / "model.safetensors").stat().st_size for where in (whole, folder)]
    assert sizes[1] < sizes[0] * (0.25 if bits == 4 else 0.4)
    model = embedder.load(folder)
    cosines = (model.encode(some_texts()) * vectors(kind)[None]).sum(axis=1)
    assert cosines.mean() > {4: 0.7, 8: 0.99}[bits]
    assert "quantised, against the original model: worst cosine" in capsys.readouterr().out
    if kind == "qwen3":
        import mlx_lm

        loaded, _ = mlx_lm.load(str(folder))
        ids, lengths = random_models.texts((29, 29))
        theirs = Decoder(loaded, read_json(folder))
        backbones.set_dtype(theirs, mx.float32)
        own = model.model.backbone.hidden_states(ids, lengths)
        np.testing.assert_allclose(np.array(theirs.hidden_states(ids, lengths)), np.array(own), atol=1e-4)


def test_base_models_and_other_copies_of_the_base(bases, adapters, vectors, tmp_path):
    folder = run_export(tmp_path / "base", model=bases["bert"])
    plain = embedder.load(bases["bert"]).encode(some_texts(8), "query")
    assert worst(embedder.load(folder).encode(some_texts(8), "query"), plain) >= 0.9999
    copy = shutil.copytree(bases["bert"], tmp_path / "copy")
    folder = run_export(tmp_path / "adapted", model=copy, adapter=adapters["bert"])
    assert worst(embedder.load(folder).encode(some_texts(), "query"), vectors("bert")["query"]) >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("form", job.FORMATS)
def test_exporting_an_exported_folder_changes_nothing(adapters, tmp_path, form):
    """But the card, which names another base."""
    first = run_export(tmp_path / "first", adapter=adapters["bidirectional"], format=form)
    second = run_export(tmp_path / "second", model=first, format=form)
    a, b = file_digests(first), file_digests(second)
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == {
        "README.md",
        "retrieval_config.json",
    }
    a, b = (read_json(folder, "retrieval_config.json") for folder in (first, second))
    assert {key for key in a if a[key] != b[key]} <= {"base_model", "base_fingerprint"}


def test_queries_of_another_length(bases, tmp_path, capsys):
    """sentence-transformers has one limit, the larger; embed.py keeps both."""
    _, adapter = trained(bases["bert"], tmp_path / "run" / "final", max_length=300, query_max_length=20)
    folder = run_export(tmp_path / "out", adapter=adapter, skip_library_check=False)
    assert "one limit for all texts: 300 tokens" in capsys.readouterr().out
    assert read_json(folder, "sentence_bert_config.json")["max_seq_length"] == 300
    model = embedder.load(folder)
    assert (model.config.max_length, model.config.query_max_length) == (300, 20)


# --- how it is written ----------------------------------------------------------------------------------------------


def test_shards(adapters, vectors, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    folder = run_export(tmp_path / "out", adapter=adapters["bert"])
    index = read_json(folder, "model.safetensors.index.json")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and {file.name for file in shards} == set(index["weight_map"].values())
    whole = {name: value for file in shards for name, value in mx.load(str(file)).items()}
    assert whole.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    for held in (list(mx.load(str(file)).values()) for file in shards):  # as small as asked, but no tensor is cut
        assert len(held) == 1 or sum(value.nbytes for value in held) <= 100_000
    found = sentence_transformer(folder).encode(some_texts(), prompt_name="query")
    assert worst(found, vectors("bert")["query"]) >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "stored"), [(None, mx.bfloat16), ("float32", mx.float32), ("float16", mx.float16)])
@pytest.mark.parametrize("form", ["mlx", "sentence-transformers"])
def test_dtype(bases, tmp_path, form, asked, stored):
    """The base model's own, or as asked; config.json and files agree."""
    base = random_models.recast(bases["bert"], tmp_path / "bfloat16", mx.bfloat16)
    base = random_models.changed(base, tmp_path / "base", dtype="bfloat16")
    _, adapter = trained(base, tmp_path / "run" / "final")
    folder = run_export(tmp_path / "out", adapter=adapter, format=form, dtype=asked)
    tensors = mx.load(str(folder / "model.safetensors")).values()
    assert {value.dtype for value in tensors} == {stored}
    assert read_json(folder)["dtype"] == (asked or "bfloat16")


def test_a_pad_token_is_named_where_the_tokenizer_has_none(bases, tmp_path):
    base = shutil.copytree(bases["llama"], tmp_path / "base")
    roles = {k: v for k, v in read_json(base, "tokenizer_config.json").items() if k != "pad_token"}
    (base / "tokenizer_config.json").write_text(json.dumps(roles))
    folder = run_export(tmp_path / "out", model=base, skip_library_check=False)
    assert read_json(folder, "tokenizer_config.json")["pad_token"] == "<eos>"


def test_a_class_that_makes_other_tokens_is_replaced(bases, tmp_path, capsys):
    """transformers' Gemma tokenizer builds itself of the vocabulary and would split words otherwise."""
    base = shutil.copytree(bases["bert"], tmp_path / "base")
    file = base / "tokenizer.json"
    content = read_json(base, "tokenizer.json")
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, content["normalizer"]]}
    file.write_text(json.dumps(content))
    roles = read_json(base, "tokenizer_config.json") | {"tokenizer_class": "GemmaTokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(roles))
    folder = run_export(tmp_path / "out", model=base, skip_library_check=False)
    assert read_json(folder, "tokenizer_config.json")["tokenizer_class"] == exporters_tokenizer.GENERIC
    assert "since GemmaTokenizer makes other tokens" in capsys.readouterr().out


def test_an_empty_text_is_the_mean_of_its_special_tokens(adapters, tmp_path):
    """Which otherwise weigh nothing where pooling leaves them out."""
    folder = run_export(tmp_path / "out", adapter=adapters["bidirectional"])
    assert (folder / "1_WordWeights").is_dir()
    theirs = sentence_transformer(folder).encode([""])
    assert worst(theirs, embedder.load(adapters["bidirectional"]).encode([""])) >= 0.9999


# --- the check, and what is refused ---------------------------------------------------------------------------------


def test_a_failed_check_leaves_nothing(adapters, tmp_path, monkeypatch, capsys):
    own, flags = weights.merge, ["--adapter", str(adapters["bert"]), "--output", str(tmp_path / "out")]

    def spoiled(backbone):
        names = own(backbone)
        layer = backbone.layers[1].attention.self.query
        layer.weight = layer.weight[::-1]
        return names

    monkeypatch.setattr(weights, "merge", spoiled)
    assert export.main(flags) == 2
    assert "export.py: the check failed: embed.load gives a vector of cosine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_what_was_there(adapters, bases, tmp_path, monkeypatch):
    folder = run_export(tmp_path / "out", model=bases["bert"])
    before = file_digests(folder)
    monkeypatch.setattr(limits, "LIMITS", dict.fromkeys(limits.LIMITS, limits.Limit(1.1, 0.0)))
    with pytest.raises(UserError, match="the check failed"):
        run_export(folder, adapter=adapters["bert"], overwrite=True)
    assert file_digests(folder) == before and [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("spoil", [{"pooling": "cls"}, {"query_prompt": ""}, {"pool_special": True}])
def test_the_check_sees_what_sentence_transformers_makes_of_the_folder(adapters, tmp_path, monkeypatch, spoil):
    """Files that only it reads, and embed.load does not."""
    own = sentence_transformers_files.write

    def spoiled(folder, config, *rest):
        own(folder, dataclasses.replace(config, **spoil), *rest)

    monkeypatch.setattr(sentence_transformers_files, "write", spoiled)
    with pytest.raises(UserError, match="the check failed: SentenceTransformer .* gives a vector of cosine"):
        run_export(tmp_path / "out", adapter=adapters["llama"], skip_library_check=False)
    assert not (tmp_path / "out").exists()


def test_vectors_that_are_not_finite_fail(adapters, tmp_path, monkeypatch):
    own = weights.mlx_tensors

    def spoiled(backbone):
        return own(backbone) | {"embeddings.LayerNorm.weight": mx.full((64,), mx.nan)}

    monkeypatch.setattr(weights, "mlx_tensors", spoiled)
    with pytest.raises(UserError, match="not finite"):
        run_export(tmp_path / "out", adapter=adapters["bert"], format="mlx")


def test_folders_that_are_not_empty(bases, tmp_path):
    folder = run_export(tmp_path / "out", model=bases["bert"])
    before = file_digests(folder)
    with pytest.raises(UserError, match="an export is in this folder; --overwrite replaces it"):
        run_export(folder, model=bases["bert"])
    (folder / "old.txt").write_text("of an earlier export")
    run_export(folder, model=bases["bert"], overwrite=True)
    assert file_digests(folder) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    for overwrite in (False, True):  # no advice that would be refused next
        with pytest.raises(UserError, match="not empty, and not an export: name another folder"):
            run_export(tmp_path / "photos", model=bases["bert"], overwrite=overwrite)
    (tmp_path / "empty").mkdir()
    run_export(tmp_path / "empty", model=bases["bert"])


def test_the_source_is_never_replaced(bases, adapters, tmp_path):
    base = shutil.copytree(bases["bert"], tmp_path / "models" / "base")
    for output in (base, base.parent):
        with pytest.raises(UserError, match="the model to export is in there"):
            run_export(output, model=base, overwrite=True)
    with pytest.raises(UserError, match="base holds a model, which reads the weights below"):
        run_export(base / "sub", model=base)
    with pytest.raises(UserError, match="the model to export is in there"):
        run_export(adapters["bert"].parent, adapter=adapters["bert"], overwrite=True)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "nothing to export: name --adapter, for example adapters/best, or --model"),
        (["--adapter", "missing"], "missing: no such adapter folder"),
        (["--adapter", "{run}"], "a run was saved there, so export {run}/final"),
        (["--adapter", "{adapter}", "--model", "{other}"], "is another model"),
        (
            ["--adapter", "{adapter}", "--quantize", "4"],
            "--quantize writes a folder that only mlx reads: use --format mlx",
        ),
        (
            ["--adapter", "{adapter}", "--format", "mlx", "--gguf-ready"],
            "--gguf-ready needs --format sentence-transformers or hf",
        ),
        (["--model", "nowhere"], "--model nowhere: no folder"),
    ],
)
def test_bad_input(bases, adapters, tmp_path, capsys, monkeypatch, flags, told):
    monkeypatch.chdir(tmp_path)
    places = {"run": adapters["bert"].parent, "adapter": adapters["bert"], "other": bases["llama"]}
    flags = [flag.format(**places) for flag in flags]
    assert export.main([*flags, "--output", str(tmp_path / "out")]) == 2
    assert told.format(**places) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_maximum_over_the_texts_own_tokens_has_no_module(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "run" / "final", pooling="max")
    with pytest.raises(UserError, match="own tokens in max pooling: use --format mlx or hf"):
        run_export(tmp_path / "out", adapter=adapter)
    run_export(tmp_path / "out", adapter=adapter, format="hf")


def test_prompts_with_the_tokenizers_own_tokens_have_no_module(bases, tmp_path):
    _, adapter = trained(bases["llama"], tmp_path / "run" / "final", query_prompt="<eos>what:")
    with pytest.raises(UserError, match="the prompt 'query' has tokens that the tokenizer puts around texts"):
        run_export(tmp_path / "out", adapter=adapter)


def test_widths_that_no_group_divides(bases, tmp_path):
    base = random_models.save(
        "bert", tmp_path / "base", tokenizer=bases["bert"].parent / "framed", intermediate_size=72
    )
    with pytest.raises(UserError, match=r"--quantize 4: encoder\.layer\.\d\.output\.dense has 72 inputs"):
        run_export(tmp_path / "out", model=base, format="mlx", quantize=4)


def test_trained_parameters_without_a_place_are_told(bases, adapters, tmp_path, monkeypatch):
    """As with experts that mlx-lm stacks and GPT-2's transposed matrices."""
    monkeypatch.setattr(weights, "_parameter", lambda backbone, name, _: None if "layers.1" in name else name)
    with pytest.raises(UserError, match=r"trained parameters are not tensors of .*layers\.1\..*Use --format mlx"):
        run_export(tmp_path / "out", adapter=adapters["llama"])


# --- GGUF -----------------------------------------------------------------------------------------------------------


def test_gguf_ready_encoder(adapters, vectors, tmp_path, capsys):
    folder = run_export(tmp_path / "out", adapter=adapters["bert"], gguf_ready=True, dtype="float16")
    assert read_json(folder)["architectures"] == ["BertModel"]
    assert read_json(folder / "1_Pooling")["pooling_mode_mean_tokens"] is True
    assert {value.dtype for value in mx.load(str(folder / "model.safetensors")).values()} == {mx.float16}
    assert f"python convert_hf_to_gguf.py {folder}" in capsys.readouterr().out


def test_gguf_ready_last_token_decoder(adapters, tmp_path, capsys):
    folder = run_export(tmp_path / "out", adapter=adapters["qwen3"], gguf_ready=True, format="hf")
    assert read_json(folder)["architectures"] == ["Qwen3ForCausalLM"]
    assert read_json(folder / "1_Pooling")["pooling_mode_lasttoken"] is True
    told = capsys.readouterr().out
    assert "--pooling last" in told and "a GGUF holds no prompts" in told


@pytest.mark.parametrize("opens", [False, True])
def test_gguf_ready_leaves_a_tokenizer_as_the_converter_knows_it(tmp_path, opens):
    """Regression: the converter refused every decoder whose texts the export had closed: other ids of its test text."""
    base, folder = tmp_path / "base", tmp_path / "out"
    base.mkdir(), folder.mkdir()
    shutil.copy(CHECKOUT / "gemma-3-tiny-mlx" / "tokenizer_config.json", base)
    own = read_json(CHECKOUT / "gemma-3-tiny-mlx", "tokenizer.json")
    if not opens:
        own["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (base / "tokenizer.json").write_text(json.dumps(own), encoding="utf-8")
    tokenizer = RetrievalConfig(pooling="last", append_eos=True).tokenizer(base)
    exporters_tokenizer.write(base, folder, tokenizer, 50)
    assert read_json(folder, "tokenizer.json")["post_processor"]["single"][-1] == {
        "SpecialToken": {"id": "<eos>", "type_id": 0}
    }
    told = " ".join(gguf.adapt_tokenizer(folder, tokenizer))
    assert "only for it: the files of the tokenizer close no text" in told and ("--override-kv" in told) == opens
    assert read_json(folder, "tokenizer.json")["post_processor"] == (own["post_processor"] if opens else None)
    assert read_json(folder, "tokenizer_config.json")["add_eos_token"] is True


def test_gguf_ready_leaves_a_tokenizer_of_sentencepiece_closed(tmp_path):
    """The converter reads its own file, and from tokenizer.json only that texts are closed."""
    (tmp_path / "tokenizer.model").touch()
    tokenizer = RetrievalConfig(pooling="last", append_eos=True).tokenizer(CHECKOUT / "gemma-3-tiny-mlx")
    exporters_tokenizer.write(CHECKOUT / "gemma-3-tiny-mlx", tmp_path, tokenizer, 50)
    before = file_digests(tmp_path)
    assert gguf.adapt_tokenizer(tmp_path, tokenizer) == [] and file_digests(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("llama", "its mean counts the tokens that the tokenizer puts around a text"),
        ("t5", "of dense layers it supports only EmbeddingGemma's two"),
        ("gemma3_text", "full attention in every sixth layer"),
    ],
)
def test_what_a_gguf_would_compute_otherwise_is_refused(adapters, tmp_path, kind, why):
    with pytest.raises(UserError, match=why):
        run_export(tmp_path / "out", adapter=adapters[kind], gguf_ready=True)


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_how_near_it_came(adapters, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # the whole check
    flags = ["--adapter", str(adapters["bert"]), "--output", str(tmp_path / "out")]
    assert export.main(flags) == 0
    told = capsys.readouterr().out
    for part in ("embed.load: worst cosine 1.0000", "SentenceTransformer 6", "worst cosine 1.0000", "float32", " MB"):
        assert part in told
    assert f"python eval.py --model {tmp_path / 'out'}" in told
    assert (tmp_path / "out" / "README.md").is_file()
