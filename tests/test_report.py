import csv
import json
import os
from html.parser import HTMLParser

import pytest
from judged import judgements, write_run
from PIL import Image

from gvl_jax.report import MAX_POINTS, MAX_SAMPLES, write_report

EVIL = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>\"'&$\\frac{$\u202e\ud800"
VOID = {"meta", "img", "col"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails where tags do not nest."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.stack = [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.stack
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


class Hidden(Page):
    """A page that also knows which text and which pictures are inside closed <details>, past their summary."""

    def __init__(self, path):
        self.seen, self.open_pictures = [], 0
        super().__init__(path)

    def closed(self):
        return any(tag == "details" and "summary" not in self.stack[i:] for i, tag in enumerate(self.stack))

    def handle_starttag(self, tag, attributes):
        super().handle_starttag(tag, attributes)
        self.open_pictures += tag == "img" and not self.closed()
        assert tag != "details" or "open" not in dict(attributes)

    def handle_data(self, data):
        super().handle_data(data)
        if self.stack and self.stack[-1] != "style" and not self.closed():
            self.seen.append(data)


def fill(folder, metrics=(), scores=None, samples=(), config=None):
    folder.mkdir(parents=True, exist_ok=True)
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if scores is not None:
        (folder / "scores.json").write_text(json.dumps(scores))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def sample(step=1, **changes):
    row = {
        "step": step, "id": f"s{step}", "request": "How?", "response": "No.", "images": [],
        "request_label": "harmful", "response_label": "unharmful", "completion": "<think>…</think>",
        "verdict": {"request": "harmful", "response": "harmful", "status": "ok"}, "reward": 0.25,
    }  # fmt: skip
    return row | changes


def test_a_run_with_everything(tmp_path):
    metrics = [{"step": s, "time": 100.0 * s, "train/loss": 2.0 / s, "reward/total": 0.1 * s} for s in (1, 2, 3)]
    metrics[1]["eval/f1"] = 0.875
    run = fill(tmp_path / "rl", metrics, [{"benchmark": "ToxicChat", "f1": 0.75}], [sample()], "model: tiny\n")
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    assert labels == [
        "train/loss, steps 1 to 3: from 2.000 to 0.667, lowest 0.667, highest 2.000",
        "reward/total, steps 1 to 3: from 0.100 to 0.300, lowest 0.100, highest 0.300",
    ]
    for words in (
        "Report of rl", "Model tiny", "Last step 3", "First step at 1970-01-01 00:01 UTC",
        "From first to last step 0:03:20", "ToxicChat 0.750", "eval/f1 2 0.875",
    ):  # fmt: skip
        assert words in page.text, words


@pytest.mark.parametrize(
    "content",
    [
        {"metrics": [{"step": 1, "time": 1.0, "loss": 1.0}]},
        {"scores": [{"f1": 1.0}]},
        {"samples": [sample()]},
        {"config": "model: x\n"},
        {"scores": []},
    ],
)
def test_any_one_file_is_enough(tmp_path, content):
    assert Page(write_report(fill(tmp_path / "run", **content))).text.startswith("Report of run")


def test_a_folder_without_a_run_says_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run: expected config.yaml, metrics.jsonl"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_page_loads_nothing_and_runs_nothing_even_when_every_field_is_hostile(tmp_path):
    evil_sample = {key: EVIL for key in sample()}
    nested = sample(images=[EVIL, 3, None, "a\0b"], verdict={"request": EVIL, "response": [EVIL], "status": {EVIL: 1}})
    run = fill(
        tmp_path / "<script>alert(0)<",
        [{"step": s, "time": 1.0, EVIL: 1.0, f"train/{EVIL}": s, "loss": EVIL} for s in (1, 2)] + [{"step": EVIL}],
        [{EVIL: EVIL, "f1": 0.5}, {EVIL: None, EVIL + "2": {EVIL: 1}}],
        [evil_sample, nested, sample(verdict={"request": EVIL, "response": None, "status": None}, reward=None)],
        "model: " + json.dumps(EVIL),
    )
    page = Page(write_report(run))
    assert not page.all("script") and not page.all("iframe") and not page.all("link")
    assert "default-src 'none'" in page.all("meta")[1]["content"]
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert page.text.count("<script>alert(1)</script>") > 15  # shown as text


def test_verdicts_are_marked_in_words(tmp_path):
    no_verdict = {"request": None, "response": None, "status": "no_verdict"}
    rows = [sample(2, verdict=no_verdict, response_label=None), sample(1)]
    page = Page(write_report(fill(tmp_path, samples=rows)))
    assert "request —: wrong , label harmful response — status no_verdict" in page.text
    assert "request harmful: right response harmful: wrong , label unharmful status ok reward 0.250" in page.text


def test_judgements_are_the_newest_first_and_limited(tmp_path):
    rows = [sample(step) for step in range(MAX_SAMPLES + 3)]
    page = Page(write_report(fill(tmp_path, samples=rows)))
    shown = [word for word in page.text.split() if word[0] == "s" and word[1:].isdigit()]
    assert shown == [f"s{step}" for step in range(MAX_SAMPLES + 2, 2, -1)]
    assert f"The newest {MAX_SAMPLES} of {MAX_SAMPLES + 3}." in page.text


def test_pictures_are_inline_thumbnails_and_a_missing_one_is_a_note(tmp_path):
    (tmp_path / "img").mkdir()
    Image.new("RGB", (640, 320), "red").save(tmp_path / "img" / "a.png")
    Image.new("L", (8, 12)).save(tmp_path / "b.png")
    (tmp_path / "img" / "torn.png").write_bytes((tmp_path / "img" / "a.png").read_bytes()[:200])
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    Image.new("RGB", (8, 8)).save(tmp_path / "img" / "eps.png", "EPS")  # Pillow would start Ghostscript for it
    images = ["img/a.png", str(tmp_path / "b.png"), "img/none.png", "img/torn.png", "pipe", "img", "img/eps.png"]
    page = Hidden(write_report(fill(tmp_path, samples=[sample(images=images)])))
    assert page.open_pictures == 0
    first, second = page.all("img")
    assert (first["width"], first["height"], first["alt"]) == ("160", "80", "Picture 1 of s1")
    assert (second["width"], second["height"], second["alt"]) == ("8", "12", "Picture 2 of s1")
    assert "Picture 3 of s1: file missing" in page.text
    assert "Picture 4 of s1: not readable (truncated)" in page.text
    assert "Picture 5 of s1: file missing" in page.text and "Picture 6 of s1: file missing" in page.text
    assert "Picture 7 of s1: not readable (bad_format)" in page.text


def test_a_long_text_folds(tmp_path):
    page = Page(write_report(fill(tmp_path, samples=[sample(completion="a" * 300)])))
    assert "a" * 240 + "… show less " + "a" * 300 in page.text


def test_scores_are_a_table_with_three_digits_and_a_dash_for_nothing(tmp_path):
    rows = [{"benchmark": "A", "f1": 0.98765, "n": 7, "auroc": None}, {"benchmark": "B", "f1": 0.0, "n": 12_000}]
    page = Page(write_report(fill(tmp_path, scores=rows)))
    assert "benchmark f1 n auroc A 0.988 7 — B 0.000 12000 —" in page.text
    assert [a.get("scope") for a in page.all("th")] == ["col"] * 4 + ["row"] * 2


def test_scores_that_are_not_json_are_said_to_be(tmp_path):
    (tmp_path / "scores.json").write_text("[")
    assert "scores.json is not JSON" in Page(write_report(tmp_path)).text


def test_lines_cut_by_a_kill_are_counted(tmp_path):
    run = fill(tmp_path, [{"step": 1, "time": 1.0, "loss": 1.0}], samples=[sample()])
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / name).open("a") as log:
            log.write('[1]\n{"step": 2, "ti')
    text = Page(write_report(run)).text
    assert "left out of metrics.jsonl: 2." in text and "left out of samples.jsonl: 2." in text


