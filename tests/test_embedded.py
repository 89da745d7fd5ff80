"""The models that ship with the package are there, small, and decode exactly."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.data.sources import open_source
from cllm_jax.hf.load import SHIPPED
from cllm_jax.hf.tokenizer import tokenizer_fingerprint


@pytest.fixture(scope='module')
def model():
    return cllm.load('embedded')


def test_jacobi_is_autoregressive_decoding_of_the_shipped_model(model):
    source = open_source('sql+arithmetic', split='heldout', seed=3, limit=4)
    prompts = [source[i].prompt for i in range(4)]
    slow = cllm.decode(model, prompts, cllm.AutoRegressive(), max_tokens=40)
    fast = cllm.decode(model, prompts, cllm.Jacobi(block=16), max_tokens=40)
    assert fast.tokens == slow.tokens and fast.texts == slow.texts
    assert sum(map(len, fast.tokens)) > 3 * sum(fast.forwards), 'it is a CLLM'
    sampled = [
        cllm.decode(model, prompts, drafter, max_tokens=40, temperature=5.0, seed=1).tokens
        for drafter in (cllm.AutoRegressive(), cllm.Jacobi(block=16))
    ]
    assert sampled[0] == sampled[1] != slow.tokens


def test_target_and_cllm_share_a_tokenizer_and_fit_the_package(model):
    target = cllm.load('embedded-target')
    assert tokenizer_fingerprint(target.tokenizer) == tokenizer_fingerprint(model.tokenizer)
    assert target.config == model.config
    size = sum(p.stat().st_size for p in SHIPPED.rglob('*.safetensors'))
    assert size <= 16_000_000


@pytest.mark.parametrize(('name', 'least'), [('medusa', 2.0), ('redrafter', 2.3), ('eagle', 3.0)])
def test_shipped_drafters_are_exact_and_draft_well(name, least):
    target = cllm.load('embedded-target')
    source = open_source('sql+arithmetic', split='heldout', seed=3, limit=4)
    prompts = [source[i].prompt for i in range(4)]
    slow = cllm.decode(target, prompts, cllm.AutoRegressive(), max_tokens=40)
    fast = cllm.decode(target, prompts, cllm.load_drafter(target, SHIPPED / name), max_tokens=40)
    assert fast.tokens == slow.tokens
    assert sum(map(len, fast.tokens)) > least * sum(fast.forwards)


def test_forward_gives_logits(model):
    logits = cllm.forward(model, jnp.asarray([[1, 2, 3]], jnp.int32))
    assert logits.shape == (1, 3, model.config.vocab_size) and logits.dtype == jnp.float32


def test_streamed_text_is_the_decoded_text(model):
    prompt = 'Question: Kate has 4 pears. She buys 3 more. How many pears has she?\nAnswer:'
    pieces = list(cllm.stream(model, prompt, cllm.Jacobi(block=3), max_tokens=24))
    assert ''.join(pieces) == cllm.decode(model, [prompt], max_tokens=24).texts[0]
    assert len(pieces) > 1


def test_numbers_and_ids_may_be_numpys_or_jaxs(model):
    ids = model.tokenizer('Question: 1')['input_ids']
    wanted = cllm.decode(model, [ids], cllm.Jacobi(4), max_tokens=4, batch=2).tokens
    for kind in (np.asarray, jnp.asarray):
        drafter = cllm.Jacobi(np.int64(4))
        whole = {'max_tokens': np.int64(4), 'batch': np.int32(2), 'seed': np.int64(0)}
        options = {'top_k': np.int64(0), 'temperature': np.float32(0), **whole}
        assert cllm.decode(model, [kind(ids)], drafter, **options).tokens == wanted
    for bad, words in (
        ([None], 'prompts[0]: prompt None'),
        (['a', [0.5]], 'prompts[1]: token ids [0.5]'),
        (['a', ''], 'prompts[1]: empty prompt'),
    ):
        with pytest.raises(cllm.ConfigError, match=re.escape(words)):
            cllm.decode(model, bad)
    with pytest.raises(cllm.ConfigError, match='must be a number'):
        cllm.decode(model, ['a'], temperature='0.8')


def test_a_model_is_shown_in_a_line(model):
    assert len(repr(model)) < 500 and 'embedded' in repr(model)


def test_a_shipped_drafter_opens_by_its_name():
    target = cllm.load('embedded-target')
    named, found = (cllm.load_drafter(target, d) for d in ('medusa', SHIPPED / 'medusa'))
    assert named.choices == found.choices
