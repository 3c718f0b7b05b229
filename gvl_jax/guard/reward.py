"""The length-aware safety reward (PAPER §7; arXiv 2505.11049, Eq. 8-10)."""

import math
from typing import Literal, NamedTuple

from gvl_jax.guard.verdict import parse
from gvl_jax.types import Label

ECO_CAP_AS_RELEASED = 500 / 3072  # what the released Eco reward has for beta = 1/6 (which is 512 / 3072)


class RewardParts(NamedTuple):
    total: float  # 0: all right; below 0: the worse, the shorter
    safety: float  # format * (request + response) / 2
    format: float  # 1: the completion parses
    request: float  # 1: the label is right
    response: float
    length: float  # l_norm, before the cap beta


def length_aware_reward(
    text: str,
    request_label: Label | None,
    response_label: Label | None,
    *,
    beta: float,
    max_length: int,
    rule: Literal["paper", "as_released"] = "paper",
    finished: bool = True,
) -> RewardParts:
    """(-1 + safety) / min(l_norm, beta)^2, where a missing label counts as unharmful on both sides.

    paper: strict grammar; l_norm = characters of the reasoning / max_length, at most 1. Where a completion has no
    closed <think> block, its reasoning cannot be told from the rest and all of it counts.
    as_released: the first match anywhere, so a missing <think> goes unpunished, cut or not; l_norm = characters
    of the whole output / max_length, not clamped; any beta < 1 means the one cap they had, 500 / 3072, and beta >= 1
    none. An empty output, which divides by zero there, is held to the floor here.
    Under both, l_norm >= 1 / max_length. Raises ValueError for a beta or max_length that is not positive.
    """
    if beta <= 0 or max_length <= 0:
        raise ValueError(f"beta {beta} and max_length {max_length} must be positive; the paper's: 1 or 1/6, and 3072")
    if rule == "paper":
        verdict = parse(text, finished)
        characters = len(text if verdict.reasoning is None else verdict.reasoning)
        l_norm, cap = min(characters / max_length, 1.0), beta
    elif rule == "as_released":
        verdict = parse(text, rule="reference")
        l_norm, cap = len(text) / max_length, ECO_CAP_AS_RELEASED if beta < 1 else math.inf
    else:
        raise ValueError(f"unknown rule {rule!r}, expected paper or as_released")
    l_norm = max(l_norm, 1 / max_length)
    well_formed = float(verdict.status == "ok")
    request = well_formed * _same(verdict.request, request_label)
    response = well_formed * _same(verdict.response, response_label)
    safety = 0.5 * request + 0.5 * response
    return RewardParts((safety - 1.0) / min(l_norm, cap) ** 2, safety, well_formed, request, response, l_norm)


def _same(predicted: Label | None, gold: Label | None) -> float:
    return float((predicted == "harmful") == (gold == "harmful"))
