"""The architecture of a LLaMA-family model, and its translation from and to Hugging Face's config.

Only what the block of `llama.py` computes is accepted; everything else is refused by name, because
a checkpoint that loads and computes something slightly different is worse than one that does not.
"""

import dataclasses
import json
import math
import reprlib
from pathlib import Path
from typing import Any, Literal

from cllm_jax.errors import ConfigError, DataError

Family = Literal['llama', 'mistral', 'qwen2', 'qwen3']
ARCHITECTURES = {
    'llama': 'LlamaForCausalLM',
    'mistral': 'MistralForCausalLM',
    'qwen2': 'Qwen2ForCausalLM',
    'qwen3': 'Qwen3ForCausalLM',
}
ROPE_TYPES = ('default', 'linear', 'llama3')
SIZES = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'dim',
    'num_hidden_layers': 'layers',
    'num_attention_heads': 'heads',
    'num_key_value_heads': 'kv_heads',
    'head_dim': 'head_dim',
    'intermediate_size': 'mlp_dim',
    'max_position_embeddings': 'max_positions',
}
"""Hugging Face's names of the sizes, and ours."""
OPTIONAL_SIZES = ('num_key_value_heads', 'head_dim')
MAX_SIZE = 1 << 24
MAX_LAYERS = 1 << 10
CONFIG_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear`, or the smooth `llama3` rule.

    The last three fields belong to `llama3` (LLaMA 3.1 model card): wavelengths shorter than
    `original_positions / high_freq_factor` stay, those longer than
    `original_positions / low_freq_factor` are divided by `factor`, with a ramp between.
    """

    kind: Literal['linear', 'llama3']
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        low, high = self.low_freq_factor, self.high_freq_factor
        if not all(0 < x < math.inf for x in (self.factor, low, high, self.original_positions)):
            raise ConfigError(f'{self}: every number must be positive and finite; correct it')
        if low >= high:
            raise ConfigError(
                f'low_freq_factor {low} and high_freq_factor {high}: the first must be smaller; '
                'LLaMA 3.1 has 1 and 4'
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of one model. Hashable, so it can be a static argument of `jax.jit`."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    """The output projection is the embedding table."""
    qkv_bias: bool = False
    """Biases on q, k, v (Qwen2)."""
    qk_norm: bool = False
    """RMS norm on each head of q and k (Qwen3)."""
    max_positions: int = 4096
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    family: Family = 'llama'

    def __post_init__(self):
        for field in SIZES.values():
            size, most = getattr(self, field), MAX_LAYERS if field == 'layers' else MAX_SIZE
            if not _is_int(size) or not 1 <= size <= most:
                raise ConfigError(
                    f'{field} = {reprlib.repr(size)}; choose a whole number from 1 to {most}'
                )
        for field in ('rope_theta', 'norm_eps'):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f'{field} = {getattr(self, field)}; choose a positive number')
        if self.heads % self.kv_heads:
            raise ConfigError(
                f'{self.heads} query heads over {self.kv_heads} kv heads: the first must be a '
                'multiple of the second; choose kv_heads that divides heads'
            )
        if self.head_dim % 2:
            raise ConfigError(
                f'head_dim {self.head_dim}; choose an even number, rotation needs pairs'
            )

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included."""
        attention = self.dim * self.head_dim * 2 * (self.heads + self.kv_heads)
        bias = self.qkv_bias * self.head_dim * (self.heads + 2 * self.kv_heads)
        norms = 2 * self.dim + self.qk_norm * 2 * self.head_dim
        block = attention + bias + 3 * self.dim * self.mlp_dim + norms
        return self.layers * block + (2 - self.tied) * self.vocab_size * self.dim + self.dim

    @property
    def cache_values(self) -> int:
        """Numbers the KV cache holds per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def one_line(text: object, limit: int = 200) -> str:
    """Somebody else's text, fit for an error message: one printable line of bounded length."""
    line = ' '.join(str(text).split())
    return ''.join(c if c.isprintable() else '?' for c in line[:limit])


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f'{path}: no such file; name a directory that holds a whole model')
    try:
        size = path.stat().st_size
        if size > CONFIG_BYTES:
            raise DataError(f'{path}: {size} bytes, at most 1 MiB expected; fetch the file again')
        data = json.loads(path.read_text('utf-8'))
    except OSError as e:
        raise DataError(f'{path}: {e.strerror or e}; make the file readable') from None
    except (ValueError, RecursionError):
        raise DataError(f'{path}: not valid JSON; fetch the file again') from None
    if not isinstance(data, dict):
        raise DataError(
            f'{path}: a JSON {type(data).__name__}, an object expected; fetch the file again'
        )
    return data


def _refuse(key: str, value: object, rule: str):
    raise ConfigError(f'{key} = {reprlib.repr(value)} is not supported; {rule}')


def _check_raw(path: Path, raw: dict[str, Any]) -> None:
    """What must be refused before `transformers` sees it: foreign models, and sizes it trusts."""
    family = raw.get('model_type')
    if not isinstance(family, str) or family not in ARCHITECTURES:
        _refuse('model_type', family, f'supported models are {", ".join(ARCHITECTURES)}')
    if raw.get('auto_map'):
        _refuse('auto_map', raw['auto_map'], 'code of a checkpoint is never run; remove the key')
    if raw.get('quantization_config'):
        _refuse('quantization_config', raw['quantization_config'], 'export the model unquantised')
    for key in SIZES.keys() & raw.keys():
        size, most = raw[key], MAX_LAYERS if key == 'num_hidden_layers' else MAX_SIZE
        if size is None and key in OPTIONAL_SIZES:
            continue
        if not _is_int(size) or not 1 <= size <= most:
            raise DataError(
                f'{path}: {key} = {reprlib.repr(size)}, a whole number from 1 to {most} expected; '
                'compare it with the original config.json'
            )


def read_config(place: Path) -> LlamaConfig:
    """Read a config file, or `config.json` and `generation_config.json` of a model directory.

    The second of these only adds stop ids.

    Raises:
      DataError: a file is missing or not JSON, or a value has the wrong type.
      ConfigError: the architecture is outside what `llama.py` computes; the message names the key.
    """
    path = place if place.is_file() else place / 'config.json'
    raw = _read_json(path)
    extra = place / 'generation_config.json'
    stops = _ids(extra, _read_json(extra).get('eos_token_id')) if extra.exists() else ()
    try:
        return parse_config(path, raw, stops)
    except ConfigError as e:
        raise ConfigError(f'{path}: {e}') from None


def parse_config(path: Path, raw: dict[str, Any], stops: tuple[int, ...] = ()) -> LlamaConfig:
    """The model that a `config.json` object describes; `path` is only named in errors.

    Absent keys take the defaults of `transformers`, as they would there.
    """
    _check_raw(path, raw)
    from transformers import CONFIG_MAPPING  # slow to import, and only model directories need it

    # How a checkpoint is stored does not matter here, and this key alone would need torch.
    known = {k: v for k, v in raw.items() if k not in ('dtype', 'torch_dtype')}
    try:
        hf = CONFIG_MAPPING[raw['model_type']].from_dict(known)
        stops = tuple(dict.fromkeys(_ids(path, hf.eos_token_id) + stops))
        return _from_hf(raw['model_type'], hf, stops)
    except (ConfigError, DataError):
        raise
    except Exception as e:  # transformers validates with many exception types
        raise DataError(
            f'{path}: {type(e).__name__}: {one_line(e)}; compare it with the original config.json'
        ) from None


def _ids(path: Path, value: object) -> tuple[int, ...]:
    """Token ids as a tuple; old checkpoints write -1 for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_int(i) for i in ids):
        raise DataError(
            f'{path}: eos_token_id = {reprlib.repr(value)}, an id or a list of ids expected; '
            'compare it with the original file'
        )
    return tuple(i for i in ids if i >= 0)


def _number(rope: dict[str, Any], key: str) -> float:
    value = rope.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(f'rope {key}', value, 'it must be a number; copy it from the original config.json')
    return float(value)


def _rope(hf: Any) -> tuple[float, RopeScaling | None]:
    rope = dict(hf.rope_parameters or {})
    kind = rope.get('rope_type', 'default')
    if kind not in ROPE_TYPES:
        _refuse('rope_type', kind, f'supported types are {", ".join(ROPE_TYPES)}')
    if rope.get('partial_rotary_factor', 1.0) != 1.0:
        _refuse('partial_rotary_factor', rope['partial_rotary_factor'], 'it must be 1')
    for key, value in rope.items():
        if isinstance(value, dict):
            _refuse(f'rope_parameters[{reprlib.repr(key)}]', value, 'all layers must share one')
    theta = _number(rope, 'rope_theta')
    if kind == 'default':
        return theta, None
    if kind == 'linear':
        return theta, RopeScaling('linear', _number(rope, 'factor'))
    return theta, RopeScaling(
        'llama3',
        _number(rope, 'factor'),
        _number(rope, 'low_freq_factor'),
        _number(rope, 'high_freq_factor'),
        int(_number(rope, 'original_max_position_embeddings')),
    )


def _from_hf(family: Family, hf: Any, eos_ids: tuple[int, ...]) -> LlamaConfig:
    if hf.hidden_act != 'silu':
        _refuse('hidden_act', hf.hidden_act, 'it must be silu')
    for key in ('mlp_bias', 'attention_bias'):
        if getattr(hf, key, False):
            _refuse(key, True, 'only the q, k, v biases of Qwen2 are')
    # transformers' LLaMA ignores the window, and its Qwen classes null it unless it is used.
    window = getattr(hf, 'sliding_window', None)
    if family != 'llama' and window is not None:
        rule = 'set it to null if prompt and answer together stay below that length'
        _refuse('sliding_window', window, rule)
    kinds = {str(kind) for kind in getattr(hf, 'layer_types', None) or ()} - {'full_attention'}
    if kinds:
        _refuse('layer_types', sorted(kinds), 'every layer must be full_attention')
    theta, scaling = _rope(hf)
    return LlamaConfig(
        vocab_size=hf.vocab_size,
        dim=hf.hidden_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=getattr(hf, 'head_dim', None) or hf.hidden_size // hf.num_attention_heads,
        mlp_dim=hf.intermediate_size,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=hf.rms_norm_eps,
        tied=hf.tie_word_embeddings,
        qkv_bias=family == 'qwen2',
        qk_norm=family == 'qwen3',
        max_positions=hf.max_position_embeddings,
        bos_id=_token(hf.bos_token_id),
        eos_ids=eos_ids,
        pad_id=_token(hf.pad_token_id),
        family=family,
    )


def _token(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `read_config` and `transformers` read back as this model."""
    rope: dict[str, Any] = {'rope_theta': config.rope_theta, 'rope_type': 'default'}
    if scaling := config.rope_scaling:
        rope |= {'rope_type': scaling.kind, 'factor': scaling.factor}
        if scaling.kind == 'llama3':
            rope |= {
                'low_freq_factor': scaling.low_freq_factor,
                'high_freq_factor': scaling.high_freq_factor,
                'original_max_position_embeddings': scaling.original_positions,
            }
    eos = list(config.eos_ids)
    # Both spellings of the rotary keys: transformers 5 writes the first, older readers know the
    # other two.
    return {
        'architectures': [ARCHITECTURES[config.family]],
        'model_type': config.family,
        'vocab_size': config.vocab_size,
        'hidden_size': config.dim,
        'num_hidden_layers': config.layers,
        'num_attention_heads': config.heads,
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_dim,
        'intermediate_size': config.mlp_dim,
        'hidden_act': 'silu',
        'rms_norm_eps': config.norm_eps,
        'rope_parameters': rope,
        'rope_theta': config.rope_theta,
        'rope_scaling': {k: v for k, v in rope.items() if k != 'rope_theta'} if scaling else None,
        'tie_word_embeddings': config.tied,
        'max_position_embeddings': config.max_positions,
        'sliding_window': None,
        'bos_token_id': config.bos_id,
        'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
        'pad_token_id': config.pad_id,
        'dtype': dtype,
    }
