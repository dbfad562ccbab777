"""The report: numbers against a slow recount, figures that repeat, a page that is safe."""

import base64
import csv
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
from matplotlib.patches import StepPatch

from scmini.errors import DataError, RecordError, StoreDamaged
from scmini.evaluation.report import figures, run_data, wording
from scmini.evaluation.report.page import duration, visible
from scmini.evaluation.report.training_prompts import Answer, of_every_reason
from scmini.evaluation.report.wording import Unit, headline, number, sentence
from scmini.evaluation.win_rate import Comparison
from scmini.records import read_rewards
from scmini.stages import report
from scmini.store import Work

Made = tuple[Path, dict[str, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("report")
    inputs = fake_run.stage_folders(root, fake_run.config(), answer=fake_run.EVIL)
    work = Work(root / "out")
    work.path.mkdir()
    report.run(fake_run.config(), inputs, work)
    return work.path, inputs


def results(made: Made) -> dict[str, Any]:
    return json.loads((made[0] / "results.json").read_text("utf-8"))


def test_numbers_equal_a_slow_recount(made: Made) -> None:
    found = results(made)["methods"]
    assert list(found) == ["targets", *fake_run.METHODS]
    for method in fake_run.METHODS:
        rows = read_rewards(made[1][f"reward:{method}"] / "rewards.jsonl")
        points = sum(
            (r.reward > r.target_reward) + 0.5 * (r.reward == r.target_reward) for r in rows
        )
        assert found[method]["win_rate"] == pytest.approx(100 * points / len(rows))
        assert found[method]["mean_reward"] == pytest.approx(sum(r.reward for r in rows) / 80)
        assert found[method]["perfect_share"] == sum(r.reward == 1 for r in rows) / len(rows)
        low, high = found[method]["mean_reward_ci95"]
        assert low < found[method]["mean_reward"] < high
    assert found["targets"]["win_rate"] == 50
    assert found["targets"]["mean_reward"] == pytest.approx(sum(r.target_reward for r in rows) / 80)
    assert found["self-contrast-16"]["training"]["effective_k"] == 14
    assert found["self-contrast-16"]["training"]["prompts"] == 20
    assert found["self-contrast-1"]["training"]["perfect_share_of_negatives"] == 0
    assert found["sft"]["training"] == {"prompts": 300}


def test_every_stage_has_its_time_and_memory(made: Made) -> None:
    found = results(made)
    assert found["stages"]["sample"] == {"seconds": 20.0, "peak_gib": None}
    assert found["stages"]["dpo:self-contrast-4"] == {"seconds": 7.5, "peak_gib": 0.51}
    order = [name.partition(":")[0] for name in found["stages"]]
    assert order == sorted(order, key=report._ORDER.index)
    assert found["device"]["cores"] >= 1
    assert found["device"]["memory_gib"] > 0
    assert found["config"]["dpo"]["beta"] == 0.1


def test_csv_says_what_json_says(made: Made) -> None:
    with open(made[0] / "results.csv", newline="") as handle:
        rows = {row["method"]: row for row in csv.DictReader(handle)}
    for name, row in results(made)["methods"].items():
        assert float(rows[name]["win_rate"]) == pytest.approx(row["win_rate"], abs=1e-5)
        high = float(rows[name]["mean_reward_high"])
        assert high == pytest.approx(row["mean_reward_ci95"][1], abs=1e-5)


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_model_text_is_only_text(made: Made) -> None:
    page = (made[0] / "index.html").read_text("utf-8")
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    assert tags.names.count("script") == 3  # two islands of data, and the browser of prompts
    starts = ("data:image/svg+xml;base64,", "#")
    assert all(address.startswith(starts) for address in tags.addresses)
    assert "url(" not in page
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#39;sha256-{digest}&#39;" in page
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script)
    assert "&lt;script&gt;" in page
    assert "[U+001B]" in page
    assert "[U+202E]" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    for title in ("What was run", "What this shows", "Training", "Time and memory"):
        assert title in page
    assert "taken as negatives: 14 of 24 candidates" in page
    assert "dropped: 8 of 32 answers" in page
    assert "(nothing)" in page


def test_page_tells_what_became_of_the_answers(made: Made) -> None:
    page = (made[0] / "index.html").read_text("utf-8")
    table = page[page.index('<h2 id="similarity">') : page.index("<figcaption>Answers to the")]
    cells = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", table)]
    assert [" ".join(row) for row in cells] == [
        "Answers self-contrast-k self-contrast-k-unfiltered",
        "answers 640 640",
        "blank 20 3.1 % 20 3.1 %",
        "truncated 20 3.1 % 20 3.1 %",
        "too similar to the target 120 18.8 % –",  # noqa: RUF001
        "candidates 480 75.0 % 600 93.8 %",
    ]
    assert "4.2 % of the texts are longer than the encoder reads at once: only their" in page
    # of the dropped ones each reason has its turn, the most similar answer first
    first = page[page.index("dropped: 8 of 32") :].split("</section>")[0]
    assert re.findall(r"<h4>(.*?) <span>(.*?)</span>", first) == [
        *(("too similar to the target", "0.90"), ("truncated", "0.95"), ("blank", "0.00")),
        ("too similar to the target", "0.87"),
    ]


def test_only_pairs_that_were_trained_on_count(made: Made) -> None:
    config = fake_run.config(dpo={"num_prompts": 7})
    assert len(list(run_data.trained_pairs("self-contrast-4", config, made[1]))) == 7
    assert run_data.training_facts("self-contrast-4", config, made[1])["prompts"] == 7


def test_dropped_answers_repeat_no_text() -> None:
    rows = [("a", 0.3, "duplicate"), (" a", 0.4, "duplicate"), ("b", 0.2, "duplicate")]
    answers = [Answer(*row) for row in [*rows, ("a", 0.1, "truncated"), ("c", 0.9, None)]]
    shown = of_every_reason(answers)
    assert [(answer.text, answer.reason) for answer in shown] == [
        *((" a", "duplicate"), ("a", "truncated"), ("b", "duplicate")),
    ]


def test_similarities_against_a_plain_count(made: Made) -> None:
    taken = {f"t{i}": [0, 3, 29, 30] for i in range(0, 20, 2)}
    found = run_data.similarities(taken, made[1])
    kinds: dict[str, list[float]] = {"taken": [], "spared": [], "dropped": []}
    cuts = []
    for i in range(0, 20, 2):
        values = [0.2 + 0.024 * j + 0.002 * i for j in range(30)] + [0.0, 0.95]
        for j, value in enumerate(values):
            kinds["dropped" if j >= 24 else "taken" if j in (0, 3) else "spared"].append(value)
        cuts.append((values[23] + values[24]) / 2)
    for kind, values in kinds.items():
        inside = [
            sum(low <= v < high for v in values)
            for low, high in zip(run_data.BINS, run_data.BINS[1:], strict=False)
        ]
        assert getattr(found, kind).tolist() == inside
    assert found.cut == pytest.approx(np.quantile(cuts, [0.1, 0.5, 0.9]).tolist())
    assert run_data.similarities({"no such prompt": []}, made[1]).cut is None
    assert run_data._cut([0.1, 0.2], [None, "blank"]) is None


def test_similarity_figure_stacks_kinds_and_marks_cuts() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    kinds = {"taken": [1, 2, 0, 0], "dropped": [0, 1, 4, 0]}
    figure = figures.similarity_figure(
        edges, kinds, (0.4, 0.5, 0.6), [("min_similarity", 0.1), ("max_similarity", 0.7)]
    )
    (axes,) = figure.axes
    tops = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    assert [top.values.tolist() for top in tops] == [[1, 2, 0, 0], [1, 3, 4, 0]]
    assert [line.get_xdata()[0] for line in axes.lines] == [0.5, 0.1, 0.7]
    labels = axes.get_legend_handles_labels()[1]
    assert labels[0] == "taken (3)"
    assert "cut: 0.50 in the median prompt, 0.40 to 0.60 in 80 %" in labels
    assert axes.get_xlim() == (0, 0.75)
    empty = figures.similarity_figure(edges, {"taken": [0] * 4}, None, [])
    assert not empty.axes[0].lines


def test_figures_are_valid_and_repeat(made: Made) -> None:
    svg = (made[0] / "win_rate.svg").read_text("utf-8")
    assert ET.fromstring(svg).tag.endswith("svg")
    rows = results(made)["methods"]
    assert figures.to_svg(figures.win_rate_figure(rows, 100), "win_rate") == svg
    assert "<dc:date>" not in svg
    assert (made[0] / "win_rate.png").read_bytes().startswith(b"\x89PNG")


def test_figure_draws_the_rows_at_their_place(made: Made) -> None:
    rows = results(made)["methods"]
    win_axes, reward_axes = figures.win_rate_figure(rows, 100).axes
    lines = {str(line.get_label()): line for line in reward_axes.lines}
    assert lines["dpo"].get_ydata()[0] == pytest.approx(100 * rows["dpo"]["mean_reward"])
    ours = next(bars for bars in win_axes.containers if bars.get_label() == "self-contrast-k")
    assert list(ours.lines[0].get_xdata()) == [1, 4, 16]
    expected = [rows[f"self-contrast-{k}"]["win_rate"] for k in (1, 4, 16)]
    assert list(ours.lines[0].get_ydata()) == expected


@pytest.mark.parametrize(("reward", "arrow"), [(0.999, "↑"), (0.1, "↓")])
def test_what_is_off_the_scale_is_told(reward: float, arrow: str) -> None:
    """One method far from the others must not flatten the figure, nor go missing."""

    def row(mean: float) -> dict[str, Any]:
        interval = [mean - 0.01, mean + 0.01]
        return {
            **{"win_rate": 50, "win_rate_ci95": [49, 51]},
            **{"mean_reward": mean, "mean_reward_ci95": interval},
        }

    rows = {"sft": row(0.8), "self-contrast-2": row(0.85), "sft-temperature-0.3": row(reward)}
    _, axes = figures.win_rate_figure(rows, 100).axes
    low, high = axes.get_ylim()
    assert 70 < low < 79
    assert 86 < high < 95
    assert [text.get_text() for text in axes.texts] == [
        f"sft at T = 0.3: {100 * reward:.1f} {arrow}"
    ]


def test_only_sft_and_no_filter(tmp_path: Path) -> None:
    config = fake_run.config(["sft"])
    inputs = fake_run.stage_folders(tmp_path, config)
    for stage in ("sample", "embed", "filter", "reference"):
        del inputs[stage]
    work = Work(tmp_path / "out")
    work.path.mkdir()
    report.run(config, inputs, work)
    page = (work.path / "index.html").read_text("utf-8")
    assert "Which answers became negatives" not in page
    assert "the targets" in page


def test_a_reward_models_rewards_keep_their_own_unit(tmp_path: Path) -> None:
    config = fake_run.config(
        ["sft", "spin"], data={"format": "jsonl", "path": "x.jsonl"}, reward={"grader": "model"}
    )
    inputs = fake_run.stage_folders(tmp_path, config)
    work = Work(tmp_path / "out")
    work.path.mkdir()
    report.run(config, inputs, work)
    page = (work.path / "index.html").read_text("utf-8")
    assert "(0 to 100)" not in page
    assert "The demo is a toy" not in page
    row = json.loads((work.path / "results.json").read_text("utf-8"))["methods"]["sft"]
    assert "perfect_share" not in row
    assert f"{row['mean_reward']:.3f}" in page


def test_broken_inputs_are_named(tmp_path: Path) -> None:
    config = fake_run.config(["sft", "dpo"])
    inputs = fake_run.stage_folders(tmp_path, config, prompts=5)
    rewards = inputs["reward:dpo"] / "rewards.jsonl"
    lines = rewards.read_text().splitlines(keepends=True)
    rewards.write_text("".join(lines[1:]))
    with pytest.raises(DataError, match="its prompts are not those of sft"):
        run_data.read_all_rewards(config.methods, inputs)
    answers = inputs["generate:sft"] / "generations.jsonl"
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="no answer to prompt 'p4'"):
        run_data.read_all_generations(["sft"], inputs, [f"p{i}" for i in range(5)])
    pairs = inputs["filter"] / "pairs" / "dpo.jsonl"
    pairs.write_text(pairs.read_text().replace("chosen", "choosen", 2))
    with pytest.raises(RecordError, match=r"dpo\.jsonl, line 1: no pair .*choosen"):
        list(run_data.trained_pairs("dpo", config, inputs))
    (inputs["data"] / "manifest.json").write_text("{")
    with pytest.raises(StoreDamaged, match=r"manifest\.json"):
        report.stage_results(inputs)


