"""What a race looks like: tokens in the style of what became of them, within the screen."""

import io

import pytest
from rich.console import Console

from cllm_jax.evaluation.outcome import COMMITTED, FORWARDED, OPEN, OUTCOMES, RANDOM, WRONG
from cllm_jax.evaluation.race import Runner
from cllm_jax.evaluation.terminal import STYLES, UNKNOWN, draw, legend, numbers, shown
from tests.evaluation.traces import jacobi, plain


def printed(runners, width: int = 80, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(runners, width, height))
    return console.file.getvalue()


def segments(runners) -> list[tuple[str, str]]:
    """What is printed and in which style, its words in the order of the alphabet."""
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    found = console.render(draw(runners, 100, 40))
    return [(part.text.strip(), ordered(part.style)) for part in found if part.text.strip()]


def ordered(style: object) -> str:
    return ' '.join(sorted(str(style).split()))


def test_a_race_shows_both_answers_and_what_became_of_guesses():
    text = printed([Runner(plain(), True), Runner(jacobi(), True)])
    assert text.count('<1><2><3><4><5><6><7><8>') == 2
    assert '8 tokens, 8 forwards, 1.00' in text and '1,000 ms' in text
    assert '8 tokens, 5 forwards, 1.60' in text and '500 ms' in text
    left, right = (''.join(line.split('││')[i] for line in text.splitlines()[1:-2]) for i in (0, 1))
    assert '<7>' in left and ' 2 <1><7><3><4>' in right and ' 2 <1>' not in left
    assert all(word in text.splitlines()[-1] for word in (*OUTCOMES, UNKNOWN))


def test_tokens_have_the_style_of_their_outcome():
    """Two forwards of the five: of the second window the answer decides one guess as yet."""
    part = jacobi(forwards=jacobi().forwards[:2])
    found = segments([Runner(part, False)])
    window = found[[text for text, _ in found].index('2') :]
    assert window[1:5] == [
        ('<1>', ordered(STYLES[COMMITTED])),
        ('<7>', ordered(STYLES[WRONG])),
        ('<3><4>', 'none'),
        ('│', 'default'),
    ]
    ended = segments([Runner(jacobi(), True)])
    assert ('<4>', ordered(STYLES[FORWARDED])) in ended
    assert ('<8>', ordered(STYLES[COMMITTED])) in ended
    assert ('<9>', ordered(STYLES[RANDOM])) in ended


def test_outcomes_differ_in_more_than_their_colour():
    plainer = {
        word: tuple(w for w in style.split() if w in ('bold', 'underline', 'strike', 'dim', 'on'))
        for word, style in STYLES.items()
    }
    del plainer[OPEN]
    assert len(set(plainer.values())) == len(plainer)
    assert set(plainer) == set(OUTCOMES)
    assert legend().plain.split('  ')[-1] == UNKNOWN


@pytest.mark.parametrize(('width', 'height'), [(80, 24), (40, 12), (120, 50), (20, 8)])
def test_a_picture_fits_its_screen(width, height):
    long = plain(forwards=plain().forwards * 40)
    lines = printed([Runner(long, False), Runner(jacobi(), True)], width, height).splitlines()
    assert max(map(len, lines)) <= width
    if width >= 80:
        assert len(lines) < height


def test_no_token_moves_the_cursor():
    assert shown('a\n\tb') == 'a↵→b'
    assert shown('\x1b[2J\r\x07\x9b') == '·[2J···'
    assert shown('\u202eeven this') == '·even this'
    pieces = jacobi().pieces | {2: '\x1b[2J'}
    text = printed([Runner(jacobi(pieces=pieces), True)])
    assert '\x1b' not in text and '·[2J' in text


def test_a_time_that_was_not_measured_is_not_told():
    assert numbers(Runner(jacobi(seconds=None), True)).endswith('1.60 tokens/forward')
