"""A batch that threads share, one for each core, gives what one thread gives."""

import contextlib
import dataclasses
import threading
from unittest.mock import patch

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cllm_jax.decoding import engine as generate
from cllm_jax.decoding.engine import _decode, advance_of, decode_all, start, stop_ids
from cllm_jax.decoding.loop import advance, prefill_by_eigen
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.hf.load import mixed
from cllm_jax.runtime import backend as choice
from cllm_jax.runtime.backend import CACHED, by_eigen, side_by_side, useful_threads
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.trajectories import collector as collecting
from cllm_jax.trajectories.collector import CollectPlan, collect
from tests.tiny import byte_tokenizer, ragged_prompts, random_model, text_config
from tests.trajectories.test_collector import identity, source

ENDS = tuple(range(1, 261, 23))
MODEL = random_model(config=text_config(layers=1, eos_ids=ENDS), tokenizer=byte_tokenizer())
PROMPTS = ragged_prompts(3, (1, 9, 3, 14, 2, 5, 16, 8, 4, 11, 7), vocab=200)


@pytest.fixture
def cores(monkeypatch):
    """Says how many cores there are."""

    def have(count: int) -> None:
        for user in (generate, collecting):
            monkeypatch.setattr(user, 'useful_threads', lambda weights: count)

    return have


@pytest.fixture
def parts(monkeypatch):
    """Sizes of the parts in which batches were decoded, and the threads that did it."""
    found, decode_part = [], generate._decode_part

    def spied(model, request, prompts, *rest):
        found.append((len(prompts), threading.get_ident()))
        return decode_part(model, request, prompts, *rest)

    monkeypatch.setattr(generate, '_decode_part', spied)
    return found


@pytest.mark.parametrize(
    'request_',
    [
        Request(Jacobi(6), 24, trace=True),
        Request(Lookahead(3, 3, 2), 24, Sampling(1.0), seed=3, trace=True),
        Request(Jacobi(6), 24, batch=6, trace=True),
        Request(Jacobi(6), 24, stop=('e', 'q'), trace=True),
    ],
    ids=('one batch', 'tree, sampled', 'refilled', 'stop strings'),
)
def test_shared_batches_give_the_same_answers(cores, parts, request_):
    cores(1)
    alone, done = decode_all(MODEL, request_, PROMPTS), []
    cores(3)
    shared = decode_all(MODEL, request_, PROMPTS, (), done.append)
    assert sorted(size for size, _ in parts) == [3, 4, 4, 11]
    here = threading.get_ident()
    assert [thread == here for _, thread in parts] == [True, False, False, False]
    assert shared.texts == alone.texts and shared.tokens == alone.tokens
    assert shared.accepted == alone.accepted
    assert sum(done) == len(PROMPTS)
    for here, one in zip(shared.trajectories, alone.trajectories, strict=True):
        np.testing.assert_array_equal(here.states, one.states)
        np.testing.assert_array_equal(here.start, one.start)


def test_parts_share_one_compilation(cores, parts):
    compiled = []
    event = '/jax/core/compile/backend_compile_duration'
    cores(3)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **about: compiled.append(about) if name == event else None
    )
    try:
        decode_all(MODEL, Request(Jacobi(5), 20), [*PROMPTS, PROMPTS[0] * 40])
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(parts) == 3 and prefill_by_eigen._cache_size() == 1
    names = [about['fun_name'] for about in compiled]
    assert names.count('jit(prefill)') == 1, names


@pytest.mark.parametrize(('rows', 'sizes'), [(1, [1]), (3, [3]), (4, [2, 2]), (6, [2, 2, 2])])
def test_no_thread_has_a_single_row(cores, parts, rows, sizes):
    cores(8)
    decode_all(MODEL, Request(Jacobi(5), 4), PROMPTS[:rows])
    assert [size for size, _ in parts] == sizes


