"""Packed batches, losses, the step, and runs that continue where they stopped."""

import dataclasses
import json
import math
import shutil
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cllm_jax.training.heads import HeadsConfig, of_heads

from cllm_jax.cli.console import Console
from cllm_jax.data.sources import Source
from cllm_jax.errors import ConfigError, DataError, Interrupted, NumericalError
from cllm_jax.export import best_numbers
from cllm_jax.hf.load import Model, load
from cllm_jax.model.attention import NEVER, attend
from cllm_jax.model.llama import Llama, forward, init_params
from cllm_jax.model.precision import linear
from cllm_jax.runs.checksums import SUMS
from cllm_jax.runs.run_dir import (
    read_metrics,
)
from cllm_jax.tasks.example import Example
from cllm_jax.training import trainer as training_run
from cllm_jax.training.checkpoint import open_checkpoints, restore
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.data import prepare
from cllm_jax.training.losses import divergence
from cllm_jax.training.objective import of_text
from cllm_jax.training.packing import Noise, Sample, make_batch, samples_of_step
from cllm_jax.training.step import (
    LossWeights,
    OptimizerConfig,
    batch_totals,
    check_accumulation,
    losses,
    make_optimizer,
    make_step,
    new_state,
    text_loss,
    visible,
)
from cllm_jax.training.trainer import HeldOut, RunPlan, alarm, train
from tests.tiny import byte_tokenizer, text_config

CONFIG, SHALLOW = text_config(layers=2), text_config(layers=1)
BLOCK = 8


@pytest.fixture
def mixed_dtypes():
    """optax itself relies on implicit promotion, which the tests otherwise forbid."""
    with jax.numpy_dtype_promotion('standard'):
        yield


@cache
def params_of(config=CONFIG):
    params = jax.jit(partial(init_params, Llama(config)))(jax.random.key(0))
    return jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params)


def samples(count: int = 12, seed: int = 0, block: int = BLOCK) -> list[Sample]:
    """Random prompts and answers with states: random guesses, partly right, and the fixed point."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(3, 90, rng.integers(2, 9)).astype(np.int32)
        answer = rng.integers(3, 90, rng.integers(5, 30)).astype(np.int32)
        padded = np.concatenate([answer, np.zeros(block, np.int32)])
        states, start = [], []
        for begin in range(0, len(answer), block):
            truth = padded[begin : begin + block]
            for right in range(1, block + 1, 3):
                state = rng.integers(3, 90, block).astype(np.int32)
                state[:right] = truth[:right]
                states.append(state)
                start.append(begin)
            states.append(truth)
            start.append(begin)
        made.append(Sample(prompt, answer, np.stack(states), np.asarray(start, np.int32)))
    return made


def logits_of(params, batch):
    model = Llama(CONFIG)
    hidden, _ = model.apply({'params': params}, batch.tokens_BT, batch.positions_BT, visible(batch))
    rows = jnp.take_along_axis(hidden, jnp.asarray(batch.rows_BR)[:, :, None], axis=1)
    return model.apply({'params': params}, rows, method='logits')


@partial(jax.jit, static_argnames='model')
def jitted_forward(model, params, tokens_BT):
    return forward(model, params, tokens_BT)


def plain_logits(params, tokens) -> np.ndarray:
    """Logits of a text by itself; what is padded on the right changes nothing before it."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jitted_forward(Llama(CONFIG), params, padded))[0, : len(tokens)]


def test_packed_rows_are_plain_causal_forwards():
    """A state sees exactly prompt + clean answer before it + itself; the clean part is clean."""
    data, params = samples(), params_of()
    batch = make_batch(data, 4, 0, 0, Noise(windows=3))
    logits = np.asarray(logits_of(params, batch))
    answers = batch.ar_weight_BA.shape[1]
    length = batch.tokens_BT.shape[1] - 3 * BLOCK
    for row, (_, sample) in enumerate(samples_of_step(data, 4, 0, 0)):
        text = np.concatenate([sample.prompt, sample.answer])
        plain = plain_logits(params, text)
        first, size = len(sample.prompt) - 1, len(sample.answer)
        assert np.allclose(logits[row, :size], plain[first : first + size], atol=2e-5)
        for w in range(3):
            at = length + w * BLOCK
            begin = batch.context_BT[row, at] - len(sample.prompt)
            state = batch.tokens_BT[row, at : at + BLOCK][: size - begin]
            whole = np.concatenate([sample.prompt, sample.answer[:begin], state])
            plain = plain_logits(params, whole)
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


