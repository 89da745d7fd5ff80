"""Training batches as a pure function of the step.

One packed row serves every loss in one forward:

    [ prompt | answer | pad ][ state 1 ][ state 2 ] ...

The clean part is ordinary causal text; its answer positions give the AR loss and the teacher's
logits. Each state (n tokens of a Jacobi trajectory) is a continuation of the clean text before its
first slot: it has that text's rotary positions, sees the clean tokens before it and its own earlier
tokens, and nothing else. Four integers per token say all of this (`Batch`), so the attention mask
is one comparison.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
from flax import struct

from cllm_jax.decoding.result import Trajectory
from cllm_jax.training.noise import Noise, pick, state_of

Samples = Sequence[Trajectory]
Rows = Sequence[int] | None

LENGTH_STEP = 32
ANSWER_STEP = 64
SORT_WINDOW = 16
"""Batches are cut from runs of this many batches sorted by length, to pad little."""


@struct.dataclass
class Batch:
    """One packed batch (numpy on the host). T tokens per row, of which A answer and W n states.

    Rows of logits are computed for the positions `rows`: first the A answer positions, then the
    state tokens. Teachers are indices into those rows.
    """

    tokens_BT: Any
    positions_BT: Any
    segment_BT: Any
    """-1 padding, 0 clean, 1.. the states."""
    context_BT: Any
    """A token also sees the clean tokens before this position (0 for clean ones)."""
    rows_BR: Any
    labels_BR: Any
    """The answer token each row should predict."""
    ar_weight_BA: Any
    teacher_BW: Any
    """Row whose distribution a state token should match: the clean one (global consistency)."""
    global_weight_BW: Any
    successor_BW: Any
    """The same in the trajectory's next state (local consistency); zeros without pairs."""
    local_weight_BW: Any
    offset_BW: Any
    """How far a state token comes after the first wrong one; -1 before it."""
    block: int = struct.field(pytree_node=False, default=0)
    """Tokens of a state; 0 without states."""


@lru_cache(maxsize=2)  # each look-up costs 15 us, and sixteen steps share a window
def _window(count: int, size: int, seed: int, window: int) -> tuple[int, ...]:
    """The sample indices of one window of an endless, every epoch reshuffled, order (Grain)."""
    import grain  # brings Orbax, which no --help waits for

    indices = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
    return tuple(int(indices[window * size + i]) for i in range(size))


def samples_of_step(
    samples: Samples, batch: int, seed: int, step: int
) -> list[tuple[int, Trajectory]]:
    """The samples of a step with their running numbers: similar lengths, a function of the step."""
    window, place = divmod(step, SORT_WINDOW)
    first = window * SORT_WINDOW * batch
    ids = _window(len(samples), SORT_WINDOW * batch, seed, window)
    ranked = sorted(range(len(ids)), key=lambda i: (samples[ids[i]].length, i))
    chunk = int(np.random.default_rng((seed, window)).permutation(SORT_WINDOW)[place])
    return [(first + i, samples[ids[i]]) for i in ranked[chunk * batch : (chunk + 1) * batch]]


