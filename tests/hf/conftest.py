"""Directories of a tiny model, and a machine without a network."""

import socket

import pytest

from tests.tiny_model import write_sharded, write_single


@pytest.fixture
def single(tmp_path):
    return write_single(tmp_path / 'model')


@pytest.fixture
def sharded(tmp_path):
    return write_sharded(tmp_path / 'shards')


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine fails the test, however it is handled."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError('no network in tests')

    for name in ('getaddrinfo', 'gethostbyname', 'create_connection'):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket.socket, 'connect_ex', refuse)
    yield
    assert not tried
