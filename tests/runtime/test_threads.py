"""A batch that threads share, one for each core, gives what one thread gives."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest

from cllm_jax.decoding import engine
from cllm_jax.decoding.engine import decode_all, decode_side_by_side
from cllm_jax.decoding.loop import programs
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.runtime.threads import side_by_side
from tests.tiny import byte_tokenizer, ragged_prompts, random_model, text_config

ENDS = tuple(range(1, 261, 23))
MODEL = random_model(config=text_config(layers=1, eos_ids=ENDS), tokenizer=byte_tokenizer())
PROMPTS = ragged_prompts(3, (1, 9, 3, 14, 2, 5, 16, 8, 4, 11, 7), vocab=200)


@pytest.fixture
def cores(monkeypatch):
    """Says how many cores there are."""

    def have(count: int) -> None:
        backend = dataclasses.replace(MODEL.backend, threads=count)
        monkeypatch.setattr(engine, 'backend_of', lambda weights: backend)

    return have


@pytest.fixture
def spy(monkeypatch):
    """Calls a function with the prompts of every part of a batch, in the thread that decodes it."""

    def watch(told) -> None:
        def spied(decode):
            def decode_part(model, request, prompts, *rest):
                told(prompts)
                return decode(model, request, prompts, *rest)

            return decode_part

        for name in ('decode_whole_batches', 'decode_refilling'):
            monkeypatch.setattr(engine, name, spied(getattr(engine, name)))

    return watch


@pytest.fixture
def parts(spy):
    """Sizes of the parts in which batches were decoded, and the threads that did it."""
    found = []
    spy(lambda prompts: found.append((len(prompts), threading.get_ident())))
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
    shared = decode_all(MODEL, request_, PROMPTS, done.append)
    assert sorted(size for size, _ in parts) == [3, 4, 4, 11]
    here = threading.get_ident()
    assert [thread == here for _, thread in parts] == [True, False, False, False]
    assert shared.texts == alone.texts and shared.tokens == alone.tokens
    assert shared.accepted == alone.accepted
    assert sum(done) == len(PROMPTS)
    for one, other in zip(shared.trajectories, alone.trajectories, strict=True):
        np.testing.assert_array_equal(one.states, other.states)
        np.testing.assert_array_equal(one.start, other.start)


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
    assert len(parts) == 3 and programs(MODEL.backend).prefill._cache_size() == 1
    names = [about['fun_name'] for about in compiled]
    assert names.count('jit(prefill)') == 1, names


@pytest.mark.parametrize(('rows', 'sizes'), [(1, [1]), (3, [3]), (4, [2, 2]), (6, [2, 2, 2])])
def test_no_thread_has_a_single_row(cores, parts, rows, sizes):
    cores(8)
    decode_all(MODEL, Request(Jacobi(5), 4), PROMPTS[:rows])
    assert [size for size, _ in parts] == sizes


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


def test_an_error_in_one_part_ends_the_others(cores, spy, monkeypatch):
    """At their next report, not with their last prompt."""
    cores(2)
    reports, faulty, failed = [], set(), threading.Event()
    spy(lambda prompts: prompts[0] == PROMPTS[0] and faulty.add(threading.get_ident()))

    def progress(done):
        if threading.get_ident() in faulty:
            raise KeyboardInterrupt
        reports.append(done)
        assert failed.wait(60)

    monkeypatch.setattr(engine, 'Lock', contextlib.nullcontext)
    request, keys = Request(Jacobi(6), 24, batch=4), row_keys(0, range(22))
    with pytest.raises(KeyboardInterrupt):
        decode_side_by_side(MODEL, request, PROMPTS * 2, keys, progress)
    failed.set()
    wait_for_threads()
    assert len(reports) <= 1
