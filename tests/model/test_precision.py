"""float32 means float32: every float32 product of every path asks for the highest precision, and
none has 64 bits, also where JAX_ENABLE_X64 makes that the default.

Chips multiply float32 in less than that unless asked (`model/precision.py`); a CPU does not, so
results tell nothing here and the programs are read instead. Nothing is compiled.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.decoding.loop import Buffers, Decoder, Prompts, advance, prefill
from cllm_jax.decoding.request import row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters import medusa
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.medusa import Medusa
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.drafters.redrafter import ReDrafter
from cllm_jax.drafters.registry import DRAFTERS
from cllm_jax.drafters.space import Space
from cllm_jax.drafters.trained import AnswerBatch, tables_of
from cllm_jax.hf.load import mixed
from cllm_jax.model.attention import attend
from cllm_jax.model.llama import Llama, forward
from cllm_jax.model.packed_attention import PackedMask, attend_packed
from cllm_jax.model.precision import linear, product
from cllm_jax.runtime.backend import CPU, GPU
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories.blocks import BlockSizes, follow
from tests.tiny import shapes, tiny_config

CONFIG = tiny_config(layers=1)
ROWS, WIDTH, SLOTS, STEPS = 2, 8, 64, 16
KEY = jax.random.key(0)


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr, and of every jaxpr inside (loops, branches, calls, custom gradients)."""
    for equation in jaxpr.eqns:
        yield equation
        for inside in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inside):
                yield from equations(getattr(inside, 'jaxpr', inside))


def is_jaxpr(x: Any) -> bool:
    return hasattr(x, 'eqns')


def float32_products(function: Callable, *args: Any) -> list[bool]:
    """Whether each product of two float32 operands asks for the highest precision."""
    with jax.default_matmul_precision(None):
        traced = jax.make_jaxpr(function)(*args)
    found = []
    for equation in equations(traced.jaxpr):
        dtypes = {operand.aval.dtype for operand in equation.invars[:2]}
        if equation.primitive.name == 'dot_general' and dtypes == {np.dtype('float32')}:
            highest = (jax.lax.Precision.HIGHEST,) * 2
            found.append(equation.params['precision'] == highest)
    return found


def is_float32(function: Callable, *args: Any) -> bool:
    """Whether it has float32 products, and all of them ask for the highest precision."""
    found = float32_products(function, *args)
    return bool(found) and all(found)


def test_a_product_that_asks_for_nothing_is_found_wherever_it_is():
    x = jnp.ones((3, 3))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    spec = jax.sharding.PartitionSpec('data')

    def bare(x):
        return jnp.einsum('ij,jk->ik', x, x)

    places = {
        'at the top': bare,
        'in a call': jax.jit(bare),
        'in a loop': lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, bare, x),
        'in a scan': lambda x: jax.lax.scan(lambda x, _: (bare(x), None), x, None, 3),
        'in a branch': lambda x: jax.lax.cond(x[0, 0] > 0, bare, lambda x: x, x),
        'made again': jax.grad(lambda x: jax.checkpoint(bare)(x).sum()),
        'on each device': jax.shard_map(bare, mesh=mesh, in_specs=spec, out_specs=spec),
    }
    for where, function in places.items():
        found = float32_products(function, x)
        assert found and not any(found), where

    def total(a, b):
        return product('ij,jk->ik', a, b).sum()

    assert is_float32(total, x, x) and is_float32(jax.grad(total, (0, 1)), x, x)


@functools.cache
def model_of(dtype: str) -> tuple[Llama, Any]:
    """A module and the shapes of its parameters."""
    if dtype == 'mixed':
        return Llama(CONFIG, jnp.float32, jnp.bfloat16), jax.eval_shape(mixed, shapes(CONFIG))
    as_dtype = functools.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))
    return Llama(CONFIG, jnp.dtype(dtype)), jax.eval_shape(as_dtype, shapes(CONFIG))


def with_weights(drafter, params):
    """A trained drafter with the shapes of its weights."""
    tables = tables_of(params)
    own = jax.eval_shape(drafter.new_weights, KEY, tables)
    return drafter.with_weights(own, params)


