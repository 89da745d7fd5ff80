"""GGUF, the files of llama.cpp: metadata, and tensors of many kinds, read by the package `gguf`."""

import dataclasses
import reprlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.hf.files import explain, listed

SUFFIX, MAGIC = '.gguf', b'GGUF'
AGAIN = 'convert the original model again'


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An open file: its metadata, and its tensors as the package `gguf` describes them."""

    path: Path
    fields: Any = dataclasses.field(repr=False)
    tensors: dict[str, Any] = dataclasses.field(repr=False)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata; DataError if it is of another kind than `kind`."""
        if key not in self.fields:
            return default
        value = self.value(key)
        wide = (int, float) if kind is float else kind
        if not isinstance(value, wide) or (isinstance(value, bool) and kind is not bool):
            fault = f'{key} = {one_line(reprlib.repr(value))}, {kind.__name__} expected'
            raise DataError(f'{self.path}: {fault}; {AGAIN}')
        return value

    def value(self, key: str) -> Any:
        """A value of the metadata that is there, whatever its kind."""
        try:
            return self.fields[key].contents()
        except (ValueError, IndexError) as e:
            raise explain(self.path, f'{key}: {e}', 'GGUF') from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, with the outputs first, as Hugging Face has it."""
        return tuple(map(int, reversed(self.tensors[name].shape)))

    def array(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32."""
        tensor = self.tensors[name]
        return np.asarray(import_module('gguf').dequantize(tensor.data, tensor.tensor_type))

    def check_kinds(self, names: Iterable[str]) -> None:
        """Refuse tensors of a kind that the package cannot dequantise, by the name of the kind."""
        package, found = import_module('gguf'), {}
        for name in names:
            found.setdefault(self.tensors[name].tensor_type, []).append(name)
        for kind, of_kind in found.items():
            block = np.zeros(package.GGML_QUANT_SIZES[kind][1], np.uint8)
            try:
                package.dequantize(block, kind)
            except NotImplementedError:
                fault = f'{kind.name} tensors: {listed(sorted(of_kind))}'
                rule = 'quantise the model in another way, Q8_0 or BF16'
                raise DataError(f'{self.path}: {fault}; {rule}') from None

    def refuse(self, key: str, value: object, rule: str) -> NoReturn:
        shown = one_line(reprlib.repr(value))
        raise ConfigError(f'{self.path}: {one_line(key)} = {shown} is not supported; {rule}')


def is_gguf(path: Path) -> bool:
    """Whether a file is one by its name or its first bytes (some programs name them by a sum)."""
    if not path.is_file():
        return False
    if path.suffix.lower() == SUFFIX:
        return True
    with open(path, 'rb') as f:
        return f.read(len(MAGIC)) == MAGIC


def open_gguf(path: Path) -> Gguf:
    """Read the metadata of a file, and where its tensors lie.

    Raises:
      ConfigError: the package `gguf` is missing, or the file is one part of several.
      DataError: the file is cut, damaged, big-endian, or something else.
    """
    try:
        package = import_module('gguf')
    except ImportError as e:
        reason = f'{path}: needs the package gguf ({one_line(e, 120)})'
        raise ConfigError(f"{reason}; pip install 'cllm_jax[gguf]'") from None
    try:
        with open(path, 'rb') as f:
            head = f.read(8)
    except OSError as e:
        raise explain(path, e, 'GGUF') from None
    version = int.from_bytes(head[4:], 'little')
    if head[:4] != MAGIC:
        raise explain(path, f'it does not begin with {MAGIC.decode()}', 'GGUF')
    if version and not version & 0xFFFF:
        raise DataError(f'{path}: a big-endian GGUF file; convert it to little-endian')
    try:
        with np.errstate(over='ignore'):  # of a place, which is looked at below
            found = _reader(package)(path)
        _check_places(found)
    except Exception as e:  # the package meets damage with whatever NumPy raises
        raise explain(path, f'{type(e).__name__}: {e}', 'or cut GGUF') from None
    file = Gguf(path, found.fields, {tensor.name: tensor for tensor in found.tensors})
    if (parts := file.get('split.count', int, 0)) > 1:
        file.refuse('split.count', parts, 'merge the parts: llama-gguf-split --merge')
    return file


def _reader(package: Any) -> type:
    """The package's reader, but for a length that the file does not have: it would go on."""

    class Reader(package.GGUFReader):
        def _get(self, offset, dtype, count=1, *order, **named):
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f'at byte {offset} it claims more than the file has')
            return super()._get(offset, dtype, count, *order, **named)

    return Reader


def _check_places(reader: Any) -> None:
    """Raise ValueError unless the tensors follow each other: a place or kind that is damaged would
    give other weights."""
    expected = int(reader.data_offset)
    for tensor in reader.tensors:
        if tensor.data_offset != expected:
            where = f'is at byte {tensor.data_offset}, where {expected} is expected'
            raise ValueError(f'tensor {tensor.name} {where}')
        expected += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(reader.alignment)
