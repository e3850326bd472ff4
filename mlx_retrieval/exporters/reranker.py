"""Writes a folder of a merged reranker, and checks that it gives the scores that the reranker gave.

cross-encoder   transformers' *ForSequenceClassification with one label, head and all, for CrossEncoder
qwen3           *ForCausalLM whose chat template is the prompt: for CrossEncoder of sentence-transformers 6, and mlx-lm
listwise        the language model and the projector's tensors, as jina-reranker-v3 is published

`--format mlx` writes the same under mlx's names, quantised if asked for. Used by export.py; tested by
`python -m pytest tests/test_export_reranker.py`.
"""

import re
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval.backbones import ENCODERS, decoder, hub, set_dtype
from mlx_retrieval.exporters import (
    config_json,
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

ACTIVATIONS = {"sigmoid": "torch.nn.modules.activation.Sigmoid", "": "torch.nn.modules.linear.Identity"}
ONE_LABEL = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
# Encoders that transformers has a classifier for: the beginning of its name, and what it calls the encoder in it.
CLASSES = {
    "bert": ("Bert", "bert."),
    "roberta": ("Roberta", "roberta."),
    "xlm-roberta": ("XLMRoberta", "roberta."),
    "camembert": ("Camembert", "roberta."),
    "modernbert": ("ModernBert", "model."),
}
LISTWISE = {"inner": "projector.0", "outer": "projector.2"}
LISTWISE_MLX = {"inner": "linear1", "outer": "linear2"}  # in a file of their own, which mlx-lm does not look into


class RerankerWriter:
    """Fills a folder with a reranker, and checks it. `lines` gets what is to be said of it.

    Args:
        model, config, base: as `loading.open_model` returns them. The model is changed, and empty in the end.

    Raises UserError for what no other library could compute.
    """

    def __init__(self, job: Export, model: RetrievalModel, config: RetrievalConfig, base: Path):
        self.job, self.model, self.config, self.base = job, model, config, base
        self.kind, self.type = config.reranker, model.backbone.config["model_type"]
        self.tokenizer = config.tokenizer(base)
        self.form, self.lines = job.format, []
        self.answers: list[int] | None = None  # tokens of no and yes, once a chat template is the prompt
        if job.gguf_ready:
            raise UserError("--gguf-ready is for models of vectors: llama.cpp's converter knows no rerankers' heads")
        if job.adapter is None and tree_flatten(model.head.trainable_parameters()):
            raise UserError(f"{base}: it has no reranker's head yet: train it, and export the adapter")
        if self.type in ENCODERS and self.type not in CLASSES:
            raise UserError(f"{self.type}: no library has a class for a cross-encoder of it; use the adapter as it is")
        if self.kind == "listwise" and self.form == "sentence-transformers":
            self.form = "hf"
            self._say("format", "hf: sentence-transformers has no listwise rerankers")
        if self.form == "sentence-transformers" and "text_config" in model.backbone.config:
            raise UserError(
                f"{self.type}: sentence-transformers would load its image part as well; use --format hf or mlx"
            )
        self.groups = reranker_parity.check_groups(config.max_length)

    def fill(self, folder: Path) -> None:
        """Write everything, and compare with the model as it was. UserError where anything is not as it should be."""
        expected = self._scores()
        stored = weights.stored_dtype(self.base)
        dtype = getattr(mx, self.job.dtype) if self.job.dtype else stored
        self._write(folder, dtype)
        tolerance, reader = reranker_parity.ROUNDED[dtype], "rerank.Reranker"
        if self.job.quantize:
            whole, tolerance, reader = expected, reranker_parity.EXACT, "rerank.Reranker, to the quantised in memory"
            expected = self._scores()
            worst, mean = reranker_parity.difference(expected, whole)
            self._say("check", f"quantised, to the whole model: worst difference {worst:.4f}, mean {mean:.4f}")
        parity.release(self.model)
        found = reranker_parity.own_scores(folder, self.groups)
        self._say("check", reranker_parity.accept(found, expected, reader, tolerance))
        judge = self.kind == "qwen3"
        if judge and not self.config.bidirectional:
            self._say("check", reranker_parity.check_mlx_lm(folder, self.groups, found))
        if self.form == "sentence-transformers" and self.job.skip_library_check:
            self._say("check", "sentence-transformers: left out, as --skip-library-check says")
        elif self.form == "sentence-transformers":
            self._say("check", reranker_parity.check_cross_encoder(folder, self.groups, found, judge))

    def _say(self, what: str, text: str) -> None:
        self.lines.append((what, text))

    def _scores(self) -> np.ndarray:
        """What the model, as it is now, makes of the check's pairs, in float32."""
        set_dtype(self.model.backbone, mx.float32)
        reranker = Reranker.of(self.model, self.config, self.tokenizer, "in memory")
        return reranker_parity.scores(reranker, self.groups)

    def _write(self, folder: Path, dtype: mx.Dtype) -> None:
        job, backbone = self.job, self.model.backbone
        trained = weights.merge(backbone)
        self._say("merged", f"{job.adapter}: {len(trained):,} tensors" if job.adapter else "nothing: a base model")
        name = str(dtype).rpartition(".")[-1]
        one_dtype = job.dtype or self.form == "mlx"
        settings = self._settings(name if one_dtype else None)
        heads = self._head(getattr(mx, job.dtype) if job.dtype else mx.float32)
        if self.form == "mlx":
            weights.cast(backbone, dtype)
            if job.quantize:
                settings["quantization"] = weights.quantise(backbone, job.quantize)
                settings["quantization_config"] = settings["quantization"]
                name = f"{job.quantize} bits in groups of {settings['quantization']['group_size']}, scales {name}"
            tensors = weights.mlx_tensors(backbone)
            if self.kind == "listwise":
                hub.save_tensors(folder / rerankers.PROJECTOR, heads)
                heads = {}
        else:
            tensors = self._tensors(trained, dtype if one_dtype else None)
        weights.write(folder, tensors | heads, "mlx" if self.form == "mlx" else "pt")
        self._say("weights", name)

        self.config.write(folder)
        if self.kind == "qwen3" and self.form == "sentence-transformers":
            self._write_modules(folder)
        config_json.write(folder, settings)  # transformers looks into it for the tokenizer
        self._say("tokenizer", self._write_tokenizer(folder))
        adapter = Path(job.adapter).expanduser() if job.adapter else None
        base = job.model or self.config.base_model
        card = model_card.write(self.config, base, adapter, self.form, name, Path(job.output).name, self.answers)
        (folder / "README.md").write_text(card, encoding="utf-8")

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
        """What sentence-transformers 6 itself writes of a judge; without, it would look for a token "yes"."""
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
        said = {"__version__": {"sentence_transformers": "6.0.0"}, "model_type": "CrossEncoder"}
        said |= {"activation_fn": ACTIVATIONS[self.config.activation], "prompts": {}, "default_prompt_name": None}
        write_json(folder, said, SETTINGS)

    # --- config.json and weights ---

    def _settings(self, dtype: str | None) -> dict:
        """config.json; `dtype` as `exported_config.make` has it."""
        backbone = self.model.backbone
        settings = config_json.make(self.base, backbone, "mlx" if self.form == "mlx" else "hf", dtype)
        settings.pop("auto_map", None)  # names code that is not here
        encoder = self.type in ENCODERS
        if not encoder:
            # Both spellings of positions: mlx-lm reads the one, transformers the other.
            settings |= decoder.normalised(settings)
        if self.kind == "cross-encoder":
            settings |= ONE_LABEL | {"architectures": [self._classifier()]}
            settings["sentence_transformers"] = {
                "activation_fn": ACTIVATIONS[self.config.activation],
                "version": "5.0.0",
            }
            settings.pop("sbert_ce_default_activation_function", None)
            if not encoder:  # scored at the last token that is no padding; there is no language model's head
                settings |= {"pad_token_id": self.tokenizer.pad_id, "tie_word_embeddings": True}
        elif self.kind == "qwen3":
            settings["architectures"] = [self._causal()]
        return settings

    def _architecture(self) -> str:
        """transformers' class of the base model without its task: "Qwen3" of Qwen3ForCausalLM."""
        named = (self.model.backbone.config.get("architectures") or [""])[0]
        return re.sub(r"(ForCausalLM|ForSequenceClassification|Model)$", "", named)

    def _classifier(self) -> str:
        if self.type in CLASSES:
            stem = CLASSES[self.type][0]
        else:
            stem = "Gemma3Text" if self.type == "gemma3_text" else self._architecture()
        return f"{stem}ForSequenceClassification"

    def _causal(self) -> str:
        stem = "Gemma3" if self.type == "gemma3_text" else self._architecture()
        return stem if stem.endswith("ForConditionalGeneration") else f"{stem}ForCausalLM"

    def _head(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """The head's tensors under their published names; a judge's is the language model's own."""
        mlx = self.form == "mlx"
        if self.kind == "listwise":
            names = LISTWISE_MLX if mlx else LISTWISE
        else:
            names = {own: name for name, own in rerankers.TENSORS.get(self.type, {"score": "out"}).items()}
        found = {}
        for name, value in tree_flatten(self.model.head.parameters()):
            stem, _, end = name.rpartition(".")
            inside = "bert." if names[stem].startswith("pooler") and not mlx else ""  # of BERT's encoder
            found[f"{inside}{names[stem]}.{end}"] = value.astype(dtype)
        return found

    def _tensors(self, trained: set[str], dtype: mx.Dtype | None) -> dict[str, mx.array]:
        """The backbone's tensors under the names of transformers' class, as `merging.stored_tensors` makes them."""
        backbone = self.model.backbone
        encoder = ENCODERS.get(self.type)
        inside = {name for name, _ in tree_flatten(backbone.adapted.parameters())}
        no_vocabulary = self.kind == "cross-encoder" or not any("lm_head" in name for name in inside)
        drop = (*decoder.HEADS, *(("lm_head.",) if no_vocabulary and not encoder else ()))
        found = weights.stored_tensors(self.base, backbone, trained, dtype, drop)
        if encoder:  # of the base's tensors only the encoder's: its own head was for something else, or is in ours
            prefix = CLASSES[self.type][1]
            return {f"{prefix}{own}": v for name, v in found.items() for own in encoder.sanitize({name: None})}
        if any(name.startswith("layers.") for name in found):  # a trunk that was saved by itself
            return {name if name.startswith("lm_head.") else f"model.{name}": v for name, v in found.items()}
        return found
