"""Every drafter returns what the plain causal model returns, in no more forwards, and says how.

Compiling is the cost here, so all cases have one shape (8 rows, prompts up to 16 tokens, up to 40
new ones) and differ in data: weights, prompts, lengths, limits, stop ids and keys.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, Sequences, setting, windows
from cllm_jax.decoding.engine import answers, decode_all
from cllm_jax.decoding.loop import Buffers, Decoder, Prompts, programs
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.decoding.state import DecodeState, Trace
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi, initial_guesses
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.model.llama import Llama, forward
from cllm_jax.runtime.backend import CPU
from tests.tiny import compilations, copy_model, ragged_prompts, random_model, tiny_config

ROWS, WIDTH, STEPS, SLOTS, VOCAB, STOPS = 8, 16, 48, 128, 29, 3
PERIOD = 12
MODULE = Llama(tiny_config())
PREFILL, ADVANCE = programs(CPU)


@struct.dataclass
class Bush(Drafter):
    """A random tree, another in each row; two of three nodes repeat what was written PERIOD ago."""

    size: int = setting()
    seed: int = setting(0)

    @property
    def nodes(self) -> int:
        return self.size

    def draft(self, state, sequences, sampling):
        rng = np.random.default_rng(self.seed)
        shape = len(sequences.length_B), self.nodes
        parent_BN = np.full(shape, -1, np.int32)
        depth_BN = np.zeros(shape, np.int32)
        for i in range(1, self.nodes):
            parent_BN[:, i] = rng.integers(max(0, i - 3), i, shape[0])
            depth_BN[:, i] = 1 + np.take_along_axis(depth_BN, parent_BN[:, i : i + 1], 1)[:, 0]
        back_BN = np.where(rng.random(shape) < 0.7, PERIOD, rng.integers(1, PERIOD, shape))
        slots_BN = sequences.length_B[:, None] + depth_BN - np.maximum(back_BN, depth_BN)
        guess_BN = jnp.take_along_axis(sequences.tokens_BS, jnp.maximum(slots_BN, 0), axis=1)
        tokens_BN = guess_BN.at[:, 0].set(sequences.window(1)[:, 0])
        valid_BN = jnp.asarray(rng.random(shape) < 0.9)
        return Draft(tokens_BN, valid_BN, jnp.asarray(parent_BN), int(depth_BN.max())), state


AR = AutoRegressive()
GREEDY, MILD, FREE = Sampling(), Sampling(0.7, top_k=10, top_p=0.9), Sampling(1.0)
SIZES = {'sliding': (1, 2, 5, 8, 31, 64), 'block': (1, 2, 3, 5, 16, 64)}
GREEDY_RUNS = [(Jacobi(n, mode), GREEDY) for mode, sizes in SIZES.items() for n in sizes]
SAMPLED_RUNS = [
    (AR, MILD),
    (Jacobi(8), MILD),
    (Jacobi(5, 'block'), MILD),
    (Jacobi(16, 'block'), FREE),
]
TRACED_RUNS = [(AR, GREEDY), *GREEDY_RUNS, *SAMPLED_RUNS]
RUNS = [
    *TRACED_RUNS,
    (PromptLookup(6), GREEDY),
    (PromptLookup(4, ngram=2), FREE),
    (Bush(12), GREEDY),
    (Bush(9, seed=1), MILD),
    (Jacobi(8, recycle=3), GREEDY),
    (Jacobi(5, 'block', recycle=2), MILD),
    (Jacobi(8, lookup=True), GREEDY),
    (Jacobi(5, 'block', recycle=1, lookup=True), MILD),
    (JacobiTree(8, 3, 2), GREEDY),
    (JacobiTree(5, 2, 3), MILD),
    (Lookahead(window=4, ngram=3, guesses=3), GREEDY),
    (Lookahead(window=3, ngram=4, guesses=2, block=6), MILD),
]
BLOCK_RUNS = [r for r in RUNS if isinstance(r[0], Jacobi) and r[0].mode == 'block']
choose_jit = jax.jit(choose, static_argnums=3)


def name(value) -> str:
    if isinstance(value, Sampling):
        return f'T{value.temperature}'
    if isinstance(value, PromptLookup):
        return f'lookup{value.block}'
    if isinstance(value, Lookahead):
        return f'lookahead{value.window},{value.block}'
    if isinstance(value, JacobiTree):
        return f'tree{value.block}x{value.branches}'
    if isinstance(value, Bush):
        return f'bush{value.nodes}'
    if isinstance(value, Jacobi):
        chains = f'+{value.recycle}' if value.recycle else ''
        return f'{value.mode}{value.block}{chains}' + ('+lookup' if value.lookup else '')
    return type(value).__name__


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One batch of requests, and what the plain causal model answers without stop or limit."""

    params: dict
    prompts: list[list[int]]
    max_tokens: np.ndarray
    stop_ids: np.ndarray
    keys: jax.Array
    plain: np.ndarray

    @property
    def answers(self) -> list[list[int]]:
        out = []
        for row, limit in zip(self.plain.tolist(), self.max_tokens, strict=True):
            ends = [i for i, token in enumerate(row[:limit]) if token in self.stop_ids]
            out.append(row[: ends[0] + 1 if ends else limit])
        return out


