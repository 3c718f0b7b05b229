"""The forced close: once the reasoning is over, by itself or by its budget, the result block is the only way on.

The block is a tree of token ids whose forks are the labels. At a fork the two ways are compared, which gives the
label and a score; so a completion always ends in a verdict, and a crafted text cannot make the guard think for ever.
"""

import os
from typing import NamedTuple

import numpy as np

from gvl_jax.guard.prompt import Tokenizer, result_block
from gvl_jax.types import Array, Label

THINK = "<think>\n\n</think>\n"  # no reasoning, as `answer_text` writes it
LABELS: tuple[Label, Label] = ("harmful", "unharmful")


class Closing(NamedTuple):
    """Nodes of the trees. Node 0 is outside: the completion is free, or complete."""

    ids: Array  # i32[nodes, 2] what a node emits: at a fork the id of harmful, then of unharmful; else one id twice
    next: Array  # i32[nodes, 2] the node after each; 0: the block is complete
    task: Array  # i32[nodes] whose label the node decides: 0 request, 1 response, -1 none
    cut: Array  # i32[2] the way in for reasoning that is cut off; [0]: without a response to judge, [1]: with one
    closed: Array  # i32[2, V] the way in after `</think>`, by the token that completed it
    length: Array  # i32[] tokens of the longest way
    opening: Array  # i32[n] an answer without reasoning, up to the first label
    fast: Array  # i32[2] the way in after `opening`, which ends with the last label


def closing(tokenizer: Tokenizer, vocab_size: int) -> Closing:
    """The trees for a tokenizer: after cut reasoning, after `</think>` and after `</think>` with its line break.

    Raises ValueError if its ids of the two labels do not part at one place.
    """
    nodes: list[tuple[list[int], list[int], int]] = [([0, 0], [0, 0], -1)]
    length = 0

    def add(tree: dict, forks: int) -> int:
        if not tree:
            return 0
        if len(tree) > 2 or (len(tree) == 2 and forks == 2):
            raise ValueError("the tokenizer encodes the labels harmful and unharmful in a way that parts twice")
        index, forked = len(nodes), len(tree) == 2
        nodes.append(([], [], 0))
        after = [add(branch, forks + forked) for branch in tree.values()]
        nodes[index] = (list(tree) * (3 - len(tree)), after * (3 - len(tree)), forks if forked else -1)
        return index

    def root(before: str, has_response: bool) -> int:
        nonlocal length
        ways = _ways(tokenizer, before, has_response)
        length = max(length, *map(len, ways))
        return add(_tree(ways), 0)

    both = (False, True)
    cut, bare, line = ([root(before, has_response) for has_response in both] for before in ("\n</think>\n", "\n", ""))
    whole = [_ways(tokenizer, THINK, has_response) for has_response in both]
    opening = os.path.commonprefix(whole[0] + whole[1])
    fast = [add(_tree([_up_to_label(way, ways)[len(opening) :] for way in ways]), 0) for ways in whole]
    closed = np.array(bare, np.int32)[:, None].repeat(vocab_size, 1)
    for token, piece in enumerate(tokenizer.token_bytes()):
        if piece.endswith(b"\n"):
            closed[:, token] = line
    ids, following, task = (np.array(column, np.int32) for column in zip(*nodes, strict=True))
    return Closing(
        ids, following, task, np.array(cut, np.int32), closed, np.int32(length), np.array(opening, np.int32),
        np.array(fast, np.int32),
    )  # fmt: skip


def _ways(tokenizer: Tokenizer, before: str, has_response: bool) -> list[list[int]]:
    """Ids of `before` and the block, for every combination of labels."""
    responses: tuple[Label | None, ...] = LABELS if has_response else (None,)
    pairs = [(request, response) for request in LABELS for response in responses]
    return [tokenizer.encode_text(before + result_block(*pair)) for pair in pairs]


def _tree(ways: list[list[int]]) -> dict:
    tree: dict = {}
    for way in ways:
        branch = tree
        for token in way:
            branch = branch.setdefault(token, {})
    return tree


def _up_to_label(way: list[int], ways: list[list[int]]) -> list[int]:
    """`way` up to the token at which it parts from the last of the others."""
    shared = max(len(os.path.commonprefix([way, other])) for other in ways if other != way)
    return way[: shared + 1]
