"""A picture of what `launch/ablations.sh` has found, drawn from the results of its rows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm_jax.evaluation.drawing import legend_outside, look, picture


def loop_free(result: Mapping[str, Any]) -> float:
    return result['loop_free_tokens_per_forward']


def quality(result: Mapping[str, Any]) -> float:
    """In percent; NaN, which is not drawn, where nobody can tell."""
    share = result['quality']['cllm']
    return float('nan') if share is None else 100 * share


RESULTS = 'seed-*/*/evaluate.json'
COLUMNS = {'loop-free tokens per forward': loop_free, 'quality, %': quality}


def draw_ablations(root: Path, directory: Path) -> list[Path]:
    """Tokens/forward and quality of the rows below `root` that are done, a point for each seed.

    Rows of other numbers of steps have a picture of their own; returns the files.
    """
    places = sorted({file.parents[2] for file in root.glob(f'ablations/*-steps/{RESULTS}')})
    return [_draw(place, directory) for place in places]


def _draw(place: Path, directory: Path) -> Path:
    found = []
    for file in sorted(place.glob(RESULTS)):
        results = json.loads(file.read_text('utf-8'))
        results = results if isinstance(results, list) else [results]
        found += [(file.parent.name, result) for result in results]
    names = sorted({name for name, _ in found}, key=lambda name: (name != 'recipe', name))
    tasks = sorted({result['task'] for _, result in found})
    path = directory / f'ablations-{place.name}.svg'
    title = f'Ablations, {place.name.replace("-", " ")}: a point for each seed'
    with picture(path, title, str(place), (1, 2), 1 + 0.25 * len(names)) as axes:
        for ax, (title, value) in zip(axes, COLUMNS.items(), strict=True):
            for number, task in enumerate(tasks):
                points = [(value(r), names.index(name)) for name, r in found if r['task'] == task]
                style = look(number) | {'linestyle': ''}
                ax.plot(*zip(*points, strict=True), **style, label=task)
            ax.set_yticks(range(len(names)), names)
            ax.invert_yaxis()
            ax.set_title(title)
        legend_outside(axes[1])
    return path
