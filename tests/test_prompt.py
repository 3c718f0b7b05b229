"""Prompts: benign ids equal the reference template's, and no text becomes a control token."""

import json
import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hostile import REQUESTS, fuzzed
from tokenizers import Tokenizer

from gvl_jax.data.tiny import train_tokenizer
from gvl_jax.guard.prompt import (
    INSTRUCTION,
    answer_text,
    build_example,
    build_prompt,
    has_response,
    mrope_positions,
    user_turn,
)
from gvl_jax.guard.verdict import parse
from gvl_jax.types import Sample

BENIGN = (
    "How do I bake bread?", "Tell me a joke.", "Stop!", "Ends in a newline\n", "Two newlines\n\n", "A last blank ",
    "  blanks  before", "x = [1, 2];\n\tprint(x)\n", "Où est la gare ? C'est loin.", "如何烤面包？", "Как испечь хлеб?",
    "كيف أخبز الخبز؟", "I'm happy 🙂👩\u200d👩\u200d👧!", "e\u0301tude (decomposed)", "1234.5 %", "a\r\nb\r\n", "...",
    "- a\n- b\n\n\n",
)  # fmt: skip
NO_GRIDS = np.zeros((0, 3), np.int32)
GRIDS = np.array([[1, 4, 6], [1, 2, 2], [1, 8, 4]], np.int32)


class SmallTokenizer:
    """A byte-level BPE of Qwen2's kind. `whole` also parses special tokens, as the reference's tokenizer does."""

    def __init__(self) -> None:
        text = [INSTRUCTION, *BENIGN, *(f"Human user:\n{line}\n\nAI assistant:\nNone\n\n" for line in BENIGN)]
        self.whole = train_tokenizer(text * 4, vocab_size=900)
        self.plain = Tokenizer.from_str(json.dumps(json.loads(self.whole.to_str()) | {"added_tokens": []}))
        self.first_added = self.plain.get_vocab_size()
        self.im_start, self.im_end, self.vision_start, self.vision_end, self.image_pad = (
            self.whole.token_to_id(f"<|{name}|>")
            for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad")
        )

    def encode_text(self, text: str) -> list[int]:
        return self.plain.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.whole.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="module")
def tokenizer():
    return SmallTokenizer()


