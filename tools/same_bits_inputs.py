"""The models, data and scripts that same_bits.py gives to both checkouts: small, random and seeded.

words = make_inputs(checkout, Path("work/inputs"), sys.executable)     # what {inputs} and {query} stand for
"""

import json
import random
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROWS = 240
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|embed_token|>", "<|rerank_token|>")
SHAPE = {"vocab_size": 1100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "max_position_embeddings": 1024}
DECODER = {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
MODERN = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
MODERN |= {"global_attn_every_n_layers": 2, "local_attention": 16}
T5 = {"vocab_size": 1100, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
# name: (class of transformers, model_type, settings of its config)
MODELS = {
    "qwen3": ("AutoModelForCausalLM", "qwen3", SHAPE | DECODER),
    "llama": ("AutoModelForCausalLM", "llama", SHAPE | DECODER),
    "listwise": ("AutoModelForCausalLM", "qwen3", SHAPE | DECODER),
    "bert": ("AutoModel", "bert", SHAPE),
    "roberta": ("AutoModel", "roberta", SHAPE | {"type_vocab_size": 1, "pad_token_id": 1}),
    "modernbert": ("AutoModel", "modernbert", SHAPE | MODERN),
    "t5": ("T5EncoderModel", "t5", T5),
    "cross": ("AutoModelForSequenceClassification", "bert", SHAPE | {"num_labels": 1}),
}
OTHER_SOURCES = {
    "area.rs": "/// Computes the area of a circle, which is round.\npub fn area(radius: f64) -> f64 {\n"
    "    let square = radius * radius;\n    square * 3.14159\n}\n",
    "queue.go": "package queue\n\n// Push puts an item at the end of the queue.\nfunc (q *Queue) Push(item int) {\n"
    "\tq.items = append(q.items, item)\n\tq.count++\n}\n",
    "count.c": "/* Counts the zero bytes of a buffer of this length. */\nint zeros(const char *data, int n) {\n"
    "  int found = 0;\n  for (int i = 0; i < n; i++) found += data[i] == 0;\n  return found;\n}\n",
    "Text.java": "class Text {\n  /** Joins words with a separator between each two of them. */\n"
    "  static String join(String[] words, String by) {\n    StringBuilder all = new StringBuilder();\n"
    "    for (String word : words) all.append(word).append(by);\n    return all.toString();\n  }\n}\n",
    "wait.ts": "/** Waits so many milliseconds before the next request. */\n"
    "export async function wait(time: number): Promise<void> {\n"
    "  const later = new Promise((go) => setTimeout(go, time));\n  await later;\n}\n",
    "notes.md": "# Notes\n\nHow headers are written.\n\n## Folding\n\nLong lines of a header are folded at spaces.\n",
}

PREPARE = """
try:
    from mlx_retrieval import backend
except ImportError:  # a checkout of before the package, where `import embed` did this
    pass
else:
    backend.prepare()
"""
BACKBONES = f"""
import sys
{PREPARE}
from embed import load

import numpy as np

texts = [line.strip() for line in open(sys.argv[1] + "/texts.txt", encoding="utf-8")]
for name in ("bert", "roberta", "modernbert", "t5", "qwen3", "llama", "quantised"):
    model = load(f"{{sys.argv[1]}}/{{name}}")
    np.save(f"{{name}}.npy", model.encode(texts, prompt="document", show_progress=False))
"""
NOTEBOOK = (
    PREPARE
    + """
import json
import sys
from embed import load
from rerank import Reranker
from search import Searcher
from mlx_cross_encoder import (
    MLXCrossEncoder, MLXCrossEncoderConfig, MLXCrossEncoderTrainer, Qwen3RerankerConfig, Qwen3RerankerTrainer,
    TriBridMLXReranker, from_env,
)

import numpy as np

inputs = sys.argv[1]
texts = [line.strip() for line in open(inputs + "/texts.txt", encoding="utf-8")][:24]
rows = [{"query": q, "document": d, "label": i % 2} for i, (q, d) in enumerate(zip(texts[::2], texts[1::2]))]
np.save("vectors.npy", load("gemma-3-tiny-mlx").encode(texts, prompt="query", show_progress=False))
answers = {name: Reranker(f"{inputs}/{name}").rerank(texts[0], texts[1:], top_n=5)
           for name in ("cross", "listwise")}
answers["qwen3"] = TriBridMLXReranker("qwen3", f"{inputs}/qwen3").rerank(texts[0], texts[1:])
answers["environment"] = from_env({"RERANKER_MODE": "mlx", "MLX_RERANKER_TYPE": "cross-encoder",
                                   "MLX_RERANKER_MODEL": f"{inputs}/cross"}).rerank(texts[0], texts[1:], 3)
small = {"lora_rank": 4, "num_epochs": 2, "max_length": 200, "learning_rate": 1e-3}
trainer = Qwen3RerankerTrainer(Qwen3RerankerConfig(
    model_name=f"{inputs}/qwen3", adapter_path="qwen3-lora", batch_size=3, gradient_accumulation_steps=2, **small))
answers["trained qwen3"] = [trainer.train(rows, rows[:4]), trainer.rerank(texts[0], texts[1:])]
model = MLXCrossEncoder.from_pretrained(f"{inputs}/cross")
trainer = MLXCrossEncoderTrainer(model, MLXCrossEncoderConfig(save_path="cross-full", batch_size=6, **small))
answers["trained cross"] = [trainer.train(rows), model.predict([(texts[0], t) for t in texts[1:]]).tolist()]
json.dump(answers, open("answers.json", "w", encoding="utf-8"), indent=1)
"""
)


def make_inputs(checkout: Path, folder: Path, python: str) -> dict[str, str]:
    """Fill a folder with models, data and scripts, from a checkout's data and seeds; returns the words of commands."""
    rows = [json.loads(line) for line in (checkout / "train-data.jsonl").read_text("utf-8").splitlines()[:ROWS]]
    queries, documents = [row["query"] for row in rows], [row["document"] for row in rows]
    folder.mkdir(parents=True)
    pick = random.Random(0)
    negatives = [
        {"query": q, "positive": d, "negatives": pick.sample(documents, 3)}
        for q, d in zip(queries[:120], documents, strict=False)
    ]
    scored = [
        {"query": row["query"], "documents": [row["positive"], *row["negatives"]], "scores": [3.0, 1.5, 0.5, -1.0]}
        for row in negatives
    ]
    talks = []
    for i in range(40):  # of one or two questions and answers
        turns = [("user", queries[i]), ("assistant", documents[i])]
        turns += [("user", queries[i + 1]), ("assistant", documents[i + 1])] * (i % 2)
        talks.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    for name, lines in (
        ("rows.jsonl", rows),
        ("bad.jsonl", [*rows[:3], {"query": 5}]),
        ("negatives.jsonl", negatives),
        ("scored.jsonl", scored),
        ("chat/train.jsonl", talks[:32]),
        ("chat/valid.jsonl", talks[32:]),
        ("documents.jsonl", [{"text": text} for text in documents[:40]]),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    texts = [text for pair in zip(queries[:30], documents, strict=False) for text in pair]
    (folder / "texts.txt").write_text("".join(" ".join(text.split()) + "\n" for text in texts), "utf-8")
    (folder / "backbones.py").write_text(BACKBONES, "utf-8")
    (folder / "notebook.py").write_text(NOTEBOOK, "utf-8")
    _cut_evaluation(checkout / "eval-data", folder / "eval")
    _copy_sources(folder / "sources")
    make_models(folder, [*queries, *documents])
    convert = [python, "-m", "mlx_lm", "convert", "--hf-path", str(folder / "llama"), "--mlx-path"]
    convert += [str(folder / "quantised"), "-q", "--q-bits", "4", "--q-group-size", "32"]
    subprocess.run(convert, check=True, capture_output=True, text=True)
    return {"inputs": str(folder), "query": queries[0].replace("'", " ")}


def _cut_evaluation(whole: Path, folder: Path, queries: int = 24, documents: int = 110) -> None:
    """A part of a folder in BEIR layout: the first queries, their documents, and others up to a number."""
    (folder / "qrels").mkdir(parents=True)
    head, *judged = (whole / "qrels" / "test.tsv").read_text("utf-8").splitlines(keepends=True)
    kept = (whole / "queries.jsonl").read_text("utf-8").splitlines(keepends=True)[:queries]
    names = {json.loads(line)["_id"] for line in kept}
    judged = [line for line in judged if line.split("\t")[0] in names]
    wanted = {line.split("\t")[1] for line in judged}
    corpus = (whole / "corpus.jsonl").read_text("utf-8").splitlines(keepends=True)
    corpus.sort(key=lambda line: json.loads(line)["_id"] not in wanted)  # stable
    (folder / "qrels" / "test.tsv").write_text(head + "".join(judged), "utf-8")
    (folder / "queries.jsonl").write_text("".join(kept), "utf-8")
    (folder / "corpus.jsonl").write_text("".join(corpus[: max(documents, len(wanted))]), "utf-8")


def _copy_sources(folder: Path) -> None:
    """Source code to mine and to search: parts of Python's own library, and a little of other languages."""
    library = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "json/encoder.py", "http/cookies.py", "email/header.py", "textwrap.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library / name, folder / name)
    for name, text in OTHER_SOURCES.items():
        (folder / name).write_text(text, "utf-8")


def make_models(folder: Path, texts: list[str]) -> None:
    """Write MODELS below a folder, each with a tokenizer that was trained on the texts."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for number, (name, (auto, kind, settings)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        config = transformers.CONFIG_MAPPING[kind](**settings)
        make = getattr(transformers, auto)
        model = make.from_config(config) if auto.startswith("Auto") else make(config)
        for parameter, value in model.named_parameters():
            value.data = torch.randn_like(value) * 0.15 + ("norm" in parameter.lower() and "weight" in parameter)
        model.eval().save_pretrained(folder / name)
        make_tokenizer(folder / name, texts, is_encoder="head_dim" not in settings)
        if name == "listwise":
            file = folder / name / "model.safetensors"
            projector = {
                "projector.0.weight": torch.randn(24, 64) * 0.2,
                "projector.2.weight": torch.randn(20, 24) * 0.2,
            }
            save_file(load_file(file) | projector, file, metadata={"format": "pt"})


def make_tokenizer(folder: Path, texts: list[str], is_encoder: bool) -> None:
    """Write a byte-level tokenizer: with Qwen's marks and "yes" and "no", or framing pairs as BERT does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if is_encoder else SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["yes", "no"] * 500], trainer)
    names = {"pad_token": special[0], "eos_token": special[2]}
    if is_encoder:
        marks = [(word, tokenizer.token_to_id(word)) for word in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
        )
        names = {f"{word.strip('[]').lower()}_token": word for word in special}
    else:
        tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "</think>")])
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names), "utf-8")
