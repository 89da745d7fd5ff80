"""Notes about a machine: found again under the same facts, and as good as none if damaged."""

import os

import pytest

from cllm_jax.runs.notes import read_note, write_note

FACTS = {'model': 'Llama(...)', 'versions': ['1', '2']}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path


def test_a_note_is_found_under_its_facts_alone(cache):
    assert read_note('class', FACTS) is None
    path = write_note('class', FACTS, True)
    assert path.is_relative_to(cache)
    assert read_note('class', FACTS) is True
    assert read_note('cost', FACTS) is None
    assert read_note('class', FACTS | {'model': 'another'}) is None
    assert write_note('class', FACTS, [1.5]) == path and read_note('class', FACTS) == [1.5]


@pytest.mark.parametrize('content', ['', '{"value": true}', '[]', '{"facts": 1, "value": true}'])
def test_a_damaged_note_is_none(content):
    write_note('class', FACTS, True).write_text(content)
    assert read_note('class', FACTS) is None


def test_without_a_place_for_notes_there_are_none(cache, monkeypatch):
    (cache / 'file').write_text('')
    monkeypatch.setenv('XDG_CACHE_HOME', str(cache / 'file'))
    assert write_note('class', FACTS, True) is None and read_note('class', FACTS) is None


def test_what_is_not_a_file_is_not_read(cache):
    """A pipe would be waited for."""
    path = write_note('class', FACTS, True)
    path.unlink()
    os.mkfifo(path)
    assert read_note('class', FACTS) is None


def test_a_relative_place_is_ignored(cache, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', 'here')
    monkeypatch.setenv('HOME', str(cache))
    assert write_note('class', FACTS, 1).parent == cache / '.cache' / 'cllm_jax'


def test_without_the_variable_they_lie_in_the_cache_of_the_user(cache, monkeypatch):
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(cache))
    path = write_note('class', FACTS, 1)
    assert path.parent == cache / '.cache' / 'cllm_jax' and os.listdir(path.parent) == [path.name]
