"""Pictures of trainings, drawn from their metrics.jsonl, also while they go on."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm_jax.evaluation.drawing import in_percent, look, picture
from cllm_jax.runs.run_dir import read_metrics, scalars
from cllm_jax.runs.stages import STAGES, output_of

PANELS = {
    'loss': {'train/loss': 'loss'},
    'guesses that are right, in training': {
        'train/agreement': 'all guesses, against the fixed point',
        **{f'train/agreement_{k}': f'guess {k + 1}' for k in (0, 3, 7)},
        **{f'train/accuracy_{k}': f'guess {k} of the drafter' for k in range(1, 9)},
        'train/ar_accuracy': 'next token, of texts and answers',
    },
    'held-out tokens per forward': {
        'held_out/tokens_per_forward': 'all answers',
        'held_out/loop_free_tokens_per_forward': 'loop-free',
    },
    'held-out answers': {
        'held_out/quality': 'quality',
        'held_out/agreement': 'tokens as before training',
        'held_out/repetitive': 'repeat themselves',
    },
}
"""What is drawn of a training: for each panel the numbers of metrics.jsonl, and what they are."""


def draw_trainings(root: Path, directory: Path) -> list[Path]:
    """The curves of every training below `root` that has begun; the files."""
    trained = [name for name, stage in STAGES.items() if stage.command == 'train']
    drawn = [draw_training(Path(output_of(name, str(root))), directory) for name in trained]
    return [path for path in drawn if path]


def draw_training(run: Path, directory: Path) -> Path | None:
    """The curves of a run directory; None if nothing is logged there."""
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in read_metrics(run / 'metrics.jsonl'):
        for name, value in scalars(record).items():
            series[name].append((record['step'], value))
    if 'train/loss' not in series:
        return None
    path = directory / f'training-{run.name}.svg'
    with picture(path, f'Training: {run.name}', f'{run}/metrics.jsonl', (2, 2), 2.6) as axes:
        for ax, (title, lines) in zip(axes, PANELS.items(), strict=True):
            _draw_series(ax, {label: series[name] for name, label in lines.items()})
            ax.set(title=title, xlabel='step')
            if title.startswith(('guesses', 'held-out answers')):
                in_percent(ax)
    return path


def _draw_series(ax: Any, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    for number, (label, points) in enumerate(series.items()):
        if points:
            style = look(number) | ({'marker': ''} if len(points) > 40 else {})
            ax.plot(*zip(*points, strict=True), **style, label=label)
    if len(ax.lines) > 1:
        ax.legend(fontsize=7)