def test_converged_states_have_no_gradient():
    data = [dataclasses.replace(s, states=s.states[-1:], start=s.start[-1:]) for s in samples(4)]
    batch = make_batch(data, 4, 0, 0, Noise(windows=2))
    weights = LossWeights(ar_weight=0.0, global_weight=1.0)
    loss = partial(losses, Llama(CONFIG), weights)
    grads = jax.jit(jax.grad(lambda p: loss(p, batch, batch_totals(batch))[0]))(params_of())
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) == 0


def test_teacher_gets_no_gradient_and_divergence_is_zero_for_equals():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    other = jax.random.normal(jax.random.key(1), (2, 3, 7))
    ones, total = jnp.ones((2, 3)), jnp.float32(6)
    assert float(divergence(logits, logits, ones, total)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(logits, other, ones, total)) > 0
    to_teacher = jax.grad(lambda t: divergence(logits, t, ones, total))(other)
    assert float(jnp.abs(to_teacher).max()) == 0
    p = jax.nn.softmax(other[0, 0])
    expected = float((p * (jnp.log(p) - jax.nn.log_softmax(logits[0, 0]))).sum())
    one = jnp.zeros((2, 3)).at[0, 0].set(1)
    assert float(divergence(logits, other, one, jnp.float32(1))) == pytest.approx(
        expected, rel=1e-5
    )


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


def test_accumulation_changes_nothing(mixed_dtypes):
    data, weights = samples(), LossWeights(ar_weight=1.0, global_weight=1.0)
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10)
    batch = make_batch(data, 4, 0, 0, Noise(windows=2))
    results = []
    for accumulate in (1, 2):
        state = new_state(optimizer, params_of())
        state, metrics = make_step(text_loss(Llama(CONFIG), weights), optimizer, accumulate)(
            state, batch
        )
        results.append((state.params, metrics))
    for params, metrics in results[1:]:
        for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(results[0][0]), strict=True):
            assert np.allclose(a, b, atol=2e-4)
        assert float(metrics['loss']) == pytest.approx(float(results[0][1]['loss']), rel=1e-5)
        norm = float(results[0][1]['gradient_norm'])
        assert float(metrics['gradient_norm']) == pytest.approx(norm, rel=1e-4)
    with pytest.raises(ConfigError, match='accumulate 3'):
        check_accumulation(4, 3)


def test_states_made_by_chance_mix_right_tokens_with_those_of_the_prompt():
    none = np.zeros((0, BLOCK), np.int32)
    texts = [Sample(s.prompt, s.answer, none, none[:, 0]) for s in samples()]
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


def test_vectors_do_not_decay(mixed_dtypes):
    params = {'q': jnp.ones((2, 3)), 'q_bias': jnp.ones((2, 3)), 'norm': jnp.ones(2)}
    config = OptimizerConfig(weight_decay=0.1, warmup=0.0, learning_rate=1.0)
    optimizer = make_optimizer(config, 10)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    assert {name: float(update.sum()) for name, update in updates.items()} == pytest.approx(
        {'q': -0.6, 'q_bias': 0.0, 'norm': 0.0}
    )


def test_muon_orthogonalises_matrices_and_nothing_else(mixed_dtypes):
    """A matrix's update has equal singular values, of AdamW's size, whatever its axes."""
    config = OptimizerConfig(kind='muon', learning_rate=1.0, warmup=0.0, clip=1e9)
    optimizer, params = make_optimizer(config, 10), params_of()
    keys = iter(jax.random.split(jax.random.key(3), 99))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    inputs = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}
    for layer in (updates['layers_0'], updates['layers_1']):
        for name, update in layer.items():
            if name in inputs:
                matrix = update.reshape(math.prod(update.shape[: inputs[name]]), -1)
                size = 0.2 * max(matrix.shape) ** 0.5
                singular = np.linalg.svd(matrix, compute_uv=False)
                # Four iterations leave the very smallest ones behind.
                assert 0.5 * size < np.quantile(singular, 0.2) < singular.max() < 1.3 * size
            else:
                assert np.ptp(np.abs(update)) < 1e-3  # the first step of Adam is a sign
    assert np.ptp(np.abs(updates['embed'])) < 1e-3


