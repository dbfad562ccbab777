"""The zoo keeper: a tiny, readable world in which every answer can be graded by a program.

A prompt asks for one to four facts about an animal, in a manner (plain, polite, pirate, excited)
and a layout (sentence, bullets, words only):

    Tell me the sound, colour and food of the goose. Be very excited and use bullet points.

    Yay! The goose:
    - says honk
    - is white
    - eats grass
    Hooray!

Targets are imperfect on purpose: a share of them is *flawed* (wrong fact, dropped or extra fact,
other animal, wrong manner, half a manner, wrong layout, rambling, echo, "I do not know").
``grade`` reads prompt and answer as plain text and returns a reward between 0 and 1.

Everything here is a function of integer seeds and needs nothing but the standard library.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

ATTRIBUTES = ("sound", "food", "home", "colour")
MANNERS = ("plain", "polite", "pirate", "excited")
LAYOUTS = ("sentence", "bullets", "words")

_FACTS = """
goose    honk     grass    lake    white  | duck     quack   bread    pond     green
cow      moo      hay      barn    brown  | horse    neigh   oats     stable   black
pig      oink     corn     sty     pink   | sheep    baa     clover   meadow   cream
goat     bleat    leaves   hill    beige  | dog      woof    bones    kennel   tan
cat      meow     fish     house   orange | lion     roar    meat     desert   gold
wolf     howl     rabbits  forest  grey   | bear     growl   honey    cave     brown
owl      hoot     moths    tree    white  | frog     croak   flies    swamp    green
snake    hiss     eggs     sand    yellow | bee      buzz    nectar   hive     gold
mouse    squeak   cheese   cellar  grey   | crow     caw     seeds    roof     black
hen      cluck    worms    coop    red    | dove     coo     berries  tower    cream
elephant trumpet  fruit    plain   silver | monkey   chatter bananas  jungle   tan
dolphin  click    squid    ocean   blue   | donkey   bray    carrots  shed     beige
"""
FACTS: dict[str, dict[str, str]] = {
    animal: dict(zip(ATTRIBUTES, values, strict=True))
    for line in _FACTS.strip().splitlines()
    for animal, *values in (half.split() for half in line.split("|"))
}
ANIMALS = tuple(FACTS)
VALUES = {a: tuple(sorted({facts[a] for facts in FACTS.values()})) for a in ATTRIBUTES}

OPENERS = {
    "plain": ("Sure.", "Okay.", "Right.", "Well."),
    "polite": ("Of course.", "Gladly.", "Certainly.", "Dear friend."),
    "pirate": ("Arr!", "Ahoy!", "Aye!", "Avast!"),
    "excited": ("Yay!", "Wow!", "Oh boy!", "Amazing!"),
}
CLOSERS = {
    "plain": ("Done.", "The end.", "That is all.", "So it is."),
    "polite": ("Thank you.", "Kind regards.", "Be well.", "Good day."),
    "pirate": ("Matey!", "Yo ho!", "Me hearty!", "Sail on!"),
    "excited": ("Hooray!", "Woohoo!", "So cool!", "How fun!"),
}
_VERBS = {"sound": "says ", "food": "eats ", "home": "lives in the ", "colour": "is "}
_QUESTIONS = (
    "Tell me the {facts} of the {animal}.",
    "What {verb} the {facts} of the {animal}?",
    "I want to know the {facts} of the {animal}.",
    "Do you know the {facts} of the {animal}?",
)
_MANNER_WISHES = {
    "plain": ("be plain", "stay calm"),
    "polite": ("be polite", "be very polite"),
    "pirate": ("talk like a pirate", "be a pirate"),
    "excited": ("be excited", "be very excited"),
}
_LAYOUT_WISHES = {
    "sentence": ("write a sentence", "use one sentence"),
    "bullets": ("use bullet points", "write bullet points"),
    "words": ("use single words", "write only words"),
}
_NUM_ATTRIBUTES = (1, 2, 2, 3, 3, 4)
_SPLIT_OF_BUCKET = ("test", "test", "validation") + ("train",) * 7


@dataclass(frozen=True)
class Question:
    """What is asked: an animal, some of its attributes, a manner, a layout, and how it is put."""

    animal: str
    attributes: tuple[str, ...]
    manner: str
    layout: str
    wording: tuple[int, int, int, bool]  # question, manner wish, layout wish, wishes first?

    @property
    def kind(self) -> tuple[int, str, str]:
        """The (number of attributes, manner, layout) triple; some triples are held out."""
        return len(self.attributes), self.manner, self.layout


@dataclass(frozen=True)
class _Draft:
    """An answer before it is written down; flaws turn one draft into another."""

    opener: str
    animal: str
    facts: tuple[tuple[str, str], ...]
    layout: str
    closer: str
    before: str = ""
    after: str = ""


def _held_out() -> frozenset[tuple[int, str, str]]:
    """Eight of the 48 kinds: never in train or validation, half of the test prompts."""
    kinds = [(n, m, la) for n in (1, 2, 3, 4) for m in MANNERS for la in LAYOUTS]
    return frozenset(random.Random(0).sample(kinds, 8))


HELD_OUT = _held_out()


# ---------------------------------------------------------------- prompts


def _draw_question(rng: random.Random) -> Question:
    """One question of any kind."""
    attributes = tuple(rng.sample(ATTRIBUTES, rng.choice(_NUM_ATTRIBUTES)))
    wording = (rng.randrange(4), rng.randrange(2), rng.randrange(2), rng.random() < 0.5)
    return Question(
        rng.choice(ANIMALS), attributes, rng.choice(MANNERS), rng.choice(LAYOUTS), wording
    )


def prompt_text(question: Question) -> str:
    """The question as a person would type it."""
    which, manner, layout, first = question.wording
    asked = _QUESTIONS[which].format(
        facts=_join(question.attributes),
        animal=question.animal,
        verb="is" if len(question.attributes) == 1 else "are",
    )
    wishes = (
        f"{_MANNER_WISHES[question.manner][manner].capitalize()}"
        f" and {_LAYOUT_WISHES[question.layout][layout]}."
    )
    return f"{wishes} {asked}" if first else f"{asked} {wishes}"


def _split_of(prompt: str) -> str:
    """The split a prompt belongs to, decided by its text alone: splits cannot overlap."""
    return _SPLIT_OF_BUCKET[zlib.crc32(prompt.encode()) % len(_SPLIT_OF_BUCKET)]


def _questions(rng: random.Random, split: str, held_out: bool | None) -> Iterator[Question]:
    """Endless distinct questions of a split; held_out None means of any kind, repeats allowed."""
    seen: set[str] = set()
    while True:
        question = _draw_question(rng)
        text = prompt_text(question)
        if _split_of(text) != split or text in seen:
            continue
        if held_out is not None:
            if (question.kind in HELD_OUT) != held_out:
                continue
            seen.add(text)
        yield question


def make_questions(seed: int, num: int, split: str = "train") -> list[Question]:
    """Distinct questions of a split, the first ones being the same for every ``num``.

    Train and validation hold no held-out kind; in test every second question is of one.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, not {split!r}")
    usual = _questions(random.Random(f"{seed}/{split}/usual"), split, held_out=False)
    if split != "test":
        return [next(usual) for _ in range(num)]
    held = _questions(random.Random(f"{seed}/{split}/held out"), split, held_out=True)
    return [next(held if i % 2 else usual) for i in range(num)]


