"""Write an embedding or late-interaction model for other libraries."""

from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones import ENCODERS, dequantized, set_dtype
from mlx_retrieval.exporters import (
    config_json,
    gguf,
    kept_layers,
    limits,
    mlx_layout,
    model_card,
    parity,
    pylate_files,
    sentence_transformers_files,
    tokenizer,
    weights,
)
from mlx_retrieval.exporters.job import FORMATS, Export
from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.pylate_files import PROJECTION
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable


class EmbeddingWriter:
    """Fills a folder with a model and checks it. `lines` collects (name, text) pairs to print about it.

    Args:
        model, config, base: as `loading.open_model` returns them. The model is changed, and empty in the end.

    Raises UserError if the job does not fit the model.
    """

    def __init__(self, job: Export, model: RetrievalModel, config: RetrievalConfig, base: Path):
        self.job, self.model, self.config, self.base = job, model, config, base
        self.tokenizer = config.override(query_expansion=0).tokenizer(base)  # tokenizer files do not know of it
        self.model_type = model.backbone.config["model_type"]
        self.limit = max(config.max_length, config.query_max_length)
        self.for_sentence_transformers = job.format == FORMATS[0] or job.gguf_ready
        self.lines: Lines = []
        if job.keep_layers:
            total = len(model.backbone.layers)
            kept_layers.keep_layers(model.backbone, job.keep_layers)
            self._note("layers", f"{' '.join(map(str, job.keep_layers))} of 0 to {total - 1}")
        if job.gguf_ready and config.task == "late":
            raise UserError("--gguf-ready: llama.cpp gives one vector a text, and this model gives one vector a token")

    def fill(self, folder: Path) -> None:
        """Write the folder and compare its vectors with the original model's. UserError if they differ."""
        self._in_float32()
        expected = library_expected = self._vectors(self.config)
        one_limit = self.for_sentence_transformers and self.config.task != "late"
        if one_limit and self.config.query_max_length != self.config.max_length:
            library_expected = self._vectors(self.config.override(max_length=self.limit))
            self._note("lengths", f"sentence-transformers has one limit for all texts: {self.limit} tokens")
        form = limits.form_of(self._write(folder))
        reader = "embed.load"
        if self.job.quantize:
            original, reader = expected, "embed.load, against the quantised model in memory"
            self._in_float32()
            with parity.of_exported_model("vectors"):
                expected = self._vectors(self.config)
            form, quantised = "float32", limits.quantised_form(self.job.quantize)
            line, missed = parity.compare_quantised(expected, original, quantised)
            self._note("check", line)
            self._note(limits.MISSED, missed)
        parity.release(self.model)
        self._note("check", parity.check_own(folder, expected, self.limit, reader, form))
        if self.job.format == "mlx" and self.model_type not in ENCODERS:
            self._note("check", parity.check_mlx_lm(folder))
        if self.for_sentence_transformers and self.job.skip_library_check:
            self._note("check", "sentence-transformers: not checked, because of --skip-library-check")
        elif self.for_sentence_transformers:
            self._note("check", parity.check_sentence_transformers(folder, library_expected, self.limit, form))

    def _note(self, name: str, text: str) -> None:
        if text:
            self.lines.append((name, text))

    def _in_float32(self) -> None:
        set_dtype(self.model.backbone, mx.float32)
        dequantized.dequantize(self.model.backbone)

    def _vectors(self, config: RetrievalConfig) -> parity.Vectors:
        """Return the present model's vectors of the check's texts under `config`."""
        model = Model(self.model, config, config.tokenizer(self.base), self.job.source)
        return parity.vectors(model.encode, config.prompts, self.limit)

    def _write(self, folder: Path) -> mx.Dtype:
        """Write everything but the check's results; return the least exact dtype of weights."""
        job, config, backbone = self.job, self.config, self.model.backbone
        trained = weights.merge(backbone)
        if job.adapter:
            self._note("merged", job.merged(len(trained)))
        else:
            self._note("adapter", "none: the base model itself is exported")
        stored = weights.stored_dtype(self.base)
        one_dtype = job.dtype or job.gguf_ready or job.format == "mlx"
        dtype = (getattr(mx, job.dtype) if job.dtype else stored) if one_dtype else None
        name = job.dtype or str(stored).rpartition(".")[-1]
        settings = config_json.make(self.base, backbone, job.format, name if one_dtype else None)
        if job.keep_layers:
            kept_layers.adapt_config(settings, job.keep_layers)
        if job.format == "mlx":
            weights.cast(backbone, dtype)
            if job.quantize:
                name = f"{weights.quantise(backbone, job.quantize, settings)}, scales {name}"
            extra = mlx_layout.pooler(self.base, dtype) if self.model_type in ENCODERS else {}
            weights.write(folder, weights.mlx_tensors(backbone) | extra, "mlx")
        else:
            drop = config_json.dropped(self.model_type, job.format)
            weights.write(
                folder, weights.stored_tensors(self.base, backbone, trained, dtype, drop, job.keep_layers), "pt"
            )
        config.dense = [layer | {"path": layer["path"] or PROJECTION} for layer in config.dense]
        for layer, description in zip(self.model.head.dense, config.dense, strict=True):
            values = {f"linear.{key}": v.astype(dtype or mx.float32) for key, v in layer.linear.parameters().items()}
            weights.write(sentence_transformers_files.write_dense(folder, description), values, "pt")
        self._note("weights", name)

        config.write(folder)
        if self.for_sentence_transformers and config.task == "late":
            frame = [*self.tokenizer.opening, *self.tokenizer.closing]
            for note in pylate_files.write(folder, config, frame, backbone.hidden_size):
                self._note("layout", note)
        elif self.for_sentence_transformers or (job.format == "mlx" and config.task != "late"):
            rows = max(settings.get("vocab_size", 0), self.tokenizer.tokenizer.get_vocab_size())
            described = (folder, config, self.tokenizer, backbone.hidden_size, rows)
            if job.format == "mlx":
                two_sided = backbone.bidirectional and self.model_type not in ENCODERS
                settings |= mlx_layout.settings(config, self.model_type)
                reader = {"model_type": self.model_type, "two_sided_decoder": two_sided}
                for note in mlx_layout.write(*described, reader):
                    self._note("layout", note)
            else:
                sentence_transformers_files.write(*described)
        config_json.write(folder, settings)  # transformers reads it to load the tokenizer
        self._note("tokenizer", tokenizer.write(self.base, folder, self.tokenizer, self.limit))
        if job.gguf_ready:
            notes = gguf.adapt_config(settings, folder, config, self.tokenizer)
            changed = gguf.adapt_tokenizer(folder, self.tokenizer)
            for note in (*notes, *changed):
                self._note("llama.cpp", note)
            self.for_sentence_transformers = not changed
            config_json.write(folder, settings)
        adapter = Path(job.adapter).expanduser() if job.adapter else None
        base = job.model or config.base_model
        origin = {"mixture": job.mixture, "measured": job.is_measured}
        card = model_card.write(config, base, adapter, job.format, name, job.public_name, **origin)
        (folder / "README.md").write_text(writable(card), encoding="utf-8")
        return dtype or stored