@pytest.mark.parametrize('axes', ['IO', 'OI'])
def test_mixed_precision_gradient_is_close(axes):
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    w = jax.random.normal(jax.random.key(1), (16, 7) if axes == 'IO' else (7, 16))

    def value(compute):
        return lambda x, w: (linear(x, w, compute, axes) ** 2).mean()

    exact = jax.grad(value(None), (0, 1))(x, w)
    mixed = jax.grad(value(jnp.dtype('bfloat16')), (0, 1))(x, w)
    for a, b in zip(exact, mixed, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert 0 < float(jnp.abs(a - b).max()) < 0.03 * float(jnp.abs(a).max())


def reference_attention(q, k, v, mask):
    """Every head on its own, by JAX's own rules of differentiation."""
    (batch, _, heads, width), groups = q.shape, len(k) // len(q)
    out = []
    for b in range(batch):
        for head in range(heads):
            row = head // (heads // groups) * batch + b
            scores = jnp.where(mask[b], q[b, :, head] @ k[row].T * width**-0.5, NEVER)
            out.append(jax.nn.softmax(scores, axis=-1) @ v[row])
    return jnp.stack(out).reshape(batch, heads, -1, width).swapaxes(1, 2)


@pytest.mark.parametrize('compute', [None, 'bfloat16'])
def test_the_gradient_of_attention_is_the_derived_one(compute):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 5, 4, 8), (4, 9, 8), (4, 9, 8)], strict=False)
    )
    mask = jax.random.bernoulli(keys[3], 0.6, (2, 5, 9)).at[:, :, 0].set(True)
    weight = jax.random.normal(keys[4], q.shape)

    def value(q, k, v):
        return (attend(q, k, v, mask, compute and jnp.dtype(compute)) * weight).sum()

    def expected(q, k, v):
        return (reference_attention(q, k, v, mask) * weight).sum()

    found = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)
    derived = jax.jit(jax.value_and_grad(expected, (0, 1, 2)))(q, k, v)
    near = 0.03 if compute else 1e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(derived), strict=True):
        assert float(jnp.abs(a - b).max()) <= near * float(jnp.abs(b).max())


def test_a_joint_training_weighs_the_loss_of_the_model():
    model = Model(SHALLOW, params_of(SHALLOW), byte_tokenizer(), 'tiny')
    batch = make_batch(samples(), 4, 0, 0, None)
    sizes, found = HeadsConfig(nodes=4, ahead=2, joint=True), []
    for weight in (1.0, 3.0):
        objective = of_heads('medusa', sizes, model, LossWeights(weight), batch, seed=0)
        _, metrics = jax.jit(objective.loss)(objective.params, (), batch, batch_totals(batch))
        found.append(metrics)
    once, thrice = found
    assert np.isclose(thrice['loss'] - once['loss'], 2 * once['ar_loss'], rtol=1e-4)


def test_heads_may_guess_further_than_answers_reach():
    model = Model(SHALLOW, params_of(SHALLOW), byte_tokenizer(), 'tiny')
    batch = make_batch(samples(), 4, 0, 0, None)
    ahead = batch.ar_weight_BA.shape[1] + 2
    sizes = HeadsConfig(nodes=4, ahead=ahead, own_table=False)
    objective = of_heads('medusa', sizes, model, LossWeights(), batch, seed=0)
    _, metrics = jax.jit(objective.loss)(objective.params, model.params, batch, batch_totals(batch))
    assert np.isfinite(metrics['loss']) and metrics[f'accuracy_{ahead}'] == 0


def test_rows_without_a_prompt_are_not_trained_on(tmp_path, capsys):
    rows = [{'prompt': 'a question' * (i % 2), 'answer': 'an answer'} for i in range(8)]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = TrainConfig(objective='ar', model='embedded-target', data=f'{path}#all')
    model, kept = prepare(settings, None, Console(), tmp_path)
    assert model.config.bos_id is None
    assert len(kept) == 4 and all(len(sample.prompt) for sample in kept)
    assert '4 samples without a prompt left out' in capsys.readouterr().err


def test_repetition_that_grows_is_reported():
    before = {'repetitive': 0.1}
    assert alarm({'repetitive': 0.3}, before) is None
    assert '31% of the held-out answers repeat' in alarm({'repetitive': 0.31}, before)


