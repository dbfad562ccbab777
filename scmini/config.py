"""The configuration: one YAML file, one section per stage, every mistake reported at once."""

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from scmini.quoting import quoted
from scmini.sections import (
    BaseConfig,
    BenchmarkConfig,
    DataConfig,
    DPOConfig,
    EmbedConfig,
    FilterConfig,
    GenerateConfig,
    JudgeConfig,
    ModelConfig,
    ReferenceConfig,
    ReportConfig,
    RewardConfig,
    SampleConfig,
    Section,
    SFTConfig,
    SFTContinuedConfig,
)

METHOD = re.compile(
    r"sft|sft-continued|sft-temperature-(?:\d+(?:\.\d+)?)|dpo|spin(?:-(?P<iterations>[2-9]|[1-9]\d))?"
    r"|self-contrast-(?P<k>[1-9]\d*)(?:-unfiltered)?"
)
METHODS_HELP = (
    "sft, sft-continued, sft-temperature-T, dpo, spin (one iteration), spin-N (N of them), "
    "self-contrast-K or self-contrast-K-unfiltered"
)


class Config(Section):
    """The whole file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}$")] = "run"
    seed: int = Field(0, ge=0, lt=2**31)
    methods: list[str] = Field(["sft", "self-contrast-1"])
    model: ModelConfig = ModelConfig()
    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
    sft: SFTConfig = SFTConfig()
    sft_continued: SFTContinuedConfig = SFTContinuedConfig()
    sample: SampleConfig = SampleConfig()
    embed: EmbedConfig = EmbedConfig()
    filter: FilterConfig = FilterConfig()
    reference: ReferenceConfig = ReferenceConfig()
    dpo: DPOConfig = DPOConfig()
    generate: GenerateConfig = GenerateConfig()
    reward: RewardConfig = RewardConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    judge: JudgeConfig = JudgeConfig()
    report: ReportConfig = ReportConfig()

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: list[str]) -> list[str]:
        if not methods:
            raise ValueError("name at least one method")
        for method in methods:
            if not METHOD.fullmatch(method):
                raise ValueError(f"unknown method {quoted(method)}; a method is {METHODS_HELP}")
        if len(set(methods)) < len(methods):
            raise ValueError("a method is named twice")
        return methods

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "Config":
        for method in self.methods:
            k = num_negatives(method)
            if k is not None and k > self.sample.n:
                raise ValueError(
                    f"methods: {method} needs sample.n of at least {k}, got {self.sample.n}"
                )
        if self.sample.engine == "data" and self.data.format != "self-contrast":
            raise ValueError("sample.engine: data needs data.format: self-contrast")
        later = [method for method in self.methods if spin_iterations(method) > 1]
        if later and self.sample.engine == "data":
            raise ValueError(
                f"methods: {later[0]} draws new answers, which sample.engine: data cannot"
            )
        if self.reward.grader == "program" and self.data.format != "zoo":
            raise ValueError(f"reward.grader: program cannot grade data.format: {self.data.format}")
        if self.grader == "program" and self.reward.model_name_or_path:
            raise ValueError(
                "reward.model_name_or_path has no effect with the demo's program as grader"
            )
        if (
            self.grader == "model"
            and self.model.model_name_or_path
            and not self.reward.model_name_or_path
        ):
            raise ValueError(
                "reward.model_name_or_path is needed to grade with a model "
                "(reward.grader: none leaves the grading out)"
            )
        return self

    @model_validator(mode="after")
    def _judge_has_work(self) -> "Config":
        tasks = self.benchmark.tasks
        if self.judge.model and not {"mt-bench", "alpaca-eval"} & set(tasks):
            raise ValueError(
                "judge.model has no effect without mt-bench or alpaca-eval among benchmark.tasks"
            )
        if self.judge.alpaca_eval_annotator and "alpaca-eval" not in tasks:
            raise ValueError(
                "judge.alpaca_eval_annotator has no effect without alpaca-eval in benchmark.tasks"
            )
        if self.judge_compares and self.judge.baseline not in self.methods:
            raise ValueError(f"judge.baseline: {self.judge.baseline} is not among the methods")
        if self.judge_compares and self.judge.baseline.startswith("sft-temperature-"):
            raise ValueError("judge.baseline: a temperature is not benchmarked; name sft")
        return self

    @property
    def judged(self) -> bool:
        """Whether there are answers to benchmarks that somebody judges."""
        named = self.judge.model is not None, self.judge.alpaca_eval_annotator is not None
        benchmarks = set(self.benchmark.tasks)
        return (named[0] and bool({"mt-bench", "alpaca-eval"} & benchmarks)) or (
            named[1] and "alpaca-eval" in benchmarks
        )

    @property
    def judge_compares(self) -> bool:
        """Whether a judge reads the answers of `judge.baseline` beside those of a method."""
        judge, benchmarks = self.judge, self.benchmark.tasks
        by_pair = judge.model and "mt-bench" in benchmarks and judge.mt_bench_mode == "pairwise"
        own_reference = "alpaca-eval" in benchmarks and judge.alpaca_eval_reference is None
        return self.judged and bool(by_pair or own_reference)

    def to_show(self) -> "Config":
        """For what others read: without the query of `judge.base_url`, which may hold a key."""
        address, _, query = self.judge.base_url.partition("?")
        if not query:
            return self
        judge = self.judge.model_copy(update={"base_url": address})
        return self.model_copy(update={"judge": judge})

    @property
    def grader(self) -> Literal["program", "model", "none"]:
        """Who grades: `reward.grader` with `auto` resolved."""
        if self.reward.grader != "auto":
            return self.reward.grader
        return "program" if self.data.format == "zoo" else "model"


def num_negatives(method: str) -> int | None:
    """k of a method that trains on the model's own answers; None for the others."""
    if spin_iterations(method):
        return 1
    found = METHOD.fullmatch(method)
    return int(found["k"]) if found and found["k"] else None


def spin_iterations(method: str) -> int:
    """N of `spin-N`, 1 of `spin`, 0 of the other methods."""
    if method == "spin":
        return 1
    found = METHOD.fullmatch(method)
    return int(found["iterations"]) if found and found["iterations"] else 0


def is_trained_by_dpo(method: str) -> bool:
    """Whether the method has a policy of its own, trained on pairs."""
    return method == "dpo" or num_negatives(method) is not None


def methods_with_pairs(config: Config, round_of: str | None = None) -> list[str]:
    """Methods for which the stage `filter` makes pairs: all that start from the SFT model.

    With `spin` where a later iteration builds on it. `round_of`: a later round of SPIN has its own.
    """
    if round_of is not None:
        return [round_of]
    found = [m for m in config.methods if is_trained_by_dpo(m) and spin_iterations(m) < 2]
    if later_rounds(config) and "spin" not in found:
        found.append("spin")
    return found


def later_rounds(config: Config) -> list[str]:
    """The iterations of SPIN after the first that some method needs: spin-2, spin-3, ..."""
    most = max(map(spin_iterations, config.methods))
    return [f"spin-{number}" for number in range(2, most + 1)]
