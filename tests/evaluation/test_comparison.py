"""Which methods are compared, and what each adds to its target."""

from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.evaluation.comparison import BenchConfig, extra_parameters, methods_of
from tests.drafters.examples import DRAFTERS, MODEL, with_random_weights
from tests.tiny import random_model, tiny_config


def test_every_method_is_compared_with_the_ar_of_its_model(tmp_path):
    target, cllm = random_model(), random_model(1)
    settings = BenchConfig(root=str(tmp_path), blocks=(4, 8))
    methods = methods_of(settings, target, cllm)
    assert {'target, AR', 'CLLM, AR'} <= methods.keys()
    for name, method in methods.items():
        assert method.model is {'target': target, 'CLLM': cllm}[name.split(', ')[0]]
    assert methods['CLLM, Jacobi 4'].request.drafter == Jacobi(4)
    assert methods['CLLM, Jacobi 8, recycling'].request.drafter == Jacobi(8, recycle=2)


def test_the_parameters_of_a_drafter_are_those_that_its_target_has_not():
    heads, width, vocab = 3, MODEL.config.dim, MODEL.config.vocab_size
    for name, tables in (('medusa', heads * vocab * width), ('medusa, shared table', 0)):
        drafter = with_random_weights(DRAFTERS[name])
        assert extra_parameters(drafter) == heads * (width * width + width) + tables
    small = random_model(config=tiny_config(layers=1))
    assert extra_parameters(DraftModel(small.module, small.params)) == small.config.parameters
    assert extra_parameters(Jacobi(8)) == extra_parameters(DRAFTERS['space']) == 0