@jax.jit
def last_logits(params, tokens_BT, length_B):
    logits_BTV = forward(MODULE, params, tokens_BT)
    return jnp.take_along_axis(logits_BTV, (length_B - 1)[:, None, None], axis=1)


def plain_decoding(params, prompts, keys, sampling, steps=40) -> np.ndarray:
    """Autoregression with nothing of the loop: no cache, the whole sequence every time."""
    tokens = np.full((ROWS, WIDTH + steps), 7, np.int32)
    length = np.array([len(p) for p in prompts], np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    out = []
    for _ in range(steps):
        logits_B1V = last_logits(params, tokens, length)
        out.append(np.asarray(choose_jit(logits_B1V, keys, length[:, None], sampling))[:, 0])
        tokens[np.arange(ROWS), length] = out[-1]
        length += 1
    return np.stack(out, 1)


@functools.cache
def cases(sampling: Sampling) -> list[Case]:
    """Three random models, whose guesses are mostly rejected, and one that repeats its prompt.

    Stop tokens: none; the first of row 0 and a later one of row 1; random ids; two of a pattern.
    """
    out = []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        params = (random_model(seed) if seed < 3 else copy_model(PERIOD)).params
        prompts = ragged_prompts(seed, [1, *rng.integers(1, WIDTH, ROWS - 2), WIDTH])
        if seed == 3:
            prompts = ragged_prompts(seed, rng.integers(PERIOD, WIDTH, ROWS))
        keys = row_keys(seed, range(ROWS))
        plain = plain_decoding(params, prompts, keys, sampling)
        max_tokens = rng.integers(2, 41, ROWS).astype(np.int32)
        max_tokens[-2:] = 40, 1
        stop_ids = [-1] * STOPS
        if seed == 1:
            stop_ids = [plain[0, 0], plain[1, 7], -1]
        if seed == 2:
            stop_ids = rng.choice(VOCAB, STOPS, replace=False)
        if seed == 3:
            stop_ids = [prompts[0][-6], prompts[1][-3], -1]
        stop_ids = np.array(stop_ids, np.int32)
        out.append(Case(params, prompts, max_tokens, stop_ids, keys, plain))
    return out


def decoder_of(case: Case, drafter: Drafter, sampling: Sampling) -> Decoder:
    decoder = Decoder(MODULE, case.params, drafter, case.stop_ids, sampling)
    return jax.tree.map(jnp.asarray, decoder)


def first(case: Case, drafter: Drafter, sampling: Sampling, trace=False) -> DecodeState:
    """The state after the prefill."""
    prompt_BP = np.full((ROWS, WIDTH), 3, np.int32)
    for row, prompt in zip(prompt_BP, case.prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in case.prompts], np.int32)
    prompts = Prompts(*map(jnp.asarray, (prompt_BP, lengths, case.max_tokens)), case.keys)
    return PREFILL(decoder_of(case, drafter, sampling), prompts, Buffers(SLOTS, STEPS, 0, trace))