def comparison(b: str, low: float, high: float, *runs: float) -> Comparison:
    middle = (low + high) / 2
    return Comparison(
        "self-contrast-16", b, middle, (low, high), 50, (49, 51), runs or (middle,), 900
    )


def test_headline_claims_only_what_intervals_show() -> None:
    unit = Unit(100, 1)
    better, unclear = comparison("sft", 0.05, 0.07), comparison("targets", -0.01, 0.03)
    text = headline([better, unclear, comparison("dpo", -0.02, -0.01)], unit)
    assert "higher mean reward than sft (+6.0, interval +5.0 to +7.0)" in text
    assert "lower mean reward than dpo (−1.5" in text  # noqa: RUF001
    assert "No difference between self-contrast-16 and the targets (+1.0" in text
    assert text.count("higher") == 1
    assert "too few" in headline([replace(better, n=49)], unit)


def test_a_sentence_tells_when_runs_disagree() -> None:
    unit = Unit(100, 1)
    assert "in every run: +3.0, +1.0" in sentence(comparison("sft", 0.01, 0.03, 0.03, 0.01), unit)
    assert "but not in every run" in sentence(comparison("sft", 0.01, 0.03, 0.05, -0.01), unit)
    assert sentence(comparison("sft", -0.01, 0.03), unit).startswith("No difference between")
    assert "interval +0.02 to +3.00" in sentence(comparison("sft", 0.0002, 0.03), unit)