def make_batch(
    samples: Samples, batch: int, seed: int, step: int, noise: Noise | None, rows: Rows = None
) -> Batch:
    """The batch of a step; the same arguments give the same bytes on any machine.

    Args:
      samples: the whole training set.
      batch: rows per step.
      noise: how states are chosen; None for plain autoregressive training.
      rows: those to pack, as they are in the whole batch; None for all.
    """
    chosen = samples_of_step(samples, batch, seed, step)
    length = -(-max(s.length for _, s in chosen) // LENGTH_STEP) * LENGTH_STEP
    answer = -(-max(len(s.answer) for _, s in chosen) // ANSWER_STEP) * ANSWER_STEP
    width = windows = 0
    if noise is not None:
        width = chosen[0][1].states.shape[1]
        windows = noise.windows or -(-answer // width)
        windows += windows % 2 if noise.pairs else 0
    packed = []
    for number, sample in chosen if rows is None else [chosen[i] for i in rows]:
        packed.append(_clean_row(sample, length, answer, windows * width))
        if noise is not None:
            rng = np.random.default_rng((seed, step, number))
            _add_states(packed[-1], sample, noise, rng, windows)
    return Batch(**{k: np.stack([row[k] for row in packed]) for k in packed[0]}, block=width)


def batches(
    samples: Samples, batch: int, seed: int, steps: range, noise: Noise | None, rows: Rows = None
) -> Iterator[Batch]:
    """The batches of consecutive steps; see `make_batch`. The next one is packed in a thread."""
    import grain

    pack = partial(make_batch, samples, batch, seed, noise=noise, rows=rows)
    packed = grain.MapDataset.range(steps.start, steps.stop).map(pack)
    return iter(packed.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)))


def _clean_row(sample: Trajectory, length: int, answer: int, noisy: int) -> dict[str, np.ndarray]:
    total, place = length + noisy, np.arange(length + noisy)
    tokens, labels = np.zeros(total, np.int32), np.zeros(answer + noisy, np.int32)
    tokens[: sample.length] = np.concatenate([sample.prompt, sample.answer])
    labels[: len(sample.answer)] = sample.answer
    answers = np.minimum(len(sample.prompt) - 1 + np.arange(answer), length - 1)
    return {
        'tokens_BT': tokens,
        'positions_BT': np.where(place < length, place, 0).astype(np.int32),
        'segment_BT': np.where(place < sample.length, 0, -1).astype(np.int32),
        'context_BT': np.zeros(total, np.int32),
        'rows_BR': np.concatenate([answers, place[length:]]).astype(np.int32),
        'labels_BR': labels,
        'ar_weight_BA': (np.arange(answer) < len(sample.answer)).astype(np.float32),
        'teacher_BW': np.zeros(noisy, np.int32),
        'global_weight_BW': np.zeros(noisy, np.float32),
        'successor_BW': np.zeros(noisy, np.int32),
        'local_weight_BW': np.zeros(noisy, np.float32),
        'offset_BW': np.full(noisy, -1, np.int32),
    }


def _add_states(
    row: dict[str, np.ndarray], sample: Trajectory, noise: Noise, rng: Any, windows: int
) -> None:
    """Put `windows` states of a sample after its clean text, with their teachers and weights."""
    width, total, answer = sample.states.shape[1], len(sample.answer), len(row['ar_weight_BA'])
    length, steps = len(row['tokens_BT']) - windows * width, np.arange(width)
    picked, placed = pick(sample, noise, rng, windows), []
    for place, index in enumerate(picked):
        begin = int(sample.start[index]) if len(sample.states) else index
        offsets = begin + steps  # answer offset of each state token; it predicts offset + 1
        real = offsets < total
        truth = sample.answer[np.minimum(offsets, total - 1)]
        state, size = state_of(sample, noise, rng, index, truth)
        real &= steps < size
        wrong = (state != truth) & real
        first = int(np.argmax(wrong)) if wrong.any() else width
        ahead = steps - first
        useful = (ahead >= 0) & (offsets + 1 < total) & (steps < size)
        weight = np.exp(-np.maximum(ahead, 0) / noise.decay) if noise.decay else np.ones(width)
        at, here = length + place * width, slice(place * width, (place + 1) * width)
        row['tokens_BT'][at : at + width] = state
        row['positions_BT'][at : at + width] = len(sample.prompt) + offsets
        row['segment_BT'][at : at + width] = np.where(real, place + 1, -1)
        row['context_BT'][at : at + width] = len(sample.prompt) + begin
        row['labels_BR'][answer:][here] = sample.answer[np.minimum(offsets + 1, total - 1)]
        row['teacher_BW'][here] = np.minimum(offsets + 1, answer - 1)
        row['global_weight_BW'][here] = np.where(useful, weight, 0)
        row['offset_BW'][here] = np.where(useful, ahead, -1)
        placed.append((begin, here))
    for i in range(0, windows, 2) if noise.pairs else ():
        _link(row, answer, placed[i], placed[i + 1], picked[i] != picked[i + 1])


def _link(row: dict[str, np.ndarray], answer: int, state, successor, distinct: bool) -> None:
    """Teach a state by its successor: by the same position there, or by the clean text before."""
    (begin, here), (begin_next, there) = state, successor
    width = here.stop - here.start
    index = begin + np.arange(width) - begin_next
    inside = (index >= 0) & (index < width)
    there_BW = answer + there.start + index
    row['successor_BW'][here] = np.where(inside, there_BW, row['teacher_BW'][here])
    known = (index < width) & distinct
    row['local_weight_BW'][here] = np.where(known, row['global_weight_BW'][here], 0)
