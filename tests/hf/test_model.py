"""How a model decodes: with which parameters, on which backend."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax.core import FrozenDict

import cllm_jax as cllm
from cllm_jax.model.precision import linear
from cllm_jax.runtime.backend import AMX, CPU, hardware

LEFT = dataclasses.replace(CPU, weights_left=True)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'mixed'])
def test_bfloat16_matrices_are_turned_once_where_it_pays(dtype):
    model = cllm.load('embedded', dtype)
    assert model.decoding_on(dataclasses.replace(LEFT, weights_left=False))[1] is model.params
    module, params = model.decoding_on(LEFT)
    assert module.outputs_first == (dtype != 'float32')
    if dtype == 'float32':
        assert params is model.params
        return
    assert model.decoding_on(LEFT)[1] is params
    assert params['embed'] is model.params['embed']


def test_matrices_are_turned_outside_of_what_is_traced():
    """And rounded to what is multiplied, whatever their dtype, whatever holds them."""
    model, wide = cllm.load('embedded', 'mixed'), cllm.load('embedded', 'float32')
    layers = {
        name: layer | {'q': wide.params[name]['q'], 'up': wide.params[name]['up']}
        for name, layer in model.params.items()
        if name.startswith('layers_')
    }
    other = dataclasses.replace(model, params=FrozenDict({**model.params, **layers}))
    jax.jit(lambda x: other.decoding_on(LEFT) and x)(1)
    found, expected = other.decoding_on(LEFT)[1], model.decoding_on(LEFT)[1]
    for a, b in zip(jax.tree.leaves(dict(found)), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and (a == b).all()


@pytest.mark.parametrize('rows', [1, 2, 16])
def test_a_product_from_the_left_is_the_product(rows):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in ((0, (1, rows, 64)), (1, (32, 64))))
    for dtype, near in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        a, b = x.astype(dtype), w.astype(dtype)
        y, left = linear(a, b, None, 'OI', CPU), linear(a, b, None, 'OI', LEFT, on_the_left=True)
        assert y.shape == left.shape == (1, rows, 32)
        assert y.dtype == left.dtype == dtype
        assert float(jnp.abs(y.astype(jnp.float32) - left.astype(jnp.float32)).max()) < near


@pytest.mark.skipif(hardware()[0] != AMX, reason='this CPU multiplies bfloat16 by other means')
@pytest.mark.parametrize('rows', [1, 2, 16, 64])
def test_no_matrix_is_converted_in_the_loop(rows):
    shape = (192, 320)
    w, x = jnp.zeros(shape, jnp.bfloat16), jnp.zeros((rows, 320), jnp.bfloat16)

    @jax.jit
    def loop(w, x, count):
        def step(_, x):
            y = linear(x, w, None, 'OI', LEFT, on_the_left=True)
            return x.at[:, :192].set(y)

        return jax.lax.fori_loop(0, count, step, x)

    text = loop.lower(w, x, 5).compile().as_text()
    assert 'bf16[192,320]' in text
    assert 'f32[192,320]' not in text
