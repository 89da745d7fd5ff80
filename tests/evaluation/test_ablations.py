"""Ablations are drawn from the results of their rows."""

import json

from cllm_jax.evaluation import ablations
from cllm_jax.evaluation.ablations import draw_ablations
from tests.evaluation.results import axes_of, evaluation, needs_matplotlib, text_of


@needs_matplotlib
def test_every_row_and_seed_is_a_point(tmp_path):
    """Of those that are done; the recipe is above all others."""
    wanted = {}
    for seed in (0, 1):
        for row in ('flat', 'recipe', 'ar-1')[: 3 - seed]:
            directory = tmp_path / f'ablations/400-steps/seed-{seed}/{row}'
            directory.mkdir(parents=True)
            gain = 2 + seed + len(row) / 10
            found = [
                evaluation(task) | {'loop_free_tokens_per_forward': gain, 'quality': {'cllm': q}}
                for task, q in (('sql', 0.9), ('free', None))
            ]
            (directory / 'evaluate.json').write_text(json.dumps(found))
            wanted.setdefault(row, set()).add(gain)
    (tmp_path / 'ablations/800-steps/seed-0/recipe').mkdir(parents=True)  # not done
    with axes_of(ablations) as axes:
        (path,) = draw_ablations(tmp_path, tmp_path / 'plots')
    assert path.name == 'ablations-400-steps.svg'
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ['recipe', 'ar-1', 'flat'] and axes[0].yaxis_inverted()
    gains, quality = ({line.get_label(): line.get_xydata() for line in ax.lines} for ax in axes)
    for task in ('sql', 'free'):
        seen = {}
        for gain, row in gains[task]:
            seen.setdefault(names[int(row)], set()).add(gain)
        assert seen == wanted
    assert set(quality['sql'][:, 0]) == {90.0}
    text = text_of(path)
    assert all(word in text for word in ('recipe', 'sql', 'loop-free', 'quality, %', '400 steps'))