def tiny_run(steps: int = 6, **changes):
    """A model, samples, held-out prompts and a plan small enough for a test."""
    model = Model(SHALLOW, params_of(SHALLOW), byte_tokenizer(), 'tiny')
    rows = [Example(str(i), 'abc'[i % 3] * 3, 'x') for i in range(3)]
    source = Source('held', rows, lambda example, text: text.startswith('x'))
    plan = RunPlan(
        steps=steps,
        batch=4,
        seed=0,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        noise=Noise(windows=2),
        held_out=HeldOut(every=3, prompts=3, max_tokens=8, block=4),
        log_every=1,
        save_every=2,
    )
    objective = of_text(model, LossWeights(ar_weight=1.0, global_weight=1.0), block=4)
    return objective, samples(), source, dataclasses.replace(plan, **changes)


def without_speed(directory):
    drop = ('tokens_per_second',)
    lines = read_metrics(directory / 'metrics.jsonl')
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


@pytest.mark.slow
def test_an_interrupted_run_ends_like_an_uninterrupted_one(mixed_dtypes, tmp_path, monkeypatch):
    objective, data, source, plan = tiny_run()
    train(tmp_path / 'whole', objective, data, source, plan)

    calls = {'n': 0}
    record = training_run._record

    def crash(run, step, numbers):
        calls['n'] += 1
        if calls['n'] in (2, 5, 9):  # before the first checkpoint, twice, and after it
            raise KeyboardInterrupt
        record(run, step, numbers)

    monkeypatch.setattr(training_run, '_record', crash)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / 'parts', objective, data, source, plan)
    train(tmp_path / 'parts', objective, data, source, plan)
    assert without_speed(tmp_path / 'parts') == without_speed(tmp_path / 'whole')
    weights = 'model/model.safetensors'
    assert (tmp_path / 'parts' / weights).read_bytes() == (
        tmp_path / 'whole' / weights
    ).read_bytes()
    loaded = load(str(tmp_path / 'whole'))
    assert loaded.config == SHALLOW


def test_a_signal_saves_and_says_how_to_go_on(mixed_dtypes, tmp_path, monkeypatch):
    objective, data, source, plan = tiny_run()
    enter = training_run._stop_signals.__enter__

    def stopped(self):
        enter(self).came = True
        return self

    monkeypatch.setattr(training_run._stop_signals, '__enter__', stopped)
    with pytest.raises(Interrupted, match='saved at step 1') as e:
        train(tmp_path, objective, data, source, plan)
    assert e.value.exit_code == 75
    monkeypatch.undo()
    train(tmp_path, objective, data, source, plan)
    steps = [m['step'] for m in without_speed(tmp_path) if 'loss' in m]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_best_few_models_are_kept(mixed_dtypes, tmp_path, monkeypatch):
    objective, data, source, plan = tiny_run()
    test = dataclasses.replace(plan.held_out, every=1, keep=2)
    scores = iter([0.2, 0.5, 0.1, 0.5, 0.3, 0.4])
    monkeypatch.setattr(training_run, 'score', lambda *_: next(scores))
    train(tmp_path, objective, data, source, dataclasses.replace(plan, held_out=test))
    assert sorted(p.name for p in (tmp_path / 'best').iterdir()) == ['2', '4']
    best = load(str(tmp_path / 'best' / '4')).params['norm']  # the later of equals
    np.testing.assert_array_equal(best, load(str(tmp_path)).params['norm'])


@pytest.mark.parametrize('quality', ['check', 'agreement'])
def test_a_model_that_learns_texts_is_kept_by_its_right_answers_or_else_the_last(
    mixed_dtypes, tmp_path, monkeypatch, quality
):
    """Agreement with the model before training would keep the one that learnt least."""
    objective, data, source, plan = tiny_run(noise=None)
    test = dataclasses.replace(plan.held_out, every=1, quality=quality)
    right, kept = iter([0.2, 0.5, 0.1, 0.5, 0.3, 0.4]), []
    monkeypatch.setattr(training_run, 'share_right', lambda *_: next(right, 0.2))
    monkeypatch.setattr(training_run, 'keep', lambda directory, trained, *_: kept.append(trained))
    model = objective.trained(objective.params).model
    objective = of_text(model, LossWeights(ar_weight=1.0, global_weight=0.0), block=4)
    train(tmp_path, objective, data, source, dataclasses.replace(plan, held_out=test))
    tests = [m for m in read_metrics(tmp_path / 'metrics.jsonl') if 'held_out_score' in m]
    assert len(kept) == (6 if quality == 'agreement' else 2)
    assert best_numbers(tmp_path)['step'] == (6 if quality == 'agreement' else 3)
    assert len(tests) == 6


