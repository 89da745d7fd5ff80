"""The limit of decoding a token at a time is measured apart from what it judges."""

import dataclasses

import jax
import pytest

from cllm_jax.evaluation import bandwidth
from cllm_jax.runtime.backend import CPU
from tests.tiny import random_model, tiny_config

MIB = 1 << 20


@pytest.mark.parametrize('host', [True, False])
def test_all_that_is_counted_is_read(host, monkeypatch):
    """Each way reads `size` bytes per pass; a call takes one second here."""
    ticks = iter(range(100))
    monkeypatch.setattr(bandwidth.time, 'perf_counter', lambda: float(next(ticks)))
    backend = dataclasses.replace(CPU, weights_in_host_memory=host)
    passes = 1 if host else bandwidth.PASSES
    assert bandwidth.memory_bandwidth(backend, MIB, repeats=2) == MIB * passes


@pytest.mark.parametrize('tied', [True, False])
def test_a_token_reads_the_matrices_but_not_the_embeddings_of_other_tokens(tied):
    model = random_model(config=tiny_config(tied=tied))
    table = 0 if tied else model.params['embed'].nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert bandwidth.bytes_per_token(model.params) == whole - table
