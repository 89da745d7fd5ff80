"""What a packed row means, and that batches are a function of the step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.decoding.result import Trajectory
from cllm_jax.model.llama import Llama, forward
from cllm_jax.training.noise import Noise, measured
from cllm_jax.training.packing import batches, make_batch, samples_of_step
from cllm_jax.training.step import hidden_states
from tests.tiny import BIASES, random_model, text_config
from tests.tiny_training import BLOCK, CONFIG, samples

CONFIGS = {'plain': CONFIG} | {name: text_config(**BIASES[name]) for name in BIASES}


def logits_of(config, params, batch):
    model = Llama(config)
    hidden = hidden_states(model, params, batch)
    rows = jnp.take_along_axis(hidden, jnp.asarray(batch.rows_BR)[:, :, None], axis=1)
    return model.apply({'params': params}, rows, method='logits')


@partial(jax.jit, static_argnames='model')
def jitted_forward(model, params, tokens_BT):
    return forward(model, params, tokens_BT)


def plain_logits(config, params, tokens) -> np.ndarray:
    """Logits of a text by itself; what is padded on the right changes nothing before it."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jitted_forward(Llama(config), params, padded))[0, : len(tokens)]


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_packed_rows_are_plain_causal_forwards(config):
    """A state sees exactly prompt + clean answer before it + itself; the clean part is clean."""
    data, params = samples(), random_model(config=config).params
    batch = make_batch(data, 4, 0, 0, Noise(windows=3))
    logits = np.asarray(logits_of(config, params, batch))
    answers = batch.ar_weight_BA.shape[1]
    length = batch.tokens_BT.shape[1] - 3 * BLOCK
    for row, (_, sample) in enumerate(samples_of_step(data, 4, 0, 0)):
        text = np.concatenate([sample.prompt, sample.answer])
        plain = plain_logits(config, params, text)
        first, size = len(sample.prompt) - 1, len(sample.answer)
        assert np.allclose(logits[row, :size], plain[first : first + size], atol=2e-5)
        for w in range(3):
            at = length + w * BLOCK
            begin = batch.context_BT[row, at] - len(sample.prompt)
            state = batch.tokens_BT[row, at : at + BLOCK][: size - begin]
            whole = np.concatenate([sample.prompt, sample.answer[:begin], state])
            plain = plain_logits(config, params, whole)
            got = logits[row, answers + w * BLOCK :][: len(state)]
            assert np.allclose(got, plain[len(sample.prompt) + begin :], atol=2e-5)


def test_weights_start_at_the_first_wrong_guess_and_end_before_padding():
    data = samples(8)
    batch = make_batch(data, 8, 3, 5, Noise(windows=4))
    length = batch.tokens_BT.shape[1] - 4 * BLOCK
    answers = batch.ar_weight_BA.shape[1]
    for row, (_, sample) in enumerate(samples_of_step(data, 8, 3, 5)):
        assert batch.ar_weight_BA[row].sum() == len(sample.answer)
        for w in range(4):
            here = slice(w * BLOCK, (w + 1) * BLOCK)
            state = batch.tokens_BT[row, length:][here]
            begin = int(batch.context_BT[row, length:][here][0]) - len(sample.prompt)
            weight = batch.global_weight_BW[row, here]
            wrong = False
            for i in range(BLOCK):
                inside = begin + i < len(sample.answer)
                wrong |= inside and state[i] != sample.answer[begin + i]
                useful = wrong and begin + i + 1 < len(sample.answer)
                assert weight[i] == useful
                if useful:
                    assert batch.teacher_BW[row, here][i] == begin + i + 1
                    label = batch.labels_BR[row, answers:][here][i]
                    assert label == sample.answer[begin + i + 1]


def test_local_consistency_points_to_the_successor():
    data = samples(6)
    batch = make_batch(data, 6, 1, 2, Noise(windows=2, pairs=True))
    answers, length = batch.ar_weight_BA.shape[1], batch.tokens_BT.shape[1] - 2 * BLOCK
    assert not batch.local_weight_BW[:, BLOCK:].any()
    assert batch.local_weight_BW.any()
    position = batch.positions_BT
    for row in range(6):
        for i in np.flatnonzero(batch.local_weight_BW[row]):
            teacher = batch.successor_BW[row, i]
            own = position[row, length + i]
            if teacher >= answers:
                assert position[row, length + teacher - answers] == own
                assert teacher - answers >= BLOCK
            else:
                assert batch.rows_BR[row, teacher] == own


def test_decay_and_fresh_states():
    data = samples(6)
    flat = make_batch(data, 6, 0, 0, Noise(windows=3))
    decayed = make_batch(data, 6, 0, 0, Noise(windows=3, decay=4.0))
    ahead = decayed.offset_BW
    expected = np.where(ahead >= 0, np.exp(-np.maximum(ahead, 0) / 4.0), 0)
    assert np.allclose(decayed.global_weight_BW, expected)
    assert (flat.tokens_BT == decayed.tokens_BT).all()
    fresh = make_batch(data, 6, 0, 0, Noise(windows=3, fresh=1.0))
    length = fresh.tokens_BT.shape[1] - 3 * BLOCK
    for row, (_, sample) in enumerate(samples_of_step(data, 6, 0, 0)):
        windows = fresh.tokens_BT[row, length:].reshape(3, BLOCK)
        assert np.isin(windows[:, 1:], sample.prompt).all()


