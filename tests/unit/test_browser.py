"""The report's page in a real Chromium: offline, quiet, and doing what it says."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chromium
import fake_run
import hostile_run
import pytest

from scmini.evaluation.report.page import visible
from scmini.records import read_generations, read_rewards
from scmini.stages import report
from scmini.store import Work

COMMAND = chromium.find()
pytestmark = pytest.mark.skipif(COMMAND is None, reason="no Chromium or Chrome on PATH")
NUM_PROMPTS = 60
MAIN = "self-contrast-16"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The page of a hostile run, and its test prompts as plain rows."""
    root = tmp_path_factory.mktemp("browser")
    config = hostile_run.config()
    inputs = hostile_run.stage_folders(root, config, NUM_PROMPTS)
    work = Work(root / "out")
    work.path.mkdir()
    report.run(config, inputs, work)
    rows: list[dict[str, Any]] = []
    for method in config.methods:
        answers = read_generations(inputs[f"generate:{method}"] / "generations.jsonl")
        rewards = read_rewards(inputs[f"reward:{method}"] / "rewards.jsonl")
        for i, (answer, reward) in enumerate(zip(answers, rewards, strict=True)):
            if i == len(rows):
                prompt = answer.prompt[0]["content"]
                rows.append(
                    {
                        "id": visible(answer.id, 200),
                        "texts": [visible(t, 4000) for t in (answer.id, prompt, answer.target)],
                        "target": reward.target_reward,
                    }
                )
            rows[i]["texts"].append(visible(answer.response, 4000))
            rows[i][method] = reward.reward
            rows[i][f"{method} says"] = visible(answer.response, 4000)
    return work.path / "index.html", rows


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Chromium]:
    with chromium.started(str(COMMAND), tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(browser: chromium.Chromium, made: Any) -> Iterator[Callable[..., chromium.Page]]:
    """Opens the page; at the end it must have been quiet, and nothing of a model have run."""
    opened = []

    def open_page(**options: Any) -> chromium.Page:
        opened.append(chromium.Page(browser, made[0], **options))
        return opened[-1]

    yield open_page
    for each in opened:
        assert each.complaints() == []
        assert [url.partition("#")[0] for url in each.requests()] == [made[0].as_uri()]
        assert each.run("typeof window.canary") == "undefined"
        each.close()


IDS = "[...document.querySelectorAll('#{}-browser article .anchor')].map(a => a.textContent)"
STATUS = "document.querySelector('#{}-browser .status').textContent"


def ids(page: chromium.Page, name: str = "answers") -> list[str]:
    found: list[str] = page.run(IDS.format(name))
    return found


def shown(page: chromium.Page, name: str = "answers") -> int:
    match = re.match(r"([\d,]+) of ([\d,]+) prompts shown", page.run(STATUS.format(name)))
    assert match
    assert match[2] == {"answers": str(NUM_PROMPTS), "training": "20"}[name]
    return int(match[1])


def all_ids(page: chromium.Page, name: str = "answers") -> list[str]:
    """Those of every page of the list, in order."""
    found = ids(page, name)
    button = f"document.querySelector('#{name}-browser .pager button:last-child')"
    while page.run(f"!{button}.closest('nav').hidden && !{button}.disabled"):
        page.run(f"{button}.click()")
        found += ids(page, name)
    return found


def search(page: chromium.Page, query: str, name: str = "answers") -> None:
    box = f"document.querySelector('#{name}-browser input[type=search]')"
    page.run(f"{box}.value = ''; {box}.focus()")
    if query:
        page.type(query)
    else:
        page.run(f"{box}.dispatchEvent(new Event('input'))")
    page.run("new Promise(done => setTimeout(done, 150))")


def choose(page: chromium.Page, label: str, option: str, name: str = "answers") -> None:
    """What a person chooses in a list that has this label, by the words of the option."""
    script = """((name, label, option) => {
      const labels = [...document.querySelectorAll(`#${name}-browser .tools label`)];
      const select = labels.find(x => x.textContent.startsWith(label)).querySelector("select");
      select.value = [...select.options].find(x => x.textContent === option).value;
      select.dispatchEvent(new Event("change"));
    })"""
    page.run(f"{script}({json.dumps(name)}, {json.dumps(label)}, {json.dumps(option)})")


def test_the_page_loads_offline_and_in_silence(page: Any, made: Any) -> None:
    found = page()
    assert shown(found) == NUM_PROMPTS
    assert shown(found, "training") == 20
    assert all_ids(found) == [row["id"] for row in made[1]]
    hidden = "[...document.querySelectorAll('.examples')].map(x => getComputedStyle(x).display)"
    assert found.run(hidden) == ["none", "none"]
    assert found.run("document.querySelectorAll('main script, main svg, main base').length") == 0
    assert found.run("[...document.images].every(i => i.naturalWidth > 100)")


def test_a_script_of_a_model_would_be_refused(browser: chromium.Chromium, made: Any) -> None:
    """The policy holds by itself: it is what stands between a hole in the escaping and harm."""
    found = chromium.Page(browser, made[0])
    found.run(
        "const s = document.createElement('script'); s.textContent = 'window.canary = 1';"
        "document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.canary=1\">');"
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"http://127.0.0.1:9/x\">')"
    )
    found.run("new Promise(done => setTimeout(done, 200))")
    assert found.run("typeof window.canary") == "undefined"
    assert len(found.complaints()) >= 3
    found.close()


@pytest.mark.parametrize(
    "query",
    ["needle", "NEEDLE honk", '"in (hay*"', "word7x", "</script> moo", "zzzz", "مرحبا", "[u+202e]"],
)
def test_search_finds_what_a_plain_search_finds(page: Any, made: Any, query: str) -> None:
    found = page()
    search(found, query)
    words = [query.strip('"')] if '"' in query else query.split()
    expected = [
        row["id"]
        for row in made[1]
        if all(w.lower() in "\n".join(row["texts"]).lower() for w in words)
    ]
    assert shown(found) == len(expected)
    assert all_ids(found) == expected
    marks = set(found.run("[...document.querySelectorAll('mark')].map(m => m.textContent)"))
    assert {mark.lower() for mark in marks} <= {word.lower() for word in words}
    assert bool(marks) == bool(expected)
    search(found, "")
    assert shown(found) == NUM_PROMPTS


@pytest.mark.parametrize(
    ("ours", "theirs"), [(MAIN, "target"), ("dpo", "sft"), ("sft", "self-contrast-4")]
)
def test_order_and_filter_are_those_of_a_plain_twin(
    page: Any, made: Any, ours: str, theirs: str
) -> None:
    found = page()
    choose(found, "Compare", ours)
    choose(found, "with", theirs)

    def gain(row: dict[str, Any]) -> float:
        return float(row[ours] - row[theirs])

    choose(found, "Order", "largest gain first")
    assert all_ids(found) == [row["id"] for row in sorted(made[1], key=gain, reverse=True)]
    choose(found, "Order", "largest loss first")
    assert all_ids(found) == [row["id"] for row in sorted(made[1], key=gain)]
    kinds = {
        "win": [row for row in made[1] if gain(row) > 0],
        "loss": [row for row in made[1] if gain(row) < 0],
        "tie": [row for row in made[1] if gain(row) == 0],
    }
    assert sum(map(len, kinds.values())) == NUM_PROMPTS
    assert all(kinds.values())
    choose(found, "Order", "as in the test set")
    for kind, rows in kinds.items():
        choose(found, "Outcome", kind)
        assert shown(found) == len(rows)
        assert all_ids(found) == [row["id"] for row in rows]
        badges = found.run("[...document.querySelectorAll('.badge')].map(b => b.textContent)")
        assert all(badge.endswith(f", {kind}") for badge in badges)


def test_every_text_stands_there_as_it_is(page: Any, made: Any) -> None:
    found = page()
    cards: dict[str, list[str]] = {}
    script = """[...document.querySelectorAll('#answers-browser article')].map(card => [
      card.querySelector('.anchor').textContent,
      [...card.querySelectorAll('.text')].map(text => text.textContent)])"""
    button = "document.querySelector('#answers-browser .pager button:last-child')"
    for _ in range(NUM_PROMPTS // 10):
        cards |= dict(found.run(script))
        found.run(f"{button}.click()")
    for row in made[1]:
        expected = [text if text.strip() else "(nothing)" for text in row["texts"][1:]]
        assert cards[row["id"]] == expected
    assert found.run("document.querySelectorAll('#answers-browser img').length") == 0


def test_a_permalink_shows_its_prompt(page: Any, made: Any) -> None:
    link = "document.querySelectorAll('#answers-browser .anchor')[{}].getAttribute('href')"
    first = page()
    found = page(fragment=first.run(link.format(0)))
    for number in range(len(hostile_run.IDS)):
        if number:
            go_to(found, first.run(link.format(number)))
        assert ids(found) == [made[1][number]["id"]]
        assert found.run("document.activeElement.tagName") == "ARTICLE"
    found.run("document.querySelector('#answers-browser .status button').click()")
    assert shown(found) == NUM_PROMPTS
    assert found.run("location.hash") == ""
    go_to(found, "#training-t7")
    assert ids(found, "training") == ["t7"]
    go_to(found, "#answer-nowhere")
    assert "is not among those on this page" in found.run(STATUS.format("answers"))
    assert ids(found) == ids(first)


def go_to(page: chromium.Page, fragment: str) -> None:
    page.run(f"location.hash = {json.dumps(fragment)}; 0")
    page.run("new Promise(done => setTimeout(done, 100))")


def test_keys_lead_through_the_list(page: Any, made: Any) -> None:
    found = page()
    focused = "document.activeElement.querySelector?.('.anchor')?.textContent ?? ''"
    found.run("document.querySelector('#answers-browser article').focus()")
    for number in range(1, 12):  # over the end of the first page of ten
        found.press("j")
        assert found.run(focused) == made[1][number]["id"]
    for number in (10, 9):
        found.press("k")
        assert found.run(focused) == made[1][number]["id"]
    found.press("/")
    assert found.run("document.activeElement.type") == "search"
    found.type("needle")
    found.run("new Promise(done => setTimeout(done, 150))")
    assert shown(found) < NUM_PROMPTS
    found.press("j")  # a letter of the search
    assert found.run("document.activeElement.value") == "needlej"
    found.press("Escape")
    assert shown(found) == NUM_PROMPTS


def test_columns_and_long_texts_fold(page: Any) -> None:
    found = page()
    boxes = "document.querySelector('#answers-browser article').querySelectorAll('.box').length"
    assert found.run(boxes) == 1 + len(hostile_run.METHODS)
    found.run("document.querySelectorAll('#answers-browser .columns input')[1].click()")
    assert found.run(boxes) == len(hostile_run.METHODS)
    assert "dpo" not in found.run(
        "[...document.querySelectorAll('#answers-browser .box h4')].map(h => h.textContent).join()"
    )
    height = "document.querySelector('#answers-browser .clamped, .text.opened').offsetHeight"
    folded = found.run(height)
    found.run(
        "const t = document.querySelector('#answers-browser .clamped');"
        "t.classList.add('opened'); t.nextSibling.click()"
    )
    assert found.run(height) > folded
    assert found.run("document.querySelector('.opened').nextSibling.textContent") == "Show less"


def test_training_prompts_can_be_searched_by_method_and_reason(page: Any) -> None:
    found = page()
    search(found, "train4x", "training")
    assert ids(found, "training") == ["t4"]
    titles = "[...document.querySelectorAll('#training-browser .group')].map(t => t.textContent)"
    assert found.run(titles)[:2] == [
        "taken as negatives: 14 of 24 candidates",
        "dropped by the filter: 8 of 32 answers; 6 are here",
    ]
    choose(found, "Negatives of", "self-contrast-4", "training")
    assert found.run(titles)[0] == "taken as negatives: 4 of 24 candidates"
    choose(found, "Negatives of", "self-contrast-16-unfiltered", "training")
    assert found.run(titles)[:2] == [
        "taken as negatives: 14",
        "what the filter would drop: 8 of 32 answers; 6 are here",
    ]
    search(found, "", "training")
    choose(found, "With an answer dropped as", "blank", "training")
    assert shown(found, "training") == 20
    choose(found, "Order", "most similar negative first", "training")
    assert len(all_ids(found, "training")) == 20


_OVERFLOW = """[document.documentElement.scrollWidth, innerWidth,
  [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre')
    && e.getBoundingClientRect().right > innerWidth + 1).length]"""


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_scrolls_no_page_sideways(page: Any, width: int, scripts: bool) -> None:
    found = page(width=width, height=740, phone=True, scripts=scripts)
    assert found.run(_OVERFLOW) == [width, width, 0]


_CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const channel = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  const under = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walk = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.disabled) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(under(e))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_has_the_contrast_of_aa(page: Any, dark: bool) -> None:
    found = page(dark=dark)
    search(found, "needle")
    found.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert found.run(_CONTRAST) == []
    paper = found.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 20, 20)" if dark else "rgb(255, 255, 255)")


