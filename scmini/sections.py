"""The sections of the configuration file, one per stage, with their checks.

Names are those of transformers, TRL and PEFT where these have one. Fields marked `machine()` decide
how the work is cut up on this machine, never what comes out of it: they do not enter a recipe, so
changing one re-runs nothing.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

ZOO_MOST = {"num_train": 200_000, "num_test": 30_000}
"""Different prompts of the demo's world that can be drawn without long search."""


def machine(default: Any, **kwargs: Any) -> Any:
    """A field that does not enter recipes (see the module docstring)."""
    return Field(default, json_schema_extra={"machine": True}, **kwargs)


class Section(BaseModel):
    """One section of the file. Frozen; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelConfig(Section):
    """The model that is aligned. Without a name the stage `base` trains a small one on the spot."""

    model_name_or_path: str | None = None
    """A local folder or a name on the Hugging Face hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    load_in_4bit: bool = True
    """Frozen weights in NF4 with double quantisation (QLoRA)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the computation; adapters are always float32."""
    max_length: int = Field(2048, ge=8)
    """Longest prompt with response, in tokens."""
    attn_implementation: Literal["tree", "flash_attention_2"] = machine("tree")
    """`flash_attention_2`: rows that share nothing (SFT) go through flash-attn (extra `flash`)."""
    use_liger_kernel: bool = machine(False)
    """Liger's RMSNorm, RoPE and SwiGLU in training and scoring (extra `liger`, CUDA)."""

    @model_validator(mode="after")
    def _revision_needs_name(self) -> "ModelConfig":
        if self.revision is not None and self.model_name_or_path is None:
            raise ValueError("revision has no effect without model_name_or_path")
        return self

    @model_validator(mode="after")
    def _flash_needs_16_bits(self) -> "ModelConfig":
        if self.attn_implementation == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attn_implementation: flash_attention_2 needs dtype bfloat16, float16")
        return self


class ColumnsConfig(Section):
    """Which column of the data stands for what, where it has another name than `auto` knows."""

    id: str | None = None
    prompt: str | None = None
    """Text (of the user, or a transcript) or messages."""
    input: str | None = None
    """Text below the prompt."""
    system: str | None = None
    history: str | None = None
    """Earlier turns, [user, assistant] each."""
    messages: str | None = None
    """A whole conversation; its last answer is the target."""
    target: str | None = None
    rejected: str | None = None


