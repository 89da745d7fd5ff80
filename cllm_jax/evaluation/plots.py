"""Pictures of what `bench` and `evaluate` found, drawn from the results that they write as JSON.

`draw_bench` and `draw_evaluation` take these results, now or from a file, and return the files that
they wrote.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.evaluation.drawing import DIM, in_percent, legend_outside, look, picture

Results = Mapping[str, Any]


def redraw(path: str, draw: Callable[[Any, Path], list[Path]], directory: Path) -> list[Path]:
    """What one of these draws of the results in a file.

    Raises:
      ConfigError: there is no such file.
      DataError: it holds something else.
    """
    try:
        return draw(json.loads(Path(path).read_text('utf-8')), directory)
    except OSError as error:
        rule = 'name a file of results with --json'
        raise ConfigError(f'redraw {path!r}: {error.strerror}; {rule}') from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        fault = f'not results of this command ({type(error).__name__}: {one_line(error)})'
        raise DataError(f'{path}: {fault}; measure again') from error


def draw_bench(found: Results, directory: Path) -> list[Path]:
    """c(N), and for each task tokens/forward against speed-up, and acceptance."""
    source = _source(found, f'{found["model"]}; target: {found.get("target", "none")}')
    drawn = []
    if 'cost' in found:
        drawn.append(_draw_cost(found['cost'], directory, source))
    for task in found.get('tasks', ()):
        ways = {name: (w['tokens_per_forward'], w['speedup']) for name, w in task['ways'].items()}
        shares = {name: way['acceptance'] for name, way in task['ways'].items()}
        drawn += _draw_task(task, ways, shares, directory, source)
    return drawn


def draw_evaluation(tasks: Results | Sequence[Results], directory: Path) -> list[Path]:
    """For each task tokens/forward against speed-up, and acceptance."""
    drawn = []
    for found in tasks if isinstance(tasks, list) else [tasks]:
        name = f'CLLM, {DrafterConfig(found["drafter"]).drafter_title}'
        forward, speed = found['tokens_per_forward'], found['tokens_per_second']
        ways = {
            'target, AR': (1.0, 1.0),
            'target, Jacobi': (forward['target'], found['speedup_vanilla_jacobi']),
            'CLLM, AR': (1.0, speed['cllm_ar'] / speed['ar']),
            name: (forward['cllm'], found['speedup']),
        }
        models = found['models']
        source = _source(found, f'{models["cllm"]}; target: {models["target"]}')
        drawn += _draw_task(found, ways, {name: found['acceptance']}, directory, source)
    return drawn


def _source(found: Results, models: str) -> str:
    version = found['versions']['jax']
    return f'{models}\n{found["device"]}, {found["dtype"]}, jax {version}; times are medians'


def roofline(rows: Mapping[int, float], weights: float, token: float) -> dict[int, float]:
    """The least milliseconds of a forward, by its tokens.

    Args:
      rows: measured milliseconds, by tokens.
      weights: milliseconds to read the weights once, at the bandwidth of memory. It bounds nothing
        where a forward was faster: the weights lie in a cache.
      token: milliseconds of a token in the forward that did the most tokens/s.
    """
    least = weights if weights <= min(rows.values()) else 0.0
    return {n: max(least, n * token) for n in rows}


def _draw_cost(cost: Results, directory: Path, source: str) -> Path:
    """The time of a forward with N tokens over that with one, and its roofline."""
    batches = {
        int(batch): {int(n): row['forward_ms'] for n, row in rows.items()}
        for batch, rows in cost['per_batch'].items()
    }
    best = min(ms / n / batch for batch, rows in batches.items() for n, ms in rows.items())
    path, weights = directory / 'forward-cost.svg', cost['weight_limit_ms']
    title = f'c(N): a forward with N tokens over one with a single token, after {cost["prompt"]}'
    with picture(path, title, source, (1, len(batches))) as axes:
        for ax, (batch, rows) in zip(axes, batches.items(), strict=True):
            roof, label = roofline(rows, weights, batch * best), 'limit: the most tokens/s measured'
            if min(roof.values()) >= weights:
                label += ',\nor the weights read once,\nat the measured bandwidth'
            for k, (named, times) in enumerate({'measured': rows, label: roof}.items()):
                style = look(k) | ({'marker': '', 'linestyle': '--'} if times is roof else {})
                ax.plot(list(times), [ms / rows[1] for ms in times.values()], **style, label=named)
            ax.set_xscale('log', base=2)
            ax.set_yscale('log', base=2)
            ax.set_xticks(list(rows), list(map(str, rows)))
            ax.yaxis.set_major_formatter(lambda value, place: f'{value:.3g}')
            ax.set(xlabel='N, tokens per forward and row', ylabel='c(N)')
            ax.set_title(f'batch {batch}: {rows[1]:.3g} ms with one token')
            ax.legend(fontsize=7.5, loc='upper left')
    return path


def _draw_task(
    task: Results,
    ways: Mapping[str, tuple[float, float]],
    shares: Mapping[str, Sequence[float]],
    directory: Path,
    source: str,
) -> list[Path]:
    """Of one task: what each way commits and gains, and how often its guesses are right."""
    name = re.sub(r'[^\w.-]+', '_', task['task']).strip('_')
    told, timed = f'{task["task"]}: {task["n"]} held-out prompts', task.get('timed', task['n'])
    speed = f'Tokens per forward, and speed-up. {told}, {timed} of them timed at batch 1'
    paths = [directory / f'speedup-{name}.svg']
    with picture(paths[0], speed, source, height=4.6) as axes:
        _draw_speedups(axes[0], ways)
    if any(shares.values()):
        paths.append(directory / f'acceptance-{name}.svg')
        with picture(paths[1], f'Which guesses are right. {told}', source) as axes:
            for way, row in shares.items():
                if row:
                    style = look(len(axes[0].lines))
                    axes[0].plot(range(1, len(row) + 1), row, **style, label=way)
            axes[0].xaxis.get_major_locator().set_params(integer=True)
            axes[0].set(xlabel='slot of the draft', xlim=(0.5, None))
            axes[0].set_ylabel('right, where all before it are')
            in_percent(axes[0])
            legend_outside(axes[0])
    return paths


def _draw_speedups(ax: Any, ways: Mapping[str, tuple[float, float]]) -> None:
    """A numbered point for each way, the fastest first."""
    order = sorted(ways, key=lambda way: -ways[way][1])
    most = max(forward for forward, _ in ways.values())
    limit = 'limit: a forward as cheap as one of AR'
    ax.plot([1, most], [1, most], color=DIM, linestyle=':', label=limit)
    ax.axhline(1, color=DIM, linestyle='--', linewidth=1, label='AR of the target at its best')
    models = list(dict.fromkeys(way.split(',')[0] for way in order))
    for number, way in enumerate(order, 1):
        colour, mark = (look(models.index(way.split(',')[0]))[k] for k in ('color', 'marker'))
        forward, speedup = ways[way]
        label = f'{number}  {way}: {speedup:.2f}x'
        ax.plot(forward, speedup, mark, color=colour, markersize=6, label=label)
        ax.annotate(str(number), (forward, speedup), (5, 3), textcoords='offset points', fontsize=8)
    ax.set_xlabel('tokens per forward')
    ax.set_ylabel('speed-up over AR of the target, tokens/s')
    ax.set_ylim(bottom=0)
    legend_outside(ax)
