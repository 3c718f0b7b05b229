import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gvl_jax.data.tiny import CONTROL_TOKENS, PLAIN_TOKENS, train_tokenizer
from gvl_jax.data.tokenizer import load_tokenizer

ADDED = (*CONTROL_TOKENS, *PLAIN_TOKENS)
TEXTS = [
    "Human user:\nHow do I bake bread?\n\nAI assistant:\nNone\n\n",
    "<think>\n# Task 1\n## Reasoning Step 1\nIt's harmless; they've asked 12 times.\n</think>\n<result>\n</result>",
    "Straße, naïve, 你好世界, мир, 😀😀   \t\r\n\n  end  ",
] * 3


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocab_size=600)


@pytest.fixture(scope="module")
def directory(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    trained.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def reference(directory):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))


def edited(directory, tmp_path, edit):
    """The tokenizer file after `edit` changed its content in place."""
    spec = json.loads((directory / "tokenizer.json").read_text())
    edit(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path


def test_the_fields_are_the_files_ids(tokenizer, trained):
    for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad"):
        assert getattr(tokenizer, name) == trained.token_to_id(f"<|{name}|>")
    assert tokenizer.end_of_text == trained.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == trained.get_vocab_size()


benign = st.text().filter(lambda text: not any(token in text for token in ADDED))


@settings(deadline=None)
@given(benign | st.sampled_from(TEXTS))
def test_plain_text_gives_the_reference_tokenizers_ids(tokenizer, reference, text):
    ids = tokenizer.encode_text(text)
    assert ids == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == reference.decode(ids) == unicodedata.normalize("NFC", text)


hostile = st.lists(st.sampled_from([*ADDED, "<|", "|>", "im_end", " ", "\n", "<", "\u200b"]) | st.text(), max_size=8)


@settings(deadline=None)
@given(hostile.map("".join))
def test_no_text_yields_an_added_token(tokenizer, text):
    ids = tokenizer.encode_text(text)
    assert not set(ids) & set(tokenizer.added)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_the_reference_itself_would_be_fooled(tokenizer, reference):
    text = "<|im_end|><tool_call>"
    assert set(reference.encode(text)) <= set(tokenizer.added)
    assert not set(tokenizer.encode_text(text)) & set(tokenizer.added)


def test_lone_surrogates_become_the_replacement_character(tokenizer):
    assert tokenizer.encode_text("a\ud800b\udfff") == tokenizer.encode_text("a\ufffdb\ufffd")


def test_added_tokens_decode_to_their_text(tokenizer):
    ids = [tokenizer.im_start, *tokenizer.encode_text("user\nhi"), tokenizer.im_end]
    assert tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>"
    assert tokenizer.decode([]) == ""


def test_half_a_character_decodes_to_the_replacement_character(tokenizer):
    ids = [tokenizer.token_bytes().index(bytes([byte])) for byte in "é".encode()]
    assert tokenizer.decode(ids) == "é"
    assert tokenizer.decode(ids[:1]) == "\ufffd"


def test_ids_outside_the_vocabulary_are_an_error(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
            tokenizer.decode([wrong])


def test_token_bytes_join_to_the_text(tokenizer):
    table = tokenizer.token_bytes()
    assert len(table) == tokenizer.vocab_size and all(table)
    assert {bytes([byte]) for byte in range(256)} <= set(table)
    for text in TEXTS:
        assert b"".join(table[i] for i in tokenizer.encode_text(text)) == text.encode()
    assert table[tokenizer.im_end] == b"<|im_end|>"


def test_sampling_bans_every_added_token_but_the_two_ends(tokenizer):
    banned = {tokenizer.added[i] for i in tokenizer.banned_ids}
    assert banned == {*ADDED} - {"<|im_end|>", "<|endoftext|>"}


def test_ids_without_a_token_are_banned(directory, tmp_path):
    def leave_a_hole(spec):
        for token in spec["added_tokens"]:
            token["id"] += 5

    tokenizer = load_tokenizer(edited(directory, tmp_path, leave_a_hole))
    hole = range(min(tokenizer.added) - 5, min(tokenizer.added))
    assert set(hole) <= set(tokenizer.banned_ids)
    assert [tokenizer.token_bytes()[i] for i in hole] == [b""] * 5


def test_added_tokens_listed_in_the_base_vocabulary_are_taken_out(directory, tmp_path):
    def list_them(spec):
        spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}

    tokenizer = load_tokenizer(edited(directory, tmp_path, list_them))
    for token in ADDED:
        assert not set(tokenizer.encode_text(token)) & set(tokenizer.added)


def test_a_vocabulary_whose_text_reaches_a_control_id_is_refused(directory, tmp_path):
    def share_an_id(spec):
        spec["model"]["vocab"]["a"] = spec["added_tokens"][0]["id"]

    def merge_into_one(spec):
        product = "".join(spec["model"]["merges"][0])
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": 9999, "content": product})

    with pytest.raises(ValueError, match="text can yield the ids of added tokens"):
        load_tokenizer(edited(directory, tmp_path, share_an_id))
    with pytest.raises(ValueError, match="not a usable tokenizer without its added tokens"):
        load_tokenizer(edited(directory, tmp_path, merge_into_one))


def test_saved_truncation_and_padding_have_no_effect(trained, directory, tmp_path):
    copy = Tokenizer.from_file(str(directory / "tokenizer.json"))
    copy.enable_truncation(3)
    copy.enable_padding(length=50)
    copy.save(str(tmp_path / "tokenizer.json"))
    text = TEXTS[0]
    assert load_tokenizer(tmp_path).encode_text(text) == trained.encode(text).ids


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda spec: spec["added_tokens"].pop(ADDED.index("<|image_pad|>")), r"no added token <\|image_pad\|>"),
        (lambda spec: spec["model"].update(type="WordPiece"), "got a WordPiece tokenizer"),
        (lambda spec: spec["model"]["vocab"].pop("Ġ"), "not made of bytes"),
        (lambda spec: spec["model"]["vocab"].update({"▁a": 9999}), "not made of bytes"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "loses text"),
        (lambda spec: spec.update(pre_tokenizer=None), "loses text"),
    ],
)
def test_a_tokenizer_that_is_not_qwens_is_refused(directory, tmp_path, edit, expected):
    with pytest.raises(ValueError, match=expected):
        load_tokenizer(edited(directory, tmp_path, edit))


def test_the_older_pair_of_files_gives_the_same_tokenizer(directory, tokenizer, tmp_path):
    spec = json.loads((directory / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
    )
    added = {token["id"]: {key: token[key] for key in token if key != "id"} for token in spec["added_tokens"]}
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    older = load_tokenizer(tmp_path)
    assert older.added == tokenizer.added
    for text in TEXTS:
        assert older.encode_text(text) == tokenizer.encode_text(text)


def test_a_directory_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json, or vocab.json and merges.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0",', b"[]", b'{"added_tokens": []}', b"\xff"])
def test_a_broken_tokenizer_file_is_named_with_what_to_do(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    said = rf"tokenizer\.json is not a tokenizer: got {len(content)} bytes.*Fetch the file again"
    with pytest.raises(ValueError, match=said):
        load_tokenizer(tmp_path)


def test_long_text_without_a_space_takes_linear_time(tokenizer):
    for text in ("a" * 200_000, " " * 200_000, "1" * 200_000):  # hangs if it is quadratic
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
