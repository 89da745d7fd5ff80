"""Draw docs/watch.svg: what `decode --watch` shows at the moment at which Jacobi has finished.

    python docs/make_watch_svg.py

The clocks count forwards and no times are shown, so that the same versions give the same file.
"""

import dataclasses
import io
import itertools
import re
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console

import cllm_jax as cllm
from cllm_jax.decoding.request import Request
from cllm_jax.evaluation.race import Runner, race
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.terminal import draw

PROMPT = (
    'Question: Henry has 13 cookies in a tin. He gives 7 cookies to Emma. Emma has 9 more cookies '
    'than Henry. How many cookies do they have together?\nAnswer:'
)
OUT = Path(__file__).with_name('watch.svg')
WIDTH, HEIGHT = 104, 40
# The picture of rich asks a server for a font.
FORMAT = re.sub(r'@font-face \{\{.*?\}\}', '', CONSOLE_SVG_FORMAT, flags=re.S)


def picture(runners: list[Runner]) -> str:
    """The SVG of a moment of a race."""
    untimed = [
        dataclasses.replace(r, trace=dataclasses.replace(r.trace, seconds=None)) for r in runners
    ]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(draw(untimed, WIDTH, HEIGHT))
    return console.export_svg(title='cllm decode --watch', code_format=FORMAT, unique_id='watch')


def main() -> None:
    model = cllm.load('embedded', 'float32')
    plain = Method(model, Request(cllm.AutoRegressive(), exact='off'))
    named = {'AR': plain, 'Jacobi': plain.with_drafter(cllm.Jacobi(16))}
    frames = race(named, PROMPT, clock=itertools.count().__next__)
    runners = next(frame for frame in frames if frame[1].finished)
    OUT.write_text(picture(runners), 'utf-8')
    print(
        f'{OUT}: {len(runners[1].trace.answer)} tokens in {len(runners[1].trace.forwards)} forwards'
    )


if __name__ == '__main__':
    main()