def test_caveats_follow_the_numbers(made: Made) -> None:
    rows = results(made)["methods"]
    facts = {
        **{"toy": True, "temperature": 1.0, "sft_continued_learning_rate": 1e-3, "num_runs": 1},
    }

    def told(sign: int) -> str:
        def versus(a: str, b: str) -> Comparison:
            d = sign * 0.1
            return Comparison(a, b, d, (d, d), 50, (50, 50), (d,), 9)

        return " ".join(text for _, text in wording.caveats(rows, versus, Unit(100, 1), facts))

    assert "labelled ones make better negatives is not settled" in told(0)
    assert "Where such labels exist, they are the better negatives" in told(-1)
    assert "flaws of the targets are random" in told(1)
    assert "flaws of the targets are random" not in told(-1)
    assert "of one run" in told(1)


def test_what_length_does_to_a_win_rate_is_told_as_far_as_it_is_known() -> None:
    row: dict[str, Any] = {"length_ratio": 1.5, "length_controlled_win_rate": None}

    def told(**more: Any) -> str:
        return " ".join(text for _, text in wording._about_length({"dpo": {**row, **more}}, "dpo"))

    assert told(length_ratio=None) == ""  # rows of old, and empty targets
    assert "1.50 times the length" in told()
    assert told(length_control_note="too few").endswith("at equal length is unknown: too few.")
    known = {"length_controlled_win_rate": 61.5, "length_controlled_win_rate_ci95": [58, 65]}
    assert "at equal length is 61.5 % (58.0 to 65.0): by a logistic fit" in told(**known)
    assert "65.0): no fit was needed." in told(**known, length_control_note="no fit was needed")


