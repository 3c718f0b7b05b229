"""The compiled half of the sampler: prompts are put into rows, and completions are drawn in the slots of their rows.

A row holds one prompt's keys and values, once. Its R slots hold a completion each, and all slots write the same column
of their caches at the same time, so that a token costs one plain write. A slot that is done is given the next
completion between two calls of `decode`; the columns are a ring, and a completion sees as many as it has tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gvl_jax.guard.closing import Closing
from gvl_jax.models.qwen_vl.config import QwenVLConfig
from gvl_jax.models.qwen_vl.model import bind
from gvl_jax.sharding import on_copy
from gvl_jax.types import Array, Batch

# Of a slot: nothing in it, drawing, or why its completion ended. CUT: a forced close came before `</think>`.
IDLE, RUNNING, END_TOKEN, VERDICT, BUDGET, CUT = range(-1, 5)
BLOCK = 128  # ids whose probabilities are summed before one of them is drawn


class Vocabulary(NamedTuple):
    """What the sampler knows of each id."""

    banned: Array  # bool[V] never drawn: vision ids, role markers, ids without a token
    end: Array  # bool[V] ends a completion
    transition: Array  # u8[states, V] the automaton that reads a tag in the bytes of the tokens


def vocabulary(tokenizer, vocab_size: int, tag: bytes = b"</result>") -> Vocabulary:
    """Tables for `decode`, from the bytes of every token.

    The automaton's state is how many bytes of `tag` have just been read, so a tag that is split over tokens in any
    way is seen, and one that is whole inside a token too. Its last state is final.
    """
    pieces = tokenizer.token_bytes()
    banned = np.ones(vocab_size, bool)
    banned[: len(pieces)] = False
    banned[list(tokenizer.banned_ids)] = True
    end = np.zeros(vocab_size, bool)
    end[[tokenizer.im_end, tokenizer.end_of_text]] = True

    final = len(tag)
    byte_step = np.zeros((final + 1, 256), np.uint8)
    for state in range(final):
        for byte in range(256):
            read = tag[:state] + bytes([byte])
            byte_step[state, byte] = next(n for n in range(state + 1, -1, -1) if read.endswith(tag[:n]))
    byte_step[final] = final
    transition = np.repeat(np.arange(final + 1, dtype=np.uint8)[:, None], vocab_size, 1)
    for token, piece in enumerate(pieces):
        if not end[token]:
            states = np.arange(final + 1)
            for byte in piece:
                states = byte_step[states, byte]
            transition[:, token] = states
    return Vocabulary(banned, end, transition)


class State(NamedTuple):
    """B rows of R slots in the middle of their work."""

    prompts: tuple  # of each layer (k, v) [K, B, S, H]
    prompt_mask: Array  # bool[B, S]
    prompt_length: Array  # i32[B] M-RoPE position of the first completion token
    first: Array  # [B, D] hidden of the prompt's last token
    caches: tuple  # of each layer (k, v) [K, B, R, J, H]
    clock: Array  # i32[] the column to be written next, modulo J
    hidden: Array  # [B, R, D] predicts the next token
    stopped: Array  # i32[B, R] RUNNING, IDLE, or why it ended
    lengths: Array  # i32[B, R] tokens so far
    tokens: Array  # i32[B, R, max_new_tokens]
    logprobs: Array  # f32[B, R, max_new_tokens]
    read: Array  # u8[B, R] state of the automaton
    keys: Array  # u32[B, R, 2] of the random numbers
    node: Array  # i32[B, R] place in the forced close, 0: not there
    has_response: Array  # i32[B, R] 1: there is a response to judge
    budget: Array  # i32[B, R] tokens at most
    scores: Array  # f32[B, R, 2] P(harmful) of request and response, where the forced close decided


def empty_state(config: QwenVLConfig, B: int, R: int, S: int, J: int, max_new_tokens: int) -> State:
    """No prompts, idle slots. J: columns of the caches to begin with."""
    text, dtype = config.text, config.dtype
    K, H, D = text.num_key_value_heads, text.head_dim, text.hidden_size

    def pairs(*shape: int) -> tuple:
        return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(text.num_hidden_layers))

    def zeros(*shape: int, of=jnp.int32):
        return jnp.zeros((B, R, *shape), of)

    return State(
        pairs(K, B, S, H), jnp.zeros((B, S), bool), jnp.zeros(B, jnp.int32), jnp.zeros((B, D), dtype),
        pairs(K, B, R, J, H), jnp.zeros((), jnp.int32), zeros(D, of=dtype), jnp.full((B, R), IDLE), zeros(),
        zeros(max_new_tokens), zeros(max_new_tokens, of=jnp.float32), zeros(of=jnp.uint8), zeros(2, of=jnp.uint32),
        zeros(), zeros(), zeros(), zeros(2, of=jnp.float32),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config",))
def instruction(params, tokens, *, config: QwenVLConfig):
    """Keys and values of what every prompt begins with, computed once for all of them."""
    return bind(config, params).instruction(tokens)


@on_copy
@functools.partial(jax.jit, static_argnames=("config",))
def prefill(params, batch: Batch, shared=None, *, config: QwenVLConfig):
    """Packed prompts → (hidden [B, T, D], keys and values [L, K, B, T, H]). shared: what `instruction` gave."""
    hidden, prompt = bind(config, params).rows(batch, shared, keep=True)
    return hidden, (prompt.k, prompt.v)


@functools.partial(jax.jit, donate_argnames=("state",))
def insert(state: State, rows, starts, lengths, positions, hidden, kept) -> State:
    """Put F prompts into `rows` i32[F]; a row that is not there (B) is passed over.

    starts i32[F]: where they begin in what `prefill` gave, whose rows lie end to end; lengths i32[F] of them;
    positions i32[F]: M-RoPE of what follows.
    """
    S = state.prompt_mask.shape[1]
    order = jnp.arange(S)[None]
    places = jnp.minimum(starts[:, None] + order, hidden.shape[0] * hidden.shape[1] - 1)

    def put(old, new):
        flat = new.reshape(new.shape[0], -1, new.shape[-1])  # [K, B · T, H]
        return old.at[:, rows].set(flat[:, places], mode="drop")

    last = hidden.reshape(-1, hidden.shape[-1])[starts + lengths - 1]
    return state._replace(
        prompts=tuple(
            tuple(put(old, new[i]) for old, new in zip(pair, kept, strict=True)) for i, pair in enumerate(state.prompts)
        ),
        prompt_mask=state.prompt_mask.at[rows].set(order < lengths[:, None], mode="drop"),
        prompt_length=state.prompt_length.at[rows].set(positions, mode="drop"),
        first=state.first.at[rows].set(last, mode="drop"),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def begin(state: State, fresh, keys, budget, node, has_response) -> State:
    """Begin a completion of their row's prompt in the slots `fresh` bool[B, R]; the others go on.

    keys u32[B, R, 2]: a draw depends on its key and its number in the completion, never on what else is there.
    budget, node, has_response i32[B, R]: see State."""

    def take(new, old):
        return jnp.where(fresh.reshape(fresh.shape + (1,) * (old.ndim - 2)), new, old)

    return state._replace(
        hidden=take(state.first[:, None], state.hidden),
        stopped=take(RUNNING, state.stopped),
        lengths=take(0, state.lengths),
        tokens=take(0, state.tokens),
        logprobs=take(0.0, state.logprobs),
        read=take(jnp.zeros((), jnp.uint8), state.read),
        keys=take(keys, state.keys),
        node=take(node, state.node),
        has_response=take(has_response, state.has_response),
        budget=take(budget, state.budget),
        scores=take(0.0, state.scores),
    )


@functools.partial(jax.jit, donate_argnames=("state",))
def stop(state: State, slots) -> State:
    """Give up what stands in `slots` bool[B, R]."""
    return state._replace(stopped=jnp.where(slots, IDLE, state.stopped))


@functools.partial(jax.jit, static_argnames=("columns",))
def _longer(pair, clock, *, columns: int):
    J = pair[0].shape[3]
    new = ((0, 0),) * 3 + ((0, columns - J), (0, 0))
    pair = jax.tree.map(lambda a: jnp.pad(jnp.roll(a, -(clock % J), axis=3), new), pair)
    return pair, jnp.full((), J, jnp.int32)  # the column written last is now J - 1


def grow(state: State, *, columns: int) -> State:
    """The same state with caches of `columns`: the oldest column first, then the new ones.

    Layer by layer, each deleted when it has been copied: the old caches and the new are never there together."""
    caches, clock = [], state.clock
    for pair in state.caches:
        longer, clock = _longer(pair, state.clock, columns=columns)
        jax.tree.map(lambda a: a.delete(), pair)
        caches.append(longer)
    return state._replace(caches=tuple(caches), clock=clock)


@functools.partial(
    jax.jit, static_argnames=("config", "steps", "length", "top_p", "top_k", "greedy"), donate_argnames=("state",)
)
def decode(
    params,
    shared,
    state: State,
    vocab: Vocabulary,
    closing: Closing | None,
    temperature,
    until,
    *,
    config: QwenVLConfig,
    steps: int,
    length: int | None = None,
    top_p: float = 1.0,
    top_k: int = 0,
    greedy: bool = False,
) -> tuple[State, Array]:
    """Up to `steps` tokens for every running slot; fewer once `until` slots are not running. → (state, steps done)

    A completion ends at an end token, when the automaton has read its tag, or at its budget. With `closing` the tag is
    that of the reasoning, no end token is drawn, and the rest is forced, in time for the budget. shared: what
    `instruction` gave. length: tokens of the longest prompt in use, None: the rows are full; no more is read.
    log-probs are those of softmax(logits / temperature) over allowed ids, before top-p and top-k; greedy ones of
    temperature 1.
    """
    model = bind(config, params)
    head, layers = model.head_kernel().astype(config.dtype), model.text.each()
    B, R, width = state.tokens.shape
    J = state.caches[0][0].shape[3]
    prompts = [
        (
            (k[:, :, :length], v[:, :, :length], state.prompt_mask[:, :length]),
            None if shared is None else (shared[0][i], shared[1][i]),
        )
        for i, (k, v) in enumerate(state.prompts)
    ]
    banned = jnp.asarray(vocab.banned if closing is None else vocab.banned | vocab.end)
    final = len(vocab.transition) - 1

    def body(carry):
        state, step = carry
        live = state.stopped == RUNNING
        logits = jnp.matmul(state.hidden, head, preferred_element_type=jnp.float32)
        allowed = jnp.where(banned[None, None], -jnp.inf, logits if greedy else logits / temperature)
        token, logprob = _draw(allowed, state.keys, state.lengths, top_p, top_k, greedy)
        read = jnp.asarray(vocab.transition)[state.read, token]
        if closing is None:
            node, scores = state.node, state.scores
            stopped = jnp.where(read == final, VERDICT, RUNNING)
            stopped = jnp.where(jnp.asarray(vocab.end)[token], END_TOKEN, stopped)
        else:
            token, forced, node, scores = _close(closing, state, logits, token, read == final)
            stopped = jnp.where(forced & (node == 0), jnp.where(state.read == final, VERDICT, CUT), RUNNING)
            read = jnp.where(forced, state.read, read)
        stopped = jnp.where((stopped == RUNNING) & (state.lengths + 1 == state.budget), BUDGET, stopped)
        hidden, caches = model.text.decode(
            model.embed(token), layers, prompts, state.prompt_length[:, None] + state.lengths,
            (state.clock - jnp.arange(J)[None, None]) % J <= state.lengths[..., None], state.caches, state.clock % J,
        )  # fmt: skip
        at = (jnp.arange(B)[:, None], jnp.arange(R)[None], jnp.where(live, state.lengths, width))
        state = state._replace(
            caches=tuple(caches),
            clock=(state.clock + 1) % J,
            hidden=hidden,
            stopped=jnp.where(live, stopped, state.stopped),
            lengths=state.lengths + live,
            tokens=state.tokens.at[at].set(token, mode="drop"),
            logprobs=state.logprobs.at[at].set(logprob, mode="drop"),
            read=jnp.where(live, read, state.read),
            node=jnp.where(live, node, state.node),
            scores=jnp.where(live[..., None], scores, state.scores),
        )
        return state, step + 1

    def some_left(carry):
        state, step = carry
        return (step < steps) & ((state.stopped != RUNNING).sum() < until)

    return lax.while_loop(some_left, body, (state, jnp.zeros((), jnp.int32)))


def _close(closing: Closing, state: State, logits, drawn, tag_read):
    """What the forced close makes of a step. → (token, whether it was forced, the node after it, scores)."""
    left = state.budget - state.lengths
    node = jnp.where(
        (state.node == 0) & (left <= closing.length), jnp.asarray(closing.cut)[state.has_response], state.node
    )
    ids, forced = jnp.asarray(closing.ids)[node], node != 0
    values = jnp.take_along_axis(logits, ids, -1)
    side = (values[..., 1] > values[..., 0]).astype(jnp.int32)
    token = jnp.where(forced, jnp.take_along_axis(ids, side[..., None], -1)[..., 0], drawn)
    decided = (jnp.asarray(closing.task)[node][..., None] == jnp.arange(2)[None, None]) & forced[..., None]
    scores = jnp.where(decided, jax.nn.sigmoid(values[..., :1] - values[..., 1:]), state.scores)
    entered = jnp.where(tag_read, jnp.asarray(closing.closed)[state.has_response, token], 0)
    return token, forced, jnp.where(forced, jnp.asarray(closing.next)[node, side], entered), scores


def _draw(logits, keys, number, top_p: float, top_k: int, greedy: bool):
    """A token of softmax(logits) f32[B, R, V] truncated, and its log-prob before that. → (i32[B, R], f32[B, R]).

    By the inverse of the distribution function, in blocks of ids: two random numbers a token, not one for every id.
    """
    total = jax.nn.logsumexp(logits, -1)
    if greedy:  # of the largest block its largest: argmax over all ids is a plain loop on CPUs, 21 against 0.8 ms
        blocks = _blocks(logits, -jnp.inf)
        block = jnp.argmax(blocks.max(-1), -1)
        inside = jnp.argmax(jnp.take_along_axis(blocks, block[..., None, None], 2)[:, :, 0], -1)
        token = block * BLOCK + inside
    else:
        kept = truncate(logits, top_p, top_k)
        share = _blocks(jnp.exp(kept - kept.max(-1, keepdims=True)), 0.0)
        chance = jax.vmap(jax.vmap(_chances))(keys, number)
        block = _pick(share.sum(-1), chance[..., :1])
        inside = _pick(jnp.take_along_axis(share, block[..., None, None], 2)[:, :, 0], chance[..., 1:])
        token = block * BLOCK + inside
    chosen = jnp.take_along_axis(logits, token[..., None], -1)[..., 0]
    return token.astype(jnp.int32), chosen - total


def _blocks(values, rest: float):
    """[B, R, V] → [B, R, V / BLOCK, BLOCK], filled up with `rest`."""
    padding = ((0, 0), (0, 0), (0, -values.shape[-1] % BLOCK))
    return jnp.pad(values, padding, constant_values=rest).reshape(*values.shape[:2], -1, BLOCK)


def _chances(key, number):
    """Two random numbers in [0, 1): token `number` of the completion with this key u32[2]."""
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), number), (2,))


def _pick(shares, chance):
    """The place where the running sum of shares [..., n] passes chance [..., 1] of it; never one whose share is 0."""
    running = jnp.cumsum(shares, -1)
    passed = (running > chance * running[..., -1:]) & (shares > 0)
    return jnp.where(passed.any(-1), jnp.argmax(passed, -1), jnp.argmax(shares, -1))


def truncate(logits, top_p: float, top_k: int):
    """Mask all but the top_k ids, then all but the fewest ids whose probabilities reach top_p. logits f32[..., V].

    Ids as likely as the last one kept stay too. No sort: the least probability kept is found by bisection over the
    bits of a float, whose order is that of the numbers, so 31 sums over the vocabulary give it exactly.
    """
    if top_k:
        kth = lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        probs = jax.nn.softmax(logits, -1)
        bits = lax.bitcast_convert_type(probs, jnp.int32)

        def halve(_, bounds):
            low, high = bounds  # the ids at `low` and above reach top_p, those at `high` and above do not
            middle = low + (high - low) // 2
            enough = jnp.where(bits >= middle, probs, 0.0).sum(-1, keepdims=True) >= top_p
            return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

        low = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)
        low, _ = lax.fori_loop(0, 31, halve, (low, jnp.full_like(low, np.float32(1.01).view(np.int32))))
        logits = jnp.where(bits >= low, logits, -jnp.inf)
    return logits
