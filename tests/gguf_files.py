"""Small GGUF files to read and to break, and the tensors that they hold in Hugging Face's order."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import hf_tensor, named
from cllm_jax.model.config import LlamaConfig
from tests.kinds import CHATML
from tests.tiny_model import model_of

KIND = gguf.GGMLQuantizationType
GQA = LlamaConfig(
    vocab_size=48, dim=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_dim=96, eos_ids=(1,)
)
"""Rows that can be divided into blocks of 32."""


def llamas_order(rows: int, heads: int) -> np.ndarray:
    """Of each row of a file's q or k the one of Hugging Face: the halves of a head alternate."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def stored_tensors(model: Model, kind: KIND) -> dict[str, tuple[np.ndarray, np.ndarray, KIND]]:
    """By the file's names: the bytes of a tensor, what they mean to Hugging Face, and their kind.

    The names are those of the package's own converter. Vectors stay float32.
    """
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.family.upper()], config.layers)
    found = {}
    for hf_name, one in named(model.params).items():
        meant = hf_tensor(*one)
        order = np.arange(len(meant))
        part = one[0].removesuffix('_bias')
        if config.family == 'llama' and part in ('q', 'k'):
            order = llamas_order(len(meant), config.heads if part == 'q' else config.kv_heads)
        own = kind if meant.ndim == 2 else KIND.F32
        data = bytes_of_kind(meant[order], own)
        meant[order] = gguf.dequantize(data, own)
        found[names.get_name(hf_name, ('.weight', '.bias'))] = data, meant, own
    return found


def bytes_of_kind(array: np.ndarray, kind: KIND) -> np.ndarray:
    """An array quantised, or random blocks of a kind to which the package cannot quantise."""
    try:
        return gguf.quantize(array, kind)
    except NotImplementedError:
        shape = gguf.quant_shape_to_byte_shape(array.shape, kind)
        return np.random.default_rng(array.size).integers(0, 60, shape, np.uint8)


def metadata(config: LlamaConfig) -> dict[str, Any]:
    """What a file says of a model, by key; None leaves a key out."""
    family, rule = config.family, config.rope_scaling
    sizes = {
        'context_length': config.max_positions,
        'embedding_length': config.dim,
        'block_count': config.layers,
        'feed_forward_length': config.mlp_dim,
        'attention.head_count': config.heads,
        'attention.head_count_kv': config.kv_heads,
        'attention.key_length': config.head_dim,
        'rope.freq_base': config.rope_theta,
        'attention.layer_norm_rms_epsilon': config.norm_eps,
        'rope.scaling.type': 'linear' if rule and rule.kind == 'linear' else None,
        'rope.scaling.factor': rule.factor if rule and rule.kind == 'linear' else None,
    }
    ids = {'bos': config.bos_id, 'padding': config.pad_id}
    ids |= dict(zip(('eos', 'eot', 'eom'), config.eos_ids, strict=False))
    return {f'{family}.{name}': value for name, value in sizes.items()} | {
        f'tokenizer.ggml.{name}_token_id': value for name, value in ids.items()
    }


def write_gguf(
    path: Path,
    model: Model | None = None,
    kind: KIND = KIND.F32,
    tensors: dict[str, Any] | None = None,
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **changes: Any,
) -> Path:
    """Write a model; `tensors` and `changes` replace, add, or with None leave out what it holds.

    In the names of `changes` `__` stands for a dot.
    """
    model = model or model_of(GQA)
    held = {name: (data, own) for name, (data, _, own) in stored_tensors(model, kind).items()}
    held |= {name: t if isinstance(t, tuple) else (t, None) for name, t in (tensors or {}).items()}
    facts = metadata(model.config) | {k.replace('__', '.'): v for k, v in changes.items()}
    family = facts.pop('general.architecture', model.config.family)
    writer = gguf.GGUFWriter(path, family, endianess=endian)
    for key, value in facts.items():
        if value is not None:
            add(writer, key, value)
    for name, (data, own) in held.items():
        if data is not None:
            writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: 'bool', int: 'uint32', float: 'float32', str: 'string', list: 'array'}
    getattr(writer, f'add_{kinds[type(value)]}')(key, value)


TEXT = [
    'the city of the cities 1234 1234 12 HTML HTML don\'t it\'s "quoted" ... \n\n  deep  deep'
] * 9
MARKS = ('<|begin|>', '<|end|>', '<|im_start|>', '<|im_end|>')
OWN = '<tool>'
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}N| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def cuts(rule: str) -> tuple[Any, list[Any]]:
    """The normalizer and the pre-tokenizers of a family, as its tokenizer.json has them."""
    pieces = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule == 'llama-bpe':
        return None, [pre.Split(Regex(WORDS.replace('N}N', 'N}{1,3}')), 'isolated'), pieces]
    if rule == 'qwen2':
        return normalizers.NFC(), [
            pre.Split(Regex(WORDS.replace('N}N', 'N}')), 'isolated'),
            pieces,
        ]
    digits = [pre.Digits(individual_digits=True)] if rule == 'smollm' else []
    return None, [*digits, pre.ByteLevel(add_prefix_space=False)]


def reference(rule: str) -> Tokenizer:
    """A tokenizer of a family, whose pairs were merged across what the family cuts apart."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    learned = json.loads(inner.to_str())['model']
    vocabulary = {name: i for i, name in enumerate([*learned['vocab'], 'zqx'])}
    merges = [tuple(pair) for pair in learned['merges']]
    made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule == 'llama-bpe'))
    normalizer, parts = cuts(rule)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer, made.decoder = pre.Sequence(parts), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    made.add_tokens([AddedToken(OWN, normalized=False)])
    return made


def tokenizer_facts(rule: str, unused: int = 3, **changes: Any) -> dict[str, Any]:
    """The metadata that describe `reference(rule)`; a table has more rows than there are tokens."""
    inner = reference(rule if rule != 'default' else 'gpt-2')
    names = sorted(inner.get_vocab(), key=inner.token_to_id)
    kinds = [3 if name in MARKS else 4 if name == OWN else 1 for name in names]
    pads = [f'[PAD{len(names) + i}]' for i in range(unused)]
    merges = json.loads(inner.to_str())['model']['merges']
    facts = {
        'model': 'gpt2',
        'pre': rule,
        'tokens': names + pads,
        'token_type': kinds + [5] * unused,
        'merges': [' '.join(pair) for pair in merges],
        **{
            f'{n}_token_id': inner.token_to_id(m)
            for n, m in zip(('bos', 'eos'), MARKS, strict=False)
        },
        'padding_token_id': inner.token_to_id(MARKS[3]),
        **changes,
    }
    named = {f'tokenizer.ggml.{name}': value for name, value in facts.items()}
    return named | {'tokenizer.chat_template': CHATML}