def test_undefined_values_leave_gaps(tmp_path):
    rows = [{"step": s, "time": 1.0, "loss": v} for s, v in enumerate((1.0, None, float("nan"), float("inf"), 3.0))]
    (label,) = [attributes["aria-label"] for attributes in Page(write_report(fill(tmp_path, rows))).all("svg")]
    assert label == "loss, steps 0 to 4: from 1.000 to 3.000, lowest 1.000, highest 3.000"


def test_a_long_log_makes_a_small_page(tmp_path):
    rows = [{"step": s, "time": 1.0, "loss": float(s % 7)} for s in range(50 * MAX_POINTS)]
    path = write_report(fill(tmp_path, rows))
    assert path.stat().st_size < 60_000
    assert "steps 0 to 19999" in Page(path).all("svg")[0]["aria-label"]


def test_a_folder_of_runs_is_one_page_in_the_order_of_time(tmp_path):
    for name, time in (("eval", 30.0), ("sft", 10.0), ("rl", 20.0)):
        fill(tmp_path / name, [{"step": 1, "time": time, "loss": 1.0}])
    (tmp_path / "corpus").mkdir()
    path = write_report(tmp_path)
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert [attributes["href"] for attributes in page.all("a")] == ["#run-sft", "#run-rl", "#run-eval"]
    assert [attributes["id"] for attributes in page.all("h2")] == ["run-sft", "run-rl", "run-eval"]
    assert write_report(tmp_path).read_bytes() == path.read_bytes()  # its own report is no input


