"""What is written of a trained drafter is what is read, and nothing else is taken for it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.drafters.checkpoint import copy_drafter, read_drafter, write_drafter
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.tokenizer import tokenizer_fingerprint, vocabulary_fingerprint
from tests.drafters.examples import DRAFTERS, MODEL, with_random_weights
from tests.kinds import tokenizer_of
from tests.tiny import random_model, tiny_config


def assert_same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('name', ['medusa', 'redrafter', 'eagle', 'space'])
def test_a_saved_drafter_is_the_same_drafter(name, tmp_path):
    drafter = with_random_weights(DRAFTERS[name])
    write_drafter(tmp_path / 'drafter', drafter, MODEL)
    assert_same(read_drafter(tmp_path, MODEL, kind=name), drafter)
    copy_drafter(tmp_path, tmp_path / 'small', jnp.bfloat16)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), drafter.own)
    assert_same(
        read_drafter(tmp_path / 'small', MODEL), drafter.with_weights(rounded, MODEL.params)
    )
    with pytest.raises(ConfigError, match='holds a'):
        read_drafter(tmp_path, MODEL, kind='lookup')
    other = random_model(config=tiny_config(vocab=30))
    with pytest.raises(ConfigError, match='vocab_size 29, random has 30'):
        read_drafter(tmp_path, other)


@pytest.mark.parametrize(
    ('change', 'error', 'words'),
    [
        ('{}', DataError, 'not the description of a drafter'),
        ({'kind': 'medusas'}, ConfigError, "'medusas'.*medusa"),
        ({'settings': {'layers': 1}}, DataError, 'not the tensors'),
        ({'settings': {'beam': 2}}, ConfigError, "no setting 'beam'; did you mean 'beams'"),
        ({'tokenizer': None, 'dim': 4}, ConfigError, 'made for a model with dim 4'),
    ],
)
def test_a_drafter_that_is_damaged_or_anothers_is_refused(tmp_path, change, error, words):
    write_drafter(tmp_path / 'drafter', with_random_weights(DRAFTERS['redrafter']), MODEL)
    path = tmp_path / 'drafter' / 'drafter.json'
    about = json.loads(path.read_text())
    path.write_text(change if isinstance(change, str) else json.dumps(about | change))
    (tmp_path / 'drafter' / 'cllm_jax.sha256').unlink()
    with pytest.raises(error, match=words):
        read_drafter(tmp_path, MODEL)


def test_a_drafter_is_for_the_tokenizer_that_it_was_made_with(tmp_path):
    model = dataclasses.replace(MODEL, tokenizer=tokenizer_of('legacy'))
    write_drafter(tmp_path, with_random_weights(DRAFTERS['redrafter']), model)
    (tmp_path / 'cllm_jax.sha256').unlink()
    path = tmp_path / 'drafter.json'
    about = json.loads(path.read_text())
    assert about['tokenizer'] == tokenizer_fingerprint(model.tokenizer)
    other = dataclasses.replace(MODEL, tokenizer=tokenizer_of('first'))
    with pytest.raises(ConfigError, match='another tokenizer than that of random'):
        read_drafter(tmp_path, other)
    older = vocabulary_fingerprint(model.tokenizer)  # the vocabulary of both
    path.write_text(json.dumps(about | {'tokenizer': older}))
    for one in (model, other, MODEL):
        read_drafter(tmp_path, one)
    path.write_text(json.dumps(about | {'tokenizer': older[::-1]}))
    with pytest.raises(ConfigError, match='another tokenizer'):
        read_drafter(tmp_path, model)


def test_what_is_not_a_drafter_is_not_written_over(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(DataError, match=r'holds notes\.txt, which is not part of a drafter'):
        write_drafter(tmp_path, DRAFTERS['space'], MODEL)
    assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']