def begin(case: Case, drafter: Drafter, sampling: Sampling) -> DecodeState:
    """AR's prefill, compiled once per sampling rule, then the drafter's state and room to trace."""
    state = first(case, AR, sampling)

    def draft(sequences):
        return drafter.draft(drafter.init(sequences), sequences, sampling)[0]

    def none(dtype, *nodes):
        return jnp.zeros((ROWS, STEPS, *nodes), dtype)

    n, is_chain = drafter.nodes, jax.eval_shape(draft, state.sequences).parent_BN is None
    parents = None if is_chain else none(jnp.int32, n)
    trace = Trace(none(jnp.int32, n), none(jnp.int32), none(bool, n), parents)
    return state.replace(drafter=drafter.init(state.sequences), trace=trace)


def proceed(case: Case, drafter, sampling, state, until=STEPS) -> DecodeState:
    bounds = jnp.int32(until), jnp.int32(ROWS)
    return ADVANCE(decoder_of(case, drafter, sampling), *bounds, state)


@functools.cache
def runs(drafter, sampling: Sampling) -> list[tuple[Case, DecodeState]]:
    """Every case decoded, with its final state."""
    return [
        (case, proceed(case, drafter, sampling, begin(case, drafter, sampling)))
        for case in cases(sampling)
    ]


@pytest.mark.parametrize(('drafter', 'sampling'), RUNS, ids=name)
def test_every_drafter_returns_the_tokens_of_plain_decoding(drafter, sampling):
    for case, state in runs(drafter, sampling):
        assert answers(state, ROWS)[0] == case.answers


@pytest.mark.parametrize('sampling', [GREEDY, MILD], ids=name)
def test_cases_end_in_every_way(sampling):
    found = set()
    for case, state in runs(Jacobi(8), sampling):
        assert len({tuple(row) for row in case.plain.tolist()}) > ROWS // 2, 'rows must differ'
        for tokens, accepted, limit in zip(*answers(state, ROWS), case.max_tokens, strict=True):
            where = 'first' if len(tokens) == 1 else 'inside' if accepted[-1] > 1 else 'alone'
            found.add(('stop' if tokens[-1] in case.stop_ids else 'limit', where))
            assert len(tokens) == limit or tokens[-1] in case.stop_ids
    assert found == set(itertools.product(('stop', 'limit'), ('first', 'inside', 'alone')))


@pytest.mark.parametrize(('drafter', 'sampling'), RUNS, ids=name)
def test_forwards_account_for_every_token(drafter, sampling):
    for _, state in runs(drafter, sampling):
        for tokens, accepted in zip(*answers(state, ROWS), strict=True):
            assert accepted[0] == 1 and min(accepted) >= 1
            assert sum(accepted) == len(tokens)
            assert max(accepted[1:], default=0) <= drafter.nodes
        emitted, forwards = np.array(state.emitted_BI), np.array(state.forwards_B)
        assert all(not row[n:].any() for row, n in zip(emitted, forwards, strict=True))
        assert int(state.iteration) == forwards.max(), 'the loop runs until the last row finishes'