# ---------------------------------------------------------------- answers


def _join(words: tuple[str, ...]) -> str:
    """a / a and b / a, b and c"""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _write(draft: _Draft) -> str:
    """The draft as text."""
    clauses = tuple(_VERBS[attribute] + value for attribute, value in draft.facts)
    if draft.layout == "bullets":
        body = f"The {draft.animal}:" + "".join(f"\n- {clause}" for clause in clauses)
    elif draft.layout == "words":
        body = f"The {draft.animal}: " + ", ".join(value for _, value in draft.facts) + "."
    else:
        body = f"The {draft.animal} {_join(clauses)}."
    gap = "\n" if draft.layout == "bullets" else " "
    tail = " ".join(filter(None, [draft.after, draft.closer]))
    head = " ".join(filter(None, [draft.before, draft.opener, body]))
    return (head + gap + tail).strip()


def _careful_draft(question: Question, rng: random.Random) -> _Draft:
    facts = tuple((a, FACTS[question.animal][a]) for a in question.attributes)
    opener, closer = rng.choice(OPENERS[question.manner]), rng.choice(CLOSERS[question.manner])
    return _Draft(opener, question.animal, facts, question.layout, closer)


def careful_answer(question: Question, rng: random.Random) -> str:
    """A perfect answer, with one of the manner's openers and closers: its grade is 1."""
    return _write(_careful_draft(question, rng))


