"""Write a reranker for other libraries, and check that the folder gives the same scores.

cross-encoder   transformers' *ForSequenceClassification with one label and its head, for CrossEncoder
qwen3           *ForCausalLM whose chat template is the prompt: for CrossEncoder of sentence-transformers 6, and mlx-lm
listwise        the language model and the projector's tensors, in the layout of jina-reranker-v3

`--format mlx` writes the same under mlx's names, and quantises on request.
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval.backbones import ENCODERS, decoder, dequantized, hub, set_dtype
from mlx_retrieval.exporters import (
    config_json,
    limits,
    model_card,
    parity,
    reranker_parity,
    reranker_tokenizer,
    tokenizer,
    weights,
)
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.exporters.sentence_transformers_files import write_json
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import rerankers
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.sentence_transformers_files import MODULES, SENTENCE, SETTINGS
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

ACTIVATIONS = {"sigmoid": "torch.nn.modules.activation.Sigmoid", "": "torch.nn.modules.linear.Identity"}
ONE_LABEL = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# Encoders with a classifier in transformers: the beginning of its class name, and the prefix of the encoder's tensors.
CLASSES = {
    "bert": ("Bert", "bert."),
    "roberta": ("Roberta", "roberta."),
    "xlm-roberta": ("XLMRoberta", "roberta."),
    "camembert": ("Camembert", "roberta."),
    "modernbert": ("ModernBert", "model."),
    "mpnet": ("MPNet", "mpnet."),
    "distilbert": ("DistilBert", "distilbert."),
    "deberta-v2": ("DebertaV2", "deberta."),
    "nomic_bert": ("NomicBert", "nomic_bert."),
    "new": ("Gte", "gte."),
    "gte": ("Gte", "gte."),
    "eurobert": ("EuroBert", "model."),
}
POOLED = ("bert", "nomic_bert", "new", "gte")  # whose pooler is part of the encoder
LISTWISE = {"inner": "projector.0", "outer": "projector.2"}
LISTWISE_MLX = {"inner": "linear1", "outer": "linear2"}  # in a file of their own, which mlx-lm does not read


class RerankerWriter:
    """Fills a folder with a reranker and checks it. `lines` collects (name, text) pairs to print about it.

    Args:
        model, config, base: as `loading.open_model` returns them. The model is changed, and empty in the end.

    Raises UserError if no other library could compute the scores.
    """

    def __init__(self, job: Export, model: RetrievalModel, config: RetrievalConfig, base: Path):
        self.job, self.model, self.config, self.base = job, model, config, base
        self.kind, self.model_type = config.reranker, model.backbone.config["model_type"]
        self.tokenizer = config.tokenizer(base)
        self.form, self.lines = job.format, []
        self.answers: list[int] | None = None  # token ids of no and yes, once a chat template is the prompt
        if job.gguf_ready:
            raise UserError("--gguf-ready is for embedding models: llama.cpp's converter knows no reranker's head")
        if job.adapter is None and tree_flatten(model.head.trainable_parameters()):
            raise UserError(f"{base}: it has no reranker head yet: train it and export the adapter")
        if self.model_type in ENCODERS and self.model_type not in CLASSES:
            raise UserError(f"{self.model_type}: no library has a cross-encoder class for it; use the adapter itself")
        if self.kind == "listwise" and self.form == "sentence-transformers":
            self.form = "hf"
            self._note("format", "hf, as sentence-transformers has no listwise rerankers")
        if self.form == "sentence-transformers" and "text_config" in model.backbone.config:
            raise UserError(
                f"{self.model_type}: sentence-transformers would also load its image encoder; use --format hf or mlx"
            )
        self.groups = reranker_parity.check_groups(config.max_length)

    def fill(self, folder: Path) -> None:
        """Write the folder and compare its scores with the original model's. UserError if they differ."""
        expected = self._scores()
        stored = weights.stored_dtype(self.base)
        dtype = getattr(mx, self.job.dtype) if self.job.dtype else stored
        self._write(folder, dtype)
        form, reader = limits.form_of(dtype), "rerank.Reranker"
        if self.job.quantize:
            original = expected
            reader = "rerank.Reranker, against the quantised model in memory"
            with parity.of_exported_model("scores"):
                expected = self._scores()
            form, quantised = "float32", limits.quantised_form(self.job.quantize)
            line, missed = reranker_parity.compare_quantised(expected, original, quantised)
            self._note("check", line)
            self._note(limits.MISSED, missed)
        parity.release(self.model)
        scores = reranker_parity.own_scores(folder, self.groups)
        self._note("check", reranker_parity.accept(scores, expected, reader, form))
        judge = self.kind == "qwen3"
        if judge and not self.config.bidirectional:
            self._note("check", reranker_parity.check_mlx_lm(folder, self.groups, scores))
        if self.form == "sentence-transformers" and self.job.skip_library_check:
            self._note("check", "sentence-transformers: not checked, because of --skip-library-check")
        elif self.form == "sentence-transformers":
            self._note("check", reranker_parity.check_cross_encoder(folder, self.groups, scores, judge))

    def _note(self, name: str, text: str) -> None:
        if text:
            self.lines.append((name, text))

    def _scores(self) -> np.ndarray:
        """Return the present model's scores of the check's pairs, computed in float32."""
        set_dtype(self.model.backbone, mx.float32)
        dequantized.dequantize(self.model.backbone)
        reranker = Reranker.of(self.model, self.config, self.tokenizer, self.job.source)
        return reranker_parity.scores(reranker, self.groups)

    def _write(self, folder: Path, dtype: mx.Dtype) -> None:
        job, backbone = self.job, self.model.backbone
        trained = weights.merge(backbone)
        if job.adapter:
            self._note("merged", job.merged(len(trained)))
        else:
            self._note("adapter", "none: the base model itself is exported")
        name = str(dtype).rpartition(".")[-1]
        one_dtype = job.dtype or self.form == "mlx"
        settings = self._settings(name if one_dtype else None)
        heads = self._head(getattr(mx, job.dtype) if job.dtype else mx.float32)
        if self.form == "mlx":
            weights.cast(backbone, dtype)
            if job.quantize:
                name = f"{weights.quantise(backbone, job.quantize, settings)}, scales {name}"
            tensors = weights.mlx_tensors(backbone)
            if self.kind == "listwise":
                weights.check_finite(heads)
                hub.save_tensors(folder / rerankers.PROJECTOR, heads)
                heads = {}
        else:
            tensors = self._tensors(trained, dtype if one_dtype else None)
        weights.write(folder, tensors | heads, "mlx" if self.form == "mlx" else "pt")
        self._note("weights", name)

        self.config.write(folder)
        if self.kind == "qwen3" and self.form == "sentence-transformers":
            self._write_modules(folder)
        config_json.write(folder, settings)  # transformers reads it to load the tokenizer
        self._note("tokenizer", self._write_tokenizer(folder))
        adapter = Path(job.adapter).expanduser() if job.adapter else None
        base = job.model or self.config.base_model
        origin = {"answers": self.answers, "mixture": job.mixture, "measured": job.is_measured}
        card = model_card.write(self.config, base, adapter, self.form, name, job.public_name, **origin)
        (folder / "README.md").write_text(writable(card), encoding="utf-8")

    def _write_tokenizer(self, folder: Path) -> str:
        if self.kind == "cross-encoder":
            return reranker_tokenizer.write_pairs(self.base, folder, self.tokenizer)
        if self.kind == "qwen3":
            needed = self.form == "sentence-transformers"
            note, templated = reranker_tokenizer.write_prompt(self.base, folder, self.tokenizer, needed)
            self.answers = self.tokenizer.answers if templated else None
            return note
        return tokenizer.write(self.base, folder, self.tokenizer.texts, rerankers.LIST_MOST)

    def _write_modules(self, folder: Path) -> None:
        """Write the module files that sentence-transformers 6 writes for a judge.

        Without them it would look for a token "yes" itself.
        """
        no, yes = self.tokenizer.answers
        kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
        modules = [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
            for i, (path, kind) in enumerate(zip(("", "1_LogitScore"), kinds, strict=True))
        ]
        score = {"true_token_id": yes, "false_token_id": no, "module_input_name": "causal_logits"}
        logits = {"method": "forward", "method_output_name": "logits"}
        reads = {"text": logits, "message": logits | {"format": "flat"}}
        settings = {"transformer_task": "text-generation", "modality_config": reads}
        (folder / "1_LogitScore").mkdir()
        write_json(folder / "1_LogitScore", score, "config.json")
        write_json(folder, modules, MODULES)
        write_json(folder, settings | {"module_output_name": "causal_logits"}, SENTENCE)
        library = {"__version__": {"sentence_transformers": "6.0.0"}, "model_type": "CrossEncoder"}
        library |= {"activation_fn": ACTIVATIONS[self.config.activation], "prompts": {}, "default_prompt_name": None}
        write_json(folder, library, SETTINGS)

    # --- config.json and weights ---

    def _settings(self, dtype: str | None) -> dict:
        """Return the content of config.json; `dtype` is that of `config_json.make`."""
        backbone = self.model.backbone
        settings = config_json.make(self.base, backbone, "mlx" if self.form == "mlx" else "hf", dtype)
        settings.pop("auto_map", None)  # names code that the folder does not hold
        encoder = self.model_type in ENCODERS
        if not encoder:
            # Both spellings of position settings: mlx-lm reads one, transformers the other.
            settings |= decoder.normalised(settings)
        if self.kind == "cross-encoder":
            settings |= ONE_LABEL | {"architectures": [self._classifier()]}
            settings["sentence_transformers"] = {
                "activation_fn": ACTIVATIONS[self.config.activation],
                "version": "5.0.0",
            }
            settings.pop("sbert_ce_default_activation_function", None)
            if not encoder:  # scored at the last token that is not padding; there is no language model's head
                settings |= {"pad_token_id": self.tokenizer.pad_id, "tie_word_embeddings": True}
        elif self.kind == "qwen3":
            settings["architectures"] = [self._causal()]
        return settings

    def _architecture(self) -> str:
        """Return the base model's class in transformers without its task: "Qwen3" of Qwen3ForCausalLM."""
        name = (self.model.backbone.config.get("architectures") or [""])[0]
        return re.sub(r"(ForCausalLM|ForSequenceClassification|Model)$", "", name)

    def _classifier(self) -> str:
        if self.model_type in CLASSES:
            stem = CLASSES[self.model_type][0]
        else:
            stem = "Gemma3Text" if self.model_type == "gemma3_text" else self._architecture()
        return f"{stem}ForSequenceClassification"

    def _causal(self) -> str:
        stem = "Gemma3" if self.model_type == "gemma3_text" else self._architecture()
        return stem if stem.endswith("ForConditionalGeneration") else f"{stem}ForCausalLM"

    def _head(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """Return the head's tensors under their published names; a judge has none of its own."""
        mlx = self.form == "mlx"
        if self.kind == "listwise":
            names = LISTWISE_MLX if mlx else LISTWISE
        else:
            names = {own: name for name, own in rerankers.TENSORS.get(self.model_type, {"score": "out"}).items()}
        tensors = {}
        for name, value in tree_flatten(self.model.head.parameters()):
            stem, _, end = name.rpartition(".")
            inside = names[stem].startswith("pooler") and self.model_type in POOLED and not mlx
            prefix = CLASSES[self.model_type][1] if inside else ""
            tensors[f"{prefix}{names[stem]}.{end}"] = value.astype(dtype)
        return tensors

    def _tensors(self, trained: set[str], dtype: mx.Dtype | None) -> dict[str, mx.array]:
        """Return the backbone's tensors (see `weights.stored_tensors`) under the names of transformers' class."""
        backbone = self.model.backbone
        encoder = ENCODERS.get(self.model_type)
        names = {name for name, _ in tree_flatten(backbone.adapted.parameters())}
        no_vocabulary = self.kind == "cross-encoder" or not any("lm_head" in name for name in names)
        drop = (*decoder.HEADS, *(("lm_head.",) if no_vocabulary and not encoder else ()))
        tensors = weights.stored_tensors(self.base, backbone, trained, dtype, drop)
        if encoder:  # only the encoder's tensors: the base's head had another task, or is part of the model's head
            prefix = CLASSES[self.model_type][1]
            return {f"{prefix}{own}": v for name, v in tensors.items() for own in encoder.sanitize({name: None})}
        if any(name.startswith("layers.") for name in tensors):  # a trunk that was saved by itself
            return {name if name.startswith("lm_head.") else f"model.{name}": v for name, v in tensors.items()}
        return tensors
