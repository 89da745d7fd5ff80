"""Which two models are compared when none is named."""

import pytest
from cllm_jax.evaluation.pair import model_pair

from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import EMBEDDED_ROOT


def test_models_that_are_not_named_are_the_exports_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_pair(EMBEDDED_ROOT, '', '') == ('embedded', 'embedded-target')
    assert model_pair(EMBEDDED_ROOT, 'mine', '') == ('mine', 'embedded-target')
    with pytest.raises(ConfigError, match=r'other/export/cllm: no such directory; train'):
        model_pair('other', '', 'b')
    for name in ('cllm', 'target'):
        (tmp_path / EMBEDDED_ROOT / 'export' / name).mkdir(parents=True)
    exported = (f'{EMBEDDED_ROOT}/export/cllm', f'{EMBEDDED_ROOT}/export/target')
    assert model_pair(EMBEDDED_ROOT, '', '') == exported
    assert model_pair(EMBEDDED_ROOT, 'a', 'b') == ('a', 'b')
