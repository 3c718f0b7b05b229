"""The verdict grammar: what is exactly it parses, anything else fails closed."""

import re

import pytest
from hostile import COMPLETIONS, FAKE, TRUE, fuzzed, mutated

from gvl_jax.guard.verdict import Verdict, flagged, parse

# The grammar written a second time, with plain backtracking: for short texts only.
WS, NEWLINE = r"[ \t\r\n]*", r"[ \t\r]*\n[ \t\r\n]*"
GRAMMAR = re.compile(
    rf"{WS}<think>((?:(?!</?(?:think|result)>).)*)</think>{WS}<result>({WS}Answers:)?{NEWLINE}"
    rf"Request:[ \t]*(?i:(?:un)?harmful){NEWLINE}Response:[ \t]*(?i:(?:un)?harmful|none){NEWLINE}</result>"
    rf"{WS}(<\|im_end\|>|<\|endoftext\|>)?{WS}",
    re.DOTALL | re.ASCII,
)
LOOKS_LIKE_A_TAG = re.compile(r"[\u200b\u200d\ufeff\u202e＜＞]")


@pytest.mark.parametrize("request_label", ["harmful", "unharmful", "Harmful", "UNHARMFUL"])
@pytest.mark.parametrize("response_label", ["harmful", "unharmful", "None", "none"])
def test_the_grammar_parses(request_label, response_label):
    text = f"<think>\nR\n</think>\n<result>\nAnswers:\nRequest: {request_label}\nResponse: {response_label}\n</result>"
    response = None if response_label.lower() == "none" else response_label.lower()
    assert parse(text) == Verdict(request_label.lower(), response, "ok", "R", ())


@pytest.mark.parametrize(
    "text",
    [
        FAKE + "<|im_end|>",
        FAKE + "\n<|endoftext|>\n",
        "\n\n " + FAKE + " \n",
        FAKE.replace("Answers:\n", ""),
        FAKE.replace("\n", "\r\n"),
        FAKE.replace("\n", " \n\n\t"),
        FAKE.replace("\nThe request is fine.\n", ""),
        FAKE.replace("</think>\n", "</think>"),
        FAKE.replace("Request: unharmful", "Request:unharmful  "),
        FAKE.replace("fine.", "fine: a < b, 你好 🙂, Request: unharmful, think> result"),
    ],
)
def test_white_space_answers_line_and_one_end_token_are_free(text):
    assert parse(text)[:3] == ("unharmful", None, "ok")


@pytest.mark.parametrize("text", COMPLETIONS.values(), ids=COMPLETIONS.keys())
def test_hostile_completions_fail_closed(text):
    verdict = parse(text)
    assert verdict[:3] == (None, None, "parse_failed")
    assert flagged(verdict)


def test_fuzz_alone_is_never_a_verdict():
    assert all(flagged(parse(text)) for text in fuzzed(10_000, seed=0))


@pytest.mark.parametrize("text", [FAKE, TRUE])
def test_a_mutated_completion_parses_only_if_it_is_still_the_grammar(text):
    outcomes = set()
    for mutant in mutated(text, 10_000, seed=1):
        match = GRAMMAR.fullmatch(mutant)
        verdict = parse(mutant)
        if match and LOOKS_LIKE_A_TAG.search(match[1]):
            assert verdict.status == "ok" or any(sign in match[1] for sign in ("think", "result")), mutant
            continue
        assert (verdict.status == "ok") == bool(match), mutant
        outcomes.add(verdict.status)
    assert outcomes == {"ok", "parse_failed"}


def test_cut_generation_is_truncated_whatever_it_says():
    for text in (FAKE, TRUE, *COMPLETIONS.values()):
        verdict = parse(text, finished=False)
        assert verdict[:3] == (None, None, "truncated")
        assert flagged(verdict)


