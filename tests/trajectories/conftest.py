"""One collection that several files read."""

import pytest

from tests.trajectories.examples import MODEL, SETTINGS, collect_into, source


@pytest.fixture(scope='session')
def collected(tmp_path_factory):
    """A directory that nobody changes, and the counts."""
    directory = tmp_path_factory.mktemp('collected')
    return directory, collect_into(directory, SETTINGS, MODEL, source())
