"""Decode prompts, with Jacobi iteration and autoregressively side by side.

    python -m cllm_jax.decode                                    a demonstration, no network needed
    python -m cllm_jax.decode --model DIR --prompts 'Once upon'  your model, your prompt
    python -m cllm_jax.decode --input prompts.jsonl --output answers.jsonl --no-compare

With --compare both decoders run, and the verdict tells whether their tokens are the same.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cllm_jax.cli.console import Console, print_plan, size, table
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write, parse
from cllm_jax.data.formats import read_jsonl
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.engine import decode_all, stream
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.registry import TITLES, Named, open_drafter
from cllm_jax.errors import ConfigError
from cllm_jax.evaluation.speed import (
    Way,
    ar_ways,
    share_identical,
    tokens_per_forward,
    tokens_per_second,
)
from cllm_jax.hf.load import MIXED, Model, Precision, load, mixed, peek, storage
from cllm_jax.hf.weights import abstract_params
from cllm_jax.model.cache import init_cache
from cllm_jax.runs.atomic import write_atomic
from cllm_jax.runs.recipe import to_json
from cllm_jax.runtime.mesh import tensor_mesh

DEMO_PROMPTS = 6


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Settings of decoding."""

    model: str = 'embedded'
    """embedded, embedded-target, a model or run directory, or a hub id owner/name."""
    prompts: tuple[str, ...] = ()
    """Prompts; without any, held-out prompts of the embedded tasks."""
    input: str = ''
    """JSONL file (.gz too) with a prompt per line, instead of prompts."""
    output: str = ''
    """Write one JSON object per prompt to this file: text, tokens, forwards, accepted, seconds
    (from the beginning of its batch to its end, compilation included). It has all of them or is
    not written."""
    drafter: str = 'jacobi'
    """jacobi; ar: one token per forward; lookup: prompt lookup; lookahead, beside Jacobi;
    model:DIR: a smaller model drafts; or a trained one, medusa, redrafter, eagle, space: NAME:DIR,
    or NAME where it was trained with the model or lies beside it."""
    reference: tuple[str, ...] = ()
    """With drafter lookup: text files that answers may quote (LLMA)."""
    block: int = 16
    """Tokens of the window or guess (n)."""
    mode: Literal['sliding', 'block'] = 'sliding'
    """Keep the window full, or let each block converge before the next (the paper's schedule)."""
    recycle: int = 0
    """Chains of dropped guesses that are tried again in the same forward."""
    branches: int = 0
    """Branches with second choices that are tried in the same forward."""
    lookup: bool = False
    """Also try what followed the last time in the prompt or answer, in the same forward."""
    max_tokens: int = 128
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples, and Jacobi still returns AR's tokens for the same seed."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    """Sample among the most likely tokens that make up this probability."""
    typical: float = 0.0
    """LOSSY, with drafter medusa and a temperature: epsilon of its typical acceptance (0.09)."""
    seed: int = 0
    """Of sampling noise, initial guesses and demonstration prompts."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    batch: int = 1
    """Prompts decoded together."""
    stream: bool = False
    """Print the text as it is produced; for one prompt, without output."""
    compare: bool = True
    """Decode autoregressively too, and time both."""
    tensor: int = 1
    """Devices that share every layer of the models."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else."""


def sampling_of(settings: DecodeConfig) -> Sampling:
    return Sampling(settings.temperature, settings.top_k, settings.top_p, settings.typical)


def drafter_named(settings: DecodeConfig) -> Named:
    return Named(
        settings.drafter,
        settings.block,
        settings.mode,
        settings.recycle,
        settings.branches,
        settings.lookup,
        settings.reference,
    )


def read_prompts(settings: DecodeConfig) -> list[str]:
    """The prompts of the command line, of a file, or of the demonstration."""
    if settings.prompts and settings.input:
        raise ConfigError('both prompts and input are given; give one of them')
    if settings.prompts:
        return list(settings.prompts)
    if settings.input:
        return [e.prompt for e in read_jsonl(settings.input)]
    source = open_source('sql+arithmetic', split='heldout', seed=settings.seed, limit=DEMO_PROMPTS)
    return [source[i].prompt for i in range(len(source))]


def rows_of(prompts: list[str], result: DecodeResult) -> Iterator[dict]:
    """What --output holds, per prompt."""
    columns = zip(
        prompts,
        result.texts,
        result.tokens,
        result.forwards,
        result.accepted,
        result.seconds,
        strict=True,
    )
    names = ('prompt', 'text', 'tokens', 'forwards', 'accepted', 'seconds')
    return (dict(zip(names, row, strict=True)) for row in columns)


def decode_many(
    console: Console,
    name: str,
    model: Model,
    request: Request,
    prompts: list[str],
    weights: Any = (),
) -> DecodeResult:
    """Decode all prompts, and show how far that is if they are more than a demonstration has."""
    if len(prompts) <= DEMO_PROMPTS:
        return decode_all(model, request, prompts, weights)
    before = 0
    with console.progress(name, len(prompts)) as bar:

        def advance(done: int) -> None:
            nonlocal before
            if done > before:
                bar(done - before)
            before = done

        return decode_all(model, request, prompts, weights, advance)


