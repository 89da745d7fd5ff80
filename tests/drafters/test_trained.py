"""Trained drafters: exact whatever their weights, and fast when they are right."""

import dataclasses
import itertools
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import chisquare

from cllm_jax.decoding.engine import advance_of, decode_all, start, stop_ids
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.checkpoint import copy_drafter, read_drafter, write_drafter
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.medusa import Medusa, tree_of, usual
from cllm_jax.drafters.redrafter import ReDrafter, pack
from cllm_jax.drafters.registry import own_drafter
from cllm_jax.drafters.space import Space
from cllm_jax.drafters.trained import borrow
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.model.llama import forward
from cllm_jax.training.heads import redrafter_loss
from tests.tiny import compilations, ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1, eos_ids=(3, 20)))
PROMPTS = ragged_prompts(0, (1, 2, 9, 5, 14))
FREE = Sampling(1.0)
DRAFTERS = {
    'medusa': Medusa(3, tree_of(usual(3), 9)),
    'medusa, sampled': Medusa(3, tree_of(usual(3), 9), own_tables=False, sampling=FREE),
    'redrafter': ReDrafter(3, 4, 8),
    'redrafter, sampled': ReDrafter(4, 3, 16, layers=1, own_table=False, sampling=FREE),
    'eagle': Eagle(MODEL.config, 3, 3, 10),
    'eagle, chain': Eagle(MODEL.config, 4, 1, 5),
    'eagle, sampled': Eagle(MODEL.config, 2, 4, 8, sampling=FREE),
    'space': Space(28, 2),
    'space, sampled': Space(28, 3),
}


def weights_of(drafter, model=MODEL, seed=0):
    if isinstance(drafter, Space):
        return ()
    head = model.params.get('head', model.params['embed'])
    own = drafter.new_weights(jax.random.key(seed), model.params['embed'], head)
    noise = np.random.default_rng(seed)
    own = jax.tree.map(lambda x: x + jnp.asarray(noise.normal(0, 0.1, x.shape), x.dtype), own)
    return borrow(model, own)


def check_identity(drafter, weights, sampling, batch) -> None:
    """The tokens are AR's: ragged, with end tokens and limits inside of a path."""
    request = Request(drafter, 20, sampling, seed=1, batch=batch)
    plain = decode_all(MODEL, dataclasses.replace(request, drafter=AutoRegressive()), PROMPTS)
    found = decode_all(MODEL, request, PROMPTS, weights)
    assert found.tokens == plain.tokens
    assert all(map(sum, found.accepted))


@pytest.mark.parametrize('name', ['medusa, sampled', 'redrafter', 'eagle, sampled', 'space'])
def test_the_answer_is_that_of_the_target(name):
    drafter, sampling = DRAFTERS[name], FREE if 'sampled' in name else Sampling()
    check_identity(drafter, weights_of(drafter), sampling, 8)
    compiled = compilations()
    check_identity(drafter, weights_of(drafter, seed=1), sampling, 8)
    assert compilations() == compiled, 'other weights of the same shapes'
    # Nothing moves between host and device inside of the loop.
    request = Request(drafter, 20, sampling)
    keys = row_keys(0, range(len(PROMPTS)))
    state = start(MODEL, request, PROMPTS, keys, weights_of(drafter))
    given = jax.device_put((MODEL.params, weights_of(drafter), stop_ids(MODEL)))
    until, idle = jnp.int32(20), jnp.int32(8)
    with jax.transfer_guard('disallow'):
        params, weights, ends = given
        advance_of(MODEL)(
            MODEL.module, params, drafter, weights, sampling, ends, until, idle, state
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize('batch', [1, 3, 8])
@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.7, 10, 0.9), FREE], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
def test_the_answer_is_that_of_the_target_however_it_is_decoded(name, sampling, batch):
    drafter = DRAFTERS[name]
    if not isinstance(drafter, Space):
        drafter = dataclasses.replace(drafter, sampling=sampling)
    check_identity(drafter, weights_of(drafter), sampling, batch)