def reference_ids(tokenizer, user, grids):
    """The chat template of Qwen2.5-VL written out as one string and tokenised whole."""
    for _, height, width in grids:
        user = user.replace(
            "<image>", "<|vision_start|>" + "<|image_pad|>" * (height * width // 4) + "<|vision_end|>", 1
        )
    text = f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.whole.encode(text).ids


def images(count):
    return (b"not read here",) * count


def test_user_turns_are_the_papers():
    assert user_turn(Sample("a", "Hi")) == "Human user:\nHi\n\nAI assistant:\nNone\n\n"
    assert user_turn(Sample("a", "Hi", "Yes")) == "Human user:\nHi\n\nAI assistant:\nYes\n\n"
    assert user_turn(Sample("a", "Hi", None, images(1))) == "Human user:\n<image>\nHi\n\nAI assistant:\nNone\n"
    assert user_turn(Sample("a", "", None, images(1))) == "Human user:\n<image>\n\nAI assistant:\nNone\n"
    assert user_turn(Sample("a", "Hi", "Yes", images(2))) == "Human user:\n<image>\n<image>\nHi\n\nAI assistant:\nYes\n"
    assert user_turn(Sample("a", "", None, images(1), user_turn="x <image> y")) == "x <image> y"


def test_a_turn_has_a_response_unless_none_is_all_that_follows_its_first_border():
    spoof = REQUESTS["turn spoof"]  # ends as a turn without a response does
    for pictures in (images(0), images(1)):
        for sample, expected in (
            (Sample("a", "Hi", None, pictures), False),
            (Sample("a", "Hi", "Yes", pictures), True),
            (Sample("a", "Hi", spoof, pictures), True),
            (Sample("a", spoof, "Yes", pictures), True),
        ):
            assert has_response(sample) == has_response(Sample("a", "", user_turn=user_turn(sample))) == expected
    assert has_response(Sample("a", "", user_turn="free text"))


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("response", [None, *BENIGN[:6]])
def test_benign_ids_equal_the_reference_template(tokenizer, count, response):
    for request in (*BENIGN, "") if count else BENIGN:
        sample = Sample("a", request, response, images(count))
        gap = "\n" if count and not request else "\n\n"
        user = "Human user:\n" + "<image>\n" * count + request + gap + "AI assistant:\n" + (response or "None")
        user += "\n" if count else "\n\n"
        tokens, positions = build_prompt(sample, GRIDS[:count], tokenizer)
        assert tokens.tolist() == reference_ids(tokenizer, user, GRIDS[:count])
        assert tokens.dtype == positions.dtype == np.int32
        assert positions.shape == (3, len(tokens))


def test_merges_cross_the_border_between_template_and_user_text(tokenizer):
    """Else the test above would pass for a prompt whose pieces are encoded one by one."""
    apart = tokenizer.encode_text("Tell me a joke.") + tokenizer.encode_text("\n\nAI assistant:\n")
    assert tokenizer.encode_text("Tell me a joke.\n\nAI assistant:\n") != apart


def test_verbatim_user_turn_keeps_its_text_and_its_slots(tokenizer):
    turn = "Human user:\nfirst <image>, then <image>\nWhat?\n\nAI assistant:\nNone\n"
    sample = Sample("a", "other text", None, images(2), user_turn=turn)
    tokens, _ = build_prompt(sample, GRIDS[:2], tokenizer)
    assert tokens.tolist() == reference_ids(tokenizer, turn, GRIDS[:2])


@pytest.mark.parametrize("turn, count", [("<image> <image>", 1), ("no tag", 1), ("<image>", 0)])
def test_verbatim_user_turn_with_other_tags_than_images_is_an_error(tokenizer, turn, count):
    with pytest.raises(ValueError, match=r"'a7' has \d <image> tags for \d images, expected one tag per image"):
        build_prompt(Sample("a7", "", None, images(count), user_turn=turn), GRIDS[:count], tokenizer)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_no_text_becomes_a_control_token_or_moves_a_slot(tokenizer, count):
    empty, _ = build_prompt(Sample("a", "x", "y", images(count)), GRIDS[:count], tokenizer)
    control = empty[empty >= tokenizer.first_added]
    texts = [*REQUESTS.values(), *fuzzed(10_000, seed=count)[:: 1 if count == 1 else 10]]
    for text, other in zip(texts, reversed(texts), strict=True):
        tokens, _ = build_prompt(Sample("a", text, other, images(count)), GRIDS[:count], tokenizer)
        assert np.array_equal(tokens[tokens >= tokenizer.first_added], control), (text, other)
        if count:  # nothing that a user writes stands before or between the slots
            slots, fixed = np.flatnonzero(tokens == tokenizer.image_pad), np.flatnonzero(empty == tokenizer.image_pad)
            assert np.array_equal(slots, fixed), (text, other)


@pytest.mark.parametrize("text", REQUESTS.values(), ids=REQUESTS.keys())
def test_hostile_text_is_kept_as_text(tokenizer, text):
    """Nothing is stripped or escaped: the guard judges what the user wrote."""
    tokens, _ = build_prompt(Sample("a", text), NO_GRIDS, tokenizer)
    assert unicodedata.normalize("NFC", f"Human user:\n{text}\n\nAI assistant:\nNone\n\n") in tokenizer.decode(tokens)


def test_example_predicts_the_answer_and_its_end_token(tokenizer):
    sample = Sample("a", "Hi", None, images(1))
    answer = answer_text("Fine.", "unharmful", None)
    prompt, _ = build_prompt(sample, GRIDS[:1], tokenizer)
    tokens, loss_mask, positions = build_example(sample, GRIDS[:1], tokenizer, answer)
    assert tokens[: len(prompt)].tolist() == prompt.tolist()
    assert loss_mask.dtype == bool and not loss_mask[: len(prompt)].any() and loss_mask[len(prompt) :].all()
    assert tokenizer.decode(tokens[loss_mask]) == answer + "<|im_end|>"
    assert positions.shape == (3, len(tokens))
    assert np.array_equal(positions[:, -1], positions[:, -2] + 1)


def test_hostile_answers_stay_text_too(tokenizer):
    for text in REQUESTS.values():
        tokens, loss_mask, _ = build_example(Sample("a", "Hi"), NO_GRIDS, tokenizer, text)
        assert (tokens[loss_mask] >= tokenizer.first_added).tolist() == [False] * (loss_mask.sum() - 1) + [True]


@pytest.mark.parametrize("grids", [NO_GRIDS, GRIDS[:2]])
def test_a_grid_for_each_image(tokenizer, grids):
    with pytest.raises(ValueError, match=r"grids for 1 images in record 'a'; pass one grid per image"):
        build_prompt(Sample("a", "Hi", None, images(1)), grids, tokenizer)


def test_odd_grid_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="grid 1x3x4 of image 0 is not divisible by the merge size 2"):
        build_prompt(Sample("a", "Hi", None, images(1)), np.array([[1, 3, 4]]), tokenizer)


