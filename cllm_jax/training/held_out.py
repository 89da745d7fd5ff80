"""The test on held-out prompts during training, and what it keeps."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cllm_jax.data.sources import Source
from cllm_jax.decoding.drafter import Drafter
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import acceptance, loop_free, tokens_per_forward
from cllm_jax.drafters.checkpoint import write_drafter
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.errors import at_least, check_seed
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model
from cllm_jax.runtime.processes import fetch, is_main
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement
from cllm_jax.training.lora import Adapter

COLLAPSE = 0.2
"""Share of the held-out answers by which repetition may grow before a warning."""
OTHERS = 0.1
"""Agreement with the model before training below which answers are others altogether."""
ALARMED = -0.5
"""Score of a test with an alarm: below every other, above that of no test."""
SLOTS = (1, 4, 8)
"""Slots of a draft whose conditional acceptance is logged."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The test on held-out prompts during training; it chooses the checkpoint that is kept.

    Objective ar keeps the one with the most right answers, and the last one where answers cannot be
    checked.
    """

    every: int = 500
    """Steps between two tests; 0 for none, and no held-out rows: the last state is kept."""
    prompts: int = 64
    """Held-out prompts per test."""
    seed: int = 1000
    """Which held-out prompts. Those of generated tasks are not those of `evaluate`, whose seeds are
    small; of a file both choose from the same twentieth of its rows."""
    max_tokens: int = 128
    """Longest answer."""
    block: int = 16
    """Jacobi window."""
    quality: Literal['check', 'agreement'] = 'check'
    """What quality means: right answers, or agreement with the model before training."""
    tolerance: float = 0.02
    """Consistency: quality that may be lost against the model before training."""
    keep: int = 1
    """How many of the best are kept; the best one in RUN/model, all of them in RUN/best/STEP."""

    def __post_init__(self):
        at_least(self, every=0, prompts=1, max_tokens=1, keep=1)
        check_seed(self)
        Jacobi(self.block)  # checks it


@dataclasses.dataclass(frozen=True)
class Trained:
    """What some parameters make: a model, and the drafter with which it is tested.

    A drafter that was trained is kept with its weights; any other one only serves the test.
    """

    model: Model
    drafter: Drafter
    new_model: bool = True
    """Whether the model is another than before the run, so that it is kept too."""
    adapter: Adapter | None = None
    """What changed it, if that is an adapter; it is kept too."""


def held_out_test(
    trained: Trained, source: Source, test: HeldOut, reference: Sequence | None
) -> dict:
    """Decode held-out prompts: tokens/forward, acceptance, quality, agreement, repetition."""
    request = Request(trained.drafter, max_tokens=test.max_tokens)
    result = decode_all(trained.model, request, [row.prompt for row in source.rows])
    shares = dict(enumerate(acceptance(result), 1))
    agreement = token_agreement(result.tokens, reference or result.tokens)
    checked = share_right(source, result.texts) if source.checkable else agreement
    return {
        'tokens': result.tokens,
        'tokens_per_forward': tokens_per_forward(result),
        'loop_free_tokens_per_forward': loop_free(result),
        **{f'acceptance_of_slot_{slot}': shares.get(slot, 0.0) for slot in SLOTS},
        'quality': agreement if test.quality == 'agreement' else checked,
        'agreement': agreement,
        'repetitive': sum(map(is_repetitive, result.tokens)) / len(source),
    }


def score(found: dict, first_quality: float, faster: bool, judged: bool, test: HeldOut) -> float:
    """Which checkpoint is best, the later one of equals.

    That is by loop-free tokens/forward where quality holds, if they are what is wanted; else by
    quality if answers are judged. Agreement with the model before would choose the one that learnt
    least.
    """
    if not faster:
        return found['quality'] if judged else 0.0
    lost = max(first_quality - test.tolerance - found['quality'], 0.0)
    return found['loop_free_tokens_per_forward'] * (1 - lost) ** 20


def alarm(found: dict, reference: dict, faster: bool, test: HeldOut) -> str | None:
    """What a held-out test says of collapse, if it finds any.

    That is a model that repeats itself far more than before training; or, where the same answers
    are wanted in fewer forwards, one with other and worse answers. Consistency training on bad
    trajectories can end in such a model, whose loss and tokens/forward look excellent.
    """
    if found['repetitive'] > reference['repetitive'] + COLLAPSE:
        return (
            f'{found["repetitive"]:.0%} of the held-out answers repeat themselves, '
            f'{reference["repetitive"]:.0%} before training'
        )
    worse = found['quality'] < reference['quality'] - test.tolerance
    if faster and worse and found['agreement'] < OTHERS:
        return (
            f'{found["agreement"]:.0%} of the held-out answers are as before training, and their '
            f'quality is {found["quality"]:.0%}, {reference["quality"]:.0%} before'
        )
    return None


def write_trained(directory: Path, trained: Trained) -> None:
    """Write what was trained to `directory/model`, `directory/adapter` and `directory/drafter`.

    Every process calls it, as weights may be spread over all of them; the first one writes.
    """
    model, drafter = trained.model, trained.drafter
    if trained.new_model:
        model = dataclasses.replace(model, params=fetch(model.params))
    if has_weights := isinstance(drafter, TrainedDrafter):
        drafter = drafter.with_weights(fetch(drafter.own), model.params)
    if trained.new_model and is_main():
        dtype = str(model.params['norm'].dtype)
        write_model(directory / 'model', model, dtype=dtype, sums=True)
    if has_weights and is_main():
        write_drafter(directory / 'drafter', drafter, model)
    if trained.adapter:
        factors = fetch(trained.adapter.factors)
        if is_main():
            dataclasses.replace(trained.adapter, factors=factors).write(directory / 'adapter')


def keep_the_best(
    directory: Path, trained: Trained, step: int, score: float, progress: dict, count: int
) -> None:
    """Keep what was tested if none so far is better, and in `best` if it is among the best `count`.

    Updates `progress`: the best score so far, and all scores if several are kept.
    """
    if score >= progress['best']:
        progress['best'] = score
        write_trained(directory, trained)
    if count == 1:
        return
    progress[f'score_{step}'] = score
    scores = {int(k[6:]): v for k, v in progress.items() if k.startswith('score_')}
    best = sorted(scores, key=lambda step: (-scores[step], -step))[:count]
    place = directory / 'best'
    if step in best:
        if is_main():
            place.mkdir(exist_ok=True)
        write_trained(place / str(step), trained)
    for old in place.iterdir() if is_main() and place.is_dir() else ():
        if old.name not in map(str, best):
            shutil.rmtree(old)
