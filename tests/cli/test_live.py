"""Pictures that follow each other: in a terminal all of them, elsewhere the last one."""

import pytest
from rich.text import Text

from cllm_jax.cli.live import play
from tests.terminal import Terminal

ENDLESS = """
import itertools
from rich.text import Text
from cllm_jax.cli.guard import guard
from cllm_jax.cli.live import play
frames = ((i / 100, i) for i in itertools.count())
guard(lambda: play(frames, lambda i, width, height: Text(f'picture {i} of {width}'), 1.0))
"""


def test_where_no_terminal_is_the_last_picture_is_printed_at_once(capsys):
    seen = []

    def draw(frame, width, height):
        seen.append((frame, width))
        return Text(f'picture {frame}')

    assert play([(0.0, 'a'), (1e6, 'b')], draw, 1e6) == 'b'
    assert seen == [('b', 80)]
    assert capsys.readouterr().out == 'picture b\n'


@pytest.mark.usefixtures('usual_signals')
def test_ctrl_c_ends_with_the_picture_and_a_cursor_below_it(monkeypatch):
    monkeypatch.setenv('TERM', 'xterm')
    terminal = Terminal('-c', ENDLESS)
    try:
        terminal.wait_for(b'picture 0 of 80')
        terminal.wait_for(b'picture 3 of 80')
        assert terminal.code_after_interrupt() == 130
        terminal.read_all()
    finally:
        terminal.close()
    hidden, shown = b'\x1b[?25l', b'\x1b[?25h'
    assert terminal.shown.startswith(hidden) and terminal.shown.rindex(shown) > 0
    assert terminal.shown.endswith((shown, shown + b'\r\n', b'\r\n' + shown))
    assert b'Traceback' not in terminal.shown
