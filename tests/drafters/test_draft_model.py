"""Speculative decoding with a draft model: exact whatever it writes, fast if it writes the same."""

import dataclasses

import jax
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.cli.console import Console
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.training.config import NewModel, TrainConfig, with_names
from cllm_jax.training.data import prepare
from tests.tiny import (
    byte_tokenizer,
    compilations,
    ragged_prompts,
    random_model,
    text_config,
    tiny_config,
)

PROMPTS = ragged_prompts(0, (1, 2, 9, 5))


def answers(model, drafter, sampling, weights=(), batch=4, **changes):
    return decode_all(model, Request(drafter, 24, sampling, batch=batch), PROMPTS, weights)


@pytest.mark.parametrize(
    ('block', 'sampling'),
    [(1, Sampling()), (5, Sampling()), (2, Sampling(0.7, top_k=10, top_p=0.9)), (5, Sampling(1.0))],
    ids=lambda value: f'T{value.temperature}' if isinstance(value, Sampling) else str(value),
)
def test_the_answer_is_that_of_the_target(block, sampling):
    """For a draft model of another size, and for the target itself, of which all is accepted."""
    target = random_model(config=tiny_config(layers=1, eos_ids=(3, 7)))
    other = random_model(seed=5, config=tiny_config(layers=1, mlp_dim=8))
    plain = answers(target, AutoRegressive(), sampling)
    for model in (other, target):
        drafter = DraftModel(model.module, block, sampling)
        found = answers(target, drafter, sampling, model.params)
        assert found.tokens == plain.tokens
        if model is target:
            full = [-(-len(tokens) // block) for tokens in plain.tokens]
            assert found.forwards == full


def test_a_wrong_draft_costs_a_forward_per_token():
    target = random_model(config=tiny_config(layers=1))
    plain = answers(target, AutoRegressive(), Sampling())
    wrong = jax.tree.map(np.array, target.params)
    wrong['head'] = -wrong['head']  # the least likely token
    found = answers(target, DraftModel(target.module, 4), Sampling(), wrong)
    assert found.tokens == plain.tokens and found.forwards == plain.forwards


def test_the_draft_model_reads_the_prompt_and_no_room_for_the_answer():
    model = random_model(config=tiny_config(layers=1))
    drafter = DraftModel(model.module, 4)

    def work(slots):
        tokens_BS, length_B = np.ones((2, slots), np.int32), np.ones(2, np.int32)
        sequences = Sequences(tokens_BS, length_B, length_B, row_keys(0, range(2)), prompt_width=16)
        compiled = jax.jit(drafter.init).lower(model.params, sequences).compile()
        return compiled.cost_analysis()['flops']

    assert work(slots=1024) < 1.5 * work(slots=64)


def test_batches_of_one_shape_share_a_compilation():
    shallow = tiny_config(layers=1)
    target, *others = (random_model(seed, shallow) for seed in (0, 5, 6))
    drafter = DraftModel(target.module, 4)
    answers(target, drafter, Sampling(), others[0].params)
    before = compilations()
    answers(target, drafter, Sampling(), others[1].params)
    assert compilations() == before


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


def test_a_new_draft_model_takes_the_tokenizer_of_its_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run takes the place of the embedded target
    small = NewModel(dim=32, layers=1, heads=2, kv_heads=2, mlp_dim=32)
    settings = TrainConfig(objective='ar', model='new', new=small, data='sql', examples=8)
    settings = with_names(settings, 'draft')
    model, samples = prepare(settings, None, Console(), tmp_path)
    target = cllm.load('embedded-target', 'float32')
    assert samples[0].answer[-1] == target.config.eos_ids[0]
    drafted = cllm.draft_model(target, model)
    prompts = ['Question: how many cats are there?\nAnswer:']
    fast = cllm.decode(target, prompts, drafted, max_tokens=8)
    assert fast.tokens == cllm.decode(target, prompts, cllm.AutoRegressive(), max_tokens=8).tokens
    other = dataclasses.replace(settings, new=dataclasses.replace(small, vocab_size=999))
    with pytest.raises(cllm.ConfigError, match='embedded-target has 1536 tokens'):
        prepare(other, None, Console(), tmp_path)
