"""The metadata of a GGUF file as the config of a model.

What `model/llama.py` does not compute is refused by the name that the file has for it.
"""

import numpy as np

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.gguf_file import AGAIN, Gguf
from cllm_jax.model.config import LlamaConfig, RopeScaling

FAMILIES = ('llama', 'qwen2', 'qwen3')
SIZES = {
    'block_count': 'layers',
    'embedding_length': 'dim',
    'attention.head_count': 'heads',
    'attention.head_count_kv': 'kv_heads',
    'attention.key_length': 'head_dim',
    'feed_forward_length': 'mlp_dim',
    'context_length': 'max_positions',
}
"""Names of the sizes in a file, after that of its architecture, and ours."""
OPTIONAL = ('attention.head_count_kv', 'attention.key_length')
READ = {
    *SIZES,
    *('vocab_size', 'attention.layer_norm_rms_epsilon', 'attention.value_length'),
    *('attention.causal', 'rope.dimension_count', 'rope.freq_base', 'rope.scale_linear'),
    *('rope.scaling.type', 'rope.scaling.factor'),
}
"""All names that are read here; those of neither set must be off, also those of later versions."""
IGNORED = {'rope.scaling.finetuned', 'rope.scaling.original_context_length', 'tensor_data_layout'}
"""What changes nothing without the kinds of scaling that are refused."""
STOPS = ('eos', 'eot', 'eom')
"""Ends of a text, of a turn, and of a message, at which llama.cpp stops too."""
EMBED, HEAD, ROPE_FACTORS = 'token_embd.weight', 'output.weight', 'rope_freqs.weight'


def config_of(file: Gguf) -> LlamaConfig:
    """The sizes and switches of a file's model.

    Raises:
      DataError: a value is missing or of the wrong kind.
      ConfigError: the architecture is outside what `llama.py` computes; the message names the key.
    """
    family = file.get('general.architecture', str)
    if family not in FAMILIES:
        rule = f'supported architectures are {", ".join(FAMILIES)}'
        file.refuse('general.architecture', family, rule)
    if (kind := file.get('general.type', str, 'model')) != 'model':
        file.refuse('general.type', kind, 'it must be a whole model')
    sizes = _sizes(file, family)
    _check_unread(file, family, sizes['head_dim'])
    norm_eps = file.get(f'{family}.attention.layer_norm_rms_epsilon', float)
    if norm_eps is None:
        fault = f'no {family}.attention.layer_norm_rms_epsilon'
        raise DataError(f'{file.path}: {fault}; {AGAIN}')
    ends = (file.get(f'tokenizer.ggml.{name}_token_id', int) for name in STOPS)
    has = file.tensors.keys()
    attention = 'blk.0.attn_q.bias' in has
    theta = _decimal(file.get(f'{family}.rope.freq_base', float, 10_000.0))
    try:
        return LlamaConfig(
            **sizes,
            rope_theta=theta,
            rope_scaling=_scaling(file, family, sizes['head_dim'], theta),
            norm_eps=_decimal(norm_eps),
            tied=HEAD not in has,
            qkv_bias=attention or family == 'qwen2',
            o_bias=attention and family != 'qwen2',
            mlp_bias='blk.0.ffn_gate.bias' in has and family == 'llama',
            qk_norm=family == 'qwen3',
            bos_id=file.get('tokenizer.ggml.bos_token_id', int),
            eos_ids=tuple(dict.fromkeys(i for i in ends if i is not None)),
            pad_id=file.get('tokenizer.ggml.padding_token_id', int),
            family=family,
        )
    except ConfigError as e:
        raise ConfigError(f'{file.path}: {str(e).removeprefix(f"{file.path}: ")}') from None


