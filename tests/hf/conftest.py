"""Directories of a tiny model."""

import pytest

from tests.tiny_model import write_sharded, write_single


@pytest.fixture
def single(tmp_path):
    return write_single(tmp_path / 'model')


@pytest.fixture
def sharded(tmp_path):
    return write_sharded(tmp_path / 'shards')
