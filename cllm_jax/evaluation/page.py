"""One HTML page that plays decodes: `page.html` with their data in it."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.evaluation.outcome import AFTER, OUTCOMES, Statistics, outcomes, statistics
from cllm_jax.evaluation.trace import DecodeTrace

TEMPLATE = Path(__file__).with_name('page.html')
PLACE = '{"data": "is put here"}'


def page(traces: Sequence[DecodeTrace]) -> str:
    """The page. Decodes of one prompt are shown together, each method in the order it came."""
    data = json.dumps(_data(traces), separators=(',', ':'))
    # Texts are a model's: nothing in them may end the script that holds them.
    return TEMPLATE.read_text('utf-8').replace(PLACE, data.replace('<', '\\u003c'))


def _data(traces: Sequence[DecodeTrace]) -> dict[str, Any]:
    methods: dict[tuple[str, str], list[DecodeTrace]] = {}
    prompts: dict[str, list[DecodeTrace]] = {}
    for trace in traces:
        methods.setdefault((trace.model, trace.name), []).append(trace)
        prompts.setdefault(trace.prompt, []).append(trace)
    found = {key: statistics(each) for key, each in methods.items()}
    plain = [found[key] for key in methods if key[1].partition(',')[0] == AutoRegressive.title]
    base, pieces = max((_speed(each) or 0 for each in plain), default=0), _Pieces()
    numbers = {key: number for number, key in enumerate(methods)}
    shown = [
        {'text': text, 'decodes': [_decode(t, numbers[t.model, t.name], pieces) for t in some]}
        for text, some in prompts.items()
    ]
    about = [
        {'model': key[0], 'name': key[1], 'timed': each[0].timed} | _numbers(found[key], base)
        for key, each in methods.items()
    ]
    tokens = list(pieces.numbers)
    return {'outcomes': OUTCOMES, 'methods': about, 'prompts': shown, 'pieces': tokens}


class _Pieces:
    """The tokens of all decodes, id and text, each with a number."""

    def __init__(self):
        self.numbers: dict[tuple[int, str], int] = {}

    def of(self, trace: DecodeTrace, tokens: Sequence[int]) -> list[int]:
        each = ((token, trace.pieces.get(token, f'#{token}')) for token in tokens)
        return [self.numbers.setdefault(piece, len(self.numbers)) for piece in each]


def _decode(trace: DecodeTrace, method: int, pieces: _Pieces) -> dict[str, Any]:
    """A decode as the page draws it, without nodes after the end of the answer."""
    forwards = []
    for forward, row in zip(trace.forwards, outcomes(trace), strict=True):
        kept = [node for node, outcome in enumerate(row) if outcome != AFTER]
        number = {-1: -1} | {node: i for i, node in enumerate(kept)}
        forwards.append(
            {
                'start': forward.start,
                'committed': len(forward.committed),
                'tokens': pieces.of(trace, [forward.tokens[node] for node in kept]),
                'parents': [number[forward.parents[node]] for node in kept],
                'outcomes': [OUTCOMES.index(row[node]) for node in kept],
            }
        )
    answer = pieces.of(trace, trace.answer)
    return {'method': method, 'seconds': trace.seconds, 'answer': answer, 'forwards': forwards}


def _speed(found: Statistics) -> float | None:
    return found.seconds and found.tokens / found.seconds


def _numbers(found: Statistics, base: float) -> dict[str, Any]:
    """What the tables show; the speed-up is over the fastest AR on the page."""
    speed = _speed(found)
    more = {'tokens_per_second': speed, 'speedup': speed / base if speed and base else None}
    return dataclasses.asdict(found) | more
