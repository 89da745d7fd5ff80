"""A chat in a terminal: the user's turns from standard input, the answers to standard output."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from cllm_jax.cli.console import Console
from cllm_jax.errors import CllmError

Chat = list[dict[str, str]]
Answer = Callable[[Chat], Generator[str, None, str]]
"""Yields an answer in pieces, and returns why it was cut off, or ''."""


def converse(console: Console, answer: Answer, chat: Chat) -> None:
    """Read turns and print answers, until an empty line, the end of input, or Ctrl-C between them.

    Ctrl-C during an answer ends the answer. `chat` holds what was said before, and takes the rest.
    A turn that cannot be answered is taken back if somebody is there to type another.
    """
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        console.note('An empty line or Ctrl-C ends the chat; Ctrl-C ends an answer first.')
    try:
        with _interrupts() as stopped:
            while turn := _asked(console, typed, stopped):
                chat.append({'role': 'user', 'content': turn})
                try:
                    text = _answered(console, answer(chat), stopped)
                except CllmError as error:
                    if not typed:
                        raise
                    console.note(f'error: {error}')
                    chat.pop()
                else:
                    chat.append({'role': 'assistant', 'content': text})
    except (EOFError, KeyboardInterrupt):
        if typed:
            console.note('')  # leaves the line of the prompt


@contextmanager
def _interrupts() -> Iterator[Event]:
    """An event that Ctrl-C sets; callbacks may swallow the KeyboardInterrupt that it raises."""
    stopped = Event()

    def interrupt(number: int, frame: Any) -> None:
        stopped.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _asked(console: Console, typed: bool, stopped: Event) -> str:
    """The next turn, '' if there is none."""
    if sys.stdin is None:  # closed by whoever started this
        return ''
    if typed:
        console.err.print('> ', end='')
    if stopped.is_set():
        raise KeyboardInterrupt
    try:
        return input().strip()
    except UnicodeDecodeError as error:
        # The bytes, as characters that no text has: what checks a turn refuses them.
        return error.object.decode(errors='surrogateescape').strip()


def _answered(console: Console, pieces: Generator[str, None, str], stopped: Event) -> str:
    """Print an answer as it comes; its text, as far as it came."""
    text, cut = '', 'interrupted'
    try:
        while not stopped.is_set():
            piece = next(pieces)
            text += piece
            print(piece, end='', flush=True)
    except StopIteration as end:
        cut = end.value
    except KeyboardInterrupt:
        pass
    stopped.clear()
    print(flush=True)
    if cut:
        console.note(f'({cut})')
    return text