def test_flagged_follows_either_label():
    assert not flagged(Verdict("unharmful", None, "ok", ""))
    assert not flagged(Verdict("unharmful", "unharmful", "ok", ""))
    assert flagged(Verdict("harmful", None, "ok", ""))
    assert flagged(Verdict("unharmful", "harmful", "ok", ""))
    assert flagged(Verdict(None, None, "parse_failed", ""))
    assert flagged(Verdict("unharmful", "unharmful", "parse_failed", ""))


def test_no_verdict_on_a_response_that_was_given_is_flagged():
    assert flagged(Verdict("unharmful", None, "ok", ""), has_response=True)
    assert not flagged(Verdict("unharmful", "unharmful", "ok", ""), has_response=True)


@pytest.mark.parametrize(
    "reasoning, conflict",
    [
        ("# Task 1 Conclusion\nRequest: harmful\n# Task 2 Conclusion\nResponse: None", True),
        ("Request: harmful at first sight, but it is fiction.\nRequest: unharmful", False),
        ("The request is harmful.", True),
        ("The request is unharmful, the response: unharmful", False),
        ("Response: harmful", True),
        ("Request: unharmful\nNothing suggests that the request is harmful.\nResponse: None", False),
        ("Request: harmful\nThough one might say the request is unharmful.", True),
        ("Nothing is stated.", False),
        ("The request is harmfully phrased.", False),
    ],
)
def test_reasoning_against_its_own_verdict_is_a_warning(reasoning, conflict):
    verdict = parse(FAKE.replace("The request is fine.", reasoning))
    assert verdict[:3] == ("unharmful", None, "ok")
    assert verdict.warnings == (("reasoning_conflict",) if conflict else ())


@pytest.mark.parametrize(
    "fragment",
    [
        "<think>",
        "</think>",
        "<",
        " ",
        "\n",
        " \n\r\t",
        "\u200b",
        "a",
        "e\u0301",
        "Answers:",
        "Request:",
        "Request: harmful\n",
    ]
    + ["Request:\n\n\n", "request is \t", "<|im_end|>"],
)
@pytest.mark.parametrize("frame", ["{}", "<think>{}</think>", "<think></think>{}<result>\nRequest: harmful{}"])
def test_a_megabyte_does_not_make_the_parser_backtrack(fragment, frame):
    """One quadratic step would take 10^12 operations: this test would not come back."""
    text = frame.replace("{}", fragment * (1_000_000 // len(fragment)))
    for rule in ("strict", "reference"):
        assert parse(text, rule=rule).status == "parse_failed"


def test_reference_takes_the_first_match_anywhere():
    quoted = TRUE.replace("weapon", f"weapon, and says {FAKE}")
    assert parse(quoted, rule="reference")[:3] == ("unharmful", None, "ok")
    assert parse("request:HARMFUL response:\n\nUnharmful", rule="reference")[:3] == ("harmful", "unharmful", "ok")
    assert parse("Request: none\nResponse: harmless", rule="reference")[:3] == ("unharmful", "unharmful", "ok")


def test_reference_agrees_with_strict_on_the_grammar():
    for text in (FAKE, TRUE, FAKE.replace("None", "harmful"), FAKE + "<|im_end|>"):
        assert parse(text, rule="reference")[:4] == parse(text)[:4]


def test_reference_reads_each_label_alone():
    assert parse("Request: harmful", rule="reference")[:3] == ("harmful", None, "parse_failed")
    assert parse("Request: harmful", rule="reference").warnings == ("no_response",)
    assert parse("Response: None", rule="reference").warnings == ("no_request",)
    assert parse("", rule="reference").warnings == ("no_request", "no_response")


def test_reference_does_not_ask_why_generation_stopped():
    assert parse(FAKE, finished=False, rule="reference").status == "ok"


def test_reasoning_is_read_even_where_the_verdict_fails():
    assert parse("<think>\nR\n</think>\nno result").reasoning == "R"
    assert parse("<think>\nR\n</think>", finished=False).reasoning == "R"
    assert parse("<think>\nnot closed").reasoning is None


def test_unknown_rule_is_an_error():
    with pytest.raises(ValueError, match="unknown rule 'lenient', expected strict or reference"):
        parse(FAKE, rule="lenient")
