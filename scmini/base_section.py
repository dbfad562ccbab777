"""The section `base` of the configuration: the models that the demo trains on the spot."""

from typing import Literal

from pydantic import Field, model_validator

from scmini.sections import Section, machine


class RewardModelTraining(Section):
    """A small sequence-classification reward model, trained on the data set's own preferences."""

    num_train_epochs: float = Field(2.0, gt=0)
    learning_rate: float = Field(1e-3, gt=0)
    pairs_per_step: int = Field(16, ge=1)


class BaseConfig(Section):
    """What a download would bring, made on the spot: tokenizer, a small Llama, a reward model.

    Used when `model.model_name_or_path` is empty.
    """

    vocab_size: int = Field(1024, ge=300)
    hidden_size: int = Field(128, ge=16)
    intermediate_size: int = Field(384, ge=16)
    num_hidden_layers: int = Field(3, ge=1)
    num_attention_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(4, ge=1)
    initializer_range: float = Field(0.06, gt=0)
    learning_rate: float = Field(3e-3, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    dialogues_per_step: int = Field(32, ge=1)
    loss_on: Literal["answers", "all"] = "answers"
    """Train on the assistant's turns alone, or on every token."""
    reward_model: RewardModelTraining = RewardModelTraining()
    tokens_per_microbatch: int = machine(4096, ge=1)
    save_steps: int = machine(250, ge=1)
    logging_steps: int = machine(10, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> "BaseConfig":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("num_attention_heads must divide hidden_size")
        if (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError("hidden_size / num_attention_heads must be even (rotary embeddings)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_key_value_heads must divide num_attention_heads")
        return self
