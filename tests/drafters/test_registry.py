"""The names that commands take, what they refuse, and drafters from outside of the package."""

from typing import Any
from unittest.mock import patch

import jax.numpy as jnp
import pytest
from flax import struct

from cllm_jax.decoding.drafter import setting
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import write_drafter
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import DRAFTERS, TRAINED, DrafterConfig, register
from cllm_jax.drafters.trained import HeadsConfig, TrainedDrafter
from cllm_jax.errors import ConfigError
from tests.drafters.examples import MODEL


@pytest.fixture(autouse=True)
def the_names_of_before():
    """What a test registers is forgotten after it."""
    with patch.dict(DRAFTERS), patch.dict(TRAINED):
        yield


def test_every_drafter_has_a_title_and_every_trained_one_is_called_by_its_kind():
    titles = [known.title for known in DRAFTERS.values()]
    assert all(titles) and len(set(titles)) == len(titles)
    assert all(known.kind == name for name, known in TRAINED.items())
    assert TRAINED.items() < DRAFTERS.items()


@struct.dataclass
class Guess(TrainedDrafter):
    """Always the same tokens."""

    count: int = setting(2)
    own: Any = None
    tables: Any = None
    kind = title = 'guess'

    @property
    def nodes(self):
        return 1 + self.count

    def new_weights(self, key, tables):
        return {'tokens': jnp.zeros(self.count)}

    def draft(self, state, sequences, sampling):
        raise AssertionError('nothing here decodes')


class Plain(AutoRegressive):
    """With a name of its own."""


def test_a_registered_drafter_is_opened_like_those_of_the_package(tmp_path):
    with pytest.raises(ConfigError, match="no drafter 'plain'"):
        open_drafter(DrafterConfig('plain'), MODEL)
    register('plain', Plain)
    assert type(open_drafter(DrafterConfig('plain'), MODEL)) is Plain
    with pytest.raises(ConfigError, match="drafter 'other': its kind is 'guess'"):
        register('other', Guess)
    register('guess', Guess)
    drafter = Guess(3).with_weights({'tokens': jnp.arange(3.0)}, MODEL.params)
    write_drafter(tmp_path, drafter, MODEL)
    found = open_drafter(DrafterConfig(f'guess:{tmp_path}'), MODEL)
    assert type(found) is Guess and found.count == 3 and found.own['tokens'].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ('config', 'rule'),
    [
        (DrafterConfig('ar', lookup=True), 'an option of jacobi'),
        (DrafterConfig('lookahead', recycle=3), 'recycle with .* an option of jacobi'),
        (DrafterConfig('ar', mode='block'), 'mode with .* an option of jacobi'),
        (DrafterConfig('ar', block=-3), 'block -3: must be'),
        (DrafterConfig(lookup=True, branches=2), 'branches 2: .* neither recycling nor lookup'),
        (DrafterConfig('ar', branches=2), 'branches 2: only Jacobi'),
        (DrafterConfig(reference=('a',)), 'only lookup reads references'),
        (DrafterConfig('jacoby'), "'jacoby'.*jacobi"),
        (DrafterConfig('jacobi:DIR'), 'write jacobi$'),
        (DrafterConfig('model'), 'write model:DIR$'),
        (DrafterConfig('medusa:'), 'write medusa:DIR$'),
    ],
    ids=lambda value: value.drafter if isinstance(value, DrafterConfig) else '',
)
def test_options_without_a_place_are_refused(config, rule):
    with pytest.raises(ConfigError, match=rule):
        config.check_drafter()


def test_a_drafter_without_sizes_or_loss_says_so():
    with pytest.raises(ConfigError, match='drafter guess: train does not know its sizes'):
        Guess.of_size(HeadsConfig(), MODEL)
    with pytest.raises(ConfigError, match='drafter guess: has no loss'):
        Guess().loss(None)
