"""From datasets and trajectories to the model and the samples of a training run."""

import dataclasses
import hashlib
import random
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from cllm_jax.data.chat import is_chat, turns_of
from cllm_jax.data.encoding import prompt_ids
from cllm_jax.data.sources import Source, open_source
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.request import check_ids
from cllm_jax.decoding.result import Trajectory
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf import load as hf
from cllm_jax.hf.load import DTYPES
from cllm_jax.hf.model import Model, with_tokenizer
from cllm_jax.hf.tokenizer import noted_or_new, read_tokenizer, same_tokenizer, write_tokenizer
from cllm_jax.model.llama import Llama, init_params
from cllm_jax.runs.atomic import replace_directory, temporary
from cllm_jax.runs.run_dir import has_begun, noted
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.processes import barrier, is_main
from cllm_jax.tasks.example import Example
from cllm_jax.training.config import TrainConfig, architecture
from cllm_jax.training.objectives import objective_of
from cllm_jax.trajectories.clean import clean, cut_warning
from cllm_jax.trajectories.collector import encode_rows
from cllm_jax.trajectories.store import read_manifest, read_records


class Listener(Protocol):
    """Who is told what goes on (`cli/console.py`); nothing here prints."""

    def note(self, text: str) -> None: ...

    def status(self, text: str) -> AbstractContextManager: ...

    def dropped(self, source: Source) -> None: ...


TOKENIZER_ROWS = 8000
"""Rows of the dataset that a new tokenizer is trained on."""


def new_model(settings: TrainConfig, examples: list[Example], run: Path) -> Model:
    """Random weights, and the run's own tokenizer or that of another model."""
    config = architecture(settings)
    if settings.tokenizer:
        tokenizer, special = shared_tokenizer(settings.tokenizer, config.vocab_size)
    elif any(is_chat(example.prompt) for example in examples):
        fault = f'model new: its tokenizer has no chat template, and {settings.data} has chats'
        raise ConfigError(f'{fault}; set tokenizer to a model that has one')
    else:
        tokenizer = own_tokenizer(settings, examples, run)
        special = {'eos_ids': (tokenizer.eos_token_id,), 'pad_id': tokenizer.pad_token_id}
    config = dataclasses.replace(config, **special)
    init = jax.jit(partial(init_params, Llama(config, DTYPES[settings.dtype])))
    return Model(config, init(prng_key(settings.seed)), tokenizer, 'new')


def own_tokenizer(settings: TrainConfig, examples: list[Example], run: Path) -> Any:
    """Trained on the examples when a run begins, and kept in `run/tokenizer` for its resumption."""
    places = [run / 'tokenizer', run / 'model']  # the latter in runs of older versions
    begun = has_begun(run) and any(place.is_dir() for place in places)
    if is_main() and not begun:
        # A random choice: a regular one could miss a task of a mixture altogether.
        rows = min(len(examples), TOKENIZER_ROWS)
        texts = [e.prompt + e.answer for e in random.Random(settings.seed).sample(examples, rows)]
        temp = temporary(places[0])
        write_tokenizer(temp, train_tokenizer(texts, settings.new.vocab_size))
        replace_directory(temp, places[0])
    barrier('tokenizer')
    return read_tokenizer(next(place for place in places if place.is_dir()))