def test_batches_are_a_function_of_the_step():
    data = samples(40)
    first = [make_batch(data, 4, 7, s, Noise(windows=2)) for s in range(20)]
    again = make_batch(data, 4, 7, 13, Noise(windows=2))
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(first[13]), jax.tree.leaves(again), strict=True)
    )
    seen = [n for s in range(32) for n, _ in samples_of_step(data, 4, 7, s)]
    assert sorted(seen) == list(range(128))


@pytest.mark.parametrize('noise', [None, Noise(windows=2), Noise(pairs=True), Noise(mask=2)])
def test_processes_that_pack_their_own_rows_have_the_batch_of_one(noise):
    data = samples(40)
    iterators = [batches(data, 6, 7, range(3, 9), noise, rows) for rows in ([0, 1, 4], [2, 3, 5])]
    whole = batches(data, 6, 7, range(3, 9), noise)
    for step, (all_rows, *some) in enumerate(zip(whole, *iterators, strict=True), start=3):
        again = make_batch(data, 6, 7, step, noise)
        for a, b, *c in zip(*map(jax.tree.leaves, (all_rows, again, *some)), strict=True):
            assert a.tobytes() == b.tobytes()
            joined = np.concatenate(c)[[0, 1, 3, 4, 2, 5]]
            assert joined.dtype == a.dtype and joined.tobytes() == a.tobytes()


def test_states_made_by_chance_mix_right_tokens_with_those_of_the_prompt():
    none = np.zeros((0, BLOCK), np.int32)
    texts = [Trajectory(none, none[:, 0], s.prompt, s.answer) for s in samples()]
    batch = make_batch(samples() + texts, 24, 0, 0, Noise(windows=3))
    again = make_batch(samples() + texts, 24, 0, 0, Noise(windows=3))
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (batch, again)), strict=True))
    batch, share = make_batch(texts, 12, 0, 0, Noise(windows=3)), []
    length = batch.tokens_BT.shape[1] - 3 * BLOCK
    for row, (_, sample) in enumerate(samples_of_step(texts, 12, 0, 0)):
        for place in range(3):
            here = slice(length + place * BLOCK, length + (place + 1) * BLOCK)
            begin = int(batch.context_BT[row, here][0]) - len(sample.prompt)
            truth = sample.answer[begin : begin + BLOCK]
            state = batch.tokens_BT[row, here][: len(truth)]
            assert state[0] == truth[0]
            assert set(state[state != truth].tolist()) <= set(sample.prompt.tolist())
            share.append((state == truth)[1:].mean() if len(truth) > 1 else 1)
    assert min(share) < 0.3 and max(share) > 0.7 and len(set(share)) > 8


def test_short_states_are_long_ones_that_teach_less():
    """A state's length is drawn; what its tokens see stays as it is."""
    data = samples(8)
    whole = make_batch(data, 8, 0, 0, Noise(windows=3))
    batch = make_batch(data, 8, 0, 0, Noise(windows=3, shortest=2))
    assert (whole.context_BT == batch.context_BT).all()
    length, lengths = batch.tokens_BT.shape[1] - 3 * BLOCK, set()
    for row in range(8):
        for w in range(3):
            here = slice(w * BLOCK, (w + 1) * BLOCK)
            real, learnt = batch.segment_BT[row, length:][here], batch.global_weight_BW[row, here]
            size = int((real >= 0).sum())
            assert (real[:size] == w + 1).all() and not learnt[size:].any()
            if (whole.segment_BT[row, length:][here] >= 0).all():
                lengths.add(size)
    assert min(lengths) >= 2 and len(lengths) > 2
    few = make_batch(data, 8, 0, 0, Noise(windows=3, shortest=99))
    assert (few.segment_BT == whole.segment_BT).all()


def test_states_of_texts_are_right_as_often_as_measured():
    data, none = samples(60), np.zeros((0, BLOCK), np.int32)
    noise = measured(Noise(windows=3, measured=True), data)
    right = [[] for _ in range(BLOCK)]
    for sample in data:
        for state, start in zip(sample.states, sample.start, strict=True):
            for slot, token in enumerate(state):
                if start + slot < len(sample.answer):
                    right[slot].append(token == sample.answer[start + slot])
    assert np.allclose(noise.right, [np.mean(r) for r in right[1:]])
    assert measured(noise, []) is noise and measured(Noise(), data) == Noise()
    # Tokens of the prompt are not of the answer, so that no guess is right by luck.
    texts = [
        Trajectory(none, none[:, 0], np.full(4, 1, np.int32), np.full(40, 2 + i % 9, np.int32))
        for i in range(200)
    ]
    batch = make_batch(texts, 200, 0, 0, noise)
    state_BWn = batch.tokens_BT[:, -batch.offset_BW.shape[1] :].reshape(-1, BLOCK)
    whole = (batch.segment_BT[:, -batch.offset_BW.shape[1] :] >= 0).reshape(-1, BLOCK).all(1)
    found = (state_BWn[whole] != 1).mean(0)
    assert found[0] == 1 and np.allclose(found[1:], noise.right, atol=0.08)
