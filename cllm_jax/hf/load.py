"""Opening a model by name: an embedded one, a directory, a run, a GGUF file, or a hub id."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax.sharding import Mesh

from cllm_jax.data.encoding import turn_end
from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.hf.adapter import SETTINGS, TENSORS, Adapter, find_adapter
from cllm_jax.hf.config import read_config
from cllm_jax.hf.files import has_weights, listed
from cllm_jax.hf.gguf import read_gguf
from cllm_jax.hf.gguf_config import config_of
from cllm_jax.hf.gguf_file import SUFFIX, is_gguf, open_gguf
from cllm_jax.hf.gguf_tokenizer import tokenizer_of
from cllm_jax.hf.model import MIXED, Model
from cllm_jax.hf.tokenizer import VOCABULARIES, lacks_package, read_tokenizer
from cllm_jax.hf.weights import DTYPES, map_matrices, read_model
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runs.checksums import SUMS, sha256
from cllm_jax.runtime.backend import backend_of

SHIPPED = Path(__file__).resolve().parents[1] / 'embedded'
EMBEDDED = {'embedded': 'cllm', 'embedded-target': 'target'}
Precision = Literal['auto', 'float32', 'mixed', 'bfloat16', 'float16']
HUB_ID = re.compile(r'[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*')
# A repository may hold the same weights twice more, in subdirectories or as `consolidated`.
HUB_FILES = ['*.json', '*.safetensors', 'tokenizer.model', '*.jinja', '*.txt']
HUB_SKIP = ['*/*', 'consolidated*']
PEEKED = ['config.json', SETTINGS]
FORMER_SUMS = {
    'cllm': 'a3815683a65bebaa2d731883feb19d1b0f2f34d323b0f5c83a2025f879f60d91',
    'target': 'e47032b356a22ab1e65f94d1c290046aace0d1719df6917b457b2a48f1412f14',
}
"""`files_fingerprint` of the shipped models before their tokenizer_config.json was for every
transformers: nothing that a run reads of them has changed."""


def chosen(dtype: str, sharing: int = 1) -> str:
    """What 'auto' stands for on the devices that are here; ConfigError for an unknown name.

    Args:
      sharing: devices that share every layer.
    """
    if dtype not in (known := get_args(Precision)):
        raise ConfigError(f'dtype {dtype!r} is unknown; choose one of {", ".join(known)}')
    return backend_of((), sharing).default_dtype if dtype == 'auto' else dtype


def resolve(name: str, files: Sequence[str] = HUB_FILES) -> Path:
    """The local directory, or GGUF file, of the model that a name stands for.

    `embedded` and `embedded-target` ship with the package. A path never touches the network. A name
    of the form `owner/name` that is not a directory is fetched from the hub: what matches `files`.

    Raises:
      ConfigError: not a directory, GGUF file or hub id, or the hub does not deliver it.
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
            own = any((path / file).exists() for file in PEEKED)
            files = sorted(file.name for file in path.glob(f'*{SUFFIX}'))
            if files and not (own or run.is_dir()):
                rule = 'name one of its GGUF files'
                raise ConfigError(f'{shown}: has no config.json; {rule}: {listed(files)}')
            return run if run.is_dir() and not own else path
        if is_gguf(path):
            return path
        if path.is_file():
            rule = 'name the directory that holds config.json, or a GGUF file'
            raise ConfigError(f'{shown}: is a file; {rule}')
    except (OSError, ValueError, RuntimeError) as e:  # too long, a NUL, an unknown ~user
        reason = getattr(e, 'strerror', None) or one_line(e)
        raise ConfigError(f'{shown}: {reason}; name a readable directory or file') from None
    if path.suffix.lower() == SUFFIX:
        raise ConfigError(f'{shown}: no such file; name a GGUF file that is here')
    if not HUB_ID.fullmatch(name):
        known = f'{", ".join(EMBEDDED)}, a directory, a GGUF file, or a hub id owner/name'
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
    directory = resolve(name, PEEKED)
    if directory.is_file():
        return config_of(open_gguf(directory))
    if not (directory / 'config.json').exists():
        directory = base_of(directory)[0]
    return read_config(directory)


