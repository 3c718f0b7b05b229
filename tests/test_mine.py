"""Which items are hard, and whose labels are doubtful."""

import pytest

from gvl_jax.guard.prompt import answer_text
from gvl_jax.mine import is_hard, is_right, unanimous
from gvl_jax.types import Sample

HARMFUL, UNHARMFUL, NONE = (
    (answer_text(text, *labels), True)
    for text, labels in (
        ("One way.", ("harmful", "harmful")),
        ("Another way.", ("harmful", "unharmful")),
        ("A third way.", ("harmful", None)),
    )
)


@pytest.mark.parametrize("completions, expected", [
    ([HARMFUL] * 4, True),
    ([UNHARMFUL, NONE], True),  # no response: unharmful, as the reward has it
    ([HARMFUL, HARMFUL, UNHARMFUL], False),
    ([HARMFUL, ("no verdict", True)], False),
    ([("no verdict", True)] * 4, False),
    ([(HARMFUL[0], False)] * 4, False),  # cut: no verdict
    ([HARMFUL], False),  # one agrees with nobody
])  # fmt: skip
def test_completions_agree_if_all_give_the_same_verdict(completions, expected):
    assert unanimous(completions) is expected


@pytest.mark.parametrize("said, gold, right", [
    (("harmful", "unharmful"), ("harmful", "unharmful"), True),
    (("harmful", "unharmful"), ("harmful", "harmful"), False),  # each label is compared with its own
    (("unharmful", "unharmful"), ("harmful", "unharmful"), False),
    (("unharmful", None), ("unharmful", None), True),
    (("unharmful", "unharmful"), ("unharmful", None), True),  # a missing label is unharmful, on both sides
    (("unharmful", None), ("unharmful", "harmful"), False),
])  # fmt: skip
def test_right_is_both_labels(said, gold, right):
    sample = Sample("a", "How?", request_label=gold[0], response_label=gold[1])
    text = answer_text("One way.", *said)
    assert is_right(text, True, sample) is right
    assert not is_right(text, False, sample) and not is_right(text.replace("<result>", ""), True, sample)


@pytest.mark.parametrize("keep, hard", [
    ("all_wrong", [True, False, False]), ("any_wrong", [True, True, False]), ("mixed", [False, True, False]),
])  # fmt: skip
def test_hard_is_how_often_it_went_wrong(keep, hard):
    assert [is_hard(right, 4, keep) for right in (0, 3, 4)] == hard
