"""The curves of a training are those of its metrics.jsonl."""

from pathlib import Path

from cllm_jax.evaluation import curves
from cllm_jax.evaluation.curves import PANELS, draw_training, draw_trainings
from cllm_jax.runs.run_dir import append_metrics
from tests.evaluation.results import axes_of, needs_matplotlib, text_of

LINES = (
    {'step': 0, 'quality': 0.5, 'tokens_per_forward': 1.25, 'agreement': 1.0},
    {'step': 1, 'loss': 9.0, 'agreement': 0.1},
    {'step': 2, 'loss': float('nan'), 'agreement': 0.2},
    {'step': 3, 'loss': 7.0, 'agreement': 0.3},
    {'step': 3, 'held_out_quality': 0.75, 'held_out_tokens_per_forward': 2.5},
)


def write_run(directory: Path, lines=LINES) -> None:
    directory.mkdir(parents=True)
    for line in lines:
        append_metrics(directory / 'metrics.jsonl', line)


@needs_matplotlib
def test_curves_have_the_numbers_of_the_log(tmp_path):
    """The test before training is the first point of those after it."""
    write_run(tmp_path / 'cllm')
    with axes_of(curves) as axes:
        path = draw_training(tmp_path / 'cllm', tmp_path)
    lines = {line.get_label(): line for ax in axes for line in ax.lines}
    assert {label: list(line.get_xdata()) for label, line in lines.items()} == {
        'loss': [1, 2, 3],
        'all guesses, against the fixed point': [1, 2, 3],
        'all answers': [0, 3],
        'quality': [0, 3],
        'tokens as before training': [0],
    }
    assert list(lines['quality'].get_ydata()) == [0.5, 0.75]
    assert list(lines['all answers'].get_ydata()) == [1.25, 2.5]
    text = text_of(path)
    assert path.name == 'training-cllm.svg'
    assert all(title in text for title in PANELS) and text.count('step') == len(PANELS)


@needs_matplotlib
def test_every_training_that_has_begun_is_drawn(tmp_path):
    write_run(tmp_path / 'target')
    write_run(tmp_path / 'medusa', [{'step': 1, 'loss': 1.0, 'accuracy_1': 0.5}])
    write_run(tmp_path / 'cllm', LINES[:1])  # no step yet
    write_run(tmp_path / 'something')  # not a stage
    drawn = draw_trainings(tmp_path, tmp_path / 'plots')
    assert [path.name for path in drawn] == ['training-target.svg', 'training-medusa.svg']
