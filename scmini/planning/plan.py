"""`scmini plan`: the cost of every stage on one card or on all, and whether it fits."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scmini.config import Config
from scmini.console import say
from scmini.errors import ConfigError, DataError, DoesNotFit
from scmini.planning import cards, fit
from scmini.planning.cards import GIB, Card
from scmini.planning.shapes import Shape, is_here, shape_of
from scmini.planning.stages import Estimate, Subject, estimate
from scmini.planning.workload import Workload, workload
from scmini.run_status import status
from scmini.stage_graph import Task, tasks, trains_base

BENCH = Path(__file__).resolve().parents[2] / "bench" / "results"
"""Benchmark rows of a checkout; an installed wheel has none."""


@dataclass(frozen=True)
class OnCard:
    """A plan for one card."""

    card: Card
    stages: list[Estimate]
    misfits: list[fit.Misfit]
    knobs: dict[str, int]
    """Largest tokens_per_microbatch that fits, by key."""

    @property
    def seconds(self) -> float | None:
        """Of all stages that need a GPU; None if the card's speed is not known."""
        known = [found.seconds for found in self.stages if found.parts]
        return None if None in known else sum(each for each in known if each is not None)


@dataclass(frozen=True)
class Plan:
    """What a run needs, on one card or on several to compare."""

    subject: Subject
    on_cards: list[OnCard]
    downloads: dict[str, int]
    """Model from the hub -> bytes of its weights that are not here yet."""
    measured: dict[Task, dict[str, Any]]
    """Of finished stages: {"peak_gib", "seconds", "device", "bytes"}."""

    @property
    def disk(self) -> int:
        """Bytes that stay, with the downloads, and the most that is needed besides."""
        stages = self.on_cards[0].stages
        kept = sum(found.disk for found in stages) + max(found.scratch for found in stages)
        return kept + sum(self.downloads.values())

    def check(self) -> None:
        """`DoesNotFit` if this is the plan of one card and a stage does not fit it."""
        if len(self.on_cards) == 1 and (found := self.on_cards[0].misfits):
            card = self.on_cards[0].card
            raise DoesNotFit("\n".join(dict.fromkeys(each.sentence(card) for each in found)))


def plan(
    config: Config,
    *,
    gpu: str | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    run_dir: Path | None = None,
    bench: Path | None = BENCH,
) -> Plan:
    """Count what a run needs. Nothing is downloaded, and no model is loaded.

    Args:
        gpu: name of a card; None takes this machine's, and without one compares all that are known.
        prompt_tokens, response_tokens: mean lengths, instead of those found or assumed.
        run_dir: a run folder, whose finished stages are shown beside the plan.
        bench: folder of benchmark results from which speeds are taken, where there are any.

    Raises:
        UsageError: no such card.
        ConfigError, DataError: the sizes of a model cannot be known; names the key and the remedy.
    """
    if gpu is not None:
        chosen = [cards.card_named(gpu)]
    else:
        here = cards.local_card()
        chosen = list(cards.CARDS.values()) if here is None else [here]
    subject = subject_of(config, workload(config, prompt_tokens, response_tokens))
    found = [on_card(subject, cards.with_measurements(card, bench)) for card in chosen]
    return Plan(subject, found, _downloads(subject), _measured(config, run_dir))


def subject_of(config: Config, load: Workload) -> Subject:
    """The configuration with the shapes of all models it names."""
    model, reward, encoder = config.model, config.reward.model_name_or_path, config.embed.encoder
    name = model.model_name_or_path
    base = _own(config) if name is None else shape_of(f"{_MODEL}", name, model.revision)
    grades = config.grader == "model"
    judge = base if grades else None
    if grades and reward is not None:
        judge = _reward_shape(config, reward)
    hashed = encoder == "hashed-ngrams" or Task("embed") not in tasks(config)
    return Subject(
        config, base, load, None if hashed else shape_of("embed.encoder", encoder), judge
    )


def _reward_shape(config: Config, name: str) -> Shape:
    """Of the reward model, or of its body where its own folder has no sizes."""
    body, revision = config.reward.body_name_or_path, config.reward.revision
    try:
        return shape_of("reward.model_name_or_path", name, revision)
    except (ConfigError, DataError):
        if body is None:
            raise
        return replace(shape_of("reward.body_name_or_path", body), name=name)