def damage(checkpoint) -> None:
    for path in checkpoint.rglob('*'):
        if path.is_file() and path.stat().st_size and path.name != SUMS:
            path.write_bytes(path.read_bytes()[:-1] + b'!')


def test_a_damaged_checkpoint_is_set_aside_and_training_goes_on_from_the_one_before(
    mixed_dtypes, tmp_path
):
    objective, data, source, plan = tiny_run()
    train(tmp_path / 'whole', objective, data, source, plan)
    train(tmp_path / 'bad', objective, data, source, plan)
    damage(tmp_path / 'bad/checkpoints/6')
    notes = []
    train(tmp_path / 'bad', objective, data, source, plan, note=notes.append)
    assert (tmp_path / 'bad/damaged-checkpoint-6').is_dir() and 'going back' in notes[0]
    assert without_speed(tmp_path / 'bad') == without_speed(tmp_path / 'whole')


@pytest.mark.parametrize('how', ['damaged', 'emptied', 'gone'])
def test_a_run_whose_checkpoints_are_lost_is_left_as_it_is(mixed_dtypes, tmp_path, how):
    objective, data, source, plan = tiny_run()
    train(tmp_path, objective, data, source, plan)
    kept = [tmp_path / 'metrics.jsonl', tmp_path / 'model/model.safetensors']
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept]
    for step in (tmp_path / 'checkpoints').iterdir():
        damage(step)
    if how != 'damaged':
        shutil.rmtree(tmp_path / 'checkpoints')
    if how == 'emptied':
        (tmp_path / 'checkpoints').mkdir()
    for _ in range(2):
        with pytest.raises(DataError, match='damaged or gone; it is left as it is'):
            train(tmp_path, objective, data, source, plan)
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in kept] == before


def test_a_finished_run_whose_model_is_gone_makes_it_again(mixed_dtypes, tmp_path):
    objective, data, source, plan = tiny_run(held_out=HeldOut(every=6, prompts=3, max_tokens=8))
    train(tmp_path, objective, data, source, plan)
    model, checkpoint = tmp_path / 'model/model.safetensors', tmp_path / 'checkpoints/6'
    before, saved = model.read_bytes(), checkpoint.stat().st_mtime_ns
    shutil.rmtree(model.parent)
    notes = []
    train(tmp_path, objective, data, source, plan, note=notes.append)
    assert model.read_bytes() == before and checkpoint.stat().st_mtime_ns == saved
    assert 'what was kept is gone' in notes[0]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(mixed_dtypes, tmp_path):
    objective, data, source, plan = tiny_run(steps=4, max_skipped=2)
    train(tmp_path, objective, data, source, plan)

    def newest():
        state = new_state(make_optimizer(plan.optimizer, plan.steps), objective.params)
        with open_checkpoints(tmp_path / 'checkpoints', lambda text: None) as checkpoints:
            return restore(checkpoints, state)[0]

    def broken(*arguments):
        loss, metrics = objective.loss(*arguments)
        return loss * jnp.nan, metrics

    good, longer = newest(), dataclasses.replace(plan, steps=40)
    failing = dataclasses.replace(objective, loss=broken)
    # Noticed where a line is logged, and where a checkpoint would be saved.
    for step, every in ((7, {'log_every': 1}), (8, {'log_every': 40, 'save_every': 4})):
        held_out = dataclasses.replace(plan.held_out, every=40)
        noticed = dataclasses.replace(longer, held_out=held_out, **every)
        with pytest.raises(NumericalError, match=rf'step {step}: .*NaN.*--model {tmp_path}'):
            train(tmp_path, failing, data, source, noticed)
        kept = newest()
        assert int(good.step) == int(kept.step) == 4
        for a, b in zip(jax.tree.leaves(good.params), jax.tree.leaves(kept.params), strict=True):
            np.testing.assert_array_equal(a, b)
