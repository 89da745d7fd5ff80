"""A model written as a GGUF file: llama.cpp reads it, and `gguf.py` reads the same model back.

What the metadata cannot say is refused before a weight is written. That is not decided by rules of
its own: the metadata are read as those of any file, and the result is compared.
"""

import copy
import dataclasses
import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np

from cllm_jax.data.encoding import plain_ids
from cllm_jax.errors import CllmError, ConfigError, DataError, one_line
from cllm_jax.hf.gguf import names_of
from cllm_jax.hf.gguf_config import ROPE_FACTORS, SIZES, STOPS, config_of, rope_factors
from cllm_jax.hf.gguf_file import SUFFIX, Gguf
from cllm_jax.hf.gguf_tokenizer import GPT2, OWN, SPECIAL, SPLITS, UNUSED, tokenizer_of
from cllm_jax.hf.model import Model
from cllm_jax.hf.tokenizer import PROBES, tokenizer_fingerprint
from cllm_jax.hf.weights import hf_tensor, named, tensor_shapes
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runs.atomic import replacing

GGUF_DTYPES = {'f32': jnp.dtype('float32'), 'bf16': jnp.dtype('bfloat16')}
"""Kinds of matrices, by the name that is part of a file's; vectors are float32 in all of them."""
FILE_TYPES = {'f32': 0, 'bf16': 32}
"""The number that llama.cpp has for a file of each kind."""
ORDINARY = 1
"""The type of a token that is text."""
EVERY_BYTE = ''.join(map(chr, [*range(0x801), *range(1 << 12, 1 << 16, 1 << 12)]))
EVERY_BYTE += ''.join(map(chr, [1 << 16, *range(1 << 18, 0x110000, 1 << 18)]))
"""A text with all that UTF-8 uses, and with every class of characters that a rule may cut at."""
INSTEAD = 'leave out --gguf, or add --gguf-without-tokenizer'


def gguf_name(kind: str) -> str:
    """The name of a file in the directory of its model."""
    return f'model-{kind}{SUFFIX}'


def write_gguf(path: Path, model: Model, kind: str, without_tokenizer: bool = False) -> None:
    """Write a model as a GGUF file, all of it or nothing.

    Two things may read back differently; no forward changes. A Mistral becomes a `llama`, as
    llama.cpp calls it. The ids of begin, end and padding are told once for model and tokenizer:
    they are the tokenizer's, or else the config's, and of several ends the tokenizer's is first.

    Args:
      kind: of the matrices, one of `GGUF_DTYPES`.
      without_tokenizer: leave the tokenizer out, whatever it is; token ids can be decoded then.

    Raises:
      ConfigError: the package `gguf` is missing, the kind is unknown, or the file would be another
        model or tokenizer.
      DataError: the file cannot be written.
    """
    package, place = _package(model.source), Path(model.source)
    if kind not in GGUF_DTYPES:
        raise ConfigError(f'kind {kind!r} is unknown; choose one of {", ".join(GGUF_DTYPES)}')
    tokenizer = None if without_tokenizer else model.tokenizer
    if model.lacks and not without_tokenizer:
        raise ConfigError(f'{place}: {model.lacks}')
    config = _told(place, model.config, tokenizer)
    wrong = [i for i in _roles(config, tokenizer).values() if not 0 <= i < config.vocab_size]
    if wrong:
        fault = f'the token id {wrong[0]} is outside the vocabulary 0..{config.vocab_size - 1}'
        raise ConfigError(f'{place}: {fault}; correct the config')
    facts = _facts(config, kind) | _roles(config, tokenizer)
    facts |= _tokenizer_facts(place, tokenizer, config.vocab_size)
    infos = _infos(config, kind, package.GGMLQuantizationType)
    factors = {}
    if (rule := config.rope_scaling) and rule.kind == 'llama3':
        divisors = rope_factors(rule, config.rope_theta, config.head_dim // 2)
        factors[ROPE_FACTORS] = divisors.astype(np.float32)
    draft = _draft(place, facts, infos, factors, package.GGMLQuantizationType.F32)
    _check_config(draft, config)
    if tokenizer is not None:
        _check_tokenizer(draft, _with_roles(tokenizer, config))
    writer = package.GGUFWriter(None, config.family)
    for key, value in facts.items():
        if key != 'general.architecture':  # the writer has said so
            _add(writer, key, value)
    try:
        with replacing(path) as temp:
            _write(temp, writer, model.params, config, infos, factors)
    except OSError as e:
        fault = f'{place}: {path.name} is not written ({one_line(e)})'
        raise DataError(f'{fault}; free some space or choose another directory') from None


def _package(source: str) -> Any:
    try:
        return import_module('gguf')
    except ImportError as e:
        reason = f'{source}: a GGUF file needs the package gguf ({one_line(e, 120)})'
        raise ConfigError(f"{reason}; pip install 'cllm_jax[gguf]'") from None


def _write(
    path: Path, writer: Any, params: Any, config: LlamaConfig, infos: dict, factors: dict
) -> None:
    """The file itself; one tensor at a time is in memory twice."""
    for name, array in factors.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    for name, (shape, dtype, own) in infos.items():
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, size, raw_dtype=own)
    names, turned = names_of(config)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in factors.values():
            writer.write_tensor_data(array)
        for hf_name, one in named(params).items():
            array = hf_tensor(*one).astype(infos[names[hf_name]][1])
            if heads := turned.get(hf_name):
                # LLaMA's rows alone: those that are rotated together lie side by side (`gguf.py`).
                halves = array.reshape(heads, 2, -1, *array.shape[1:])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
            writer.write_tensor_data(array)
    finally:
        writer.close()


