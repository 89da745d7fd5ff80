"""A batch on several devices: nothing is communicated, and what shares a model says the same."""

import dataclasses
from unittest.mock import patch

import jax
import numpy as np

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.loop import Buffers
from cllm_jax.decoding.request import Request, encode, pad_prompts, row_keys, stop_ids
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.model.llama import param_axes
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.runtime.sharding import RULES, param_shardings
from cllm_jax.trajectories import sharded
from cllm_jax.trajectories.blocks import BlockSizes
from cllm_jax.trajectories.store import read_records
from tests.trajectories.examples import MODEL, SETTINGS, collect_into, source


def compiled(model) -> list[str]:
    """The programs of both modes."""
    mesh = sharded.mesh_of(model)
    rows = mesh.shape['data']
    batch = pad_prompts([[1, 2]] * rows, rows, 16, 30, row_keys(0, range(rows)))
    args, texts = (model.params, stop_ids(model), batch), []
    for drafter, references in ((Jacobi(8), None), (sharded.FINDER, batch.tokens_BP)):
        run = sharded.compiled_decoder(model.module, drafter, mesh, Buffers(64, 32))
        texts.append(run.lower(*args, references).compile().as_text())
    sequences, cache, *_ = run(*args, references)
    follow = sharded.compiled_follower(model.module, mesh, BlockSizes(8, 2, 64))
    lowered = follow.lower(model.params, np.int32(0), sequences, cache)
    return [*texts, lowered.compile().as_text()]


def shared(model):
    """The same model with every layer on two devices; its vocabulary of 261 is not divided."""
    mesh = make_mesh(MeshConfig(tensor=2))
    with patch.dict(RULES, vocab=None):
        places = param_shardings(param_axes(model.config), model.params, mesh)
    return dataclasses.replace(model, params=jax.device_put(model.params, places))


def test_devices_with_a_model_each_do_not_communicate():
    names = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')
    assert jax.device_count() == 8
    assert not any(name in text for name in names for text in compiled(MODEL))
    assert all('all-reduce' in text for text in compiled(shared(MODEL)))


def test_devices_that_share_a_model_collect_the_same(collected, tmp_path):
    collect_into(tmp_path, model=shared(MODEL))
    for a, b in zip(read_records(tmp_path), read_records(collected[0]), strict=True):
        assert a.id == b.id and a.answer.tolist() == b.answer.tolist()
        assert a.states.tolist() == b.states.tolist() and a.start.tolist() == b.start.tolist()


def test_references_find_answers_sooner_and_change_nothing(monkeypatch):
    prompts = [np.asarray(encode(MODEL, source()[i].prompt), np.int32) for i in range(6)]
    keys = sharded.prompt_keys(3, [f'row-{i}' for i in range(6)])
    answers = decode_all(MODEL, Request(AutoRegressive(), max_tokens=30), prompts).tokens
    with_an_error = [[*answer[:3], 259, *answer[3:]] for answer in answers]
    decoder, forwards = sharded.compiled_decoder, []

    def counting(*shape):
        def run(*args):
            decoded = decoder(*shape)(*args)
            forwards.append(np.asarray(decoded[2])[:6])
            return decoded

        return run

    monkeypatch.setattr(sharded, 'compiled_decoder', counting)
    plain, *others = (
        sharded.trajectories(MODEL, prompts, keys, texts, SETTINGS, width=32)
        for texts in ([[]] * 6, answers, with_an_error, [answer * 9 for answer in answers])
    )
    assert [found.answer.tolist() for found in plain] == answers
    for other in others:
        jax.tree.map(
            np.testing.assert_array_equal,
            *([dataclasses.asdict(x) for x in found] for found in (plain, other)),
        )
    length = np.asarray(list(map(len, answers)))
    assert (forwards[1] == -(-length // sharded.FINDER.block)).all()
    assert (forwards[2] <= forwards[1] + 2).all() and (forwards[3] == forwards[1]).all()
    assert forwards[1].sum() < 0.5 * forwards[0].sum()


def test_a_prompts_key_depends_on_the_seed_and_its_name_alone():
    def keys(seed, names):
        return jax.random.key_data(sharded.prompt_keys(seed, names)).tolist()

    together = keys(3, ['a', 'b', 'c'])
    assert keys(3, ['c', 'a']) == [together[2], together[0]]
    assert len({tuple(key) for key in [*together, *keys(4, ['a', 'b'])]}) == 5
