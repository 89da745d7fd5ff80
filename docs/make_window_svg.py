"""Draw docs/window.svg: one answer of the embedded CLLM, and its window at every forward.

    python docs/make_window_svg.py

The picture is a function of the prompt and of the embedded model: the same versions give the same
file. Only the public API of the package is used.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

PROMPT = (
    'Question: Henry has 13 cookies in a tin. He gives 7 cookies to Emma. Emma has 9 more cookies '
    'than Henry. How many cookies do they have together?\nAnswer:'
)
BLOCK = 16
OUT = Path(__file__).with_name('window.svg')

COMMITTED, AHEAD, WRONG, RANDOM = 'committed', 'ahead', 'wrong', 'random'
LEGEND = {
    COMMITTED: 'committed: part of the answer',
    AHEAD: 'right, but after a wrong guess',
    WRONG: 'wrong guess',
    RANDOM: 'random: not computed yet',
}
STYLE = """
.card{fill:#101828;stroke:#344054}
text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace}
.title,.note{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
.title{fill:#f9fafb;font-size:18px;font-weight:600}
.note{fill:#a4adba}
.number{fill:#a4adba;text-anchor:end}
.word text{text-anchor:middle}
.committed{fill:#2dd4a7}.committed text{fill:#052e24;font-weight:600}
.ahead{fill:#12352f;stroke:#2dd4a7;stroke-width:1.2}.ahead text{fill:#7ff0d0;stroke:none}
.wrong{fill:#4a2412;stroke:#f79009}.wrong text{fill:#fdb874;stroke:none}
.random{fill:none;stroke:#475467;stroke-dasharray:2 2}.random text{fill:#8490a5;stroke:none}
.rest{fill:#1d2939}.known{fill:#1d5c50}
.map .committed,.map .ahead,.map .wrong,.map .random{stroke:none}
.map .ahead{fill:#1fa587}.map .wrong{fill:#f79009}.map .random{fill:#5d697c}
"""
"""Kinds of tokens differ in more than their colour: filled, outlined, dashed."""

WIDTH, MARGIN, TOP, LINE = 880, 24, 100, 29
CHARACTER, PADDING, GAP, HEIGHT = 7.25, 5, 3, 22
WINDOW = MARGIN + 34
"""Where the tokens of a row begin, after the number of its forward."""
MAP, MARK = 236, 12
"""Width of the whole answer at the right of a row, and height of its marks."""

Row = list[tuple[int, int, str]]
"""A window: for each of its tokens the place in the answer, the token and its kind."""


def windows(answer: Sequence[int], states: np.ndarray, start: np.ndarray) -> list[Row]:
    """The window of each forward after the first, without what lies after the end of the answer.

    Args:
      answer: the tokens of the answer.
      states: int32 `[I, N]`, what each forward verified; slot 0 is committed before.
      start: int32 `[I]`, the place of slot 0 in the answer.
    """
    rows, nodes = [], states.shape[1]
    computed = nodes - 1  # the first forward has a window too, from the last token of the prompt
    ends = [*map(int, start[1:]), len(answer)]
    for state, first, end in zip(states, map(int, start), ends, strict=True):
        row = []
        for place in range(first, min(first + nodes, len(answer))):
            token = int(state[place - first])
            if place < end:
                kind = COMMITTED
            elif place > computed:
                kind = RANDOM
            else:
                kind = AHEAD if token == answer[place] else WRONG
            row.append((place, token, kind))
        rows.append(row)
        computed = first + nodes
    return rows


def box(x: float, y: float, width: float, height: float, kind: str = '', radius: float = 5) -> str:
    named = f' class="{kind}"' if kind else ''
    return (
        f'<rect x="{x:.5g}" y="{y:.5g}" width="{width:.4g}" height="{height:.4g}" '
        f'rx="{radius}"{named}/>'
    )


def label(x: float, y: float, text: str, kind: str = '') -> str:
    named = f' class="{kind}"' if kind else ''
    return f'<text x="{x:.5g}" y="{y:.5g}"{named}>{escape(text)}</text>'


def shown(token: str) -> str:
    """A token as it can be read: line breaks and single spaces get a sign."""
    return token.strip() or ('↵' if '\n' in token else '␣')


def tokens_of(y: float, row: Row, word: Callable[[int], str]) -> list[str]:
    """The tokens of a window, one after the other."""
    parts, x = ['<g class="word">'], float(WINDOW)
    for _, token, kind in row:
        text = shown(word(token))
        width = len(text) * CHARACTER + 2 * PADDING
        parts.append(f'<g class="{kind}">')
        parts += [box(x, y, width, HEIGHT), label(x + width / 2, y + 15.5, text), '</g>']
        x += width + GAP
    return [*parts, '</g>']


def place_of(y: float, row: Row, length: int) -> list[str]:
    """The same window in the whole answer, one mark for each token."""
    step, x, y = MAP / length, WIDTH - MARGIN - MAP, y + (HEIGHT - MARK) / 2
    parts = ['<g class="map">', box(x, y, MAP, MARK, 'rest', 2)]
    if row and row[0][0]:
        parts.append(box(x, y, row[0][0] * step, MARK, 'known', 2))
    for place, _, kind in row:
        parts.append(box(x + place * step + 0.3, y, step - 0.6, MARK, kind, 0.8))
    return [*parts, '</g>']


def draw(
    answer: Sequence[int], states: np.ndarray, start: np.ndarray, word: Callable[[int], str]
) -> str:
    """The picture as SVG; `word` gives the text of a token, the rest is as `windows` takes it."""
    rows, forwards, nodes = windows(answer, states, start), len(states) + 1, states.shape[1]
    height, title = TOP + forwards * LINE + 52, f'{len(answer)} tokens in {forwards} forwards'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img">',
        f'<title>Jacobi decoding with a window of {nodes} tokens: {title}</title>',
        f'<style>{STYLE}</style>',
        box(0.5, 0.5, WIDTH - 1, height - 1, 'card', 12),
        label(MARGIN, 38, title, 'title'),
        label(
            MARGIN,
            58,
            f'Written one at a time they take {len(answer)}. '
            'The filled tokens, row after row, are the same answer.',
            'note',
        ),
        label(WINDOW, TOP - 10, f'the window of {nodes} tokens that a forward verifies', 'note'),
        label(WIDTH - MARGIN - MAP, TOP - 10, 'where it is in the answer', 'note'),
    ]
    for i in range(forwards):
        y = TOP + i * LINE
        parts.append(label(MARGIN + 18, y + 15.5, str(i + 1), 'number'))
        if i == 0:
            parts.append(
                label(
                    WINDOW, y + 15, f'the prompt, and {nodes - 1} random guesses after it', 'note'
                )
            )
        else:
            parts += tokens_of(y, rows[i - 1], word)
        parts += place_of(y, rows[i - 1] if i else [], len(answer))
    x, y = float(MARGIN), TOP + forwards * LINE + 18
    for kind, meaning in LEGEND.items():
        parts += [box(x, y, 24, 15, kind, 4), label(x + 32, y + 12, meaning, 'note')]
        x += 32 + 5.9 * len(meaning) + 38
    return '\n'.join([*parts, '</svg>', ''])


def main() -> None:
    import cllm_jax as cllm

    model = cllm.load('embedded', 'float32')
    result = cllm.decode(model, [PROMPT], cllm.Jacobi(block=BLOCK), trace=True)
    answer, trace = result.tokens[0], result.trajectories[0]
    text = draw(answer, trace.states, trace.start, lambda token: model.tokenizer.decode([token]))
    OUT.write_text(text, 'utf-8')
    print(f'{OUT}: {len(answer)} tokens in {result.forwards[0]} forwards')


if __name__ == '__main__':
    main()