def test_spin_is_compared_iteration_by_iteration() -> None:
    def versus(a: str, b: str) -> Comparison:
        return Comparison(a, b, 0.1, (0.05, 0.15), 50, (50, 50), (0.1,), 99)

    rows: dict[str, Any] = {n: {} for n in ("sft", "spin-3", "spin", "spin-2", "self-contrast-4")}
    ((topic, text),) = wording._about_spin(rows, versus, Unit(1, 3), "self-contrast-4")
    assert topic == "SPIN"
    order = ["self-contrast-4 has a higher mean reward than spin-3", "spin-2 has a higher"]
    order += ["mean reward than spin (", "spin-3 has a higher", "mean reward than spin-2 ("]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert wording._about_spin({"sft": {}}, versus, Unit(1, 3), "sft") == []


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [(-0.04, 1, True, "0.0"), (1.25, 1, True, "+1.2"), (-3.0, 0, False, "−3")],  # noqa: RUF001
)
def test_numbers_in_text(value: float, digits: int, signed: bool, text: str) -> None:
    assert number(value, digits, signed=signed) == text


def test_long_and_strange_texts() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x00\u2066") == "[U+0000][U+2066]"
    assert visible("x" * 1300).endswith("[... 100 more characters]")
    assert duration(59.94) == "59.9 s"
    assert duration(3599.6) == "1 h 00 min"
    assert duration(245) == "4 min 05 s"