def drafters(dtype: str) -> dict:
    """One of every kind, and every loss."""
    module, params = model_of(dtype)
    trained = {
        'medusa': Medusa(2, ((0,), (1,), (0, 0))),
        'medusa, the output table of the target': Medusa(2, ((0,), (0, 0)), own_tables=False),
        'redrafter': ReDrafter(2, 3, 5, 1),
        'redrafter, the output table of the target': ReDrafter(2, 3, 5, 1, own_table=False),
        'eagle': Eagle(CONFIG, CPU, 2, 2, 5),
        'space': Space(7, 2),
    }
    return {
        'ar': AutoRegressive(),
        'jacobi': Jacobi(4),
        'jacobi with chains': Jacobi(4, recycle=1, lookup=True),
        'jacobi tree': JacobiTree(4, 2),
        'lookup': PromptLookup(4),
        'lookahead': Lookahead(3, 3, 2, 4),
        'model': DraftModel(module, params, 3),
    } | {name: with_weights(drafter, params) for name, drafter in trained.items()}


NAMES = tuple(drafters('float32'))
HEADS = ('medusa', 'redrafter', 'eagle')
"""Drafters whose weights have a loss of their own; that of SPACE is the model's."""


def decoding(dtype: str, name: str, sampling: Sampling) -> list[tuple]:
    """A prefill and the loop, each with the arguments that it is called with."""
    module, params = model_of(dtype)
    ids_E = jnp.asarray([-1], jnp.int32)
    decoder = Decoder(module, params, drafters(dtype)[name], ids_E, sampling)
    tokens_BP, one_B = jnp.zeros((ROWS, WIDTH), jnp.int32), jnp.ones(ROWS, jnp.int32)
    prompts = Prompts(tokens_BP, one_B, one_B, row_keys(0, range(ROWS)))
    begin = functools.partial(prefill, buffers=Buffers(SLOTS, STEPS))
    state = jax.eval_shape(begin, decoder, prompts)
    bound = jnp.int32(STEPS)
    return [(begin, decoder, prompts), (advance, decoder, bound, bound, state)]


def decoding_products(dtype: str, name: str, temperature: float) -> list[bool]:
    """The float32 products of a prefill and of the loop."""
    calls = decoding(dtype, name, Sampling(temperature))
    return [product for call in calls for product in float32_products(*call)]


def test_every_drafter_is_looked_at():
    assert {type(drafter) for drafter in drafters('float32').values()} >= set(DRAFTERS.values())


@pytest.mark.parametrize(
    ('dtype', 'name'),
    [('float32', name) for name in NAMES]
    # What these have of their own is float32 next to any model.
    + [(dtype, name) for dtype in ('bfloat16', 'mixed') for name in HEADS],
)
def test_decoding_asks_for_it(dtype, name):
    found = decoding_products(dtype, name, 0.7)
    assert found and all(found)


def wide_numbers(function: Callable, *args: Any) -> set[str]:
    """The operations of a program that make arrays of float64; 64-bit indices do no harm."""
    with jax.enable_x64(True):
        traced = jax.make_jaxpr(function)(*args)
    made = (var.aval for equation in equations(traced.jaxpr) for var in equation.outvars)
    return {str(aval) for aval in made if aval.dtype == np.float64 and aval.shape}


@pytest.mark.parametrize('name', NAMES)
def test_decoding_has_no_numbers_of_64_bits(name):
    for sampling in (Sampling(), Sampling(0.7, 5, 0.9)):
        for call in decoding('float32', name, sampling):
            assert not wide_numbers(*call)


def test_numbers_of_64_bits_are_found_wherever_they_are():
    x = jnp.ones(3)
    assert wide_numbers(lambda x: (x, jnp.zeros(3)), x)
    assert wide_numbers(lambda x: jax.lax.map(lambda _: jnp.ones(3), x), x)
    assert not wide_numbers(lambda x: 2.0 * x + 1, x)


def test_a_drafter_that_does_not_ask_is_found(monkeypatch):
    monkeypatch.setattr(medusa, 'product', lambda spec, *args: jnp.einsum(spec, *args))
    assert not all(decoding_products('float32', 'medusa', 0.0))