def base_of(directory: Path) -> tuple[Path, Adapter | None]:
    """Where the whole weights of a model directory lie, and the adapter to merge into them.

    An adapter that lies with weights is merged into these, unless it names another directory. One
    by itself names its base: a directory, seen from here or from the adapter, or a hub id that was
    fetched before.

    Raises ConfigError if there is no such base, and what `find_adapter` raises.
    """
    adapter = find_adapter(directory)
    if adapter is None:
        return directory, adapter
    if has_weights(directory):
        bases = [p.resolve() for p in _local_bases(adapter) if (p / 'config.json').exists()]
        if bases and directory.resolve() not in bases:
            fault = f'{directory}: has weights and an adapter of those in {bases[0]}'
            raise ConfigError(f'{fault}; delete the adapter if it was merged, or else the weights')
        return directory, adapter
    base = _named_base(adapter)
    if find_adapter(base) is not None:
        fault = f'{base}: is the base of an adapter, and has an adapter too'
        raise ConfigError(f'{fault}; name a base of plain weights')
    return base, adapter


def base_name(model: Model) -> str:
    """What an adapter calls its base: the directory of the model, or its hub id."""
    here = model.source in EMBEDDED or Path(model.source).expanduser().exists()
    return str(model.directory.absolute()) if model.directory and here else model.source


def _local_bases(adapter: Adapter) -> list[Path]:
    """The directories that the name of its base may mean."""
    name = adapter.base
    try:
        asked = (Path(name).expanduser(), adapter.directory / name) if name else ()
        places = dict.fromkeys(path.resolve() for path in asked if path.is_dir())
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown ~user
        return []
    return [resolve(str(place)) for place in places]


def _named_base(adapter: Adapter) -> Path:
    name, found = adapter.base, _local_bases(adapter)
    says = f'{adapter.directory / SETTINGS}: base_model_name_or_path = {one_line(ascii(name))}'
    models = [path for path in found if (path / 'config.json').exists()]
    if len(models) > 1:
        raise ConfigError(f'{says} is a model here and next to it; write the whole path there')
    if found:
        return (models or found)[0]
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f'{says}: no such directory; write that of the base there')
    from huggingface_hub import snapshot_download

    patterns = {'allow_patterns': HUB_FILES, 'ignore_patterns': HUB_SKIP}
    try:
        fetched = snapshot_download(
            name, revision=adapter.revision, local_files_only=True, **patterns
        )
    except Exception:  # the hub client raises many types
        raise ConfigError(
            f'{says}: not fetched yet, and nothing is fetched that only a file names; run '
            'hf download with that name, or write the directory of the base there'
        ) from None
    return Path(fetched)


def open_tokenizer(directory: Path) -> Any:
    """The tokenizer of a model directory or file; of an adapter without one that of its base.

    Raises ConfigError if it cannot be read.
    """
    if directory.is_file():
        tokenizer, lacks = tokenizer_of(open_gguf(directory))
        if lacks:
            raise ConfigError(f'{directory}: {lacks}')
        return tokenizer
    return read_tokenizer(_home_of_tokenizer(directory))


def _home_of_tokenizer(directory: Path) -> Path:
    own = any((directory / name).exists() for name in VOCABULARIES)
    return directory if own else base_of(directory)[0]