def test_typical_acceptance_takes_what_is_likely_enough_and_says_that_it_is_lossy():
    """Each token of an answer is chosen, as without it, or its probability is above the border."""
    drafter = DRAFTERS['medusa, sampled']
    exact = Request(drafter, 20, FREE, seed=1)
    lossy = dataclasses.replace(exact, sampling=dataclasses.replace(FREE, typical=0.09))
    weights = weights_of(drafter)
    found = decode_all(MODEL, lossy, PROMPTS, weights)
    keys, others = row_keys(1, range(len(PROMPTS))), 0
    logits_of = jax.jit(partial(forward, MODEL.module))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        text_1T = np.zeros((1, 48), np.int32)
        text_1T[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        from_answer = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits_1TV = logits_of(MODEL.params, text_1T)[:, from_answer]
        at_1T = len(prompt) + jnp.arange(len(answer), dtype=jnp.int32)[None]
        chosen_T = np.asarray(choose(logits_1TV, keys[row : row + 1], at_1T, FREE))[0]
        p_TV = np.asarray(jax.nn.softmax(logits_1TV[0]))
        for token, best, p_V in zip(answer, chosen_T, p_TV, strict=True):
            entropy = -(p_V * np.log(p_V)).sum()
            assert token == best or p_V[token] > min(0.09, 0.3 * np.exp(-entropy)) - 1e-5
            others += token != best
    assert others, 'something was taken that would not have been chosen'
    plain = decode_all(MODEL, exact, PROMPTS, weights)
    assert sum(found.forwards) < sum(plain.forwards)
    with pytest.raises(ConfigError, match='lossy rule of Medusa, not of AutoRegressive'):
        dataclasses.replace(lossy, drafter=AutoRegressive())
    with pytest.raises(ConfigError, match='set a temperature'):
        Sampling(typical=0.09)


@pytest.mark.parametrize('name', ['AR', 'medusa, sampled'])
def test_the_sampled_law_is_the_softmax_of_the_target(name):
    """Chi-square over all answers of two tokens, of a vocabulary of five."""
    model = random_model(3, tiny_config(vocab=5, layers=1))
    drafter, weights = AutoRegressive(), ()
    if name != 'AR':
        drafter = Medusa(2, ((0,), (1,), (0, 0), (1, 0)), False, FREE)
        weights = weights_of(drafter, model)
    count = 4096
    request = Request(drafter, 3, FREE, batch=1024)
    result = decode_all(model, request, [[1, 2]] * count, weights)
    seen = Counter(tuple(tokens[:2]) for tokens in result.tokens)
    pairs = np.array([[1, 2, t] for t in range(5)], np.int32)
    logits_VTV = np.asarray(forward(model.module, model.params, pairs), np.float64)
    first_V, second_VV = (softmax(x, axis=-1) for x in (logits_VTV[0, 1], logits_VTV[:, 2]))
    expected = (first_V[:, None] * second_VV).ravel() * count
    found = np.array([seen[pair] for pair in itertools.product(range(5), repeat=2)])
    often = expected >= 5
    assert often.sum() > 8
    ratio = found[often].sum() / expected[often].sum()
    assert chisquare(found[often], expected[often] * ratio).pvalue > 1e-3


APPLE = np.array(
    [
        [[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]],
        [[93, 94, 95, 92], [93, 95, 96, 93], [93, 94, 97, 96]],
    ],
    np.int32,
)


def test_beams_are_packed_as_apple_packs_them():
    """The vectors of apple/ml-recurrent-drafter, tree_attention_test.py."""
    tokens_BN, parent_BN, live_BN, unpack_BMC = jax.device_get(pack(APPLE, 12))
    packed = [[91, 92, 93, 95, 94, 96, 97], [93, 94, 95, 92, 95, 96, 93, 97, 96]]
    unpack = [
        [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 6]],
        [[0, 1, 2, 3], [0, 4, 5, 6], [0, 1, 7, 8]],
    ]
    depths = [[0, 1, 2, 3, 2, 3, 3], [0, 1, 2, 3, 1, 2, 3, 2, 3]]
    assert unpack_BMC.tolist() == unpack
    for b in range(2):
        assert tokens_BN[b, live_BN[b]].tolist() == packed[b]
        depth = [0]
        for parent in parent_BN[b, 1 : len(packed[b])]:
            depth.append(depth[parent] + 1)
        assert depth == depths[b]