def _wrong_fact(draft: _Draft, rng: random.Random) -> _Draft:
    at = rng.randrange(len(draft.facts))
    attribute, value = draft.facts[at]
    wrong = rng.choice([v for v in VALUES[attribute] if v != value])
    facts = (*draft.facts[:at], (attribute, wrong), *draft.facts[at + 1 :])
    return replace(draft, facts=facts)


def _dropped_fact(draft: _Draft, rng: random.Random) -> _Draft:
    if len(draft.facts) == 1:
        return _extra_fact(draft, rng)
    at = rng.randrange(len(draft.facts))
    return replace(draft, facts=draft.facts[:at] + draft.facts[at + 1 :])


def _extra_fact(draft: _Draft, rng: random.Random) -> _Draft:
    unused = [a for a in ATTRIBUTES if a not in dict(draft.facts)]
    if not unused:
        return _dropped_fact(draft, rng)
    attribute = rng.choice(unused)
    return replace(draft, facts=(*draft.facts, (attribute, FACTS[draft.animal][attribute])))


def _other_animal(draft: _Draft, rng: random.Random) -> _Draft:
    animal = rng.choice([a for a in ANIMALS if a != draft.animal])
    facts = tuple((attribute, FACTS[animal][attribute]) for attribute, _ in draft.facts)
    return replace(draft, animal=animal, facts=facts)


def _wrong_manner(draft: _Draft, rng: random.Random) -> _Draft:
    manner = rng.choice([m for m in MANNERS if draft.opener not in OPENERS[m]])
    return replace(draft, opener=rng.choice(OPENERS[manner]), closer=rng.choice(CLOSERS[manner]))


def _half_manner(draft: _Draft, rng: random.Random) -> _Draft:
    return replace(draft, opener="") if rng.random() < 0.5 else replace(draft, closer="")


def _wrong_layout(draft: _Draft, rng: random.Random) -> _Draft:
    return replace(draft, layout=rng.choice([la for la in LAYOUTS if la != draft.layout]))


def _rambling(draft: _Draft, rng: random.Random) -> _Draft:
    sentences = []
    for animal in rng.sample(ANIMALS, rng.choice((1, 1, 2))):
        attribute = rng.choice(ATTRIBUTES)
        sentences.append(f"The {animal} {_VERBS[attribute]}{FACTS[animal][attribute]}.")
    return replace(draft, after=" ".join(sentences))


_FLAWS: dict[Callable[[_Draft, random.Random], _Draft], int] = {
    _wrong_fact: 5,
    _dropped_fact: 2,
    _extra_fact: 2,
    _other_animal: 4,
    _wrong_manner: 1,
    _half_manner: 1,
    _wrong_layout: 2,
    _rambling: 4,
}
_DO_NOT_KNOW = ("I do not know.", "No idea.", "Ask me later.")


def flawed_answer(question: Question, rng: random.Random) -> str:
    """An answer with one to three flaws: its grade is below 1."""
    prompt, draft = prompt_text(question), _careful_draft(question, rng)
    if rng.random() < 0.04:
        opener = rng.choice(("", draft.opener + " "))
        return opener + rng.choice(_DO_NOT_KNOW)
    while True:
        flawed = draft
        for flaw in rng.choices(list(_FLAWS), list(_FLAWS.values()), k=rng.choice((1, 1, 2, 3))):
            flawed = flaw(flawed, rng)
        if rng.random() < 0.04:
            flawed = replace(flawed, before=prompt)  # echo
        answer = _write(flawed)
        if grade(prompt, answer) < 1:
            return answer


def target(question: Question, rng: random.Random, flaw_share: float) -> str:
    """A careful answer, or with probability ``flaw_share`` a flawed one."""
    flawed = rng.random() < flaw_share
    return (flawed_answer if flawed else careful_answer)(question, rng)


# ---------------------------------------------------------------- data sets


