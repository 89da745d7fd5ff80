"""Tiny models and a tokenizer for tests; all weights are made here, nothing is read."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.loop import programs
from cllm_jax.decoding.state import grow, replace_rows
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runtime.backend import CPU, EIGEN
from tests.kinds import tokenizer_of


def tiny_config(vocab: int = 29, width: int = 16, **changes) -> LlamaConfig:
    """Two layers, four query heads on two kv heads, biases on q, k, v; `width` is a head's."""
    sizes = {'dim': 2 * width, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'head_dim': width}
    other = {'mlp_dim': 24, 'qkv_bias': True, 'max_positions': 256, 'family': 'qwen2'}
    return LlamaConfig(vocab, **(sizes | other | changes))


BIASES = {
    'llama': {'family': 'llama', 'o_bias': True, 'mlp_bias': True},
    'qwen3': {'family': 'qwen3', 'o_bias': True, 'qk_norm': True},
}
"""What makes `tiny_config`, which has biases on q, k, v, a model with all biases of a family."""


def shapes(config: LlamaConfig) -> dict:
    """The parameter tree of `Llama(config)` without its values."""
    return jax.eval_shape(functools.partial(init_params, Llama(config)), jax.random.key(0))


def random_model(seed: int = 0, config: LlamaConfig | None = None, tokenizer=None) -> Model:
    """Weights large enough for the argmax to follow the context; logits have a spread near 2."""
    config, rng = config or tiny_config(), np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        spread = 0.0 if 'norm' in name else 0.5 if name in ('embed', 'head') else 0.16
        return jnp.asarray(rng.normal('norm' in name, spread, leaf.shape), jnp.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes(config))
    return Model(config, params, tokenizer, 'random')


def copy_model(period: int, config: LlamaConfig | None = None, tokenizer=None) -> Model:
    """Repeats the last `period` tokens for ever, as a trained model repeats a learnt pattern.

    One head of the first layer looks `period - 1` tokens back: its queries and keys are constant
    vectors whose rotary phases agree at that distance. It copies the token's embedding from the
    lower half of the residual stream to the upper half, which the output projection reads.
    """
    config = config or tiny_config()
    half, width = config.dim // 2, config.head_dim
    assert half == width
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes(config))
    codes = np.random.default_rng(0).normal(size=(config.vocab_size, half)).astype(np.float32)
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    params['embed'][:, :half] = codes
    params['head'][:, half:] = 20 * codes
    params['norm'][:] = 1
    for layer in (params[f'layers_{i}'] for i in range(config.layers)):
        layer['attn_norm'][:], layer['mlp_norm'][:] = 1, 1
    first = params['layers_0']
    turn = (period - 1) * config.rope_theta ** (-np.arange(width // 2) * 2 / width)
    first['q_bias'][0] = 40 * np.concatenate([np.cos(turn), -np.sin(turn)])
    first['k_bias'][0, : width // 2] = 40
    first['v'][:half, 0] = np.eye(half)
    first['o'][0, :, half:] = np.eye(half)
    return Model(config, jax.tree.map(jnp.asarray, params), tokenizer, 'copy')


@functools.cache
def byte_tokenizer():
    """Ids 0 <s>, 1 </s>, 2 <pad>, then one token per byte and the merges 'th' and 'the': 261."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ['<s>', '</s>', '<pad>', *sorted(pre_tokenizers.ByteLevel.alphabet()), 'th', 'the']
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[('t', 'h'), ('th', 'e')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>'
    )


@functools.cache
def larger_tokenizer():
    """`byte_tokenizer` with two tokens more, 261 '<tool>' and 262 '<call>'."""
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.add_tokens(['<tool>', '<call>'])
    return tokenizer


@functools.cache
def fallback_tokenizer():
    """Like LLaMA 2's: characters, spaces as '▁', and a token per byte for all others: 270.

    Its decoder drops the first space of a text, and all bytes of a run that is no UTF-8.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = [
        '<s>',
        '</s>',
        '<pad>',
        *(f'<0x{i:02X}>' for i in range(256)),
        *'▁abcxteh',
        'th',
        'the',
    ]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [('t', 'h'), ('th', 'e')]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(' ', '▁')
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace('▁', ' '),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(' ', 1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>', pad_token='<pad>'
    )


def text_config(**changes) -> LlamaConfig:
    """The sizes that go with `byte_tokenizer`."""
    ids = {'bos_id': 0, 'eos_ids': (1,), 'pad_id': 2}
    return tiny_config(len(byte_tokenizer()), 64, **(ids | changes))


def echo_config(tokenizer) -> LlamaConfig:
    """Answers end at `</s>` or an exclamation mark."""
    bang = tokenizer('!')['input_ids'][0]
    return dataclasses.replace(text_config(), vocab_size=len(tokenizer), eos_ids=(1, bang))


def echo_model(phrase: str, tokenizer=None) -> Model:
    """A model that answers the phrase with the phrase, again and again."""
    tokenizer = tokenizer or byte_tokenizer()
    period = len(tokenizer(phrase)['input_ids'])
    return copy_model(period, echo_config(tokenizer), tokenizer)


def model_directory(directory) -> str:
    """A model of one layer for commands, which compile it quickly."""
    config = text_config(layers=1, max_positions=1024)
    write_model(directory, random_model(config=config, tokenizer=byte_tokenizer()))
    return str(directory)


def ragged_prompts(seed: int, lengths: Sequence[int], vocab: int = 29) -> list[list[int]]:
    """Random prompts of the given lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def compilations() -> int:
    """How often the functions that decode have been compiled, with whichever compiler options."""
    return sum(run._cache_size() for run in compiled())


def compiled() -> set:
    """The functions that decode, as they are compiled with whichever compiler options."""
    backends = CPU, dataclasses.replace(CPU, compiler_options=EIGEN)
    return {run for backend in backends for run in programs(backend)} | {grow, replace_rows}


def chat_model(kind: str = 'Qwen2, ChatML', **changes) -> Model:
    """Random weights for one of the tokenizers of `tests/kinds.py` that have a chat template."""
    tokenizer = tokenizer_of(kind)
    ids = {'bos_id': tokenizer.bos_token_id, 'eos_ids': (tokenizer.eos_token_id,), 'pad_id': None}
    config = tiny_config(
        len(tokenizer), 64, **(ids | {'layers': 1, 'max_positions': 512} | changes)
    )
    return random_model(config=config, tokenizer=tokenizer)