_MODEL = "model.model_name_or_path"


def _own(config: Config) -> Shape:
    """The model that the stage `base` makes."""
    base = config.base
    return Shape(
        "the model of stage base",
        base.num_hidden_layers,
        base.hidden_size,
        base.num_attention_heads,
        base.num_key_value_heads,
        base.hidden_size // base.num_attention_heads,
        base.intermediate_size,
        base.vocab_size,
        tied=True,
        file_bytes=4,
    )


def on_card(subject: Subject, card: Card) -> OnCard:
    """The costs on one card, with what could be changed."""
    stages = [estimate(subject, task, card) for task in tasks(subject.config)]
    misfits = [each for found in stages if (each := fit.misfit(subject, found, card))]
    knobs: dict[str, int] = {}
    for found in stages:
        if found.task.stage in ("sft", "dpo"):
            most = fit.largest_knob(subject, found.task, card)
            key = fit.knob_of(found.task)
            if most is not None:
                knobs[key] = max(most, knobs.get(key, 0))
    return OnCard(card, stages, misfits, knobs)


def _downloads(subject: Subject) -> dict[str, int]:
    config = subject.config
    named: list[tuple[Shape | None, str | None]] = [(subject.encoder, None)]
    if not trains_base(config):
        named.append((subject.base, config.model.revision))
    if config.reward.model_name_or_path is not None:
        named.append((subject.reward, config.reward.revision))
    return {
        shape.name: shape.weights * shape.file_bytes
        for shape, revision in named
        if shape is not None and not is_here(shape.name, revision)
    }


def _measured(config: Config, run_dir: Path | None) -> dict[Task, dict[str, Any]]:
    """What the manifests of a run's finished stages say."""
    if run_dir is None:
        return {}
    if not run_dir.is_dir():
        say(f"{run_dir}: no such run folder yet, so there is nothing measured to show")
        return {}
    found = {}
    for row in status(config, run_dir)["stages"]:
        if row["state"] == "done":
            manifest = json.loads((Path(row["path"]) / "manifest.json").read_bytes())
            notes = manifest.get("notes", {})
            found[Task(row["name"], row["method"])] = {
                "peak_gib": notes.get("peak_gib"),
                "device": notes.get("device"),
                "seconds": row["seconds"],
                "bytes": row["bytes"],
            }
    return found


def document(made: Plan) -> dict[str, Any]:
    """The plan as one JSON document, sizes in bytes and GiB, times in seconds."""
    load = made.subject.load
    return {
        "name": made.subject.config.name,
        "workload": {
            "prompts": load.prompts,
            "test_prompts": load.test,
            "prompt_tokens": load.prompt,
            "response_tokens": load.response,
            "notes": list(load.notes),
        },
        "downloads": made.downloads,
        "disk_bytes": made.disk,
        "cards": [_card_document(each, made.measured) for each in made.on_cards],
    }


def _card_document(found: OnCard, measured: dict[Task, dict[str, Any]]) -> dict[str, Any]:
    card = found.card
    return {
        "gpu": card.name,
        "memory_gib": card.memory_gib,
        "usable_gib": round(card.usable / GIB, 3),
        "tflops": card.tflops,
        "gigabytes_per_second": card.gigabytes_per_second,
        "efficiency": card.efficiency,
        "efficiency_source": card.efficiency_source,
        "fits": not found.misfits,
        "seconds": found.seconds,
        "stages": [_stage_document(each, card, measured.get(each.task)) for each in found.stages],
        "largest_that_fit": found.knobs,
        "misfits": [
            {
                "name": each.task.stage,
                "method": each.task.method,
                "message": each.sentence(card),
                "changes": each.changes,
            }
            for each in found.misfits
        ],
    }


def _stage_document(found: Estimate, card: Card, measured: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "name": found.task.stage,
        "method": found.task.method,
        "peak_bytes": found.peak,
        "peak_gib": round(found.peak / GIB, 3),
        "parts": found.parts,
        "fits": fit.fits(found, card),
        "disk_bytes": found.disk,
        "scratch_bytes": found.scratch,
        "tokens": found.tokens,
        "answers_at_once": found.at_once,
        "seconds": found.seconds,
        "measured": measured,
    }
