"""Opening a model by name: an embedded one, a directory, a run, or a hub id."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.hf.config import read_config
from cllm_jax.hf.tokenizer import lacks_package, read_tokenizer
from cllm_jax.hf.weights import DTYPES, read_model
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Llama
from cllm_jax.runs.checksums import SUMS, sha256
from cllm_jax.runtime.backend import Backend, backend_for, backend_of

SHIPPED = Path(__file__).resolve().parents[1] / 'embedded'
EMBEDDED = {'embedded': 'cllm', 'embedded-target': 'target'}
MIXED = 'mixed'
Precision = Literal['auto', 'float32', 'mixed', 'bfloat16', 'float16']
HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
# A repository may hold the same weights twice more, in subdirectories or as `consolidated`.
HUB_FILES = ['*.json', '*.safetensors', 'tokenizer.model', '*.jinja', '*.txt']
HUB_SKIP = ['*/*', 'consolidated*']
FORMER_SUMS = {
    'cllm': 'a3815683a65bebaa2d731883feb19d1b0f2f34d323b0f5c83a2025f879f60d91',
    'target': 'e47032b356a22ab1e65f94d1c290046aace0d1719df6917b457b2a48f1412f14',
}
"""`files_fingerprint` of the shipped models before their tokenizer_config.json was for every
transformers: nothing that a run reads of them has changed."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to run: its config, its weights as a plain pytree, and its tokenizer."""

    config: LlamaConfig
    params: Any = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(repr=False)
    """A `transformers` tokenizer, or None if the directory has none, or `lacks` says why."""
    source: str
    """What the user called it."""
    lacks: str = ''
    """The package without which its tokenizer cannot be read; token ids can be used without."""

    @functools.cached_property
    def backend(self) -> Backend:
        """What suits the devices that the weights live on."""
        return backend_of(self.params)

    @property
    def module(self) -> Llama:
        """The Linen module; equal for equal configs, so it shares compilations."""
        dtype, matrices = self.params['norm'].dtype, self.params['embed'].dtype
        compute = None if matrices == dtype else matrices
        return Llama(self.config, dtype, compute, backend=self.backend)


def chosen(dtype: str) -> str:
    """What 'auto' stands for on the devices that are here; ConfigError for an unknown name."""
    if dtype not in (known := get_args(Precision)):
        raise ConfigError(f'dtype {dtype!r} is unknown; choose one of {", ".join(known)}')
    return backend_for(jax.devices()).default_dtype if dtype == 'auto' else dtype


def resolve(name: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The local directory of the model that a name stands for.

    `embedded` and `embedded-target` ship with the package. A path never touches the network. A name
    of the form `owner/name` that is not a directory is fetched from the hub: what matches `files`.

    Raises:
      ConfigError: neither a directory nor a hub id, or the hub does not deliver it.
      DataError: this installation lacks the embedded model.
    """
    if name in EMBEDDED:
        path = SHIPPED / EMBEDDED[name]
        if not path.is_dir():
            raise DataError(f'model {name!r}: {path} is missing; install cllm_jax again')
        return path
    shown = f'model {one_line(repr(name))}'
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            run = path / 'model'
            return run if run.is_dir() and not (path / 'config.json').exists() else path
        if path.is_file():
            raise ConfigError(f'{shown}: is a file; name the directory that holds config.json')
    except (OSError, ValueError, RuntimeError) as e:  # too long, a NUL, an unknown ~user
        reason = getattr(e, 'strerror', None) or one_line(e)
        raise ConfigError(f'{shown}: {reason}; name a readable directory') from None
    if not HUB_ID.fullmatch(name):
        known = f'{", ".join(EMBEDDED)}, a directory, or a hub id owner/name'
        raise ConfigError(f'{shown}: no such directory; use {known}')
    from huggingface_hub import snapshot_download  # network code, only for a hub id

    try:
        return Path(snapshot_download(name, allow_patterns=files, ignore_patterns=HUB_SKIP))
    except Exception as e:  # the hub client raises many types: offline, gated, absent
        raise ConfigError(
            f'{shown}: no such directory, and the hub did not deliver it '
            f'({type(e).__name__}: {one_line(e, 160)}); check the name or download it yourself'
        ) from None


def peek(name: str) -> LlamaConfig:
    """The config of the model that a name stands for, without its weights; raises as `load`."""
    return read_config(resolve(name, ['config.json']))


def load(name: str, dtype: str = 'auto', mesh: Mesh | None = None) -> Model:
    """Open a model: `embedded`, `embedded-target`, a model or run directory, or a hub id.

    Args:
      name: see `resolve`; a run directory means its best exported checkpoint.
      dtype: 'float32', 'bfloat16', 'float16', or 'mixed': bfloat16 matrices, cache and products,
        float32 everywhere else. 'auto' is what suits the device.
      mesh: devices that share the weights (`runtime/mesh.py`); None for one device.

    Raises:
      ConfigError, DataError: see `resolve`, `read_config` and `read_model`.
    """
    dtype = chosen(dtype)
    directory = resolve(name)
    config, params = read_model(directory, storage(dtype), mesh)
    if dtype == MIXED:
        params = mixed(params)
    if lacks := lacks_package(directory):
        return Model(config, params, None, name, lacks)
    return Model(config, params, read_tokenizer(directory), name)


def with_tokenizer(
    model: Model, remedy: str = 'copy the tokenizer files of the original model into its directory'
) -> Model:
    """The model, if texts can be learned or answered with it; ConfigError without a tokenizer."""
    if model.tokenizer is None:
        fault = f': {model.lacks}, or' if model.lacks else ' has no tokenizer;'
        raise ConfigError(f'{model.source}{fault} {remedy}')
    return model


def storage(dtype: str) -> jnp.dtype:
    """The dtype of norms and residuals under a name that `load` accepts."""
    dtype = chosen(dtype)
    return DTYPES['float32' if dtype == MIXED else dtype]


def mixed(params: Any) -> Any:
    """The same parameters with bfloat16 matrices; norms and biases as they are."""

    def lower(path: tuple, leaf: jax.Array) -> jax.Array:
        vector = path[-1].key.endswith(('norm', 'bias'))
        return leaf if vector else leaf.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(lower, params)


def fingerprint(model: Model) -> str:
    """sha256 over the config and every weight: two models with one fingerprint compute the same."""
    digest = hashlib.sha256(repr(model.config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def files_fingerprint(directory: Path) -> str:
    """sha256 of a model directory's sums, else of its config and the sizes of its weight files."""
    if (directory / SUMS).exists():
        return sha256(directory / SUMS)
    digest = hashlib.sha256((directory / 'config.json').read_bytes())
    for path in sorted(directory.glob('*.safetensors')):
        digest.update(f'{path.name} {path.stat().st_size}\n'.encode())
    return digest.hexdigest()


def same_files(noted: Any, directory: Path) -> bool:
    """Whether the first 16 digits of a `files_fingerprint` are those of a model directory."""
    former = FORMER_SUMS.get(directory.name, '') if directory.parent == SHIPPED else ''
    return noted in (files_fingerprint(directory)[:16], former[:16])