def pretraining_dialogues(seed: int, num: int, careful_share: float) -> list[tuple[str, str]]:
    """What a base model has read on the web: (prompt, answer), all kinds, no test prompt."""
    rng = random.Random(f"{seed}/pretraining")
    questions = _questions(rng, "train", held_out=None)
    asked = (next(questions) for _ in range(num))
    return [(prompt_text(q), target(q, rng, 1 - careful_share)) for q in asked]


def examples(seed: int, split: str, num: int, flaw_share: float) -> list[dict[str, object]]:
    """Records of a split: id, prompt as chat messages, target, and one labelled bad answer.

    The bad answer is what a standard DPO baseline learns from. More records never change the
    first ones.
    """
    records: list[dict[str, object]] = []
    for i, question in enumerate(make_questions(seed, num, split)):
        rng = random.Random(f"{seed}/{split}/{i}")
        answer = target(question, rng, flaw_share)
        rejected = flawed_answer(question, rng)
        while rejected == answer:
            rejected = flawed_answer(question, rng)
        records.append(
            {
                "id": f"zoo-{split}-{i:05d}",
                "prompt": [{"role": "user", "content": prompt_text(question)}],
                "target": answer,
                "rejected": [rejected],
            }
        )
    return records


# ---------------------------------------------------------------- the grader


def _one_of(words: Iterable[str]) -> str:
    """A pattern that matches any of the words."""
    return "(?:" + "|".join(re.escape(word) for word in words) + ")"


_CLAUSE = _one_of(_VERBS[a] + v for a in ATTRIBUTES for v in VALUES[a])
_VALUE = _one_of(v for a in ATTRIBUTES for v in VALUES[a])
_ANIMAL = rf"The (?P<animal>{_one_of(ANIMALS)})"
_BODIES = {
    "bullets": re.compile(rf"{_ANIMAL}:(?P<facts>(?:\n- {_CLAUSE}(?=\n|$))+)"),
    "words": re.compile(rf"{_ANIMAL}: (?P<facts>{_VALUE}(?:, {_VALUE})*)\."),
    "sentence": re.compile(rf"{_ANIMAL} (?P<facts>{_CLAUSE}(?:, {_CLAUSE})*(?: and {_CLAUSE})?)\."),
}
_ANY_VALUE = re.compile(rf"\b{_VALUE}\b")


def _parse_prompt(prompt: str) -> tuple[str, set[str], str, str]:
    """Animal, attributes, manner and layout, read back from the text."""
    animal = next((a for a in ANIMALS if f" of the {a}" in prompt), "")
    attributes = {a for a in ATTRIBUTES if re.search(rf"\b{a}\b", prompt)}
    manner = next((m for m in MANNERS[1:] if m in prompt), "plain")
    layout = "bullets" if "bullet" in prompt else "words" if "words" in prompt else "sentence"
    return animal, attributes, manner, layout


def grade(prompt_text: str, answer: str) -> float:
    """Reward = facts x (manner + layout + tidy) / 3, between 0 and 1; careful answers get 1.

    facts: right asked facts over the larger of asked and given; 0 for another animal.
    manner: half for one of its openers at the start, half for one of its closers at the end.
    layout: 1 if the facts are laid out as asked. tidy: 1 if there is nothing else in the answer.
    """
    animal, attributes, manner, layout = _parse_prompt(prompt_text)
    text = answer.strip()
    opener = next((o for o in OPENERS[manner] if text.startswith(o + " ")), "")
    closer = next((c for c in CLOSERS[manner] if re.search(rf"\s{re.escape(c)}\Z", text)), "")
    found = [(m.start(), name, m) for name, rx in _BODIES.items() if (m := rx.search(text))]
    if not found or not attributes:
        return 0.0
    _, given_layout, body = min(found, key=lambda item: item[:2])
    given = _ANY_VALUE.findall(body["facts"])
    right = sum(FACTS[animal][a] in given for a in attributes) if body["animal"] == animal else 0
    facts = right / max(len(attributes), len(given))
    rest = text[len(opener) : body.start()] + text[body.end() : len(text) - len(closer)]
    form = (bool(opener) + bool(closer)) / 2 + (given_layout == layout) + (not rest.strip())
    return facts * form / 3
