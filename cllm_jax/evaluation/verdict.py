"""Whether a drafter returned AR's tokens, under which promise, and how near a tie was if not."""

from collections.abc import Sequence

from cllm_jax.decoding.promise import first_difference, promise
from cllm_jax.decoding.request import encode_each, row_keys
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.evaluation.speed import IN_CLASS, Method
from cllm_jax.hf.model import Model


def _shown(model: Model, token: int | None) -> str:
    if token is None:
        return 'no more'
    return str(token) if model.tokenizer is None else repr(model.tokenizer.decode([token]))


def judged(is_equal: bool, how: str) -> str:
    """What answers are called that equal AR's, or do not, under a promise, which may be ''."""
    if not how:
        return f'{"IDENTICAL" if is_equal else "DIFFERENT"}, without a guarantee'
    return f'IDENTICAL by {how}' if is_equal else f'DIFFERENT, although promised by {how} (a fault)'


def verdict(
    name: str, drafted: Method, prompts: Sequence[str], result: DecodeResult, plain: DecodeResult
) -> list[str]:
    """The lines to print, of which the first begins with IDENTICAL, DIFFERENT or LOSSY.

    Args:
      name: of the method that gave `result`.
      plain: what its `reference` gave.
    """
    model, request = drafted.model, drafted.request
    equal = sum(a == b for a, b in zip(result.tokens, plain.tokens, strict=True))
    lossy = bool(request.sampling.typical)
    how, reason = ('', '') if lossy else promise(model, request)
    ar = "AR by this drafter's program" if request.exact == 'program' else 'AR'
    ar = f'AR {IN_CLASS}' if how == 'class' else ar
    counted = f'{equal} of {len(prompts)} prompts ({sum(map(len, result.tokens))} tokens)'
    said = f'{name} and {ar} agree token for token on {counted}'
    if lossy:
        return [f'LOSSY: {said}']
    lines = [f'{judged(equal == len(prompts), how)}: {said}']
    if not how:
        lines.append(f'({reason}; see docs/exactness.md)')
    keys_B = row_keys(request.seed, range(len(prompts)))
    ids, both = encode_each(model, prompts), (plain.tokens, result.tokens)
    if found := first_difference(model, request, ids, keys_B, both):
        said = [_shown(model, i) for i in found.ids]
        place = f'first in prompt {found.prompt + 1}, token {found.token + 1}'
        line = f'{place}: AR has {said[0]}, {name} {said[1]}'
        if found.units is not None:
            unit = f'units in the last place of {model.products}'
            line += f'; their scores are {found.units:.2g} {unit} apart'
        lines.append(line)
    return lines
