"""Hugging Face's `config.json`, read and written.

What `model/llama.py` does not compute is refused by name: a checkpoint that loads and computes
something slightly different is worse than one that does not load.
"""

import dataclasses
import reprlib
from pathlib import Path
from typing import Any, NoReturn, get_args

from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.hf.files import read_json
from cllm_jax.model.config import LARGEST, Family, LlamaConfig, RopeScaling

LLAMA3 = ('low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
ROPE_KEYS = {'default': (), 'linear': ('factor',), 'llama3': ('factor', *LLAMA3)}
"""Kinds of rotary scaling with Hugging Face's names of the fields of `RopeScaling`, in order."""
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
BIASES = {'attention_bias': ('llama', 'qwen2', 'qwen3'), 'mlp_bias': ('llama',)}
"""Hugging Face's switches of biases, and the families that have such biases at all. Qwen2 has those
of q, k, v, and none of o, whatever its switch says."""
OPTIONAL_SIZES = ('num_key_value_heads', 'head_dim')


def read_config(place: Path) -> LlamaConfig:
    """Read a config file, or that of a model directory, to which `generation_config.json` adds ids.

    Raises:
      DataError: a file is missing or not JSON, or a value has the wrong type.
      ConfigError: the architecture is outside what `llama.py` computes; the message names the key.
    """
    path, extra = place / 'config.json', place / 'generation_config.json'
    path = place if place.is_file() else path
    raw = read_json(path)
    stops = _ids(extra, read_json(extra).get('eos_token_id')) if extra.exists() else ()
    return parse_config(path, raw, stops)


def parse_config(path: Path, raw: dict[str, Any], stops: tuple[int, ...] = ()) -> LlamaConfig:
    """The model that a `config.json` object describes; `path` is only named in errors.

    Absent keys take the defaults of `transformers`. Raises what `read_config` raises.
    """
    from transformers import CONFIG_MAPPING  # slow to import, and only model directories need it

    # How a checkpoint is stored does not matter here, and this key alone would need torch.
    known = {k: v for k, v in raw.items() if k not in ('dtype', 'torch_dtype')}
    try:
        _check_raw(path, raw)
        hf = CONFIG_MAPPING[raw['model_type']].from_dict(known)
        stops = tuple(dict.fromkeys(_ids(path, hf.eos_token_id) + stops))
        return _from_hf(raw['model_type'], hf, stops)
    except DataError:
        raise
    except ConfigError as e:
        raise ConfigError(f'{path}: {e}') from None
    except Exception as e:  # transformers validates with many exception types
        raise DataError(
            f'{path}: {type(e).__name__}: {one_line(e)}; compare it with the original config.json'
        ) from None


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that `read_config` and `transformers` read back as this model."""
    rule = config.rope_scaling
    kind, *numbers = dataclasses.astuple(rule) if rule else ('default',)
    # The last three numbers belong to `llama3` alone.
    scaling = {'rope_type': kind, **dict(zip(ROPE_KEYS[kind], numbers, strict=False))}
    eos, sizes = list(config.eos_ids), {name: getattr(config, n) for name, n in SIZES.items()}
    positions = sizes.pop('max_position_embeddings')
    biases = {'attention_bias': config.o_bias, 'mlp_bias': config.mlp_bias}
    return {  # in this order always, for runs note the sum of the file
        'architectures': [f'{config.family.capitalize()}ForCausalLM'],
        'model_type': config.family,
        **sizes,
        'hidden_act': 'silu',
        'rms_norm_eps': config.norm_eps,
        **{key: True for key, on in biases.items() if on},
        'rope_parameters': {'rope_theta': config.rope_theta, **scaling},
        'rope_theta': config.rope_theta,  # this and the next are read by transformers before 5
        'rope_scaling': scaling if rule else None,
        'tie_word_embeddings': config.tied,
        'max_position_embeddings': positions,
        'sliding_window': None,
        'bos_token_id': config.bos_id,
        'eos_token_id': eos[0] if len(eos) == 1 else eos or None,
        'pad_token_id': config.pad_id,
        'dtype': dtype,
    }


def _refuse(key: str, value: object, rule: str) -> NoReturn:
    raise ConfigError(f'{key} = {reprlib.repr(value)} is not supported; {rule}')


def _check_raw(path: Path, raw: dict[str, Any]) -> None:
    """What must be refused before `transformers` sees it: foreign models, and sizes it trusts."""
    if raw.get('model_type') not in (families := get_args(Family)):
        _refuse('model_type', raw.get('model_type'), f'supported models are {", ".join(families)}')
    if raw.get('auto_map'):
        _refuse('auto_map', raw['auto_map'], 'code of a checkpoint is never run; remove the key')
    if raw.get('quantization_config'):
        _refuse('quantization_config', raw['quantization_config'], 'export the model unquantised')
    for key in SIZES.keys() & raw.keys():
        size, most = raw[key], LARGEST[SIZES[key]]
        absent = size is None and key in OPTIONAL_SIZES
        if not absent and (type(size) is not int or not 1 <= size <= most):
            raise DataError(
                f'{path}: {key} = {reprlib.repr(size)}, a whole number from 1 to {most} expected; '
                'compare it with the original config.json'
            )


def _ids(path: Path, value: object) -> tuple[int, ...]:
    """Token ids as a tuple; old checkpoints write -1 for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise DataError(
            f'{path}: eos_token_id = {reprlib.repr(value)}, an id or a list of ids expected; '
            'compare it with the original file'
        )
    return tuple(i for i in ids if i >= 0)


def _rope(hf: Any) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and how they are stretched."""
    rope = dict(hf.rope_parameters or {})
    kind = rope.get('rope_type', 'default')
    if kind not in ROPE_KEYS:
        _refuse('rope_type', kind, f'supported types are {", ".join(ROPE_KEYS)}')
    if rope.get('partial_rotary_factor', 1.0) != 1.0:
        _refuse('partial_rotary_factor', rope['partial_rotary_factor'], 'it must be 1')
    for key, value in rope.items():
        if isinstance(value, dict):
            _refuse(f'rope_parameters[{reprlib.repr(key)}]', value, 'all layers must share one')
    numbers = {key: rope.get(key) for key in ('rope_theta', *ROPE_KEYS[kind])}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            rule = 'it must be a number; copy it from the original config.json'
            _refuse(f'rope {key}', value, rule)
    theta, *numbers = map(float, numbers.values())
    if kind == 'llama3':
        numbers[-1] = int(numbers[-1])
    return theta, None if kind == 'default' else RopeScaling(kind, *numbers)


def _biases(family: Family, hf: Any) -> dict[str, bool]:
    """Which products of a block have biases."""
    asked = {key: getattr(hf, key, False) for key in BIASES}
    for key, families in BIASES.items():
        if asked[key] and family not in families:
            _refuse(key, asked[key], f'a {family} model has no such biases, set it to false')
    if family == 'qwen2':
        return {'qkv_bias': True}
    attention, mlp = (bool(value) for value in asked.values())
    return {'qkv_bias': attention, 'o_bias': attention, 'mlp_bias': mlp}


def _from_hf(family: Family, hf: Any, eos_ids: tuple[int, ...]) -> LlamaConfig:
    if hf.hidden_act != 'silu':
        _refuse('hidden_act', hf.hidden_act, 'it must be silu')
    # transformers' LLaMA ignores the window, and its Qwen classes null it unless it is used.
    window = getattr(hf, 'sliding_window', None)
    if family != 'llama' and window is not None:
        rule = 'set it to null if prompt and answer together stay below that length'
        _refuse('sliding_window', window, rule)
    kinds = {str(kind) for kind in getattr(hf, 'layer_types', None) or ()} - {'full_attention'}
    if kinds:
        _refuse('layer_types', sorted(kinds), 'every layer must be full_attention')
    theta, scaling = _rope(hf)
    sizes = {ours: getattr(hf, name, None) for name, ours in SIZES.items()}
    sizes['head_dim'] = sizes['head_dim'] or sizes['dim'] // sizes['heads']  # Qwen2 has none
    bos, pad = (t if t is not None and t >= 0 else None for t in (hf.bos_token_id, hf.pad_token_id))
    return LlamaConfig(
        **sizes,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=hf.rms_norm_eps,
        tied=hf.tie_word_embeddings,
        **_biases(family, hf),
        qk_norm=family == 'qwen3',
        bos_id=bos,
        eos_ids=eos_ids,
        pad_id=pad,
        family=family,
    )