@given(st.integers(0, 2**32), st.integers(4, 30))
def test_packed_beams_unpack_to_themselves(seed, capacity):
    rng = np.random.default_rng(seed)
    beams_BMC = np.concatenate([np.zeros((3, 6, 1), int), rng.integers(0, 3, (3, 6, 4))], 2)
    tokens_BN, parent_BN, live_BN, unpack_BMC = (
        np.asarray(x) for x in PACK(beams_BMC.astype(np.int32), capacity)
    )
    for tokens, parent, live, unpack, beams in zip(
        tokens_BN, parent_BN, live_BN, unpack_BMC, beams_BMC, strict=True
    ):
        kept = unpack < capacity
        assert (tokens[unpack[kept]] == beams[kept]).all()
        assert (parent < np.arange(capacity)).all() and parent[0] == -1
        prefixes = {tuple(beam[: i + 1]) for beam in beams for i in range(5)}
        assert live.sum() == len(set(unpack[kept])) == min(capacity, len(prefixes))
        for row, k in zip(unpack, kept, strict=True):
            assert all(parent[row[i]] == row[i - 1] for i in range(1, 5) if k[i])


PACK = jax.jit(pack, static_argnums=1)


class Saying:
    """A drafter that says what it is told to."""

    length = 3

    def __init__(self, logits):
        self.said = iter(logits)

    def cell(self, weights, tokens_BA, state_BAD):
        return state_BAD

    def logits(self, weights, hidden_BAD, state_BAD):
        return next(self.said)


def test_the_loss_of_redrafter_is_apples():
    """The value of apple/ml-recurrent-drafter, train/loss_test.py: 1.6388."""
    said = [
        [[-4.2755, -4.0159, -5.4326], [-7.3534, -5.2731, -4.7144], [-6.3034, -5.6929, -4.1427]],
        [[-5.6221, -2.1564, -5.9357], [-2.7976, -5.3193, -4.0888], [-4.9951, -4.7358, -6.5123]],
    ]
    labels, weight = jnp.array([[1, 2, 1]]), jnp.ones((1, 3))  # of the tokens 0 1 2 1
    drafter = Saying(jnp.array([[step] for step in said]))
    later = jnp.array([3.0, 2.0, 1.0])
    loss, _ = redrafter_loss(drafter, None, jnp.zeros((1, 3, 1)), labels, weight, later)
    assert abs(float(loss) - 1.6388) < 1e-4


def test_the_tree_of_medusa_holds_the_likeliest_nodes():
    right = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.0]])
    assert tree_of(right, 4) == ((0,), (1,), (0, 0), (0, 1))
    everything = tree_of(right, 99)
    assert len(everything) == 3 + 9
    assert all(path[:-1] in {(), *everything} for path in everything)
    for wrong in (((1, 0),), ((0,), (0,)), ((9,),), ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))):
        with pytest.raises(ConfigError):
            Medusa(3, wrong)


@pytest.mark.parametrize('name', ['medusa', 'redrafter', 'eagle', 'space'])
def test_a_saved_drafter_is_the_same_drafter(name, tmp_path):
    drafter, weights = DRAFTERS[name], weights_of(DRAFTERS[name])
    own = weights.own if weights else {}
    write_drafter(tmp_path / 'drafter', drafter, own, MODEL)
    loaded = read_drafter(tmp_path, MODEL, kind=name)
    assert loaded.drafter == drafter
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, weights)
    copy_drafter(tmp_path, tmp_path / 'small', jnp.bfloat16)
    small = read_drafter(tmp_path / 'small', MODEL)
    rounded = weights and weights.replace(
        own=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), weights.own)
    )
    assert small.drafter == drafter
    jax.tree.map(np.testing.assert_array_equal, small.weights, rounded)
    with pytest.raises(ConfigError, match='holds a'):
        read_drafter(tmp_path, MODEL, kind='lookup')
    other = random_model(config=tiny_config(vocab=30))
    with pytest.raises(ConfigError, match='vocab_size 29, random has 30'):
        read_drafter(tmp_path, other)
    (tmp_path / 'drafter' / 'drafter.json').write_text('{}')
    with pytest.raises(DataError):
        read_drafter(tmp_path, MODEL)


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