def _told(path: Path, config: LlamaConfig, tokenizer: Any) -> LlamaConfig:
    """The config that a file has of a model, see `write_gguf`."""
    config = dataclasses.replace(
        config, family='llama' if config.family == 'mistral' else config.family
    )
    if tokenizer is None:
        return config
    ids = {'bos_id': tokenizer.bos_token_id, 'pad_id': tokenizer.pad_token_id}
    ends, end = config.eos_ids, tokenizer.eos_token_id
    if end is not None:
        if ends and end not in ends:
            fault = f'the tokenizer ends texts with {end}, and the model with {ends}'
            raise ConfigError(f'{path}: {fault}; make the two agree, or {INSTEAD}')
        ids['eos_ids'] = (end, *(i for i in ends if i != end))
    return dataclasses.replace(config, **{name: i for name, i in ids.items() if i is not None})


def _with_roles(tokenizer: Any, config: LlamaConfig) -> Any:
    """The tokenizer with the begin and the end that its model's config alone names."""
    ends = config.eos_ids[:1] or (None,)
    missing = {
        name: at
        for name, at in (('bos', config.bos_id), ('eos', ends[0]))
        if at is not None and getattr(tokenizer, f'{name}_token_id') is None
    }
    if missing:
        tokenizer = copy.deepcopy(tokenizer)
        for name, at in missing.items():
            setattr(tokenizer, f'{name}_token', tokenizer.convert_ids_to_tokens(at))
    return tokenizer


def _facts(config: LlamaConfig, kind: str) -> dict[str, Any]:
    """What the metadata say of a model."""
    own = {name: getattr(config, ours) for name, ours in SIZES.items()} | {
        'vocab_size': config.vocab_size,
        'attention.value_length': config.head_dim,
        'attention.layer_norm_rms_epsilon': float(config.norm_eps),
        'rope.dimension_count': config.head_dim,
        'rope.freq_base': float(config.rope_theta),
    }
    if (rule := config.rope_scaling) and rule.kind == 'linear':
        own |= {'rope.scaling.type': 'linear', 'rope.scaling.factor': float(rule.factor)}
    general = {'architecture': config.family, 'type': 'model', 'file_type': FILE_TYPES[kind]}
    facts = {f'general.{name}': value for name, value in general.items()}
    return facts | {f'{config.family}.{name}': value for name, value in own.items()}


def _roles(config: LlamaConfig, tokenizer: Any) -> dict[str, int]:
    ids = dict(zip(STOPS, config.eos_ids, strict=False))
    ids |= {'bos': config.bos_id, 'padding': config.pad_id}
    ids['unknown'] = getattr(tokenizer, 'unk_token_id', None)
    return {f'tokenizer.ggml.{n}_token_id': i for n, i in ids.items() if i is not None}


def _tokenizer_facts(path: Path, tokenizer: Any, rows: int) -> dict[str, Any]:
    """What the metadata say of a tokenizer; there is a token for each row of the table."""
    if tokenizer is None:
        return {'tokenizer.ggml.model': 'none'}
    backend = getattr(tokenizer, 'backend_tokenizer', None)
    inner = json.loads(backend.to_str()) if backend is not None else {}
    rule, names = _rule(inner), {at: name for name, at in tokenizer.get_vocab().items()}
    if not rule:
        known = f'byte-level BPE with the rule {", ".join(SPLITS)}'
        _refuse(path, f'the tokenizer is none that a GGUF file can have, {known}')
    if max(names) >= rows:
        _refuse(path, f'the tokenizer has the id {max(names)}, and the table {rows} rows')
    kinds = dict.fromkeys(names, ORDINARY)
    kinds |= {one['id']: SPECIAL if one['special'] else OWN for one in inner['added_tokens']}
    merges = inner['model']['merges']
    facts = {
        'model': 'gpt2',
        'pre': rule,
        'tokens': [names.get(at, f'[PAD{at}]') for at in range(rows)],
        'token_type': [kinds.get(at, UNUSED) for at in range(rows)],
        'merges': [pair if isinstance(pair, str) else ' '.join(pair) for pair in merges],
    }
    [plain], whole = plain_ids(tokenizer, ['a']), tokenizer('a')['input_ids']
    for name, ids in (('bos', whole[:1]), ('eos', whole[-1:])):
        facts[f'add_{name}_token'] = whole != plain and ids == [
            getattr(tokenizer, f'{name}_token_id')
        ]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get('default')
    facts = {f'tokenizer.ggml.{name}': value for name, value in facts.items()}
    return facts | ({'tokenizer.chat_template': template} if template else {})


