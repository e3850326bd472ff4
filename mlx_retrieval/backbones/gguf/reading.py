"""Read a GGUF with llama.cpp's own package, and refuse in one line what cannot be converted.

    file = Gguf(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    file.architecture, file.number("block_count"), file.tensors["token_embd.weight"]

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity

MAGIC = b"GGUF"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
# What llama-quantize makes of vocabularies in files that it calls Q4_0 and Q4_1.
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
TABLES = {EMBEDDINGS: "Q6_K", HEAD: "Q6_K"}
LONG = 100  # elements of a list that is counted and not read
HIGHEST = 255  # number of a type, of which there are some 40; a larger one is damage
# What the library raises for damaged files, besides ValueError.
DAMAGE = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF does, whatever its name. UserError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


class Gguf:
    """The values and tensors of a GGUF that this toolkit can convert.

    Attributes:
        architecture: one of ARCHITECTURES.
        tensors: the library's tensors by name, mapped from the file and not read yet.

    Raises UserError for a file that is no GGUF, that is damaged or one part of several, or that holds something else
    than a language model of ARCHITECTURES in TYPES.
    """

    def __init__(self, path: Path):
        self.path = path
        if not is_gguf(path):
            raise UserError(f"{path}: not a GGUF, which begins with these four letters")
        reader = _opened(path)
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if reader.byte_order == "S":
            raise self.refusal("its numbers are in the byte order of other processors (big-endian)")
        parts = self.value("split.count")
        if isinstance(parts, int) and parts > 1:
            raise self.refusal(f"one of {parts} parts of a model; llama-gguf-split --merge makes one file of them")
        self.architecture = self.value("general.architecture")
        self._check_architecture()
        self._check_types()

    def value(self, key: str) -> Any:
        """Return a value by its whole key, such as `tokenizer.chat_template`; None if the file has none.

        UserError for a list of more than LONG elements.
        """
        try:
            return self._fields[key].contents() if key in self._fields else None
        except DAMAGE as error:  # text that is not UTF-8
            raise self.refusal(f"a damaged GGUF ({key}: {error})") from error

    def count(self, key: str) -> int:
        """Return how many elements the list at this key has; 0 if there is none."""
        return len(self._fields[key].data) if key in self._fields else 0

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the architecture, such as `block_count`.

        Args:
            default: of a key that may be missing; None = UserError if it is.
        """
        value = self.value(f"{self.architecture}.{key}")
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            missing = "has none" if value is None else f"says {str(value)[:40]}"
            raise self.refusal(f"{self.architecture}.{key} must be a number, and the file {missing}")
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.999999747e-06

    def refusal(self, reason: str) -> UserError:
        """Return an error about the file."""
        return UserError(f"{self.path}: {reason}")

    def _check_architecture(self) -> None:
        """Raise UserError for a file of another architecture, or of no language model."""
        name, kind = self.architecture, self.value("general.type") or "model"
        if name == "clip" or kind == "mmproj":
            raise self.refusal("a projector of images (mmproj), not a model: give the language model's GGUF")
        if kind != "model":
            raise self.refusal(f"holds no model (general.type is {kind!r})")
        if name not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise self.refusal(f"architecture {name!r}; this toolkit reads {known} from a GGUF, more from safetensors")
        if not self.tensors:
            raise self.refusal("holds a vocabulary and no weights")
        if experts := self.value(f"{name}.expert_count"):
            raise self.refusal(f"a mixture of {experts} experts, which this toolkit reads from safetensors alone")

    def _check_types(self) -> None:
        """Raise UserError that names the types of tensors that are not among TYPES, nor a vocabulary's in TABLES."""
        types = {name: tensor.tensor_type.name for name, tensor in self.tensors.items()}
        counts = Counter(kind for name, kind in types.items() if kind != TABLES.get(name))
        if others := [f"{name} ({quantity(counts[name], 'tensor')})" for name in sorted(counts) if name not in TYPES]:
            raise self.refusal(_quantised(others))


class UnknownTypeError(Exception):
    """A tensor is of a type that the library does not know by its number: a newer one, or one that was given up."""


def _quantised(types: Sequence[str]) -> str:
    """Return why a file in these types is refused."""
    known = f"{', '.join(TYPES[:-1])} and {TYPES[-1]}"
    return f"quantised as {', '.join(types)}; this toolkit reads {known} from a GGUF"


def _opened(path: Path) -> Any:
    """Return the library's reader of a file. UserError if the file is damaged, or in a type of an unknown number."""
    try:
        return _reader_class()(path)
    except UnknownTypeError as error:
        raise UserError(f"{path}: {_quantised([str(error)])}") from error
    except EOFError as error:
        raise UserError(f"{path}: cut off after {path.stat().st_size:,} bytes: copy or download it again") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path}: a damaged GGUF ({reason}): copy or download it again") from error


@functools.cache
def _reader_class() -> type:
    """Return the library's reader, which refuses to read beyond the file's end, and reads vocabularies quickly."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

    class Reader(GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):  # the library takes what is there
                raise EOFError
            return super()._get(offset, dtype, count, override_order)

        def _build_tensors(self, start_offs, fields):
            """Name types that the library would take for damage."""
            numbers = Counter(int(field.parts[4][0]) for field in fields)
            if unknown := sorted(number for number in {*numbers} - {*GGMLQuantizationType} if number <= HIGHEST):
                named = (f"type {number} ({quantity(numbers[number], 'tensor')})" for number in unknown)
                raise UnknownTypeError(", ".join(named) + ", which the package gguf does not know")
            super()._build_tensors(start_offs, fields)

        def _get_field_parts(self, offset, raw_type):
            """Pass over long lists: the library makes objects of each element, ten seconds of a large vocabulary."""
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, raw_type)
            kind, length = self._get(offset, np.uint32), self._get(offset + 4, np.uint64)
            start, count = offset + 12, int(length[0])
            if count <= LONG or kind[0] == GGUFValueType.ARRAY:
                return super()._get_field_parts(offset, raw_type)
            end = start
            if kind[0] == GGUFValueType.STRING:
                data = memoryview(self.data)
                order = "big" if self.byte_order == "S" else "little"
                for _ in range(count):
                    end += 8 + int.from_bytes(data[end : end + 8], order)
                    if end > len(data):
                        raise EOFError
            else:
                end += self._get(start, self.gguf_scalar_to_np[GGUFValueType(kind[0])], count).nbytes
            return end - offset, [kind, length], range(count), [GGUFValueType.ARRAY, GGUFValueType(kind[0])]

    return Reader