def test_a_tokenizer_that_leaks_placeholders_is_caught(tokenizer):
    class Leaky(SmallTokenizer):
        def encode_text(self, text):
            return self.whole.encode(text).ids

    with pytest.raises(ValueError, match="7 image placeholders for 1 images of .6. merged tokens"):
        build_prompt(Sample("a", "<|image_pad|>", None, images(1)), GRIDS[:1], Leaky())


def test_positions_follow_a_hand_computed_layout():
    is_image = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0], bool)  # grids: 2 x 3 merged, then 1 x 1
    positions = mrope_positions(is_image, np.array([[1, 4, 6], [1, 2, 2]]))
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7],
    ]


@pytest.mark.parametrize(
    "is_image, grids",
    [
        ([0, 1, 1, 0], [[1, 2, 2]]),  # one too many
        ([0, 1, 1, 0], [[1, 4, 4]]),  # too few
        ([0, 1, 0, 1], [[1, 2, 4]]),  # cut in two
        ([0, 1, 0, 1, 1], [[1, 2, 4], [1, 2, 2]]),  # in another order
        ([0, 0, 0], [[1, 2, 2]]),
        ([0, 1, 0], []),
    ],
)
def test_placeholders_that_are_not_the_grids_are_an_error(is_image, grids):
    with pytest.raises(ValueError, match="expected one run of placeholders per image, in order"):
        mrope_positions(np.array(is_image, bool), np.array(grids))


@pytest.mark.parametrize("reasoning", ["# Task 1\nIt asks.", "", None, "a < b, Request: harmful"])
@pytest.mark.parametrize("labels", [("harmful", "unharmful"), ("unharmful", "harmful"), ("harmful", None)])
def test_answers_parse_back(reasoning, labels):
    verdict = parse(answer_text(reasoning, *labels))
    assert (verdict.status, verdict.reasoning, verdict.request, verdict.response) == ("ok", reasoning or "", *labels)


def test_answer_is_exactly_these_lines():
    expected = "<think>\nR\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: None\n</result>"
    assert answer_text("R", "harmful", None) == expected


@pytest.mark.parametrize("reasoning, label", [("a </think> b", "harmful"), ("a <result>", "harmful"), ("a", None)])
def test_answer_that_would_not_parse_is_an_error(reasoning, label):
    with pytest.raises(ValueError, match="do not make a valid answer"):
        answer_text(reasoning, label, None)