def _rule(inner: dict[str, Any]) -> str:
    """The name of the rule by which a tokenizer.json cuts texts, '' if a file has none for it.

    Its own words decide here, and not texts alone: two rules may agree on all that are tried.
    """
    model, cuts = inner.get('model', {}), []
    odd = ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'byte_fallback')
    top = inner.get('pre_tokenizer') or {}
    parts = top.get('pretokenizers', [top])
    if model.get('type') != 'BPE' or any(model.get(name) for name in odd):
        return ''
    if parts[-1].get('type') != 'ByteLevel':
        return ''
    for part in parts:
        kind, pattern = part.get('type'), part.get('pattern', {})
        if kind == 'ByteLevel' and not part['add_prefix_space']:
            cuts += [GPT2] if part.get('use_regex', True) else []
        elif kind == 'Digits' and part['individual_digits']:
            cuts.append(r'\p{N}')
        elif kind == 'Split' and (part['behavior'], part['invert']) == ('Isolated', False):
            cuts.append(pattern.get('Regex'))
        else:
            return ''
    rule = next((name for name, splits in SPLITS.items() if splits == tuple(cuts)), '')
    whole = bool(model.get('ignore_merges')) == (rule == 'llama-bpe')
    return rule if whole else ''


def _infos(config: LlamaConfig, kind: str, kinds: Any) -> dict[str, tuple]:
    """Shape, dtype and kind of the model's tensors, by a file's names, in its order."""
    own = {1: (GGUF_DTYPES['f32'], kinds.F32), 2: (GGUF_DTYPES[kind], kinds[kind.upper()])}
    names, shapes = names_of(config)[0], tensor_shapes(config)
    return {name: (shapes[hf_name], *own[len(shapes[hf_name])]) for hf_name, name in names.items()}


def _draft(path: Path, facts: dict, infos: dict, factors: dict, f32: Any) -> Gguf:
    """The file that is to be written as it would be opened, without its weights."""

    def field(value: Any) -> Any:
        value = float(np.float32(value)) if isinstance(value, float) else value
        return SimpleNamespace(contents=lambda: value)

    def tensor(shape: tuple[int, ...], kind: Any, data: Any = None) -> Any:
        return SimpleNamespace(shape=shape[::-1], tensor_type=kind, data=data)

    tensors = {name: tensor(shape, kind) for name, (shape, _, kind) in infos.items()}
    tensors |= {name: tensor(array.shape, f32, array) for name, array in factors.items()}
    return Gguf(path, {key: field(value) for key, value in facts.items()}, tensors)


def _check_config(draft: Gguf, config: LlamaConfig) -> None:
    try:
        found = config_of(draft)
    except CllmError as e:
        raise ConfigError(f'{e}; leave out --gguf') from None
    for field in dataclasses.fields(config):
        told, read = (getattr(one, field.name) for one in (config, found))
        if told != read:
            fault = f'{field.name} = {one_line(told)} would be read back as {one_line(read)}'
            raise ConfigError(f'{draft.path}: {fault}; leave out --gguf, or change it')


def _check_tokenizer(draft: Gguf, tokenizer: Any) -> None:
    """Refuse a tokenizer of which the file would make another one."""
    try:
        made, lacks = tokenizer_of(draft)
    except DataError as e:
        made, lacks = None, str(e)
    if made is None:
        _refuse(draft.path, f'the tokenizer could not be read back ({one_line(lacks)})')
    same = tokenizer_fingerprint(made) == tokenizer_fingerprint(tokenizer)
    ids = [one([*PROBES, EVERY_BYTE])['input_ids'] for one in (made, tokenizer)]
    if not same or ids[0] != ids[1]:
        rule = draft.get('tokenizer.ggml.pre', str)
        _refuse(draft.path, f'the tokenizer would do something else with texts by the rule {rule}')


def _refuse(path: Path, fault: str) -> None:
    raise ConfigError(f'{path}: {fault}; {INSTEAD}')


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string', list: 'array'}
    getattr(writer, f'add_{kinds[type(value)]}')(key, value)
