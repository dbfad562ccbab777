"""The figures that are drawn from stage folders: training curves, and how similar answers are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure

from scmini.config import Config
from scmini.evaluation.report import figures, run_data, wording
from scmini.evaluation.report.run_data import Inputs

DRIFT = "drift/chosen_per_token"
CURVES = {
    "loss": "loss",
    "rewards/margins": "margin",
    DRIFT: "drift of chosen",
    "kl/rejected": "log-ratio, rejected",
}
"""Metric -> what stands at its axis."""


@dataclass(frozen=True)
class SimilarityPicture:
    """The histogram of the answers to the prompts that a method is trained on."""

    figure: Figure
    method: str
    has_cut: bool


@dataclass(frozen=True)
class Pictures:
    """What is drawn once, for the page and for files of its own."""

    curves: Mapping[str, Figure]
    """By method."""
    similarity: SimilarityPicture | None

    @property
    def has_drift(self) -> bool:
        """Whether some curve tells how far the policy has moved."""
        labels = (axes.get_ylabel() for figure in self.curves.values() for axes in figure.axes)
        return CURVES[DRIFT] in labels

    @property
    def files(self) -> dict[str, Figure]:
        """Figures by file name, without ending."""
        found = {f"training-{method}": figure for method, figure in self.curves.items()}
        if self.similarity is not None:
            found["similarity"] = self.similarity.figure
        return found


def draw(config: Config, inputs: Inputs) -> Pictures:
    """Both kinds, as far as the run has them."""
    return Pictures(training_curves(config, inputs), similarity(config, inputs))


def training_curves(config: Config, inputs: Inputs) -> dict[str, Figure]:
    """Small multiples by method: loss, and of DPO the margin and how far the policy has moved."""
    curves = {}
    for method in config.methods:
        if not method.startswith("sft-temperature-"):
            found = run_data.read_curves(inputs[f"train:{method}"], CURVES)
            curves.update({method: found} if found else {})
    limits: dict[bool, dict[str, tuple[float, float]]] = {True: {}, False: {}}
    for found in curves.values():  # SFT's loss is another quantity than DPO's
        mine = limits["margin" in found]
        for name, points in found.items():
            values = [value for _, value in points] + list(mine.get(name, ()))
            mine[name] = min(values), max(values)
    return {
        method: figures.curve_figure(method, found, limits["margin" in found])
        for method, found in curves.items()
    }


def similarity(config: Config, inputs: Inputs) -> SimilarityPicture | None:
    """Of the self-contrast method with most negatives; None where there is none."""
    ours = wording.by_k(config.methods)
    pairs = run_data.trained_pairs(ours[-1], config, inputs) if ours else ()
    taken = {pair.id: pair.response_index for pair in pairs}
    if not taken:
        return None
    found = run_data.similarities(taken, inputs)
    limits = {key: getattr(config.filter, key) for key in ("min_similarity", "max_similarity")}
    kinds = {
        "taken as negatives": found.taken.tolist(),
        "candidates, not drawn": found.spared.tolist(),
        "dropped": found.dropped.tolist(),
    }
    window = [(key, value) for key, value in limits.items() if value is not None]
    figure = figures.similarity_figure(run_data.BINS.tolist(), kinds, found.cut, window)
    return SimilarityPicture(figure, ours[-1], found.cut is not None)
