"""Where the time of a decoding iteration goes: a profile of the loop, summed by part of the model.

XLA names every instruction it runs by the operation it came from, and the parts below are told by
those names; products of a single row lose theirs and are told by their shapes. What XLA made up
itself, copies and conversions above all, is `other`.
"""

import glob
import gzip
import json
import re
import tempfile
from collections import Counter
from typing import Any

import jax
import numpy as np

from cllm_jax.decoding.engine import decoder_of, programs_of, run_until, start
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.evaluation.forward_cost import ITERATIONS, NeverRight, endless
from cllm_jax.hf.model import Model

PARTS = (
    ('attention', r'/(attention|rope)/'),
    ('cache', r'/cache/'),
    ('norms', r'/norm/'),
    ('vocabulary', r'\.logits/'),
    ('layer matrices', r'Llama/.*dot_general'),
    ('activations', r'Llama/'),
    ('choice and acceptance', r'while/body/'),
)
"""Parts and the operations that belong to them; the first that matches counts."""
INSTRUCTION = re.compile(r'\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\(')
OPERATION = re.compile(r'op_name="([^"]*)"')


def milliseconds_by_part(model: Model, nodes: int, prompt: int = 64) -> dict[str, float]:
    """Milliseconds per iteration of the loop, batch 1, by part; `whole` is their sum."""
    model, request = (
        endless(model),
        Request(NeverRight(nodes), ITERATIONS + 1, exact='off' if nodes == 1 else 'auto'),
    )
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, prompt)).tolist()

    def begin() -> Any:
        return jax.block_until_ready(start(model, request, ids, row_keys(0, [0])))

    state = begin()
    bound = (np.int32(ITERATIONS + 1), np.int32(1))
    lowered = programs_of(model, request).advance.lower(decoder_of(model, request), *bound, state)
    program = lowered.compile().as_text()
    jax.block_until_ready(run_until(model, request, state, ITERATIONS + 1))
    state = begin()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(run_until(model, request, state, ITERATIONS + 1))
        (path,) = glob.glob(f'{directory}/**/*.trace.json.gz', recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)['traceEvents']
    part_of = _part_of_each(program, model.config.vocab_size)
    spent: Counter = Counter(dict.fromkeys([name for name, _ in PARTS] + ['other'], 0.0))
    for event in events:
        if event.get('ph') == 'X' and event['name'] in part_of:
            spent[part_of[event['name']]] += event['dur'] / 1e3 / ITERATIONS
    return dict(spent) | {'whole': sum(spent.values())}


def _part_of_each(program: str, vocabulary: int) -> dict[str, str]:
    """The part of every instruction of a compiled program that runs by itself."""
    found = {}
    for line in program.split('\n'):
        if not (match := INSTRUCTION.match(line)):
            continue
        name, shape, kind = match.groups()
        operation = OPERATION.search(line)
        if operation:
            hits = (part for part, pattern in PARTS if re.search(pattern, operation[1]))
            found[name] = next(hits, 'other')
        elif kind == 'dot':
            sizes = shape.split(',')
            rows = 'attention' if len(sizes) > 2 else 'layer matrices'
            found[name] = 'vocabulary' if sizes[-1] == str(vocabulary) else rows
        else:
            found[name] = 'other'
    return found