class DataConfig(Section):
    """Where prompts and targets come from: files (`path`) or a data set (`dataset_name`)."""

    format: Literal["zoo", "auto", "jsonl", "hh-rlhf", "nectar", "ultrachat", "self-contrast"] = (
        "zoo"
    )
    """`zoo`: the embedded demo; `auto`: the usual shapes, told apart by their columns; `jsonl`:
    rows of data/train.jsonl; `hh-rlhf`, `nectar`, `ultrachat`: these data sets as published;
    `self-contrast`: response or pair files of the original project. See docs/data.md."""
    path: str | list[str] | None = None
    """Files (.jsonl, .json, each also .gz, .parquet) or folders of them; none for `zoo`."""
    dataset_name: str | None = None
    """A data set on the Hugging Face hub, or a local copy of its folder; read as a stream."""
    dataset_config: str | None = None
    """Its configuration; with `hh-rlhf` one of the four subsets, all of them when empty."""
    dataset_split: str | None = None
    """Empty: `train`, with `ultrachat` `train_sft`."""
    dataset_test_split: str | None = None
    """Split of the test prompts; empty: they are held out from `dataset_split`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of columns, with `auto`: {prompt: question, target: answer}."""
    num_pretraining: int = Field(24000, ge=0)
    """Most dialogues that the stage `base` reads."""
    num_train: int | None = Field(None, ge=1)
    """Most training prompts to take; all when empty."""
    num_test: int = Field(500, ge=1)
    """Held-out prompts on which the methods are judged."""
    test_prompts: Literal["any", "first-turn"] = "any"
    """`first-turn`: first questions with their first answers, as the original tests."""
    max_prompt_chars: int | None = Field(None, ge=1)
    """Drop (and count) rows whose prompt is longer."""
    max_target_chars: int | None = Field(None, ge=1)
    """Drop (and count) rows whose target is longer."""

    @model_validator(mode="after")
    def _source_fits_format(self) -> "DataConfig":
        given = {key for key in (*_OF_DATASET, "path", "dataset_name") if getattr(self, key)}
        named = any(value is not None for value in self.columns.model_dump().values())
        if named and self.format != "auto":
            raise ValueError(f"columns has no effect with format: {self.format}")
        if self.format == "zoo":
            for key in ("path", "dataset_name", *_OF_DATASET):
                if key in given:
                    raise ValueError(f"{key} has no effect with format: zoo")
            if self.test_prompts != "any":
                raise ValueError("test_prompts has no effect with format: zoo")
            return self
        if "dataset_name" in given and ("path" in given or self.format in _FILES_ONLY):
            other = "path" if "path" in given else f"format: {self.format}"
            raise ValueError(f"dataset_name has no effect with {other}")
        for key in _OF_DATASET:
            if key in given and "dataset_name" not in given:
                raise ValueError(f"{key} has no effect without dataset_name")
        if not given:
            other = "" if self.format in _FILES_ONLY else ", or dataset_name"
            raise ValueError(f"format: {self.format} needs path, the file to read{other}")
        return self

    @model_validator(mode="after")
    def _zoo_has_enough(self) -> "DataConfig":
        if self.format == "zoo":
            for key, most in ZOO_MOST.items():
                if (getattr(self, key) or 0) > most:
                    raise ValueError(f"{key}: the zoo has no more than {most:,} different prompts")
        return self


_OF_DATASET = ("dataset_config", "dataset_split", "dataset_test_split", "revision")
_FILES_ONLY = ("jsonl", "self-contrast")