def test_the_page_works_in_light_and_dark(tmp_path):
    rows = [{"step": s, "time": 1.0, "loss": 1e-9 * s} for s in range(3)]
    html = write_report(fill(tmp_path, rows)).read_text()
    assert "prefers-color-scheme: dark" in html
    svg = html[html.index("<svg") : html.index("</svg>")]
    assert "currentColor" in svg and "var(--accent)" in svg
    assert "#0" not in svg and "fill: black" not in svg


# ------------------------------------------------------------------------------------------------------- runs of eval


def test_an_eval_run_shows_scores_plots_and_errors(tmp_path):
    run = write_run(tmp_path / "eval", judgements(300, category="theft"), model="m")
    page = Page(write_report(run))
    for words in (
        "Request benchmark modality rule predictor n f1 f1 95 % precision", "always_harmful", "reference",
        "Response, by category", "Scores as probabilities: request", "Reliability ECE 0.", "highest F1 0.",
        "Errors: response The worst 20 of", "said unharmful · score 0.",
    ):  # fmt: skip
        assert words in page.text, words
    assert [one["aria-label"].split(":")[0] for one in page.all("svg")] == [
        f"{name}, {task}, {n} scored records"
        for task, n in (("request", 300), ("response", sum(row["response"] is not None for row in judgements(300))))
        for name in ("Reliability", "Thresholds")
    ]


def test_without_scores_and_errors_there_are_no_plots_and_no_list(tmp_path):
    rows = judgements(30, accuracy=1.0, request_score=None, response_score=None)
    page = Page(write_report(write_run(tmp_path, rows)))
    assert not page.all("svg") and "Errors" not in page.text and "auroc" not in page.text


def test_errors_come_worst_first_and_stay_hidden_until_clicked(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    rows = judgements(60, accuracy=1.0, request_score=None, response_score=None, images=["a.png"], request="SECRET")
    good = rows[0]["completion"]
    for index, score in ((10, 0.7), (20, 0.95), (30, 0.5)):  # a false alarm is the worse the surer it was
        rows[index] |= {"completion": good.replace("unharmful", "harmful"), "request_score": score}
        rows[index] |= {"request_label": "unharmful", "response_label": None}
        rows[index]["completion"] = "<think>\nR\n</think>\n<result>\nRequest: harmful\nResponse: None\n</result>"
    page = Hidden(write_report(write_run(tmp_path, rows)))
    order = [page.text.index(f"r{index} Set") for index in (20, 10, 30)]
    assert order == sorted(order)
    assert len(page.all("img")) == 3 and page.open_pictures == 0
    assert page.text.count("SECRET") == 3 and "SECRET" not in " ".join(page.seen)


def test_scores_that_are_no_table_of_eval_are_shown_as_they_are(tmp_path):
    (line, *_) = json.loads((write_run(tmp_path / "run", judgements(10)) / "scores.json").read_text())
    for wrong in ({"category": ["a"]}, {"benchmark": 3}, {"failures": [1]}, {"n": None}):
        run = fill(tmp_path / "run", scores=[line | wrong])
        assert "benchmark modality category n" in Page(write_report(run)).text


def test_a_hostile_eval_run_is_text_in_html_markdown_and_csv(tmp_path):
    evil = {name: EVIL for name in ("id", "request", "response", "benchmark", "modality", "category")}
    rows = judgements(40, accuracy=0.5, images=[EVIL], **evil)
    rows[0]["category"] = "=cmd|' /C calc'!A0\n| # x"
    run = write_run(tmp_path / "run", rows)
    with (run / "judgements.jsonl").open("a") as file:
        for broken in ({}, {"completion": 3}, rows[1] | {"request_score": 7}, rows[1] | {"request_label": "bad"}):
            file.write(json.dumps(broken) + "\n")
    path = write_report(run)
    page = Page(path)
    assert not page.all("script") and not page.all("iframe")
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "Judgements that cannot be read: 4." in page.text
    markdown = (run / "report.md").read_text()
    assert "<script" not in markdown and "<img" not in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert not [line for line in markdown.splitlines() if line and line[0] not in "|#"]
    assert len({line.replace("\\|", "").count("|") for line in lines}) <= 4  # as many as tables
    with (run / "scores.csv").open(newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))] and any("'=cmd" in cell for cell in cells)


def test_the_csv_has_every_number_of_the_table(tmp_path):
    run = write_run(tmp_path, judgements(30))
    write_report(run)
    table = json.loads((run / "scores.json").read_text())
    with (run / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(table)
    for line, row in zip(lines, table, strict=True):
        assert {name: cell for name, cell in line.items() if name != "failures"} == {
            name: "" if value is None else str(value) for name, value in row.items() if name != "failures"
        }
        assert json.loads(line["failures"]) == row["failures"]
