"""Speculative decoding with a draft model: exact whatever it writes, fast if it writes the same."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.evaluation.comparison import BenchConfig, methods_of
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model
from tests.drafters.examples import GREEDY
from tests.tiny import (
    byte_tokenizer,
    compilations,
    ragged_prompts,
    random_model,
    text_config,
    tiny_config,
)

PROMPTS = ragged_prompts(0, (1, 2, 9, 5))
TARGET = random_model(config=tiny_config(layers=1, eos_ids=(3, 7)))
OTHER = random_model(seed=5, config=tiny_config(layers=1, mlp_dim=8))


def answers(drafter, sampling=GREEDY):
    return decode_all(TARGET, Request(drafter, 24, sampling, batch=4), PROMPTS)


@functools.cache
def plain(sampling=GREEDY):
    return answers(AutoRegressive(), sampling)


@pytest.mark.parametrize(
    ('block', 'sampling'),
    [(1, Sampling()), (5, Sampling()), (2, Sampling(0.7, top_k=10, top_p=0.9))],
    ids=lambda value: f'T{value.temperature}' if isinstance(value, Sampling) else str(value),
)
def test_the_answer_is_that_of_the_target(block, sampling):
    """For a draft model of another size, and for the target itself, of which all is accepted."""
    for small in (OTHER, TARGET):
        found = answers(DraftModel(small.module, small.params, block), sampling)
        assert found.tokens == plain(sampling).tokens
        if small is TARGET:
            assert found.forwards == [-(-len(tokens) // block) for tokens in found.tokens]


def test_a_wrong_draft_costs_a_forward_per_token_and_other_weights_no_compilation():
    answers(DraftModel(TARGET.module, TARGET.params, 5))
    expected, compiled = plain(), compilations()
    wrong = TARGET.params | {'head': -TARGET.params['head']}  # the least likely token
    found = answers(DraftModel(TARGET.module, wrong, 5))
    assert found.tokens == expected.tokens and found.forwards == expected.forwards
    assert compilations() == compiled


def test_the_draft_model_reads_the_prompt_and_no_room_for_the_answer():
    drafter = DraftModel(TARGET.module, TARGET.params, 4)

    def work(slots):
        tokens_BS, length_B = np.ones((2, slots), np.int32), np.ones(2, np.int32)
        sequences = Sequences(tokens_BS, length_B, length_B, row_keys(0, range(2)), prompt_width=16)
        compiled = jax.jit(lambda sequences: drafter.init(sequences)).lower(sequences).compile()
        return compiled.cost_analysis()['flops']

    assert work(slots=1024) < 1.5 * work(slots=64)


def test_a_draft_model_with_another_vocabulary_is_refused():
    target = random_model(config=text_config(layers=1), tokenizer=byte_tokenizer())
    drafter = cllm.draft_model(target, target, block=4)
    found = cllm.decode(target, ['a b'], drafter=drafter, max_tokens=8)
    assert found.tokens == cllm.decode(target, ['a b'], cllm.AutoRegressive(), 8).tokens
    with pytest.raises(cllm.ConfigError, match='29 tokens'):
        cllm.draft_model(target, random_model())
    other = train_tokenizer(['some other text'] * 9, len(byte_tokenizer()))
    same_size = dataclasses.replace(target, tokenizer=other)
    with pytest.raises(cllm.ConfigError, match='another tokenizer'):
        cllm.draft_model(target, same_size)


TOKENS = len(byte_tokenizer())


def padded(model: Model, rows: int, spread: float) -> Model:
    """The model with a table of other rows: the last ones gone, or new ones of that spread."""
    rng, size = np.random.default_rng(rows), model.config.vocab_size

    def resized(table_VD):
        extra = rng.normal(0, spread, (max(rows - size, 0), table_VD.shape[1]))
        return jnp.concatenate([table_VD, jnp.asarray(extra, jnp.float32)])[:rows]

    params = {k: resized(v) if k in ('embed', 'head') else v for k, v in model.params.items()}
    config = dataclasses.replace(model.config, vocab_size=rows)
    return dataclasses.replace(model, config=config, params=params)


LIKE_ANY, LOUD = 0.5, 5.0
"""Rows that are chosen as often as others, and rows that score highest."""
PLAIN = random_model(config=text_config(layers=1), tokenizer=byte_tokenizer())
IDS = ragged_prompts(4, (1, 2, 9, 5), TOKENS)


@pytest.mark.parametrize('temperature', [0.0, 0.8])
@pytest.mark.parametrize(
    ('of_target', 'of_small'),
    [(TOKENS + 3, TOKENS + 11), (TOKENS + 11, TOKENS + 3), (TOKENS + 11, TOKENS - 60)],
)
def test_tables_may_be_padded_differently(of_target, of_small, temperature):
    """The answers are the target's, and what both choose alike is drafted, at any temperature."""
    target, small = padded(PLAIN, of_target, LIKE_ANY), padded(PLAIN, of_small, LOUD)
    prompts = [[min(i, of_target - 1) for i in ids] for ids in (*IDS, [of_target - 1])]
    options = {'max_tokens': 24, 'temperature': temperature, 'seed': 5}
    slow = cllm.decode(target, prompts, cllm.AutoRegressive(), **options)
    drafter = cllm.draft_model(target, small, block=4)
    fast = cllm.decode(target, prompts, drafter, **options, trace=True)
    assert fast.tokens == slow.tokens
    least = min(of_target, of_small, TOKENS)
    drafted = np.concatenate([one.states[:, 1:].ravel() for one in fast.trajectories])
    assert drafted.max() < least
    for prompt, tokens, forwards in zip(prompts, fast.tokens, fast.forwards, strict=True):
        if max(*prompt, *tokens) < least:  # then nothing tells the two apart
            assert forwards == -(-len(tokens) // 4)
    assert sum(fast.forwards) < sum(map(len, fast.tokens))


def test_padding_is_told_by_the_tokenizers_of_both():
    larger = padded(PLAIN, TOKENS + 11, LOUD)
    bare = [dataclasses.replace(model, tokenizer=None) for model in (larger, PLAIN)]
    for target, small in ((larger, bare[1]), (bare[0], PLAIN), bare, bare[::-1]):
        with pytest.raises(cllm.ConfigError, match='put the tokenizer into both'):
            cllm.draft_model(target, small)
    other = train_tokenizer(['some other text'] * 9, TOKENS)
    with pytest.raises(cllm.ConfigError, match='another tokenizer'):
        cllm.draft_model(PLAIN, dataclasses.replace(larger, tokenizer=other))


def test_a_draft_model_padded_differently_opens_by_its_option(tmp_path):
    for name, rows in (('target', TOKENS + 3), ('small', TOKENS + 11)):
        write_model(tmp_path / name, padded(PLAIN, rows, LOUD), dtype='float32')
    target = cllm.load(str(tmp_path / 'target'), 'float32')
    options = DrafterConfig(drafter=f'model:{tmp_path / "small"}', block=4)
    found = open_drafter(options, target, 'float32')
    assert found.shared == len(target.tokenizer) < TOKENS + 3
    settings = BenchConfig(draft_model=str(tmp_path / 'small'), root=str(tmp_path / 'none'))
    drafter = methods_of(settings, target, target)['target, draft model'].request.drafter
    assert drafter.shared == found.shared
