"""The training run: the loop around the step, its log, its checkpoints and its held-out tests."""

import dataclasses
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from cllm_jax.data.sources import Source
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import DataError, Interrupted, NumericalError, at_least, check_seed
from cllm_jax.runs.atomic import recover_replacement
from cllm_jax.runs.run_dir import append_metrics, read_metrics, rewind_metrics
from cllm_jax.runtime.processes import fetch, is_main
from cllm_jax.runtime.sharding import place_batch
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement
from cllm_jax.training.checkpoint import Checkpoints, open_checkpoints, restore, save
from cllm_jax.training.objective import Objective, Trained, keep
from cllm_jax.training.packing import Noise, Sample, make_batch
from cllm_jax.training.step import (
    OptimizerConfig,
    TrainState,
    make_optimizer,
    make_step,
    new_state,
    state_places,
)

COLLAPSE = 0.2
"""Share of the held-out answers by which repetition may grow before a warning."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The test on held-out prompts during training; it chooses the checkpoint that is kept.

    Objective ar keeps the one with the most right answers, and the last one where answers cannot be
    checked.
    """

    every: int = 500
    """Steps between two tests."""
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
    """How many of the best are kept; beside RUN/model, the best one, in RUN/best/STEP."""

    def __post_init__(self):
        at_least(self, every=1, prompts=1, max_tokens=1, keep=1)
        check_seed(self)
        Jacobi(self.block)  # checks it


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """How long and how a run trains."""

    steps: int
    batch: int
    seed: int
    optimizer: OptimizerConfig
    noise: Noise | None
    held_out: HeldOut
    mesh: Mesh | None = None
    """Devices to train on; None for one."""
    log_every: int = 20
    save_every: int = 200
    max_skipped: int = 20


def held_out_test(
    trained: Trained, source: Source, test: HeldOut, reference: Sequence | None
) -> dict:
    """Decode held-out prompts: tokens/forward, quality, agreement, repetition."""
    request = Request(trained.drafter, max_tokens=test.max_tokens)
    prompts = [source[i].prompt for i in range(len(source))]
    result = decode_all(trained.model, request, prompts, trained.weights)
    tokens, forwards = sum(map(len, result.tokens)), sum(result.forwards)
    agreement = token_agreement(result.tokens, reference or result.tokens)
    checked = share_right(source, result.texts) if source.checkable else agreement
    return {
        'tokens': result.tokens,
        'tokens_per_forward': tokens / forwards,
        'quality': agreement if test.quality == 'agreement' else checked,
        'agreement': agreement,
        'repetitive': sum(map(is_repetitive, result.tokens)) / len(prompts),
    }


def score(found: dict, first_quality: float, faster: bool, judged: bool, test: HeldOut) -> float:
    """Which checkpoint is best, the later one of equals.

    That is by tokens/forward where quality holds, if they are what is wanted; else by quality if
    answers are judged. Agreement with the model before would choose the one that learnt least.
    """
    if not faster:
        return found['quality'] if judged else 0.0
    lost = max(first_quality - test.tolerance - found['quality'], 0.0)
    return found['tokens_per_forward'] * (1 - lost) ** 20


def alarm(found: dict, before: dict) -> str | None:
    """What a held-out test says about collapse, for one that repeats itself far more than before.

    Consistency training on bad trajectories can end in a model that repeats a few tokens, whose
    loss and tokens/forward look excellent.
    """
    if found['repetitive'] <= before['repetitive'] + COLLAPSE:
        return None
    return (
        f'{found["repetitive"]:.0%} of the held-out answers repeat themselves, '
        f'{before["repetitive"]:.0%} before training: the model may be collapsing; the best one so '
        'far is kept, clean the trajectories or raise loss.ar_weight'
    )


