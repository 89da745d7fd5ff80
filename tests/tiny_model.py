"""A model directory of a few kilobytes to break, and the form every refusal has."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import pytest

from cllm_jax.errors import CllmError
from cllm_jax.hf.weights import abstract_params, write_model
from cllm_jax.model.config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=16, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_dim=8, eos_ids=(1,)
)


def params_of(config, seed=0):
    """Random float32 NumPy parameters, vectors included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype('f4'), abstract_params(config))


@functools.cache
def _files(shard_bytes: int) -> dict[str, bytes]:
    with TemporaryDirectory() as parent:
        directory = Path(parent) / 'model'
        write_model(directory, TINY, params_of(TINY), dtype='float32', shard_bytes=shard_bytes)
        return {path.name: path.read_bytes() for path in directory.iterdir()}


def write_single(directory: Path) -> Path:
    """The tiny model in one file."""
    return _copy(_files(1 << 30), directory)


def write_sharded(directory: Path) -> Path:
    """The same weights in several files with an index."""
    return _copy(_files(600), directory)


def _copy(files: dict[str, bytes], directory: Path) -> Path:
    directory.mkdir(parents=True)
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def tiny_tokenizer():
    """Sixteen words: `<s>`, `</s>` and the letters a to n."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(['<s>', '</s>', *'abcdefghijklmn'])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token='<s>'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token='<s>', eos_token='</s>')


def refusal(call, *args, of=CllmError) -> str:
    """The message with which `call` refuses; it must be one bounded line with a remedy."""
    with pytest.raises(of) as caught:
        call(*args)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    assert '; ' in message, 'no remedy'
    return message