def test_print_has_examples_and_no_controls(page: Any) -> None:
    found = page()
    pages = len(re.findall(rb"/Type\s*/Page\b", found.pdf()))
    assert 3 <= pages <= 12
    found.call("Emulation.setEmulatedMedia", media="print")
    displays = "[...document.querySelectorAll('{}')].map(x => getComputedStyle(x).display)"
    assert found.run(displays.format(".browser")) == ["none", "none"]
    assert found.run(displays.format(".contents")) == ["none"]
    assert found.run(displays.format(".examples")) == ["block", "block"]


def test_without_scripts_some_prompts_can_be_read(page: Any, made: Any) -> None:
    found = page(scripts=False)
    assert found.run("document.querySelectorAll('.browser[hidden]').length") == 2
    cards = found.run("[...document.querySelectorAll('.examples article')].map(x => x.innerText)")
    assert len(cards) == 10
    first = made[1][0]
    assert first["sft says"].strip() in cards[0]
    assert "taken as negatives: 14 of 24 candidates" in cards[6]
    assert found.run("getComputedStyle(document.querySelector('.examples')).display") == "block"


def test_a_bare_run_has_a_quiet_page_too(browser: chromium.Chromium, tmp_path: Path) -> None:
    """One prompt, one method, no grades, no training prompts."""
    config = fake_run.config(["sft"], reward={"grader": "none"})
    inputs = fake_run.stage_folders(tmp_path, config, prompts=1)
    kept = {key: path for key, path in inputs.items() if key not in ("sample", "filter", "embed")}
    work = Work(tmp_path / "out")
    work.path.mkdir()
    report.run(config, {k: v for k, v in kept.items() if k != "reward:sft"}, work)
    found = chromium.Page(browser, work.path / "index.html")
    assert ids(found) == ["p0"]
    assert found.run(STATUS.format("answers")) == "1 of 1 prompts shown"
    assert found.run("document.getElementById('training-browser')") is None
    choose(found, "Order", "much longer first")
    assert ids(found) == ["p0"]
    assert found.complaints() == []
    found.close()