def train(
    directory: Path,
    objective: Objective,
    samples: Sequence[Sample],
    source: Source,
    plan: RunPlan,
    report: Callable[[dict], None] = lambda record: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Train until `plan.steps`, continuing from the newest checkpoint in `directory`.

    The best model by held-out score is kept in `directory/model`, or a drafter in
    `directory/drafter`. Every number is a function of the step, so an interrupted run ends with the
    metrics of an uninterrupted one.

    Raises:
      DataError: the run was begun, but its checkpoints are damaged or gone; nothing is replaced.
      NumericalError: too many updates in a row were not finite; no checkpoint is overwritten.
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    run = _Run(directory, objective, source, plan, report, note)
    # Opening makes the directory: after that, one without checkpoints is that of an early kill.
    if not (directory / 'checkpoints').is_dir() and any(m['step'] for m in read_metrics(run.log)):
        raise _lost(directory)
    for kept in ('model', 'drafter') if is_main() else ():
        recover_replacement(directory / kept)
    optimizer = make_optimizer(plan.optimizer, plan.steps)
    start = objective.params
    shardings = plan.mesh and state_places(optimizer, objective.axes, start, plan.mesh)
    state = new_state(optimizer, start, shardings)
    reference = held_out_test(objective.trained(start), source, plan.held_out, None)
    step_fn = make_step(objective.loss, optimizer, plan.optimizer.accumulate, shardings)
    with (
        open_checkpoints(directory / 'checkpoints', note) as checkpoints,
        _stop_signals() as stopped,
    ):
        state, progress = _begin_or_restore(run, checkpoints, state, reference)
        if lost := progress['best'] >= 0 and not _has_kept(directory):
            note(f'{directory}: what was kept is gone; the next test keeps what it finds')
            progress['best'] = -1.0
        # No steps: the model as it is, in the form of a run.
        if plan.steps == 0 or (lost and int(state.step) == plan.steps):
            _test_and_keep(run, state, reference, progress)
        if int(state.step) < plan.steps:
            _iterate(run, samples, step_fn, checkpoints, stopped, state, reference, progress)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same from the first step to the last."""

    directory: Path
    objective: Objective
    source: Source
    plan: RunPlan
    report: Callable[[dict], None]
    note: Callable[[str], None]

    @property
    def log(self) -> Path:
        return self.directory / 'metrics.jsonl'


def _has_kept(directory: Path) -> bool:
    """Whether a model or a drafter is there, as the process sees it that writes them."""
    there = any((directory / name).is_dir() for name in ('model', 'drafter'))
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(there)))


def _lost(directory: Path) -> DataError:
    return DataError(
        f'{directory}: was begun, but its checkpoints are damaged or gone; it is left as it is: '
        'move or remove it to begin again'
    )


def _begin_or_restore(
    run: _Run, checkpoints: Checkpoints, state: TrainState, reference: dict
) -> tuple[TrainState, dict]:
    """The state and the progress of the newest checkpoint, else those of a new run."""
    if found := restore(checkpoints, state):
        if is_main():
            rewind_metrics(run.log, int(found[0].step))
        return found
    # A save waits for the one before, so that of two one is complete.
    saved = any(m['step'] > 2 * run.plan.save_every for m in read_metrics(run.log))
    if saved or any(run.directory.glob('damaged-checkpoint-*')):
        raise _lost(run.directory)
    if is_main():
        rewind_metrics(run.log, -1)
    _record(run, 0, {k: v for k, v in reference.items() if k != 'tokens'})
    return state, {'first_quality': reference['quality'], 'best': -1.0}


def _iterate(
    run: _Run,
    samples: Sequence[Sample],
    step_fn: Callable,
    checkpoints: Checkpoints,
    stopped: '_stop_signals',
    state: TrainState,
    reference: dict,
    progress: dict,
) -> None:
    """All steps that are left, each with what is due after it: a line, a test, a checkpoint."""
    plan, step = run.plan, int(state.step)
    batch_of = partial(make_batch, samples, plan.batch, plan.seed, noise=plan.noise)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(batch_of, step)
        begin, tokens = time.perf_counter(), 0
        while step < plan.steps:
            batch = following.result()
            following = pool.submit(batch_of, step + 1)
            placed = batch if plan.mesh is None else place_batch(batch, plan.mesh)
            state, metrics = step_fn(state, placed, run.objective.frozen)
            tokens += int((batch.segment_BT >= 0).sum())
            step += 1
            tested = step % plan.held_out.every == 0 or step == plan.steps
            if step % plan.log_every == 0 or tested:
                numbers = {k: round(float(v), 6) for k, v in metrics.items()}
                _is_sound(run, step, metrics)
                seconds = time.perf_counter() - begin
                _record(run, step, numbers | {'tokens_per_second': round(tokens / seconds)})
                begin, tokens = time.perf_counter(), 0
            if tested:
                _test_and_keep(run, state, reference, progress)
                begin, tokens = time.perf_counter(), 0
            stop = stopped.at(step)
            due = step % plan.save_every == 0 or step == plan.steps or stop
            if sound := due and _is_sound(run, step, metrics):
                save(checkpoints, step, state, progress)
            if stop:
                checkpoints.settle()
                done = 'saved' if sound else 'an update of NaN or Inf is not saved, stopped'
                raise Interrupted(f'{done} at step {step}; run the same command to continue')
        following.cancel()


def _is_sound(run: _Run, step: int, metrics: dict) -> bool:
    """Whether the last update was finite; raises NumericalError after too many that were not."""
    skipped, directory = int(metrics['skipped']), run.directory
    if skipped > run.plan.max_skipped:
        # The same settings end here again, and a run has one set of settings.
        start = f' and --model {directory}' if (directory / 'model').is_dir() else ''
        raise NumericalError(
            f'step {step}: {skipped} updates in a row were NaN or Inf; begin another run (--root) '
            f'with a lower learning rate{start}; what was saved here before is kept'
        )
    return skipped == 0


def _test_and_keep(run: _Run, state: TrainState, reference: dict, progress: dict) -> None:
    """Test on held-out prompts, and keep what was trained if none so far is better."""
    step, test = int(state.step), run.plan.held_out
    trained = run.objective.trained(jax.tree.map(jnp.copy, state.params))
    found = held_out_test(trained, run.source, test, reference['tokens'])
    judged = run.source.checkable and test.quality == 'check'
    first_quality = progress['first_quality']
    found['score'] = score(found, first_quality, run.objective.faster, judged, test)
    numbers = {k: round(float(v), 6) for k, v in found.items() if k != 'tokens'}
    _record(run, step, {f'held_out_{k}': v for k, v in numbers.items()})
    if warning := alarm(found, reference):
        run.note(f'warning: step {step}: {warning}')
    if found['score'] >= progress['best']:
        progress['best'] = found['score']
        keep(run.directory, trained, fetch, is_main())
    if test.keep > 1:
        progress[f'score_{step}'] = found['score']
        scores = {int(k[6:]): v for k, v in progress.items() if k.startswith('score_')}
        best = sorted(scores, key=lambda step: (-scores[step], -step))
        _keep_several(run.directory, trained, step, best[: test.keep])


def _keep_several(directory: Path, trained: Trained, step: int, best: Sequence[int]) -> None:
    """Keep what was tested at this step if it is among the best, and nothing but those."""
    place = directory / 'best'
    if step in best:
        if is_main():
            place.mkdir(exist_ok=True)
        keep(place / str(step), trained, fetch, is_main())
    for old in place.iterdir() if is_main() and place.is_dir() else ():
        if old.name not in map(str, best):
            shutil.rmtree(old)


def _record(run: _Run, step: int, numbers: dict) -> None:
    record = {'step': step, **numbers}
    if is_main():
        append_metrics(run.log, record)
    run.report(record)


class _stop_signals:
    """Tells after which step to stop because of SIGTERM or SIGINT.

    With several processes JAX's own service catches SIGTERM, and lets all of them stop after the
    same step when one is told to.
    """

    def __enter__(self):
        self.came = False
        caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self.old = {s: signal.signal(s, self._note) for s in caught}
        return self

    def _note(self, number, frame):
        self.came = True

    def at(self, step: int) -> bool:
        """Whether to stop after this step; every process asks after each."""
        return self.came or multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *error):
        for number, handler in self.old.items():
            signal.signal(number, handler)
