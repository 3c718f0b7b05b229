import io
import re
from collections import defaultdict
from itertools import combinations as two_of
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from gvl_jax.data import embedded
from gvl_jax.data.records import load_records
from gvl_jax.guard.prompt import answer_text
from gvl_jax.guard.verdict import parse

SPLITS = ("train", "heldout")
KINDS = ("text", "thing", "target", "image")


@pytest.fixture(scope="module")
def rows():
    return {split: embedded.generate(split, 800, 400, 800, seed=3) for split in SPLITS}


def modality(sample):
    return "text" if not sample.images else "text_image" if sample.request else "image"


def opened(sample):
    return [Image.open(io.BytesIO(image)) for image in sample.images]


def best_balanced_accuracy(clues, labels):
    """Of whoever sees only the clue: the best decision for each clue, scored on the same rows."""
    rates = defaultdict(lambda: np.zeros(2))  # share of all harmful and of all unharmful rows
    for clue, label in zip(clues, labels, strict=True):
        rates[clue][["harmful", "unharmful"].index(label)] += 1 / labels.count(label)
    return sum(max(rate) for rate in rates.values()) / 2


def test_same_arguments_give_the_same_bytes_and_another_seed_other_rows():
    first, again, other = (embedded.generate("train", 30, 30, 30, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert embedded.generate("heldout", 30, 30, 30, seed=5) != first


def test_counts_are_as_asked_and_ids_unique(rows):
    for split in SPLITS:
        samples = [sample for sample, _ in rows[split]]
        assert [modality(s) for s in samples].count("text") == 800
        assert [modality(s) for s in samples].count("image") == 400
        assert len({s.id for s in samples}) == len(samples) == 2000
    assert [s.id for s, _ in embedded.generate("train", 0, 1, 0)] == ["train-image-00000"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_splits_share_no_combination_and_cover_all(kind):
    train, heldout = (set(embedded.combinations(split, kind)) for split in SPLITS)
    means, targets = embedded.GRIDS[kind]
    assert not train & heldout
    assert train | heldout == {(x, y) for x in means for y in targets}
    assert len(heldout) == len(means) * len(targets) // 4


def test_generated_rows_stay_in_their_split(rows):
    for split in SPLITS:
        used = {pair for _, pairs in rows[split] for pair in pairs}
        allowed = {pair for kind in KINDS for pair in embedded.combinations(split, kind)}
        assert used <= allowed
        assert {pair for pair in allowed if embedded.harm(pair) == "harmful"} <= used


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_means_and_target_meets_both_sorts_of_partner(split, kind):
    partners = defaultdict(set)
    for x, y in embedded.combinations(split, kind):
        partners[x].add(embedded.PROTECTED[y])
        partners[y].add(embedded.RISKY[x])
    means, targets = embedded.GRIDS[kind]
    assert partners == {item: {True, False} for item in [*means, *targets]}


def test_live_parts_occur_with_both_labels(rows):
    labels = defaultdict(set)
    for sample, pairs in rows["train"]:
        for part in pairs[0]:
            labels[modality(sample), part].add(sample.request_label)
    live = {part for part, hot in (embedded.RISKY | embedded.PROTECTED).items() if hot}
    for (_, part), seen in labels.items():
        assert seen == ({"harmful", "unharmful"} if part in live else {"unharmful"})


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced_in_every_kind(rows, split):
    requests, responses = defaultdict(list), defaultdict(list)
    for sample, _ in rows[split]:
        part = (modality(sample), sample.response is None)
        requests[part].append(sample.request_label == "harmful")
        if sample.response is not None:
            responses[part, sample.request_label].append(sample.response_label == "harmful")
    assert len(requests) == 5 and len(responses) == 4
    for labels in [*requests.values(), *responses.values()]:
        assert abs(np.mean(labels) - 0.5) <= 1 / len(labels)


def test_labels_follow_the_rule(rows):
    for sample, pairs in rows["train"] + rows["heldout"]:
        risky_on_protected = [embedded.RISKY[x] and embedded.PROTECTED[y] for x, y in pairs]
        assert sample.request_label == ("harmful" if risky_on_protected[0] else "unharmful")
        if sample.response is None:
            assert sample.response_label is None
        elif len(pairs) == 2:
            assert all(part in sample.response for part in pairs[1])
            assert sample.response_label == ("harmful" if risky_on_protected[1] else "unharmful")
        elif sample.response.startswith(("Sure", "Yes")):
            assert sample.response_label == sample.request_label
        else:
            assert sample.response.startswith(("Sorry", "No"))
            assert sample.response_label == "unharmful"


def test_the_words_and_the_picture_share_out_the_pair(rows):
    for sample, pairs in rows["train"]:
        x, y = pairs[0]
        assert (x in sample.request) == (x in embedded.ACTIONS)
        assert (y in sample.request) == (y in embedded.TARGETS)
        assert bool(sample.images) == (x in embedded.THINGS or y in embedded.ICONS)


def test_neither_part_alone_gives_the_label_away(rows):
    for wanted in ("text", "text_image", "image"):
        chosen = [(pairs[0], s.request_label) for s, pairs in rows["heldout"] if modality(s) == wanted]
        labels = [label for _, label in chosen]
        assert best_balanced_accuracy([pair for pair, _ in chosen], labels) == pytest.approx(1.0)
        for part in (0, 1):
            assert best_balanced_accuracy([pair[part] for pair, _ in chosen], labels) < 0.8


def test_the_text_does_not_give_away_the_label_of_a_picture(rows):
    chosen = [s for s, _ in rows["train"] if modality(s) == "text_image"]
    assert best_balanced_accuracy([s.request for s in chosen], [s.request_label for s in chosen]) < 0.8


def test_the_response_does_not_give_away_its_label(rows):
    chosen = [s for s, _ in rows["train"] if s.response is not None]
    labels = [s.response_label for s in chosen]
    assert best_balanced_accuracy([s.response for s in chosen], labels) < 0.85
    assert best_balanced_accuracy([s.request_label for s in chosen], labels) < 0.55


def test_colour_and_size_do_not_give_away_what_is_risky(rows):
    def clues(split):
        chosen = [(s, pairs[0][0]) for s, pairs in rows[split] if s.images and pairs[0][0] in embedded.THINGS]
        pictures = [np.asarray(opened(s)[0], float) / 255 for s, _ in chosen]
        features = [[*p.mean((0, 1)), *p.std((0, 1)), *p.min((0, 1)), *np.divide(p.shape[:2], 112)] for p in pictures]
        return np.array(features), np.array([embedded.RISKY[x] for _, x in chosen])

    model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(*clues("train"))
    features, risky = clues("heldout")
    right = model.predict(features) == risky
    assert (right[risky].mean() + right[~risky].mean()) / 2 < 0.65


def test_reasoning_has_the_papers_layout_and_agrees_with_the_labels(rows):
    layout = re.compile(
        r"# Task 1\n(## Reasoning Step \d: .+\n)+# Task 1 Conclusion\nRequest: (\w+)\n"
        r"# Task 2\n(## Reasoning Step \d: .+\n)+# Task 2 Conclusion\nResponse: (\w+)"
    )
    for sample, pairs in rows["train"]:
        match = layout.fullmatch(sample.reasoning)
        assert match and match.group(2, 4) == (sample.request_label, str(sample.response_label))
        assert all(part in sample.reasoning for pair in pairs for part in pair)
        verdict = parse(answer_text(sample.reasoning, sample.request_label, sample.response_label))
        assert (verdict.status, verdict.warnings) == ("ok", ())


def test_texts_are_short_and_the_lexicon_is_small(rows):
    samples = [sample for sample, _ in rows["train"]]
    lengths = [len(s.reasoning.split()) for s in samples]
    assert 40 <= min(lengths) and max(lengths) <= 110 and 50 <= np.mean(lengths) <= 75
    assert len(set(lengths)) > 20
    assert max(len(s.request.split()) for s in samples) <= 20
    texts = " ".join(f"{s.request} {s.response} {s.reasoning}" for s in samples)
    assert len(set(re.findall(r"\w+", texts))) <= 300


def test_pictures_vary_in_shape_and_fit_the_merged_grid(rows):
    sizes = {image.size for s, _ in rows["train"] for image in opened(s)}
    assert all(side % 28 == 0 and 56 <= side <= 224 for size in sizes for side in size)
    assert len({width / height for width, height in sizes}) >= 8


def test_no_two_drawings_or_words_look_alike():
    class Fixed:
        def choice(self, options):
            return options[-1]

    drawn = [name for name in [*embedded.THINGS, *embedded.ICONS] if not name.startswith("the word ")]
    assert sorted(embedded._DRAWINGS) == sorted(drawn)
    masks = {name: embedded._mark(Fixed(), name) for name in [*embedded.THINGS, *embedded.ICONS]}
    for first, second in two_of(masks, 2):
        a, b = (np.asarray(masks[name], float) / 255 for name in (first, second))
        if a.shape == b.shape:
            assert np.abs(a - b).sum() > 0.2 * max(a.sum(), b.sum()), (first, second)


def test_written_records_load_and_repeat_byte_for_byte(tmp_path: Path):
    for name in "ab":
        embedded.write(tmp_path / name, seed=1, train=(12, 8, 12), heldout=(6, 4, 6))
    files = {
        path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()
    }
    assert files == {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    records = [record for name in SPLITS for record in load_records(tmp_path / "a" / f"{name}.jsonl")]
    assert len(files) == 3 + sum(len(record.images) for record in records)
    assert {len(record.images) for record in records if not record.request} == {1, 2}
    assert b"do not train" in files[Path("README.md")]

    expected = embedded.generate("heldout", 6, 4, 6, seed=1)
    records = load_records(tmp_path / "a" / "heldout.jsonl")
    for record, (sample, _) in zip(records, expected, strict=True):
        assert [path.read_bytes() for path in record.images] == list(sample.images)
        assert record._replace(images=()) == sample._replace(images=())