@pytest.mark.parametrize('mode', ['block', 'sliding'])
def test_a_collection_has_the_same_bytes_with_any_number_of_cores(cores, tmp_path, mode):
    model = dataclasses.replace(MODEL, params=jax.device_put(MODEL.params, jax.devices()[0]))
    plan, files = CollectPlan(8, mode, max_tokens=20, seed=3, batch=4, shard=16), []
    for count in (1, 3):
        cores(count)
        out, told = tmp_path / f'{count}', []
        with patch('jax.local_devices', return_value=jax.devices()[:1]):
            counts = collect(
                out, model, source(), plan, identity(plan), lambda n, tokens, t=told: t.append(n)
            )
        assert told == [4] * 5 and counts['prompts'] == 20
        files.append({path.name: path.read_bytes() for path in out.glob('*-of-*')})
    assert files[0] == files[1] and files[0]


def test_large_and_divided_weights_are_left_to_one_thread():
    weights = jax.numpy.ones((4, CACHED // 16))
    assert useful_threads(weights) == useful_threads((weights, np.ones(3))) >= 1
    everywhere = NamedSharding(make_mesh(MeshConfig()), PartitionSpec(None, 'data'))
    assert useful_threads(jax.device_put(weights, everywhere)) == 1
    assert useful_threads((weights, jax.numpy.ones(1))) == 1
    assert useful_threads(np.ones(3)) == 1


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if 'ThreadPoolExecutor' in thread.name:
            thread.join(60)
            assert not thread.is_alive()


def test_side_by_side_keeps_the_order_and_stops_at_an_error():
    begun, second, stop = [], threading.Event(), threading.Event()

    def job(i):
        begun.append(i)
        if i == 0:
            assert second.wait(60), 'two run at a time'
            raise ValueError('the first')
        second.set()
        assert stop.wait(60)

    with pytest.raises(ValueError, match='the first'):
        list(side_by_side(job, range(9), 2))
    stop.set()
    wait_for_threads()
    assert set(begun) <= {0, 1, 2}
    assert list(side_by_side(lambda i: -i, range(9), 3)) == [-i for i in range(9)]


def test_an_error_in_one_part_ends_the_others(cores, monkeypatch):
    """At their next report, not with their last prompt."""
    cores(2)
    reports, faulty, failed, decode_part = [], set(), threading.Event(), generate._decode_part

    def spied(model, request, prompts, *rest):
        if prompts[0] == PROMPTS[0]:
            faulty.add(threading.get_ident())
        return decode_part(model, request, prompts, *rest)

    def progress(done):
        if threading.get_ident() in faulty:
            raise KeyboardInterrupt
        reports.append(done)
        assert failed.wait(60)

    monkeypatch.setattr(generate, '_decode_part', spied)
    monkeypatch.setattr(generate, 'Lock', contextlib.nullcontext)
    request, keys = Request(Jacobi(6), 24, batch=4), row_keys(0, range(22))
    with pytest.raises(KeyboardInterrupt):
        _decode(MODEL, request, PROMPTS * 2, keys, (), progress)
    failed.set()
    wait_for_threads()
    assert len(reports) <= 1


def test_small_float32_models_are_multiplied_by_eigen(monkeypatch):
    """The answers are the same, and the compiled loop has nothing of the other library."""
    request = Request(Jacobi(5), 20)
    state = start(MODEL, request, [[1, 2]], row_keys(0, [0]), ())
    bound = stop_ids(MODEL), np.int32(20), np.int32(1), state

    def other_library() -> int:
        how = (request.drafter, (), request.sampling)
        lowered = advance_of(MODEL).lower(MODEL.module, MODEL.params, *how, *bound)
        return lowered.compile().as_text().count('ynn_fusion')

    fast, fusions = decode_all(MODEL, request, PROMPTS[:3]), other_library()
    monkeypatch.setattr(choice, 'CACHED', 0)
    assert advance_of(MODEL) is advance
    plain = decode_all(MODEL, request, PROMPTS[:3])
    assert (fast.tokens, fast.accepted) == (plain.tokens, plain.accepted)
    if choice.EIGEN:
        assert fusions == 0 < other_library()


def test_what_eigen_would_be_slow_with_is_left_as_it_is():
    assert by_eigen(MODEL.params)
    assert not by_eigen(mixed(MODEL.params))
    weights = jax.numpy.ones(CACHED // 4)
    assert by_eigen(weights) and not by_eigen((weights, jax.numpy.ones(1)))
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    shared = jax.device_put(MODEL.params, NamedSharding(mesh, PartitionSpec()))
    assert not by_eigen(shared)