def compare(
    console: Console,
    name: str,
    model: Model,
    request: Request,
    weights: Any,
    prompts: list[str],
    result: DecodeResult,
    mesh: Mesh | None,
) -> None:
    """Autoregressive decoding beside the result: identity, tokens/forward, speed-up."""
    exact = dataclasses.replace(request.sampling, typical=0.0)
    ar = dataclasses.replace(request, drafter=AutoRegressive(), sampling=exact)
    plain, timed = decode_many(console, 'AR', model, ar, prompts), prompts[:DEMO_PROMPTS]
    with console.status(f'AR and {name}, timed in turn'):
        ways = ar_ways('AR', model, ar, mesh)
        speed = tokens_per_second(ways | {name: Way(model, request, weights)}, timed)
    base = max(speed[way] for way in ways)
    forward = tokens_per_forward(result)
    rows = [[way, 1.0, speed[way], speed[way] / base] for way in ways]
    rows.append([name, forward, speed[name], speed[name] / base])
    columns = ['', 'tokens/forward', 'tokens/s', 'speed-up']
    which = f'the first {len(timed)} prompts' if len(timed) < len(prompts) else 'these prompts'
    console.out.print(table(f'tokens/s: {which}, one at a time', columns, rows))
    same = share_identical(result, plain)
    verdict = 'IDENTICAL' if same == 1 else 'DIFFERENT'
    if request.sampling.typical:
        verdict = 'LOSSY'
    console.result(f'{verdict}: {name} and AR agree token for token on {same:.0%} of the prompts')


def show(console: Console, prompts: list[str], result: DecodeResult) -> None:
    """Prompts and answers, and what each answer took."""
    for prompt, text, tokens, forwards in zip(
        prompts, result.texts, result.tokens, result.forwards, strict=True
    ):
        console.literal(prompt, text or '')
        console.literal(f'-- {len(tokens)} tokens in {forwards} forwards\n', '')


def plan(settings: DecodeConfig, console: Console, prompts: list[str]) -> None:
    """What decoding would need."""
    config, dtype = peek(settings.model), storage(settings.dtype)
    weights = abstract_params(config, dtype)
    if settings.dtype == MIXED:
        weights, dtype = jax.eval_shape(mixed, weights), jnp.bfloat16
    cache = _bytes(
        jax.eval_shape(lambda: init_cache(config, 1, 1, dtype, settings.drafter == 'ar'))
    )
    facts = {
        'prompts': len(prompts),
        'parameters': f'{config.parameters:,}',
        'weights': size(_bytes(weights)),
        'KV cache per token': size(cache),
        'KV cache of the answers of a batch': size(cache * settings.max_tokens * settings.batch),
    }
    print_plan(console, to_json(settings), facts)


def _bytes(shapes: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def check_files(settings: DecodeConfig) -> None:
    """Raise ConfigError if the answers could not be written, or would replace the prompts."""
    if settings.output and settings.stream:
        raise ConfigError('both stream and output are given; leave stream out to write a file')
    can_write('output', settings.output)
    for path in (settings.input, *settings.reference) if settings.output else ():
        if path and Path(path).resolve() == Path(settings.output).resolve():
            raise ConfigError(f'output {settings.output!r}: is read too; name another file')


def run() -> None:
    settings, flags = parse(
        DecodeConfig, program='python -m cllm_jax.decode', description=__doc__, stage='decode'
    )
    console = Console()
    named, sampling = drafter_named(settings), sampling_of(settings)
    named.check()
    check_files(settings)
    exact = dataclasses.replace(sampling, typical=0.0)
    request = Request(
        AutoRegressive(),
        settings.max_tokens,
        exact,
        settings.seed,
        settings.stop,
        settings.batch,
    )
    prompts = read_prompts(settings)
    if settings.stream and len(prompts) != 1:
        raise ConfigError(f'stream with {len(prompts)} prompts: give exactly one prompt')
    if flags.plan:
        plan(settings, console, prompts)
        return
    mesh = tensor_mesh(settings.tensor)
    model = load(settings.model, settings.dtype, mesh)
    loaded = open_drafter(named, model, sampling, settings.dtype, mesh)
    request = dataclasses.replace(request, drafter=loaded.drafter, sampling=sampling)
    if sampling.typical:
        console.note('LOSSY: with typical acceptance answers are not those of AR')
    if settings.stream:
        for piece in stream(model, request, prompts[0], loaded.weights):
            print(piece, end='', flush=True)
        print()
        return
    result = decode_many(console, TITLES[named.name], model, request, prompts, loaded.weights)
    if settings.output:
        _write(Path(settings.output), rows_of(prompts, result))
        console.note(f'{settings.output}: {len(prompts)} answers')
    else:
        show(console, prompts, result)
    if settings.compare and settings.drafter != 'ar':
        name = TITLES[named.name] + (' (LOSSY)' if settings.typical else '')
        compare(console, name, model, request, loaded.weights, prompts, result, mesh)


def _write(path: Path, rows: Iterator[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    write_atomic(path, text.encode())


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
