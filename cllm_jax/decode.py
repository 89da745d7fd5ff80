"""Decode prompts, with a drafter and autoregressively in turn.

    python -m cllm_jax.decode                                    a demonstration, no network needed
    python -m cllm_jax.decode --model DIR --prompts 'Once upon'  your model, your prompt
    python -m cllm_jax.decode --model DIR --chat                 a chat with your model
    python -m cllm_jax.decode --watch                            a race in the terminal
    python -m cllm_jax.decode --input prompts.jsonl --output answers.jsonl --no-compare

With --compare both decode, and the verdict tells whether their tokens are the same.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax

from cllm_jax.cli.console import Console, print_plan, size, table
from cllm_jax.cli.conversation import converse
from cllm_jax.cli.guard import guard
from cllm_jax.cli.settings import can_write_all, parse
from cllm_jax.data.chat import LONGEST, check_template, user_chat
from cllm_jax.data.formats import read_jsonl
from cllm_jax.data.sources import open_source
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.promise import reference
from cllm_jax.decoding.request import Request, Texts
from cllm_jax.decoding.result import DecodeResult, tokens_per_forward
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.decoding.stream import reply, stream
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.open import open_drafter
from cllm_jax.drafters.registry import DrafterConfig
from cllm_jax.errors import ConfigError
from cllm_jax.evaluation.bandwidth import bytes_of_weights, read_per_second, weight_bytes
from cllm_jax.evaluation.recording import trace_all
from cllm_jax.evaluation.speed import Method, other_precisions, plain_methods, tokens_per_second
from cllm_jax.evaluation.terminal import watch
from cllm_jax.evaluation.trace import write_traces
from cllm_jax.evaluation.verdict import verdict
from cllm_jax.evaluation.window import choose, learn
from cllm_jax.hf.load import Precision, chosen, load, peek, products_of
from cllm_jax.hf.model import Model, with_tokenizer
from cllm_jax.model.cache import init_cache
from cllm_jax.runs.atomic import write_atomic
from cllm_jax.runtime.backend import Exactness, backend_of
from cllm_jax.runtime.mesh import tensor_mesh

DEMO_PROMPTS = 6
WATCHED_PROMPTS = 2
"""One of each embedded task."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig(DrafterConfig):
    """Settings of decoding."""

    model: str = 'embedded'
    """embedded, embedded-target, a model or run directory, a GGUF file, or a hub id owner/name."""
    prompts: tuple[str, ...] = ()
    """Prompts; without any, held-out prompts of the embedded tasks."""
    input: str = ''
    """JSONL file (.gz too) with a prompt, or the messages of a chat, per line."""
    chat: bool = False
    """Each prompt is what a user says, and the model's chat template is applied; without prompts
    and input, a chat in the terminal."""
    system: str | None = None
    """System message with which each chat begins."""
    output: str = ''
    """Write one JSON object per prompt to this file: text, tokens, forwards, accepted, seconds
    (from the beginning of its batch to its end, compilation included). It has all of them or is
    not written."""
    trace: str = ''
    """Write to this file what every forward verified and committed (docs/view.md): the drafter's
    and, with compare, AR's, each prompt decoded once more alone and timed."""
    max_tokens: int | None = None
    """Longest answer; 128 if not given, with chat 512."""
    temperature: float = 0.0
    """0 is greedy; above 0 samples, and every drafter still returns AR's tokens for the same
    seed."""
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
    watch: bool = False
    """Show AR and the drafter next to each other, forward by forward (docs/view.md); with
    --no-compare the drafter alone. One prompt after the other, and two if none is given. Where no
    terminal is, the last frame is printed."""
    compare: bool = True
    """Decode autoregressively too, and time both."""
    tensor: int = 1
    """Devices that share every layer of the models."""
    dtype: Precision = 'auto'
    """Of weights and cache; mixed has both in bfloat16 and float32 everywhere else. auto: bfloat16
    on an accelerator, float32 on a CPU, and mixed on a CPU with AMX."""
    exact: Exactness = 'auto'
    """How far tokens hang on rounding (docs/exactness.md): class: on the token alone, whatever the
    window and the batch; program: AR runs the drafter's program; off: each as fast as it can. auto:
    class where that is known to hold."""

    @property
    def talks(self) -> bool:
        """Whether a user is asked for what to answer."""
        return self.chat and not (self.prompts or self.input)

    def resolved(self) -> 'DecodeConfig':
        """The same with the longest answer as a number."""
        known = (LONGEST if self.chat else 128) if self.max_tokens is None else self.max_tokens
        return dataclasses.replace(self, max_tokens=known)

    def request(self) -> Request:
        """What is asked of AR: the drafter, and a lossy rule that it may have, come later."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p)
        drafter = AutoRegressive()
        how = (self.max_tokens, sampling, self.seed, self.stop, self.batch)
        return Request(drafter, *how, exact=self.exact)


def read_prompts(settings: DecodeConfig) -> Texts:
    """The prompts of the command line, of a file, or of the demonstration."""
    if settings.prompts and settings.input:
        raise ConfigError('both prompts and input are given; give one of them')
    if settings.chat or settings.prompts or settings.input:
        found = [e.prompt for e in read_jsonl(settings.input)] if settings.input else ()
        given = [*settings.prompts, *found]
        return [user_chat(p, settings.system) for p in given] if settings.chat else given
    limit = WATCHED_PROMPTS if settings.watch else DEMO_PROMPTS
    source = open_source('sql+arithmetic', split='heldout', seed=settings.seed, limit=limit)
    return [row.prompt for row in source.rows]


def write_answers(path: Path, prompts: Texts, result: DecodeResult) -> None:
    """Write what --output holds, a line per prompt."""
    names = ('texts', 'tokens', 'forwards', 'accepted', 'seconds')
    columns = {name.replace('texts', 'text'): getattr(result, name) for name in names}
    rows = (
        {'prompt' if isinstance(prompt, str) else 'messages': prompt}
        | dict(zip(columns, row, strict=True))
        for prompt, *row in zip(prompts, *columns.values(), strict=True)
    )
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


def decode_many(console: Console, name: str, method: Method, prompts: Texts) -> DecodeResult:
    """Decode all prompts, and show how far that is if they are more than a demonstration has."""
    if len(prompts) <= DEMO_PROMPTS:
        return decode_all(method.model, method.request, prompts)
    with console.progress(name, len(prompts)) as bar:
        return decode_all(method.model, method.request, prompts, bar)


def compare(
    console: Console,
    name: str,
    drafted: Method,
    ar: Method,
    prompts: Texts,
    result: DecodeResult,
) -> None:
    """Autoregressive decoding next to the result: identity, tokens/forward, speed-up."""
    asked = Method(ar.model, reference(drafted.request, ar.request.drafter))
    plain, timed = decode_many(console, 'AR', asked, prompts), prompts[:DEMO_PROMPTS]
    with console.status(f'AR and {name}, timed in turn'):
        baselines = plain_methods('AR', ar)
        speed = tokens_per_second(baselines | {name: drafted}, timed)
    best = max(baselines, key=lambda baseline: speed[baseline])
    base = speed[best]
    rows = [[baseline, 1.0, speed[baseline], speed[baseline] / base] for baseline in baselines]
    rows.append([name, tokens_per_forward(result), speed[name], speed[name] / base])
    columns = ['', 'tokens/forward', 'tokens/s', 'speed-up']
    which = f'the first {len(timed)} prompts' if len(timed) < len(prompts) else 'these prompts'
    console.out.print(table(f'tokens/s: {which}, one at a time', columns, rows))
    console.result(read_per_second(best, baselines[best].model, base))
    for line in verdict(name, drafted, prompts, result, plain):
        console.result(line)


def show(console: Console, prompts: Texts, result: DecodeResult) -> None:
    """Prompts and answers, and what each answer took."""
    for i, prompt in enumerate(prompts):
        asked = prompt if isinstance(prompt, str) else f'> {prompt[-1]["content"]}\n'
        console.literal(asked, result.texts[i] or '')
        took = f'{len(result.tokens[i])} tokens in {result.forwards[i]} forwards'
        console.literal(f'-- {took}\n', '')


def plan(settings: DecodeConfig, console: Console, prompts: Texts) -> None:
    """What decoding would need."""
    config, precision = peek(settings.model), chosen(settings.dtype, settings.tensor)
    dtype, backend = products_of(precision), backend_of((), settings.tensor)
    in_class = settings.exact == 'auto' and str(dtype) in backend.rounding_class.dtypes
    backend = backend.exactly('class' if in_class else settings.exact)
    kept = backend.cache_dtype(dtype, one_query=settings.drafter == 'ar')
    cache = weight_bytes(jax.eval_shape(lambda: init_cache(config, 1, 1, kept)))
    weights, copied = bytes_of_weights(config, precision, settings.tensor)
    more = {'matrices once more, for products from the left': copied}
    drafter, _, directory = settings.drafter.partition(':')
    if drafter == 'model':
        sizes = bytes_of_weights(peek(directory), precision, settings.tensor)
        more['weights of the draft model'] = sum(sizes)
    others = other_precisions(config, precision, backend) if settings.compare else ()
    sizes = (bytes_of_weights(config, other, settings.tensor) for other in others)
    more['AR in other precisions, to compare'] = sum(map(sum, sizes))
    facts = {
        'prompts': len(prompts),
        'parameters': f'{config.parameters:,}',
        'weights': size(weights),
        **{name: size(count) for name, count in more.items() if count},
        'KV cache per token': size(cache),
        'KV cache of the answers of a batch': size(cache * settings.max_tokens * settings.batch),
    }
    print_plan(console, settings, facts)


def check_files(settings: DecodeConfig) -> None:
    """Raise ConfigError if a file could not be written, or would replace another one."""
    written = {'output': settings.output, 'trace': settings.trace}
    for name, path in written.items():
        if path and settings.talks:
            raise ConfigError(f'{name} {path!r}: of a chat in the terminal; give prompts')
        for way in ('stream', 'watch') if path else ():
            if getattr(settings, way):
                rule = f'leave {way} out to write a file'
                raise ConfigError(f'both {way} and {name} are given; {rule}')
    if settings.watch and (settings.stream or settings.talks):
        other = 'stream' if settings.stream else 'chat without prompts'
        raise ConfigError(f'both watch and {other} are given; leave one of them out')
    can_write_all(written, (settings.input, *settings.reference))


def write_trace(console: Console, path: Path, named: dict[str, Method], prompts: Texts) -> None:
    """Write what --trace holds."""
    with console.progress('trace', len(prompts)) as bar:
        traces = trace_all(list(named.items()), prompts, progress=bar)
    write_traces(path, traces)
    console.note(f'{path}: {len(traces)} decodes, which python -m cllm_jax.view --trace shows')


def check_chats(settings: DecodeConfig, model: Model, console: Console) -> None:
    """Raise ConfigError if a chat is wanted of a model that has no template for it.

    Of one that has a template, say that texts are taken as they stand.
    """
    if settings.chat:
        check_template(with_tokenizer(model).tokenizer, model.source)
    elif settings.prompts and model.tokenizer is not None and model.tokenizer.chat_template:
        marks = model.tokenizer.get_added_vocab()
        if not any(mark in prompt for prompt in settings.prompts for mark in marks):
            console.note(f'{model.source} has a chat template; with --chat it is applied')


def run() -> None:
    settings, flags = parse(DecodeConfig, stage='decode', description=__doc__)
    settings, console = settings.resolved(), Console()
    settings.check_drafter()
    check_files(settings)
    request = settings.request()
    sampling = dataclasses.replace(request.sampling, typical=settings.typical)
    if settings.system is not None and not settings.chat:
        raise ConfigError(f'system {settings.system!r}: is a message of a chat; add --chat')
    prompts = read_prompts(settings)
    if settings.stream and len(prompts) != 1 and not settings.talks:
        raise ConfigError(f'stream with {len(prompts)} prompts: give exactly one prompt')
    if flags.plan:
        plan(settings, console, prompts)
        return
    mesh = tensor_mesh(settings.tensor)
    model = load(settings.model, settings.dtype, mesh)
    console.opened(model)
    check_chats(settings, model, console)
    drafter = open_drafter(settings, model, settings.dtype, mesh)
    asked = dataclasses.replace(request, drafter=drafter, sampling=sampling)
    choice = choose(model, asked, prompts, sample=not settings.stream)
    if choice.why:
        console.note(choice.why)
    drafted = Method(model, choice.request)
    if sampling.typical:
        console.note('LOSSY: with typical acceptance answers are not those of AR')
    if settings.talks:
        converse(
            console, partial(reply, model, drafted.request), list(user_chat([], settings.system))
        )
        return
    if settings.stream:
        for piece in stream(model, drafted.request, prompts[0]):
            print(piece, end='', flush=True)
        print()
        return
    name = settings.drafter_title + (' (LOSSY)' if settings.typical else '')
    compared = settings.compare and settings.drafter != 'ar'
    if settings.watch:
        plain = Method(model, dataclasses.replace(request, exact='off'))
        watch(
            console, ({AutoRegressive.title: plain} if compared else {}) | {name: drafted}, prompts
        )
        return
    result = decode_many(console, name, drafted, prompts)
    learn(model, asked, drafted.request, result)
    if settings.output:
        write_answers(Path(settings.output), prompts, result)
        console.note(f'{settings.output}: {len(prompts)} answers')
    else:
        show(console, prompts, result)
    if compared:
        compare(console, name, drafted, Method(model, request), prompts, result)
    if settings.trace:
        plain = Method(model, reference(drafted.request, request.drafter))
        named = {AutoRegressive.title: plain} if compared else {}
        write_trace(console, Path(settings.trace), named | {name: drafted}, prompts)


def main() -> None:
    guard(run)


if __name__ == '__main__':
    main()