@pytest.mark.parametrize('name', [n for n in NAMES if n.startswith(HEADS)])
def test_losses_of_drafters_ask_for_it(name):
    drafter, shape = drafters('float32')[name], (ROWS, WIDTH)
    zeros, ones = jnp.zeros(shape, jnp.int32), jnp.ones(shape)
    mask_BTT = jnp.ones((*shape, WIDTH), bool)
    hidden_BTD = jnp.zeros((*shape, CONFIG.dim))
    answers = AnswerBatch(
        hidden_BTD, zeros, zeros, mask_BTT, zeros, zeros, ones, jnp.ones(WIDTH + 1)
    )

    def loss(drafter, answers):
        return drafter.loss(answers)[0]

    assert is_float32(jax.grad(loss), drafter, answers)


def packed_mask(length: int, states: int, block: int) -> PackedMask:
    return PackedMask(
        jnp.ones((ROWS, length, length), bool),
        jnp.ones((ROWS, states * block, length), bool),
        jnp.ones((ROWS, states, block, block), bool),
    )


@pytest.mark.parametrize('backend', [CPU, GPU], ids=['cpu', 'gpu'])
@pytest.mark.parametrize('compute', [None, jnp.bfloat16], ids=['float32', 'mixed'])
def test_gradients_of_attention_ask_for_it(compute, backend):
    length, states, block = 4, 2, 3
    tokens, width = length + states * block, CONFIG.head_dim
    q_BTNH = jnp.ones((ROWS, tokens, CONFIG.heads, width))
    kv_KBTH = jnp.ones((CONFIG.kv_heads, ROWS, tokens, width))
    mask_BTT = jnp.ones((ROWS, tokens, tokens), bool)
    for look, mask in ((attend, mask_BTT), (attend_packed, packed_mask(length, states, block))):

        def total(q_BTNH, k_KBTH, v_KBTH, look=look, mask=mask):
            return look(q_BTNH, k_KBTH, v_KBTH, mask, compute, backend).sum()

        found = float32_products(jax.grad(total, (0, 1, 2)), q_BTNH, kv_KBTH, kv_KBTH)
        assert all(found) and bool(found) == (compute is None)


@pytest.mark.parametrize('axes', ['IO', 'OI'])
def test_gradients_of_linear_ask_for_it(axes):
    def total(x, weight):
        return linear(x, weight, None, axes).sum()

    assert is_float32(jax.grad(total, (0, 1)), jnp.ones((2, 3)), jnp.ones((3, 3)))


@pytest.mark.parametrize('remat', [False, True])
def test_a_training_step_of_the_model_asks_for_it(remat):
    """The packed forward, the scores of every token, and the gradient of both."""
    length, states, block = 4, 2, 3
    module = Llama(tiny_config(), remat=remat)
    tokens_BT = jnp.zeros((ROWS, length + states * block), jnp.int32)
    mask = packed_mask(length, states, block)

    def loss(params):
        hidden_BTD, _ = module.apply({'params': params}, tokens_BT, tokens_BT, mask)
        logits_BTV = module.apply({'params': params}, hidden_BTD, method='logits')
        return jax.nn.logsumexp(logits_BTV, axis=-1).sum()

    params = shapes(tiny_config())
    assert is_float32(jax.grad(loss), params)
    assert is_float32(functools.partial(forward, module), params, tokens_BT)


def test_blocks_that_are_followed_ask_for_it():
    module, params = model_of('float32')
    tokens_BP, one_B = jnp.zeros((ROWS, WIDTH), jnp.int32), jnp.ones(ROWS, jnp.int32)
    prompts = Prompts(tokens_BP, one_B, one_B, row_keys(0, range(ROWS)))
    ids_E = jnp.asarray([-1], jnp.int32)
    decoder = Decoder(module, params, Jacobi(4), ids_E)
    begin = functools.partial(prefill, buffers=Buffers(SLOTS, STEPS))
    state = jax.eval_shape(begin, decoder, prompts)
    sizes = BlockSizes(block=4, blocks=2, slots=32)

    def followed(params, sequences, cache):
        return follow(module, params, sequences, cache, jnp.int32(0), sizes)

    assert is_float32(followed, params, state.sequences, state.cache)
