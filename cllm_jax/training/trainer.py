"""The training run: the loop around the step, its log, its checkpoints and its held-out tests."""

import dataclasses
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from cllm_jax.data.sources import Source
from cllm_jax.errors import DataError, Interrupted, NumericalError
from cllm_jax.runs.atomic import recover_replacement
from cllm_jax.runs.logs import open_logs
from cllm_jax.runs.recipe import to_json
from cllm_jax.runs.run_dir import append_metrics, read_metrics, rewind_metrics
from cllm_jax.runtime.processes import is_main
from cllm_jax.runtime.sharding import place_batch, rows_here
from cllm_jax.training.checkpoint import Checkpoints, open_checkpoints, restore, save
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.held_out import (
    ALARMED,
    Trained,
    alarm,
    held_out_test,
    keep_the_best,
    score,
)
from cllm_jax.training.objective import Learner
from cllm_jax.training.optimizer import make_optimizer
from cllm_jax.training.packing import Samples, batches
from cllm_jax.training.step import TrainState, make_step, new_state, state_places

MAX_SKIPPED = 20
"""Updates in a row that may be left out, for NaN or Inf, before a run ends."""
ALARMS = 2
"""Held-out tests in a row that find a collapsed model before a run ends."""


def train(
    directory: Path,
    learner: Learner,
    samples: Samples,
    source: Source | None,
    settings: TrainConfig,
    report: Callable[[dict], None] = lambda record: None,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Train until `settings.steps`, continuing from the newest checkpoint in `directory`.

    The best model by the score of the held-out prompts of `source` is kept in `directory/model`, or
    a drafter in `directory/drafter`; the last one where `source` is None. Every number is a
    function of the step, so an interrupted run ends with the metrics of an uninterrupted one.
    `report` gets each line of them, `note` warnings.

    Raises:
      DataError: the run was begun, but its checkpoints are damaged or gone; nothing is replaced.
      NumericalError: too many updates in a row were not finite (`_is_sound`); no checkpoint is
        overwritten. Or the model collapsed, in this call or before (`on_collapse`).
      Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    log = directory / 'metrics.jsonl'
    # Opening makes the directory: after that, one without checkpoints is that of an early kill.
    if not (directory / 'checkpoints').is_dir() and any(m['step'] for m in read_metrics(log)):
        raise _lost(directory)
    for kept in ('model', 'adapter', 'drafter') if is_main() else ():
        recover_replacement(directory / kept)
    ended = [m['step'] for m in read_metrics(log) if 'collapsed' in m]
    if ended and settings.on_collapse == 'stop':
        raise _collapsed(directory, ended[-1], 'this run ended here before')
    optimizer, mesh = make_optimizer(settings.optimizer, settings.steps), learner.mesh
    shardings = mesh and state_places(optimizer, learner.axes, learner.params, mesh)
    state = new_state(optimizer, learner.params, shardings)
    reference = {}
    if source is not None:
        reference = held_out_test(learner.trained(learner.params), source, settings.held_out, None)
    step_fn = make_step(learner.loss, optimizer, settings.optimizer.accumulate, shardings)
    run = _Run(directory, learner, samples, source, settings, reference, report, note)
    with open_checkpoints(directory / 'checkpoints', note) as checkpoints, _stop_signals() as stop:
        state, progress = _begin_or_restore(run, checkpoints, state)
        there = any((directory / name).is_dir() for name in ('model', 'drafter'))
        there = multihost_utils.broadcast_one_to_all(np.asarray(there))  # as their writer sees it
        if lost := progress['best'] > -1 and not there:
            note(f'{directory}: what was kept is gone; the next test keeps what it finds')
            progress['best'] = -1.0
        with open_logs(settings.log, directory, to_json(settings), note) as also:
            run = dataclasses.replace(run, also=also)
            # No steps: the model as it is, in the form of a run.
            if settings.steps == 0 or (lost and int(state.step) == settings.steps):
                _test_and_keep(run, state, progress | {'alarms': 0})  # the last test, once more
            if int(state.step) < settings.steps:
                _iterate(run, step_fn, checkpoints, stop, state, progress)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same from the first step to the last."""

    directory: Path
    learner: Learner
    samples: Samples
    source: Source | None
    settings: TrainConfig
    reference: dict
    """The held-out test before training; empty if there are no tests."""
    report: Callable[[dict], None]
    note: Callable[[str], None]
    also: Callable[[dict], None] = lambda line: None
    """Adds a line to the other logs."""

    @property
    def log(self) -> Path:
        return self.directory / 'metrics.jsonl'

    def record(self, step: int, numbers: dict) -> None:
        """Log and report numbers of a step."""
        line = {'step': step, **numbers}
        if is_main():
            append_metrics(self.log, line)
        self.also(line)
        self.report(line)


def _lost(directory: Path) -> DataError:
    fault = 'was begun, but its checkpoints are damaged or gone; it is left as it is'
    return DataError(f'{directory}: {fault}: move or remove it to begin again')


def _collapsed(directory: Path, step: int, why: str) -> NumericalError:
    scores = [m.get('held_out_score', ALARMED) for m in read_metrics(directory / 'metrics.jsonl')]
    kept = 'model' if (directory / 'model').is_dir() else 'drafter'
    best = f'the best one is in {directory / kept}' if max(scores) > ALARMED else 'none was sound'
    return NumericalError(
        f'step {step}: {why}: {ALARMS} held-out tests in a row found that the model collapsed, and '
        f'{best}; begin another run (--root) with a lower optimizer.learning_rate, cleaner '
        'trajectories or a higher loss.ar_weight, or go on in this one with --on-collapse warn'
    )


def _begin_or_restore(
    run: _Run, checkpoints: Checkpoints, state: TrainState
) -> tuple[TrainState, dict]:
    """The state and the progress of the newest checkpoint, else those of a new run."""
    if found := restore(checkpoints, state):
        if is_main():
            rewind_metrics(run.log, int(found[0].step))
        return found
    # A save waits for the one before, so that of two one is complete.
    saved = any(m['step'] > 2 * run.settings.save_every for m in read_metrics(run.log))
    if saved or any(run.directory.glob('damaged-checkpoint-*')):
        raise _lost(run.directory)
    if is_main():
        rewind_metrics(run.log, -1)
    if run.reference:
        run.record(0, {k: v for k, v in run.reference.items() if k != 'tokens'})
    return state, {'first_quality': run.reference.get('quality', 0.0), 'best': -1.0}


def _iterate(
    run: _Run,
    step_fn: Callable,
    checkpoints: Checkpoints,
    stop_at: Callable[[int], bool],
    state: TrainState,
    progress: dict,
) -> None:
    """All steps that are left, each with what is due after it: a line, a test, a checkpoint."""
    settings, mesh, step = run.settings, run.learner.mesh, int(state.step)
    rows, steps = mesh and rows_here(settings.batch, mesh), range(step, settings.steps)
    order = (run.samples, settings.batch, settings.seed, steps, run.learner.noise, rows)
    begin, tokens = time.perf_counter(), 0
    for batch in batches(*order):
        placed = batch if mesh is None else place_batch(batch, mesh)
        state, metrics = step_fn(state, placed, run.learner.frozen)
        tokens += (placed.segment_BT >= 0).sum()
        step += 1
        every = settings.held_out.every or settings.steps
        tested = step % every == 0 or step == settings.steps
        if step % settings.log_every == 0 or tested:
            numbers = {k: round(float(v), 6) for k, v in metrics.items()}
            speed = int(tokens) / (time.perf_counter() - begin)
            run.record(step, numbers | {'tokens_per_second': round(speed)})
            _is_sound(run, step, metrics)
            if tested:
                _test_and_keep(run, state, progress)
            begin, tokens = time.perf_counter(), 0
        stop = stop_at(step)
        due = step % settings.save_every == 0 or step == settings.steps or stop
        if sound := due and _is_sound(run, step, metrics):
            save(checkpoints, step, state, progress)
        if stop:
            checkpoints.settle()
            done = 'saved' if sound else 'an update of NaN or Inf is not saved, stopped'
            raise Interrupted(f'{done} at step {step}; run the same command to continue')


def _is_sound(run: _Run, step: int, metrics: dict) -> bool:
    """Whether the weights can be saved; raises NumericalError after too many updates left out.

    At the end of a run a tenth of its steps is too many, and after fewer the weights are those
    of the last update that was made.
    """
    skipped, directory, ends = int(metrics['skipped']), run.directory, step == run.settings.steps
    if skipped > (min(MAX_SKIPPED, step // 10) if ends else MAX_SKIPPED):
        # The same settings end here again, and a run has one set of settings.
        start = f' and --model {directory}' if (directory / 'model').is_dir() else ''
        raise NumericalError(
            f'step {step}: {skipped} updates in a row left out for NaN or Inf; begin another run '
            f'(--root) with a lower learning rate{start}; what was saved here before is kept'
        )
    return skipped == 0 or ends


def _test_and_keep(run: _Run, state: TrainState, progress: dict) -> None:
    """Test on held-out prompts, and keep what was trained if none so far is better."""
    step, test = int(state.step), run.settings.held_out
    trained = run.learner.trained(jax.tree.map(jnp.copy, state.params))
    # Of equals the later one is kept.
    best = 0.0 if run.source is None else _test(run, trained, step, progress)
    keep_the_best(run.directory, trained, step, best, progress, test.keep)


def _test(run: _Run, trained: Trained, step: int, progress: dict) -> float:
    """The score of what was trained on held-out prompts; logs the test."""
    test, first_quality = run.settings.held_out, progress['first_quality']
    found = held_out_test(trained, run.source, test, run.reference['tokens'])
    judged = run.source.checkable and test.quality == 'check'
    found['score'] = score(found, first_quality, run.learner.faster, judged, test)
    why = alarm(found, run.reference, run.learner.faster, test)
    # A new model says anything at first: it has nothing to lose.
    collapsed = why is not None and run.settings.model != 'new'
    if collapsed:
        found['score'] = ALARMED
    numbers = {k: round(float(v), 6) for k, v in found.items() if k != 'tokens'}
    run.record(step, {f'held_out_{k}': v for k, v in numbers.items()})
    progress['alarms'] = progress.get('alarms', 0) + 1 if collapsed else 0
    if progress['alarms'] >= ALARMS and run.settings.on_collapse == 'stop':
        # Nothing is saved, and the log keeps the same command from coming here again.
        run.record(step, {'collapsed': ALARMS})
        raise _collapsed(run.directory, step, why)
    if why:
        run.note(
            f'warning: step {step}: {why}: the model may be collapsing; the best one so far is '
            'kept, clean the trajectories or raise loss.ar_weight'
        )
    return found['score']


@contextmanager
def _stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields what every process asks after each step: whether to stop, for SIGTERM or SIGINT.

    With several processes JAX's own service catches SIGTERM, and lets all of them stop after the
    same step when one is told to. What was ignored at the start, as SIGINT is by what a script runs
    in the background, stays ignored.
    """
    came: list[int] = []
    asked = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    caught = [s for s in asked if signal.getsignal(s) != signal.SIG_IGN]
    old = {s: signal.signal(s, lambda number, _: came.append(number)) for s in caught}
    try:
        yield lambda step: bool(came) or multihost_utils.reached_preemption_sync_point(step)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