@pytest.mark.parametrize(('drafter', 'sampling'), BLOCK_RUNS, ids=name)
def test_a_block_takes_at_most_n_forwards(drafter, sampling):
    for _, state in runs(drafter, sampling):
        for accepted in answers(state, ROWS)[1]:
            pending = np.cumsum(accepted)[:-1] - 1
            assert max(np.bincount(pending // drafter.block), default=0) <= drafter.block


@pytest.mark.parametrize(
    ('drafter', 'sampling'),
    [
        (AR, GREEDY),
        (Jacobi(64), GREEDY),
        (Jacobi(8), MILD),
        (Jacobi(5, 'block'), MILD),
        (Bush(12), GREEDY),
    ],
    ids=name,
)
def test_cache_holds_what_a_fresh_prefill_computes(drafter, sampling):
    """Rejected guesses leave nothing behind (I1, I5)."""
    for case, state in runs(drafter, sampling):
        tokens, length = np.array(state.sequences.tokens_BS), np.array(state.sequences.length_B)
        prompts = Prompts(tokens[:, :64], length, np.ones(ROWS, np.int32), case.keys)
        fresh = PREFILL(decoder_of(case, AR, GREEDY), prompts, Buffers(SLOTS, STEPS))
        kept, new = (np.stack(c.k_RSH + c.v_RSH) for c in (state.cache, fresh.cache))
        kept, new = (x.reshape(len(x), -1, ROWS, *x.shape[2:]) for x in (kept, new))
        for row in range(ROWS):
            error = np.abs(kept[:, :, row, : length[row]] - new[:, :, row, : length[row]])
            assert error.max() < 1e-5 * max(1, np.abs(kept).max())


@pytest.mark.parametrize(('drafter', 'sampling'), TRACED_RUNS, ids=name)
def test_trace_starts_random_and_converges(drafter, sampling):
    """Slot 0 is committed, each state extends the converged prefix, the last one is the answer."""
    n, block_mode = drafter.nodes, getattr(drafter, 'mode', '') == 'block'
    for case, state in runs(drafter, sampling):
        guesses = np.array(initial_guesses(state.sequences))
        drafts, starts = np.array(state.trace.tokens_BIN), np.array(state.trace.position_BI)
        for row, (tokens, accepted) in enumerate(zip(*answers(state, ROWS), strict=True)):
            prompt = len(case.prompts[row])
            assert (starts[row, 1 : len(accepted)] - prompt == np.cumsum(accepted)[:-1] - 1).all()
            blocks: dict[int, list[np.ndarray]] = {}
            for i in range(1, len(accepted)):
                at, draft = starts[row, i] - prompt, drafts[row, i]
                assert draft[0] == tokens[at]
                room = n - at % n if block_mode else n
                ahead = tokens[at : at + room]
                right = int(np.cumprod(draft[: len(ahead)] == ahead).sum())
                assert accepted[i] == right or i == len(accepted) - 1  # the last may be cut
                if block_mode:
                    converged = tokens[at - at % n : at]
                    blocks.setdefault(at // n, []).append(np.array([*converged, *draft[:room]]))
            for block, states in blocks.items():
                first = prompt + block * n
                assert len(states[0]) == n
                assert (states[0][1:] == guesses[row, first + 1 : first + n]).all()
                truth = np.array(tokens[block * n : block * n + n])
                right = [int(np.cumprod(s[: len(truth)] == truth).sum()) for s in states]
                assert all(a < b for a, b in itertools.pairwise(right)), 'prefixes must grow'
                if block + 1 in blocks:
                    assert (states[-1] == truth).all(), 'a block ends at its fixed point'


@pytest.mark.parametrize(('drafter', 'sampling'), RUNS, ids=name)
def test_a_trace_tells_why_so_many_tokens_were_committed(drafter, sampling):
    """They are the longest path of valid nodes that spells the answer, and one more."""
    for case, state in runs(drafter, sampling):
        trace = jax.tree.map(np.asarray, state.trace)
        for row, (tokens, accepted) in enumerate(zip(*answers(state, ROWS), strict=True)):
            for i in range(1, len(accepted)):
                at = int(trace.position_BI[row, i]) - len(case.prompts[row])
                chain = trace.parent_BIN is None
                parents = np.arange(-1, drafter.nodes - 1) if chain else trace.parent_BIN[row, i]
                right = {0: 0}
                for node in range(1, drafter.nodes):
                    depth = right.get(int(parents[node]), -1) + 1
                    said = tokens[at + depth : at + depth + 1] if depth else []
                    found = [trace.tokens_BIN[row, i, node]]
                    if said == found and trace.valid_BIN[row, i, node]:
                        right[node] = depth
                longest, last = max(right.values()), i == len(accepted) - 1
                assert accepted[i] == longest + 1 or (last and accepted[i] >= longest)


def test_initial_guesses_are_prompt_tokens_chosen_by_the_row_key():
    prompts = ragged_prompts(5, [3, 16])
    keys = row_keys(1, range(2))

    def guesses(rows, slots, keys):
        tokens = np.full((len(rows), slots), VOCAB, np.int32)  # outside the vocabulary
        for row, ids in zip(tokens, rows, strict=True):
            row[: len(ids)] = ids
        length = jnp.asarray([len(ids) for ids in rows], jnp.int32)
        sequences = Sequences(jnp.asarray(tokens), length, length, keys, prompt_width=16)
        return np.array(initial_guesses(sequences))

    both = guesses(prompts, 40, keys)
    assert all(set(g) <= set(p) for g, p in zip(both.tolist(), prompts, strict=True))
    assert (guesses(prompts[1:], 24, keys[1:])[0] == both[1, :24]).all()
    assert (guesses(prompts, 40, row_keys(2, range(2)))[1] != both[1]).mean() > 0.5


def test_a_predictable_answer_is_accepted_in_whole_windows():
    """One forward finds n new tokens, the next confirms them."""
    n = 8
    case = dataclasses.replace(
        cases(GREEDY)[3],
        max_tokens=np.full(ROWS, 46, np.int32),
        stop_ids=np.full(STOPS, -1, np.int32),
    )
    for drafter in (Jacobi(n), Jacobi(n, 'block')):
        state = proceed(case, drafter, GREEDY, begin(case, drafter, GREEDY))
        tokens, accepted = answers(state, ROWS)
        assert tokens == [(prompt[-PERIOD:] * 4)[:46] for prompt in case.prompts]
        if drafter.mode == 'sliding':
            assert {max(counts) for counts in accepted} >= {n}
            assert all(n / 2 < 46 / len(counts) < n for counts in accepted)
        else:
            assert all(len(counts) <= 1 + 2 * 48 / n for counts in accepted)


@struct.dataclass
class Scripted(Drafter):
    """Drafts what is written in its weights: tokens, and which slots may be accepted."""

    tokens_BS: jax.Array
    allowed_BS: jax.Array
    size: int = setting()

    @property
    def nodes(self) -> int:
        return self.size

    def draft(self, state, sequences, sampling):
        script_BN, valid_BN = (
            windows(x_BS, sequences.length_B, self.size)
            for x_BS in (self.tokens_BS, self.allowed_BS)
        )
        tokens_BN = script_BN.at[:, 0].set(sequences.window(1)[:, 0])
        return Draft(tokens_BN, valid_BN), state


def answers_in_place(case):
    """`[B, S]` with AR's answer to each prompt in the slots where it belongs."""
    script = np.full((ROWS, SLOTS), 3, np.int32)
    for row, prompt, answer in zip(script, case.prompts, case.plain, strict=True):
        row[len(prompt) : len(prompt) + len(answer)] = answer
    return script


def test_a_drafter_decides_the_forwards_and_never_the_answer():
    n = 4
    for case in cases(MILD):
        script = answers_in_place(case)
        allowed = np.ones((ROWS, SLOTS), bool)
        every_third = (np.arange(SLOTS) % 3 > 0) & allowed
        accepted = {}
        for who, tokens, valid in (
            ('oracle', script, allowed),
            ('adversary', (script + 1) % VOCAB, allowed),
            ('unsure', script, every_third),
            ('mute', script, ~allowed),
        ):
            drafter = Scripted(jnp.asarray(tokens), jnp.asarray(valid), n)
            state = proceed(case, drafter, MILD, begin(case, drafter, MILD))
            answer, accepted[who] = answers(state, ROWS)
            assert answer == case.answers
        for row, answer in enumerate(case.answers):
            assert len(accepted['oracle'][row]) == 1 + -(-(len(answer) - 1) // n)
            assert accepted['adversary'][row] == accepted['mute'][row] == [1] * len(answer)
            assert max(accepted['unsure'][row]) <= 3
            if len(answer) > 12:
                assert 3 in accepted['unsure'][row]


@pytest.mark.parametrize(
    ('drafter', 'sampling'),
    [
        (Jacobi(8), MILD),
        (Jacobi(5, 'block'), GREEDY),
        (PromptLookup(6), GREEDY),
        (Bush(12), GREEDY),
    ],
    ids=name,
)
def test_the_prefill_verifies_a_draft_too(drafter, sampling):
    """The answers stay; what Jacobi saves is a forward per answer, and block mode nothing."""
    saved = 0
    for (case, late), early in zip(
        runs(drafter, sampling),
        [first(c, drafter, sampling, trace=True) for c in cases(sampling)],
        strict=True,
    ):
        state = proceed(case, drafter, sampling, early)
        assert answers(state, ROWS)[0] == case.answers
        saved += int((late.forwards_B - state.forwards_B).sum())
    if isinstance(drafter, Jacobi):
        assert saved > 0 if drafter.mode == 'sliding' else saved == 0


def test_a_right_draft_is_accepted_in_the_prefill():
    n = 4
    for case in cases(GREEDY):
        script = jnp.asarray(answers_in_place(case))
        drafter = Scripted(script, jnp.ones((ROWS, SLOTS), bool), n)
        state = first(case, drafter, GREEDY)
        for accepted, answer in zip(answers(state, ROWS)[1], case.answers, strict=True):
            assert accepted == [min(n, len(answer))]
        state = proceed(case, drafter, GREEDY, state)
        assert answers(state, ROWS)[0] == case.answers


def test_one_shape_compiles_once_and_reads_nothing_back():
    runs(Jacobi(8), MILD)
    compiled = compilations()
    for case, until in zip(cases(MILD), (1, 2, 9, STEPS), strict=True):
        other = dataclasses.replace(
            case, keys=row_keys(77, range(ROWS)), max_tokens=case.max_tokens[::-1].copy()
        )
        state, decoder = begin(other, Jacobi(8), MILD), decoder_of(case, Jacobi(8), MILD)
        bounds = jnp.int32(until), jnp.int32(ROWS)
        with jax.transfer_guard('disallow'):
            ADVANCE(decoder, *bounds, state)
    assert compilations() == compiled


def test_prefill_arguments_survive_the_donation_of_its_state():
    """A caller may reuse prompts and keys although `advance` consumes the state made of them."""
    case = cases(GREEDY)[0]
    keys = case.keys
    first = answers(proceed(case, AR, GREEDY, begin(case, AR, GREEDY)), ROWS)
    assert not keys.is_deleted()
    assert answers(proceed(case, AR, GREEDY, begin(case, AR, GREEDY)), ROWS) == first


def test_stopping_and_going_on_changes_nothing():
    for case, whole in runs(Jacobi(5, 'block'), MILD):
        state = begin(case, Jacobi(5, 'block'), MILD)
        for until in (1, 2, 5, 6, STEPS):
            state = proceed(case, Jacobi(5, 'block'), MILD, state, until=until)
            assert int(state.iteration) == min(until, int(whole.iteration))
        assert answers(state, ROWS) == answers(whole, ROWS)


def test_batching_changes_neither_answers_nor_forwards_nor_states():
    """Five prompts, the batch filled up to eight rows, against each prompt alone."""
    model = random_model(1, tiny_config(eos_ids=(4, 9)))
    prompts = ragged_prompts(3, [16, 1, 9, 4, 12])
    prompts[0][:3] = [4, 9, 0]  # stop ids in a prompt do not stop its answer
    together = decode_all(model, Request(Jacobi(8), 40, MILD, seed=3, trace=True), prompts)
    ends = [answer[-1] in (4, 9) for answer in together.tokens]
    assert any(ends) and max(map(len, together.tokens)) > 1
    done = []
    request = Request(Jacobi(8), 40, MILD, seed=3, trace=True, batch=1)
    alone = decode_all(model, request, prompts, progress=done.append)
    assert done == [1] * 5
    assert alone.tokens == together.tokens and alone.accepted == together.accepted
    assert together.texts == [None] * 5
    assert together.forwards == [len(t.states) + 1 for t in together.trajectories]
    assert together.tokens_per_forward == [
        len(t) / n for t, n in zip(together.tokens, together.forwards, strict=True)
    ]
    for a, b, answer in zip(
        alone.trajectories, together.trajectories, together.tokens, strict=True
    ):
        assert (a.states == b.states).all() and (a.start == b.start).all()
        assert (b.states[:, 0] == np.array(answer)[b.start]).all()
    again = dataclasses.replace(request, seed=4)
    assert decode_all(model, again, prompts[:2]).tokens != together.tokens[:2]
    assert decode_all(model, request, []).tokens == []
