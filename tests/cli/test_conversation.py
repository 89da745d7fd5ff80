"""A chat in a terminal: who says what, and what Ctrl-C and the end of input do."""

import contextlib
import io
import signal
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console as Rich

from cllm_jax.cli.console import Console
from cllm_jax.cli.conversation import converse
from cllm_jax.errors import ConfigError
from cllm_jax.hf.write import write_model
from tests.terminal import Terminal
from tests.tiny import chat_model

END = EOFError()


def talk(monkeypatch, turns, answer, typed: bool = True, chat=()) -> list[tuple[str, str]]:
    """Who said what; `turns` are what `input` returns or raises."""
    lines = iter(turns)

    def read():
        if isinstance(line := next(lines), BaseException):
            raise line
        return line

    monkeypatch.setattr('builtins.input', read)
    monkeypatch.setattr(sys, 'stdin', SimpleNamespace(isatty=lambda: typed))
    converse(Console(), answer, chat := list(chat))
    assert not list(lines), 'the rest was not read'
    return [(message['role'], message['content']) for message in chat]


def echo(chat):
    yield 'you said '
    yield chat[-1]['content']
    return ''


@pytest.mark.parametrize('end', ['', '  ', END, KeyboardInterrupt()])
@pytest.mark.parametrize('typed', [True, False])
def test_turns_and_answers_follow_each_other_until_the_end(end, typed, monkeypatch, capsys):
    before = [{'role': 'system', 'content': 's'}]
    asked = []
    said = talk(
        monkeypatch,
        ['one', ' two ', end],
        lambda chat: asked.append([m['content'] for m in chat]) or echo(chat),
        typed,
        before,
    )
    assert said == [
        ('system', 's'),
        *(('user', 'one'), ('assistant', 'you said one')),
        *(('user', 'two'), ('assistant', 'you said two')),
    ]
    assert asked == [['s', 'one'], ['s', 'one', 'you said one', 'two']]
    told = capsys.readouterr()
    assert told.out == 'you said one\nyou said two\n'
    assert told.err.count('> ') == 3 * typed


def test_ctrl_c_ends_the_answer_and_its_text_stays(monkeypatch, capsys):
    def broken(chat):
        yield 'as far '
        yield 'as it'
        if len(chat) == 1:
            raise KeyboardInterrupt
        return 'cut off'

    said = talk(monkeypatch, ['one', 'two', END], broken)
    assert [text for _, text in said] == ['one', 'as far as it', 'two', 'as far as it']
    told = capsys.readouterr()
    assert told.out == 'as far as it\nas far as it\n'
    assert told.err.count('(interrupted)') == told.err.count('(cut off)') == 1


def test_ctrl_c_ends_an_answer_although_its_exception_was_swallowed(monkeypatch, capsys):
    def deaf(chat):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        while True:
            yield 'word '

    before = signal.getsignal(signal.SIGINT)
    said = talk(monkeypatch, ['one', 'two', END], deaf)
    assert [text for _, text in said] == ['one', 'word ', 'two', 'word ']
    assert capsys.readouterr().err.count('(interrupted)') == 2
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_before_a_turn_ends_the_chat_although_its_exception_was_swallowed(monkeypatch):
    """One that comes while the prompt is printed."""

    def prompt(*text, **options):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Rich, 'print', prompt)
    assert talk(monkeypatch, [], echo) == []


def refuse(chat):
    if chat[-1]['content'] == 'bad':
        raise ConfigError('too long; say less')
    yield from echo(chat)
    return ''


def test_a_turn_that_cannot_be_answered_is_taken_back(monkeypatch, capsys):
    said = talk(monkeypatch, ['bad', 'good', END], refuse)
    assert said == [('user', 'good'), ('assistant', 'you said good')]
    assert capsys.readouterr().err.count('error: too long; say less\n') == 1


def test_where_nobody_can_type_another_turn_it_is_an_error(monkeypatch):
    with pytest.raises(ConfigError, match='too long'):
        talk(monkeypatch, ['bad', 'good', END], refuse, typed=False)


def test_what_is_not_utf_8_reaches_the_check_of_the_turn(monkeypatch):
    wrong = UnicodeDecodeError('utf-8', b'caf\xe9\n', 3, 4, 'invalid')
    said = talk(monkeypatch, [wrong, END], echo)
    assert said[0] == ('user', 'caf\udce9')


def test_without_standard_input_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', None)
    converse(Console(), echo, [])
    assert capsys.readouterr().out == ''


def test_lines_of_a_pipe_are_turns(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('one\ntwo\n'))
    converse(Console(), echo, chat := [])
    assert len(chat) == 4 and capsys.readouterr() == ('you said one\nyou said two\n', '')


@pytest.mark.slow
def test_a_chat_in_a_terminal(tmp_path, usual_signals):
    """Ctrl-C ends an answer that would go on for minutes, and then the program, quietly."""
    model = chat_model(eos_ids=(), max_positions=1 << 20)
    write_model(tmp_path / 'm', model, dtype='float32')
    common = ('-m', 'cllm_jax.decode', '--chat', '--model', tmp_path / 'm', '--drafter', 'ar')
    terminal = Terminal(*common, '--max-tokens', '100000')
    try:
        terminal.wait_for(b'> ')
        terminal.type('the city')
        terminal.wait_for(b'the city\r\n')
        terminal.wait_for('\ufffd'.encode())
        terminal.interrupt()
        terminal.wait_for(b'(interrupted)\r\n> ')
        terminal.type('and then?')
        terminal.wait_for('\ufffd'.encode())
        terminal.interrupt()
        terminal.wait_for(b'(interrupted)\r\n> ')
        assert terminal.code_after_interrupt() == 0
    finally:
        terminal.close()
    assert b'Traceback' not in terminal.shown and b'error' not in terminal.shown
