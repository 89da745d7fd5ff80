"""The window that is chosen is the fastest by what was measured and learnt; the answer is AR's."""

import dataclasses
import json

import pytest

import cllm_jax as cllm
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from cllm_jax.evaluation import window
from cllm_jax.evaluation.window import accepted, choose, known, learn, tokens_per_forward
from tests.tiny import model_directory, ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPTS = ragged_prompts(5, (3, 7, 4, 5, 6, 2))
ASKED = Request(Jacobi('auto'), 9, batch=1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def loaded(tmp_path):
    """A model that lies in a directory, so that what it accepts can be kept."""
    return cllm.load(str(model_directory(tmp_path / 'tiny')))


def result_of(*accepted: list[int]) -> DecodeResult:
    """A result that took these tokens per forward."""
    rows = [*accepted]
    return DecodeResult([''] * len(rows), [[1] * sum(r) for r in rows], rows, [1.0] * len(rows))


def test_what_a_window_commits_is_known_or_estimated_from_the_nearest():
    seen = {8: [0, 0, 0, 10, 0, 0, 0, 10]}  # 4 tokens or all 8
    assert tokens_per_forward(seen, 8) == 6
    assert tokens_per_forward(seen, 4) == 120 / 30  # 8 tokens take two forwards of 4
    assert tokens_per_forward(seen, 16) == 9  # half of the forwards go on as far again
    never_full = {8: [0, 0, 0, 20, 0, 0, 0, 0]}
    assert tokens_per_forward(never_full, 8) == tokens_per_forward(never_full, 32) == 4
    both = seen | {16: [0] * 11 + [5] + [0] * 4}
    assert tokens_per_forward(both, 16) == 12 and tokens_per_forward(both, 8) == 6


def test_the_prefill_is_not_counted():
    assert accepted(result_of([5, 1, 3, 3], [2]), 4) == [1, 0, 2, 0]


@pytest.mark.parametrize(
    ('milliseconds', 'block'),
    [
        ({1: 1, 8: 2, 16: 3, 32: 9}, 8),  # 3, 2 and 2/3 tokens per ms
        ({1: 1, 8: 4, 16: 4, 32: 4}, 32),
        ({1: 1, 8: 9, 16: 9, 32: 9}, 1),
        ({1: 1, 8: 5.9, 16: 9, 32: 9}, 1),  # less than 5 % faster than AR
    ],
)
def test_the_fastest_is_chosen_and_ar_where_none_is_faster(milliseconds, block, monkeypatch):
    seconds = {n: t / 1e3 for n, t in milliseconds.items()}
    monkeypatch.setattr(window, 'measured', lambda model, request: seconds)
    seen = {8: [0] * 5 + [10] + [0] * 2, 16: [0] * 5 + [5] + [0] * 9 + [1]}
    monkeypatch.setattr(window, 'known', lambda model, request: seen)
    choice = choose(MODEL, ASKED, PROMPTS)
    asked = AutoRegressive() if block == 1 else Jacobi(block)
    assert choice.request == dataclasses.replace(ASKED, drafter=asked)
    assert (
        f'block auto: {"AR" if block == 1 else block}; ' in choice.why and 'AR: 1,000' in choice.why
    )


def test_what_is_not_open_stays():
    for drafter in (Jacobi(5), AutoRegressive(), cllm.PromptLookup(4)):
        request = Request(drafter, 9)
        assert choose(MODEL, request, PROMPTS) == window.Choice(request)
        assert learn(MODEL, request, request, result_of([1, 1])) == {}


@pytest.mark.parametrize('count', [3, 6])
@pytest.mark.parametrize('more', [{}, {'mode': 'block'}, {'recycle': 1}], ids=str)
def test_the_answer_is_ar_s(count, more):
    plain = cllm.decode(MODEL, PROMPTS[:count], cllm.AutoRegressive(), 9)
    drafter = cllm.Jacobi(block='auto', **more)
    assert cllm.decode(MODEL, PROMPTS[:count], drafter, 9).tokens == plain.tokens


def test_what_was_measured_is_not_measured_again(monkeypatch):
    request, times = Request(Jacobi('auto'), 9, batch=2), window.measured(MODEL, ASKED)
    assert set(times) == {1, *MODEL.backend.windows} and min(times.values()) > 0
    measuring = []
    monkeypatch.setattr(window, '_measure', lambda *_: measuring.append(1) or [1.0] * 4)
    assert window.measured(MODEL, ASKED) == times and not measuring
    window.measured(MODEL, request)  # another batch costs something else
    assert measuring


def test_what_a_model_accepts_is_kept_by_its_files_and_its_drafter(loaded):
    first = dataclasses.replace(ASKED, drafter=Jacobi(4))
    assert known(loaded, ASKED) == {}
    assert learn(loaded, ASKED, first, result_of([1, 2, 2])) == {4: [0, 2, 0, 0]}
    learn(loaded, ASKED, first, result_of([1, 3]))
    assert known(loaded, ASKED) == {4: [0, 2, 1, 0]}
    assert known(loaded, dataclasses.replace(ASKED, drafter=Jacobi('auto', 'block'))) == {}
    (file,) = loaded.directory.glob('*.safetensors')
    file.write_bytes(file.read_bytes() + b' ')
    assert known(loaded, ASKED) == {}


def test_a_model_brings_what_it_accepted_where_it_was_made(loaded):
    prior = loaded.directory / window.PRIOR
    prior.write_text(json.dumps({'4': [0, 2, 1, 0]}))
    assert known(loaded, ASKED) == {4: [0, 2, 1, 0]}
    assert known(loaded, dataclasses.replace(ASKED, drafter=Jacobi('auto', recycle=1))) == {}
    for damaged in ('', '[]', '{"4": [1]}', '{"4": [0, 0, 0, 0]}', '{"x": 1}', '{"2": [-1, 3]}'):
        prior.write_text(damaged)
        assert known(loaded, ASKED) == {}


def test_nothing_else_takes_a_window_that_is_still_open():
    with pytest.raises(ConfigError, match=r"block 'auto': .* give a number"):
        _ = Jacobi('auto').nodes
    with pytest.raises(ConfigError, match=r"block often: must be 1 .* or 'auto'"):
        Jacobi('often')
