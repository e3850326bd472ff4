"""Merge a chat adapter into its base model and write a folder for mlx-lm, or for transformers.

The folder is compared with the base model and its adapter, within a limit for each form of the weights; see
chat_parity.py.
"""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones import decoder, load_backbone, resolve
from mlx_retrieval.backbones.decoder import Decoder
from mlx_retrieval.exporters import card_metadata, chat_parity, config_json, model_card, parity, tokenizer, weights
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.training import starting_model
from mlx_retrieval.training.chat import adapter as chat_adapter
from mlx_retrieval.training.chat.template import TEMPLATE_FILE, ChatTokenizer
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import UserError, concerning
from mlx_retrieval.utils.text import quantity, shell

NAMES = (*tokenizer.NAMES, "generation_config.json")
SETTINGS = ("mask_prompt", "max_length", *model_card.WEIGHTS_AND_SCHEDULE)
TAGS = ("text-generation", "conversational", "mlx-retrieval")


class ChatWriter:
    """Fills a folder with a chat model and checks it. `lines` collects (name, text) pairs to print about it.

    Raises UserError if the adapter's base is not known, is another model or cannot be loaded.
    """

    def __init__(self, job: Export):
        self.job = job
        self.folder = Path(job.adapter).expanduser()
        self.base_model = job.model or starting_model.base_of(self.folder)
        if self.base_model is None:
            raise UserError(f"{job.adapter}: its files do not name its base model; name it by --model")
        with concerning("model"):
            self.base = resolve(self.base_model)
            self.backbone: Decoder = load_backbone(self.base, bidirectional=False, dtype="float32")
        with concerning("adapter"):
            chat_adapter.check_base(self.backbone, self.folder, self.base_model)
        self.lines: Lines = []

    def fill(self, folder: Path) -> None:
        """Write the folder and compare its answers with those of the base and its adapter. UserError if they differ."""
        job, backbone = self.job, self.backbone
        self._write_tokenizer(folder)
        conversations = chat_parity.conversations(ChatTokenizer(folder))
        chat_parity.prepare(backbone.adapted)
        untrained = chat_parity.logits(backbone.adapted, conversations)
        with concerning("adapter"):
            chat_adapter.attach(backbone, self.folder)
        expected = chat_parity.logits(backbone.adapted, conversations)
        dtype = getattr(mx, job.dtype) if job.dtype else weights.stored_dtype(self.base)
        form = f"{job.quantize} bits" if job.quantize else str(dtype).rpartition(".")[-1]
        stored = self._write_weights(folder, dtype)
        change = chat_parity.divergence(untrained, expected)
        self._note("adapter", f"a divergence of {change:.1e} nats a token from the base model")
        if job.quantize:
            chat_parity.prepare(backbone.adapted)
            actual = chat_parity.logits(backbone.adapted, conversations)
            self._note("check", chat_parity.accept(actual, expected, f"quantised to {form}", form))
            if chat_parity.divergence(actual, expected) > change / 2:
                kept = "the model without --quantize keeps it" if job.quantize == 8 else "8 bits keep more of it"
                self._note("warning", f"{form} change the answers about as much as the adapter does: {kept}")
            expected, form = actual, "float32"
        parity.release(backbone)
        self._note("check", chat_parity.check_mlx_lm(folder, conversations, expected, form))
        if job.format == "hf" and job.skip_library_check:
            self._note("check", "transformers: not checked, because of --skip-library-check")
        elif job.format == "hf":
            self._note("check", chat_parity.check_transformers(folder, conversations, expected, form))
        (folder / "README.md").write_text(self._card(stored), encoding="utf-8")

    @property
    def next_command(self) -> str:
        """The command that talks to the exported model."""
        return shell("mlx_lm.generate", "--model", self.job.output, "--prompt", "...")

    def _note(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def _write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files unchanged, and the chat template that stands beside the adapter."""
        for source in (self.base / name for name in NAMES):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)
        if (self.folder / TEMPLATE_FILE).is_file():
            shutil.copyfile(self.folder / TEMPLATE_FILE, folder / TEMPLATE_FILE)
        shutil.copyfile(self.base / "config.json", folder / "config.json")  # ChatTokenizer reads it; replaced later

    def _write_weights(self, folder: Path, dtype: mx.Dtype) -> str:
        """Merge the adapter, write weights and config.json; return how the weights are stored, in words."""
        job, backbone = self.job, self.backbone
        trained = weights.merge(backbone)
        self._note("merged", f"{job.adapter}: {quantity(len(trained), 'tensor')}")
        mlx = job.format == "mlx"
        name = str(dtype).rpartition(".")[-1]
        settings = config_json.make(self.base, backbone, job.format, name if mlx or job.dtype else None)
        settings |= decoder.normalised(settings)  # mlx-lm and transformers spell position settings differently
        settings[config_json.MARK] = {"task": "chat"}
        if mlx:
            weights.cast(backbone, dtype)
            if job.quantize:
                name = f"{weights.quantise(backbone, job.quantize, settings)}, scales {name}"
            weights.write(folder, weights.mlx_tensors(backbone), "mlx")
        else:
            one_dtype = dtype if job.dtype else None
            weights.write(folder, weights.stored_tensors(self.base, backbone, trained, one_dtype), "pt")
        config_json.write(folder, settings)
        self._note("weights", name)
        return name

    def _card(self, stored: str) -> str:
        """Return the README.md of the folder."""
        job = self.job
        title = job.public_name.rpartition("/")[2]
        return "\n".join(
            [
                card_metadata.front_matter(self.base_model, job.format, "text-generation", TAGS),
                f"# {title}\n",
                f"A chat model: a fine-tuned `{model_card.public(self.base_model)}`, exported by mlx-retrieval.\n",
                model_card.table(("", ""), [("weights", stored)]),
                *model_card.history(self.folder, SETTINGS),
                "## Use\n",
                _use(job.format, job.public_name),
                model_card.LICENCE,
            ]
        )


def _use(form: str, name: str) -> str:
    """Return blocks of Markdown that say how to load the folder."""
    blocks = [
        f"""With mlx-lm:

```sh
{shell("mlx_lm.generate", "--model", name, "--prompt", "Where are the keys?")}
```
"""
    ]
    if form == "hf":
        blocks.append(
            f"""With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained({json.dumps(name)}) for kind in (AutoModelForCausalLM, AutoTokenizer))
messages = [{{"role": "user", "content": "Where are the keys?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```
"""
        )
    return "\n".join(blocks)
