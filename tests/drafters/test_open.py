"""Every drafter is opened by the name that commands take."""

import dataclasses

import pytest

from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import write_drafter
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.open import open_drafter, own_drafter
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.errors import ConfigError
from tests.drafters.examples import DRAFTERS, MODEL


@pytest.mark.parametrize(
    ('config', 'drafter'),
    [
        (DrafterConfig(), Jacobi(16)),
        (DrafterConfig(block=8, mode='block', recycle=2, lookup=True), Jacobi(8, 'block', 2, True)),
        (DrafterConfig(branches=3), JacobiTree(16, 3)),
        (DrafterConfig('ar'), AutoRegressive()),
        (DrafterConfig('lookup', block=5), PromptLookup(5)),
        (DrafterConfig('lookahead', block=5), Lookahead(block=5)),
    ],
    ids=lambda value: value.drafter if isinstance(value, DrafterConfig) else '',
)
def test_a_name_and_its_options_open_the_drafter(config, drafter):
    assert open_drafter(config, MODEL) == drafter


def test_references_are_read_from_their_files(tmp_path):
    """And refused where no tokenizer can read them."""
    (tmp_path / 'text').write_text('what answers may quote')
    config = DrafterConfig('lookup', reference=(str(tmp_path / 'text'),))
    with pytest.raises(ConfigError, match='no tokenizer'):
        open_drafter(config, MODEL)


def test_a_trained_drafter_is_opened_from_its_directory(tmp_path):
    write_drafter(tmp_path, DRAFTERS['space'], MODEL)
    assert open_drafter(DrafterConfig(f'space:{tmp_path}'), MODEL) == DRAFTERS['space']
    with pytest.raises(ConfigError, match='holds a space drafter, not medusa'):
        open_drafter(DrafterConfig(f'medusa:{tmp_path}'), MODEL)


@pytest.mark.parametrize(
    ('model', 'found'),
    [
        ('run/joint', 'run/joint/drafter'),  # a run that trained both
        ('export/joint', 'export/joint/drafter'),  # the same, exported
        ('run/target', 'run/medusa'),
        ('run/target/model', 'run/medusa'),
        ('export/target', 'export/medusa'),
    ],
)
def test_heads_without_a_directory_are_those_of_the_model(tmp_path, model, found):
    for name in ('run/joint/model', 'run/joint/drafter', 'run/target/model', 'run/medusa/drafter'):
        (tmp_path / name).mkdir(parents=True)
    for name in ('export/joint', 'export/target'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / 'config.json').touch()
    (tmp_path / 'export/joint/drafter').mkdir()
    named = dataclasses.replace(MODEL, source=str(tmp_path / model))
    assert own_drafter(named, 'medusa') == tmp_path / found