def _sizes(file: Gguf, family: str) -> dict[str, int]:
    sizes = {}
    for name, ours in SIZES.items():
        key = f'{family}.{name}'
        if key in file.fields and isinstance(layers := file.value(key), list):
            file.refuse(key, layers, 'all layers must have the same')
        sizes[ours] = file.get(key, int)
    missing = [n for n, ours in SIZES.items() if sizes[ours] is None and n not in OPTIONAL]
    if missing:
        raise DataError(f'{file.path}: no {family}.{missing[0]}; {AGAIN}')
    if sizes['kv_heads'] is None:
        sizes['kv_heads'] = sizes['heads']
    if sizes['head_dim'] is None:
        sizes['head_dim'] = sizes['dim'] // max(sizes['heads'], 1)
    if EMBED not in file.tensors:
        raise DataError(f'{file.path}: missing tensors: {EMBED}; fetch the whole model again')
    rows = file.shape(EMBED)[0]
    return sizes | {'vocab_size': file.get(f'{family}.vocab_size', int, rows)}


def _check_unread(file: Gguf, family: str, head_dim: int) -> None:
    """Refuse what the metadata asks for beyond what is read, whatever it is."""
    for key in file.fields:
        prefix, _, name = key.partition('.')
        if prefix == family and name not in READ | IGNORED and (value := file.value(key)):
            file.refuse(key, value, 'it must be absent, or 0')
    for name in ('attention.value_length', 'rope.dimension_count'):
        if (value := file.get(f'{family}.{name}', int, head_dim)) != head_dim:
            file.refuse(f'{family}.{name}', value, f'it must be the width of a head, {head_dim}')
    if not file.get(f'{family}.attention.causal', bool, True):
        file.refuse(f'{family}.attention.causal', False, 'it must be true')


def _decimal(number: float) -> float:
    """The shortest number that a file's float32 stands for: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _scaling(file: Gguf, family: str, head_dim: int, theta: float) -> RopeScaling | None:
    """How the rotary frequencies are stretched: a factor of the metadata, or a tensor of them."""
    key = f'{family}.rope.scaling.'
    kind = file.get(f'{key}type', str, 'linear')
    old = file.get(f'{family}.rope.scale_linear', float, 1.0)
    factor = _decimal(file.get(f'{key}factor', float, old) or 1.0)
    if kind not in ('none', 'linear'):
        file.refuse(f'{key}type', kind, 'supported types are none, linear')
    linear = RopeScaling('linear', factor) if kind == 'linear' and factor != 1.0 else None
    if ROPE_FACTORS not in file.tensors:
        return linear
    half = (head_dim // 2,)
    file.check_kinds([ROPE_FACTORS])
    if linear or file.shape(ROPE_FACTORS) != half:
        rule = f'it must be {half}, without a factor in the metadata'
        file.refuse(ROPE_FACTORS, f'{file.shape(ROPE_FACTORS)}, factor {factor}', rule)
    return _llama3(file, theta)


def _llama3(file: Gguf, theta: float) -> RopeScaling | None:
    """The rule of LLaMA 3 that gives the divisors of the frequencies which a file holds.

    A file does not name the rule. All LLaMA 3.1 to 3.3 models have one that differs in its factor
    alone, so the divisors must be exactly what it gives for the largest of them.
    """
    stored = file.array(ROPE_FACTORS).astype(np.float64)
    if np.all(stored == 1):
        return None
    rule = RopeScaling('llama3', _decimal(stored.max()))
    if not np.allclose(stored, rope_factors(rule, theta, stored.size), rtol=1e-4, atol=0):
        file.refuse(ROPE_FACTORS, stored.tolist(), 'only the factors of LLaMA 3.1 to 3.3 are known')
    return rule


def rope_factors(rule: RopeScaling, theta: float, size: int) -> np.ndarray:
    """The divisors of so many rotary frequencies that a `llama3` rule gives."""
    low, high = rule.low_freq_factor, rule.high_freq_factor
    freq = np.float64(theta) ** (-np.arange(size) / size)
    turns = rule.original_positions * freq / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / (keep + (1 - keep) / rule.factor)