def shared_tokenizer(name: str, vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """The tokenizer of a model, and the token ids that its config gives a meaning to.

    Raises ConfigError if it has none, or its vocabulary has another size.
    """
    config, tokenizer = hf.peek(name), hf.open_tokenizer(hf.resolve(name))
    if tokenizer is None:
        raise ConfigError(f'{name} has no tokenizer; name a model that has one')
    if config.vocab_size != vocab_size:
        raise ConfigError(
            f'new.vocab_size {vocab_size}: the tokenizer of {name} has {config.vocab_size} tokens; '
            'set the same'
        )
    config = hf.with_turn_end(config, tokenizer)
    return tokenizer, {'eos_ids': config.eos_ids, 'pad_id': config.pad_id}


def trajectory_samples(settings: TrainConfig, model: Model, listener: Listener) -> list[Trajectory]:
    """The cleaned trajectories of a collection.

    Raises ConfigError if it was made with another tokenizer, DataError for ids outside the table.
    """
    directory = Path(settings.data)
    made_with = read_manifest(directory)['identity']
    if not same_tokenizer(made_with.get('tokenizer'), model.tokenizer):
        raise ConfigError(
            f'{directory}: collected with another tokenizer than that of {model.source}; '
            'collect again with this model'
        )
    with listener.status(f'reading {directory}'):
        kept, counts = clean(read_records(directory), settings.cleaning)
        for one in kept:
            for ids in (one.prompt, one.answer, one.states):
                check_ids(model, ids, f'{directory}: record {one.id}: ', DataError)
    listener.note('trajectories: ' + ', '.join(f'{v} {k}' for k, v in sorted(counts.items())))
    limit, total = made_with.get('max_tokens', 0), counts.total() - counts['augmented states']
    cut = (directory, counts['truncated'], total, limit, model.config.max_positions)
    if warning := cut_warning(*cut):
        listener.note(warning)
    return kept


def read_examples(settings: TrainConfig, data: str, listener: Listener) -> list[Example]:
    """The training rows of a dataset."""
    source = open_source(data, split='train', seed=settings.seed, limit=settings.examples)
    listener.dropped(source)
    with listener.status(f'reading {len(source)} examples of {source.name}'):
        return list(source.rows)


def without_states(block: int, prompt: np.ndarray, answer: np.ndarray) -> Trajectory:
    """A sample whose states, of `block` tokens, are made by chance if there are to be any."""
    return Trajectory(np.zeros((0, block), np.int32), np.zeros(0, np.int32), prompt, answer)


def text_samples(
    model: Model, examples: list[Example], listener: Listener, block: int = 0
) -> list[Trajectory]:
    """Prompts with their reference answers, where they have one; no states of `block` tokens.

    Every answer of a chat is learnt, each by a sample of its own that has all before it as prompt.
    """
    if not model.config.eos_ids:
        raise ConfigError(f'{model.source} has no end token; set eos_token_id in its config.json')
    with listener.status('tokenising'):
        turns = [turn for example in examples for turn in turns_of(example)]
        pairs = encode_rows(model, turns)
    # An end token alone is not an answer: a model that learns it says nothing any more.
    kept = [without_states(block, *pair) for pair in pairs if len(pair[1]) > 1]
    unlike = sum(not len(answer) for _, answer in pairs)
    if len(kept) + unlike < len(pairs):
        listener.note(f'{len(pairs) - len(kept) - unlike} rows without an answer left out')
    if unlike:
        why = 'the template does not go on from their prompts, or they spell an end token'
        listener.note(f'{unlike} answers of chats left out: {why}')
    return kept


def held_out_rows(settings: TrainConfig) -> Source | None:
    """The rows of the held-out tests, None if there are none; ConfigError for nothing to learn."""
    test, objective = settings.held_out, objective_of(settings)
    name = objective.dataset
    dataset = getattr(settings, name)
    if not (objective.reads_trajectories or dataset):
        raise ConfigError(
            f'objective {settings.objective!r} without {name}; name a dataset, such as {name}: sql'
        )
    if not test.every:
        return None
    task = settings.task or dataset or read_manifest(Path(settings.data))['identity']['data']
    return open_source(task, split='heldout', seed=test.seed, limit=test.prompts)


def trained_on_too(samples: list[Trajectory], source: Source, model: Model) -> int:
    """How many of the held-out prompts are prompts of samples as well."""
    texts = [row.prompt for row in source.rows]
    known = {tuple(sample.prompt.tolist()) for sample in samples}
    return sum(tuple(p) in known for p in prompt_ids(model.tokenizer, texts, model.config.bos_id))


def inputs_of(
    settings: TrainConfig, model: Model, samples: list[Trajectory], run: Path
) -> dict[str, str]:
    """Names and fingerprints of what a run learns from; the same for a root that was moved.

    What the run of that directory noted stays as it is where it means the same.
    """
    begun = run / 'inputs.json'
    inputs = {'model': settings.model.replace(f'{settings.root}/', 'ROOT/', 1)}
    if settings.model != 'new':
        place, known = hf.resolve(settings.model), noted(begun, 'model_files')
        new = hf.files_fingerprint(place)[:16]
        inputs['model_files'] = known if hf.same_files(known, place) else new
    inputs['tokenizer'] = noted_or_new(noted(begun, 'tokenizer'), model.tokenizer)[:16]
    digest = hashlib.sha256()
    for sample in samples:
        for array in (sample.prompt, sample.answer, sample.states, sample.start):
            digest.update(f'{array.shape}'.encode() + array.tobytes())
    inputs['samples'] = f'{len(samples)} samples, sha256 {digest.hexdigest()[:16]}'
    return inputs


def prepare(
    settings: TrainConfig, mesh: Mesh | None, listener: Listener, run: Path
) -> tuple[Model, list[Trajectory]]:
    """The model to start from and its training samples, for the run of that directory."""
    objective = objective_of(settings)
    if objective.reads_trajectories:
        model = with_tokenizer(hf.load(settings.model, settings.dtype, mesh))
        samples = trajectory_samples(settings, model, listener)
        block = samples[0].states.shape[1] if samples else 0
        if not objective.keeps_states:
            block = objective.block(settings)
            samples = [without_states(block, s.prompt, s.answer) for s in samples]
        if settings.texts and samples:
            examples = read_examples(settings, settings.texts, listener)
            samples += text_samples(model, examples, listener, block)
    else:
        examples = read_examples(settings, getattr(settings, objective.dataset), listener)
        if settings.model == 'new':
            model = new_model(settings, examples, run)
        else:
            model = with_tokenizer(hf.load(settings.model, settings.dtype, mesh))
        block = objective.block(settings) if objective.noise(settings, model) else 0
        samples = text_samples(model, examples, listener, block)
    begun = [s for s in samples if len(s.prompt)]
    if len(begun) < len(samples):
        listener.note(f'{len(samples) - len(begun)} samples without a prompt left out')
    kept = [s for s in begun if s.length <= settings.max_length]
    listener.note(f'{len(kept)} samples, {len(begun) - len(kept)} too long left out')
    if settings.steps and not kept:
        raise DataError(
            'no training sample is left; check the data and their answers, max_length and cleaning'
        )
    return model, kept
