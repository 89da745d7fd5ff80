"""The parts of an iteration are told by the names that XLA gives to its instructions."""

import pytest

from cllm_jax.evaluation.profile import milliseconds_by_part
from tests.tiny import random_model, tiny_config


def test_the_parts_of_an_iteration_add_up_to_the_whole():
    spent = milliseconds_by_part(random_model(config=tiny_config(layers=1)), nodes=4, prompt=5)
    assert min(spent['layer matrices'], spent['attention'], spent['vocabulary']) > 0
    assert spent.pop('whole') == pytest.approx(sum(spent.values()))