def load(
    name: str, dtype: str = 'auto', mesh: Mesh | None = None, adapter: str | Sequence[str] = ()
) -> Model:
    """Open a model: `embedded`, `embedded-target`, a directory, a run, a GGUF file, or a hub id.

    A LoRA adapter of PEFT is merged into its base (`base_of`), in float32. End tokens are those of
    the config, of `generation_config.json` and of the chat template.

    Args:
      name: see `resolve`; a run directory means its best exported checkpoint.
      dtype: 'float32', 'bfloat16', 'float16', or 'mixed': bfloat16 matrices, cache and products,
        float32 everywhere else. 'auto' is what suits the device.
      mesh: devices that share the weights (`runtime/mesh.py`); None for one device.
      adapter: directories of LoRA adapters that are merged too, whatever base they name; of a run
        that trained one.

    Raises:
      ConfigError, DataError: see `resolve`, `base_of`, `read_config`, `read_model` and `open_gguf`,
        `read_gguf`, `tokenizer_of`.
    """
    dtype = chosen(dtype, 1 if mesh is None else mesh.shape.get('tensor', 1))
    more = [_named_adapter(each) for each in ([adapter] if isinstance(adapter, str) else adapter)]
    directory = resolve(name)
    if directory.is_file():
        file = open_gguf(directory)
        config, params = read_gguf(file, storage(dtype), mesh, products_of(dtype), more)
        tokenizer, lacks = tokenizer_of(file)
        config = with_turn_end(config, tokenizer)
        return Model(config, params, tokenizer, name, _merged(None, more, name), directory, lacks)
    base, own = base_of(directory)
    adapters = [own, *more] if own else more
    config, params = read_model(base, storage(dtype), mesh, adapters, products_of(dtype))
    into = base if own is None or base == directory else own.base
    lacks = lacks_package(home := _home_of_tokenizer(directory))
    tokenizer = None if lacks else read_tokenizer(home)
    config = with_turn_end(config, tokenizer)
    merged = _merged(own, more, one_line(str(into)))
    return Model(config, params, tokenizer, name, merged, directory, lacks)


def _merged(own: Adapter | None, more: Sequence[Adapter], into: str) -> str:
    """What to say of the adapters that were merged, if any."""
    titles = [own.title] if own else []
    titles += [f'{adapter.title} of {adapter.directory}' for adapter in more]
    return f'{" and ".join(titles)} merged into {into}' if titles else ''


def _named_adapter(name: str) -> Adapter:
    """The adapter of a directory, or of a run; ConfigError if there is none."""
    place = Path(name).expanduser()
    place = next((p for p in (place / 'adapter', place) if p.is_dir()), place)
    if (found := find_adapter(place)) is None:
        raise ConfigError(f'adapter {name}: no {SETTINGS} there; name the directory of an adapter')
    return found


def with_turn_end(config: LlamaConfig, tokenizer: Any) -> LlamaConfig:
    """The config whose answers also end where the chat template of a tokenizer ends them.

    The files of a model that was made a chat model later may name another end alone.
    """
    end = None if tokenizer is None else turn_end(tokenizer)
    if end is None or end in config.eos_ids or end >= config.vocab_size:
        return config
    return dataclasses.replace(config, eos_ids=(*config.eos_ids, end))


def storage(dtype: str) -> jnp.dtype:
    """The dtype of norms and residuals under a name that `load` accepts."""
    dtype = chosen(dtype)
    return DTYPES['float32' if dtype == MIXED else dtype]


def products_of(dtype: str) -> jnp.dtype:
    """The dtype of what is multiplied under a name that `load` accepts."""
    dtype = chosen(dtype)
    return DTYPES['bfloat16' if dtype == MIXED else dtype]


def mixed(params: Any) -> Any:
    """The same parameters with bfloat16 matrices; norms and biases as they are."""
    return map_matrices(lambda leaf: leaf.astype(jnp.bfloat16), params)


def files_fingerprint(directory: Path) -> str:
    """sha256 of a model directory's sums, else of its config and the sizes of its weight files.

    Of an adapter: of all its bytes, and this of its base. Of a GGUF file: of all its bytes.
    """
    if directory.is_file():
        return sha256(directory)
    base, adapter = base_of(directory)
    if adapter is not None:
        files = [sha256(directory / name) for name in (SETTINGS, TENSORS)]
        return hashlib.sha256(' '.join([_weights_fingerprint(base), *files]).encode()).hexdigest()
    return _weights_fingerprint(directory)


def _weights_fingerprint(directory: Path) -> str:
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