class TrainingConfig(Section):
    """What every training shares. One optimizer step is `prompts_per_step` prompts, however cut."""

    learning_rate: float = Field(2e-4, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    num_prompts: int | None = Field(None, ge=1)
    """Train on the first so many prompts only; all when empty."""
    prompts_per_step: int = Field(128, ge=1)
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw_torch"
    )
    tokens_per_microbatch: int = machine(8192, ge=1)
    """The one memory knob: tokens of a packed row. Never changes the result beyond rounding."""
    gradient_checkpointing: bool = machine(True)
    save_steps: int = machine(50, ge=1)
    logging_steps: int = machine(1, ge=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = machine("none")


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning of a fresh LoRA adapter on the targets."""

    lora_r: int = Field(64, ge=1)
    lora_alpha: int = Field(64, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: str | list[str] = "all-linear"
    loss_on: Literal["last", "all"] = "last"
    """Loss on the last assistant turn (as the original) or on every assistant turn."""


class SFTContinuedConfig(TrainingConfig):
    """The control `sft-continued`: the same steps spent on more SFT, from the SFT adapter."""

    loss_on: Literal["last", "all"] = "last"


class DPOConfig(TrainingConfig):
    """DPO with one chosen and k rejected responses, from a copy of the SFT adapter."""

    learning_rate: float = Field(5e-6, gt=0)
    beta: float = Field(0.1, gt=0)
    loss_type: Literal["sigmoid", "ipo", "hinge", "softmax"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    rpo_alpha: float = Field(0.0, ge=0)
    """Weight of an SFT term (mean negative log-likelihood per token) on the chosen response."""

    @model_validator(mode="after")
    def _smoothing_fits_loss(self) -> "DPOConfig":
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing has no effect with loss_type: {self.loss_type}")
        return self


VLLM_KEYS = (
    *("python", "weights", "quantization", "kv_cache_dtype", "gpu_memory_utilization"),
    *("max_num_seqs", "enforce_eager", "tensor_parallel_size", "data_parallel_size"),
)
"""Keys that only the vLLM engine reads."""


class DecodingConfig(Section):
    """How answers are drawn, and by which engine."""

    temperature: float = Field(1.0, ge=0)
    """0 takes the most likely token."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    engine: str = "auto"
    """`vllm`, `transformers`, or `auto`: vLLM where there are a CUDA device and vLLM."""
    batch_size: int = machine(256, ge=1)
    """Sequences decoded at once (transformers)."""
    python: str | None = machine(None)
    """Interpreter of an environment that has vLLM; empty: this one (vLLM, as all keys below)."""
    weights: Literal["adapter", "merged"] = "adapter"
    """Serve the adapter beside the base weights, or merge it into a 16-bit checkpoint first."""
    quantization: Literal["fp8", "bitsandbytes"] | None = None
    """Of the served base weights; empty: none, in `model.dtype`."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    gpu_memory_utilization: float | None = machine(None, gt=0, le=1)
    """Share of the GPU's memory; empty: what is really free, less a margin."""
    max_num_seqs: int = machine(256, ge=1)
    """Sequences decoded at once (vLLM)."""
    enforce_eager: bool = machine(False)
    """No CUDA graphs: slower, less memory."""
    tensor_parallel_size: int = machine(1, ge=1)
    data_parallel_size: int = machine(1, ge=1)

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in (known := cls.engines()):
            raise ValueError(f"unknown engine {value!r}; it is one of {', '.join(known)}")
        return value

    @classmethod
    def engines(cls) -> tuple[str, ...]:
        """Values of `engine`."""
        return ("auto", "vllm", "transformers")

    @model_validator(mode="after")
    def _keys_fit_engine(self) -> "DecodingConfig":
        unread = {"transformers": VLLM_KEYS, "vllm": ("batch_size",)}.get(self.engine, ())
        for key in unread:
            if key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with engine: {self.engine}")
        if self.weights == "merged" and self.quantization == "bitsandbytes":
            raise ValueError("quantization: bitsandbytes would round merged weights to 4 bits")
        return self


class SampleConfig(DecodingConfig):
    """n answers of the SFT model to every training prompt."""

    n: int = Field(32, ge=1)
    num_prompts: int | None = Field(None, ge=1)
    """Sample for the first so many training prompts only; all when empty."""
    shard_size: int = machine(64, ge=1)
    """Prompts per file."""
    max_failed_share: float = machine(0.01, ge=0, le=1)
    """Stop when more than this share of the prompts could not be answered."""

    @classmethod
    def engines(cls) -> tuple[str, ...]:
        """Values of `engine`; `data`: the answers that came with the data set are taken."""
        return (*super().engines(), "data")

    @field_validator("temperature")
    @classmethod
    def _greedy_repeats(cls, value: float) -> float:
        if value == 0:
            raise ValueError(
                "n answers at temperature 0 are all the same; use a temperature above 0"
            )
        return value


class EmbedConfig(Section):
    """Vectors of targets and responses."""

    encoder: str = "hashed-ngrams"
    """`hashed-ngrams` (no download) or a sentence-transformers model: folder or hub name."""
    dimensions: int = Field(4096, ge=16)
    """Of `hashed-ngrams` only; other encoders have their own."""
    pooling: Literal["cls", "mean"] | None = None
    """How token vectors become one; empty: as the model's own files say."""
    max_length: int = Field(512, ge=8)
    """Tokens an encoder reads of a text; what is cut off is counted."""
    long_texts: Literal["truncate", "mean"] = "truncate"
    """`mean`: a longer text is read in pieces, whose vectors are averaged by their tokens."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the encoder's weights; `auto`: 16 bits on a GPU, float32 on the CPU."""
    tokens_per_batch: int = machine(16384, ge=1)
    """Tokens encoded at once, padding included (on a CPU at most 2,048: more is slower)."""

    @model_validator(mode="after")
    def _fits_encoder(self) -> "EmbedConfig":
        if self.encoder.startswith("hashed") and self.encoder != "hashed-ngrams":
            raise ValueError(f"unknown encoder {self.encoder!r}; did you mean hashed-ngrams?")
        unread = {"dimensions"}
        if self.encoder == "hashed-ngrams":
            unread = {"pooling", "max_length", "long_texts", "dtype", "tokens_per_batch"}
        for key in sorted(unread & self.model_fields_set):
            raise ValueError(f"{key} has no effect with encoder: {self.encoder}")
        return self


class FilterConfig(Section):
    """Which responses become negatives (DESIGN 5.6)."""

    mode: Annotated[
        str, StringConstraints(pattern=r"^(default|all|alldedup|last-\d+|lastdedup-\d+)$")
    ] = "default"
    keep_fraction: float = Field(0.75, gt=0, le=1)
    """Of the unique responses, the share of least similar ones that stays."""
    min_similarity: float | None = Field(None, ge=-1, le=1)
    """Drop responses less similar to the target: they may have missed the question."""
    max_similarity: float | None = Field(None, ge=-1, le=1)
    """Drop responses more similar to the target."""
    near_duplicate_similarity: float | None = Field(None, gt=0, le=1)
    """Of responses at least so similar to one another, the first stays."""
    min_length_ratio: float | None = Field(None, gt=0)
    """Drop responses with fewer characters than this times the target's."""
    max_length_ratio: float | None = Field(None, gt=0)
    """Drop responses with more characters than this times the target's."""
    allow_fewer: bool = False
    """Keep a prompt with fewer than k candidates, with those it has; else drop and count it."""
    common_subset: bool = False
    """Every k trains on the same prompts: those with enough candidates for the largest k."""

    @model_validator(mode="after")
    def _options_have_effect(self) -> "FilterConfig":
        own = ("keep_fraction", "near_duplicate_similarity", *_LIMITS)
        for key in own:
            if self.mode != "default" and key in self.model_fields_set:
                raise ValueError(f"{key} has no effect with mode: {self.mode}")
        for low, high in (_LIMITS[:2], _LIMITS[2:]):
            bounds = getattr(self, low), getattr(self, high)
            if None not in bounds and bounds[0] >= bounds[1]:
                raise ValueError(f"{low} must be below {high}")
        if self.allow_fewer and self.common_subset:
            raise ValueError("allow_fewer and common_subset exclude each other")
        return self


_LIMITS = ("min_similarity", "max_similarity", "min_length_ratio", "max_length_ratio")


class ReferenceConfig(Section):
    """Log-probabilities of the reference model (the SFT model), computed once."""

    tokens_per_microbatch: int = machine(8192, ge=1)


class GenerateConfig(DecodingConfig):
    """One answer of every method to each test prompt."""


class RewardConfig(Section):
    """Who grades the answers."""

    grader: Literal["auto", "program", "model"] = "auto"
    """`program`: the demo's own; `model`: a reward model; `auto` takes the one the data has."""
    model_name_or_path: str | None = None
    """Any AutoModelForSequenceClassification with one label; empty: the one that `base` made."""
    tokens_per_microbatch: int = machine(8192, ge=1)


class ReportConfig(Section):
    """Tables, figure and page."""

    bootstrap_samples: int = Field(2000, ge=100)
    """Resamples over prompts behind the 95 % intervals."""


def recipe_section(section: Section) -> dict[str, Any]:
    """The part of a section that can change a result, as plain JSON values."""
    hidden = {
        name
        for name, info in type(section).model_fields.items()
        if isinstance(info.json_schema_extra, dict) and info.json_schema_extra.get("machine")
    }
    return section.model_dump(mode="json", exclude=hidden)
