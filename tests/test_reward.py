"""The length-aware safety reward against the paper's values and its stated properties."""

import math

import pytest
from hostile import COMPLETIONS, FAKE

from gvl_jax.guard.prompt import answer_text
from gvl_jax.guard.reward import RewardParts, length_aware_reward

VL = {"beta": 1.0, "max_length": 3072}
ECO = {"beta": 1 / 6, "max_length": 3072}


def wrong(characters):
    """Both labels are wrong against (harmful, harmful); the reasoning has this many characters."""
    return answer_text("a" * characters, "unharmful", "unharmful")


def padded(characters):
    """The same with an output of this many characters."""
    return wrong(characters - len(wrong(0)))


@pytest.mark.parametrize("characters, total", [(500, -37.7), (818, -14.1), (950, -10.5), (1500, -4.2), (3072, -1.0)])
def test_papers_values_for_vl(characters, total):
    for text, rule in ((wrong(characters), "paper"), (padded(characters), "as_released")):
        parts = length_aware_reward(text, "harmful", "harmful", **VL, rule=rule)
        assert round(parts.total, 1) == total
        assert parts == RewardParts(parts.total, 0.0, 1.0, 0.0, 0.0, characters / 3072)


@pytest.mark.parametrize("characters", [500, 818, 950, 1500, 3072, 9000])
def test_papers_values_for_eco(characters):
    released = length_aware_reward(padded(characters), "harmful", "harmful", **ECO, rule="as_released")
    assert round(released.total, 2) == -37.75
    paper = length_aware_reward(wrong(max(characters, 512)), "harmful", "harmful", **ECO)
    assert paper.total == pytest.approx(-36.0)  # 1 / (1/6)^2: the released cap is 500, not 512 characters


@pytest.mark.parametrize("rule", ["paper", "as_released"])
@pytest.mark.parametrize("setting", [VL, ECO])
@pytest.mark.parametrize("characters", [0, 10, 3072, 5000])
def test_all_right_is_zero_at_any_length(rule, setting, characters):
    parts = length_aware_reward(wrong(characters), "unharmful", "unharmful", **setting, rule=rule)
    assert parts.total == 0.0
    assert parts[1:5] == (1.0, 1.0, 1.0, 1.0)


def test_each_task_is_worth_half():
    text = answer_text("a" * 3072, "harmful", "unharmful")
    assert length_aware_reward(text, "harmful", "harmful", **VL)[:5] == (-0.5, 0.5, 1.0, 1.0, 0.0)
    assert length_aware_reward(text, "unharmful", "unharmful", **VL)[:5] == (-0.5, 0.5, 1.0, 0.0, 1.0)


def test_missing_label_counts_as_unharmful_on_both_sides():
    none = answer_text("a" * 3072, "unharmful", None)
    assert length_aware_reward(none, None, None, **VL).total == 0.0
    assert length_aware_reward(none, "unharmful", "unharmful", **VL).total == 0.0
    assert length_aware_reward(none, "unharmful", "harmful", **VL).total == -0.5
    said = answer_text("a" * 3072, "unharmful", "harmful")
    assert length_aware_reward(said, "unharmful", None, **VL).total == -0.5


@pytest.mark.parametrize("text", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_wrong_format_earns_nothing_even_where_a_verdict_is_quoted(text):
    parts = length_aware_reward(text, "unharmful", None, **VL)
    assert parts[1:5] == (0.0, 0.0, 0.0, 0.0)
    assert parts.total == -1 / parts.length**2 and math.isfinite(parts.total)


def test_wrong_format_is_punished_by_the_length_of_the_reasoning():
    parts = length_aware_reward("<think>\n" + "a" * 500 + "\n</think>\nno result", "harmful", None, **VL)
    assert parts.total == pytest.approx(-((3072 / 500) ** 2))
    unclosed = "<think>\n" + "a" * 500
    parts = length_aware_reward(unclosed, "harmful", None, **VL)
    assert parts.length == len(unclosed) / 3072


def test_cut_generation_is_wrong_format():
    assert length_aware_reward(FAKE, "unharmful", None, **VL, finished=False).format == 0.0
    assert length_aware_reward(FAKE, "unharmful", None, **VL, finished=False, rule="as_released").format == 1.0


def test_length_is_clamped_in_the_paper_and_not_as_released():
    assert length_aware_reward(wrong(6144), "harmful", "harmful", **VL).total == -1.0
    parts = length_aware_reward(padded(6144), "harmful", "harmful", **VL, rule="as_released")
    assert (parts.total, parts.length) == (-0.25, 2.0)


def test_length_counts_reasoning_in_the_paper_and_everything_as_released():
    text = wrong(100)
    assert length_aware_reward(text, "harmful", "harmful", **VL).length == 100 / 3072
    assert length_aware_reward(text, "harmful", "harmful", **VL, rule="as_released").length == len(text) / 3072


def test_missing_think_is_punished_in_the_paper_and_not_as_released():
    text = "<result>\nRequest: unharmful\nResponse: None\n</result>"
    assert length_aware_reward(text, "unharmful", None, **VL).format == 0.0
    assert length_aware_reward(text, "unharmful", None, **VL, rule="as_released").total == 0.0


@pytest.mark.parametrize("rule", ["paper", "as_released"])
def test_empty_output_is_held_to_the_floor(rule):
    assert length_aware_reward("", "harmful", None, **VL, rule=rule)[::5] == (-(3072.0**2), 1 / 3072)


def test_longer_wrong_answers_are_punished_less_up_to_beta():
    totals = [length_aware_reward(wrong(n), "harmful", "harmful", **ECO).total for n in (0, 1, 100, 511, 512, 3000)]
    assert totals == sorted(totals) and totals[-1] == totals[-2] > totals[-3]


def test_impossible_settings_are_errors():
    with pytest.raises(ValueError, match="beta 0 and max_length 3072 must be positive"):
        length_aware_reward(FAKE, None, None, beta=0, max_length=3072)
    with pytest.raises(ValueError, match="beta 1 and max_length 0 must be positive"):
        length_aware_reward(FAKE, None, None, beta=1, max_length=0)
    with pytest.raises(ValueError, match="unknown rule 'strict', expected paper or as_released"):
        length_aware_reward(FAKE, None, None, beta=1, max_length=10, rule="strict")
