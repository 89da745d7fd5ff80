"""A model directory of a few kilobytes to break, and the form every refusal has."""

import functools
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np
import pytest

from cllm_jax.errors import CllmError
from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import abstract_params
from cllm_jax.hf.write import write_model
from cllm_jax.model.config import LlamaConfig

TINY = LlamaConfig(
    vocab_size=16, dim=8, layers=2, heads=2, kv_heads=1, head_dim=4, mlp_dim=8, eos_ids=(1,)
)


def model_of(config=TINY, seed=0, tokenizer=None) -> Model:
    """Random float32 NumPy parameters, vectors included."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(config)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype('f4'), shapes)
    return Model(config, params, tokenizer, 'tiny')


def same_bits(a, b) -> bool:
    """Whether two trees have the same arrays: their shapes, dtypes and every bit."""

    def one(x, y):
        alike = x.dtype == y.dtype and x.shape == y.shape
        return alike and np.asarray(x).tobytes() == np.asarray(y).tobytes()

    return jax.tree.all(jax.tree.map(one, a, b))


def edit_config(directory: Path, **changes) -> None:
    """Change keys of a directory's config.json."""
    path = directory / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@functools.cache
def _files(shard_bytes: int) -> dict[str, bytes]:
    with TemporaryDirectory() as parent:
        directory = Path(parent) / 'model'
        write_model(directory, model_of(), dtype='float32', shard_bytes=shard_bytes)
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


COMMIT = '0123456789abcdef0123456789abcdef01234567'


def to_cache(directory: Path, cache: Path) -> Path:
    """The snapshot of a model as the hub's client lays it out."""
    repository = cache / 'models--a--b'
    snapshot, blobs, refs = (repository / n for n in (f'snapshots/{COMMIT}', 'blobs', 'refs'))
    for place in (snapshot, blobs, refs):
        place.mkdir(parents=True)
    (refs / 'main').write_text(COMMIT)
    for i, path in enumerate(sorted(directory.iterdir())):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f'../../blobs/{i}')
    return snapshot


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
