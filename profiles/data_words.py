"""The text of a recipe, how the student is trained on it, and what of it travels with the bundle."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgestill.profiles.words import Count, Fraction, Name, NotNegative, OpenFraction, Positive, Words


class SourceSpec(Words):
    """One source of text: a local path (text, .jsonl, .parquet; a folder means all such files) or a Hub data set."""

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    domain: Name = "text"
    domain_column: str | None = None
    """A column that names each row's domain, instead of `domain`."""
    weight: Positive = 1.0
    """Share of the training tokens; normalised over the sources."""
    text_column: str = "text"
    prompt_column: str | None = None
    """With response_column: rendered by the chat template, the loss only on the response."""
    response_column: str | None = None
    separator: str | None = None
    """A line of plain text that ends a document. None: one file is one document."""

    @model_validator(mode="after")
    def _one_place(self) -> SourceSpec:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"hub data set {self.hub!r} needs a revision, so that the build can be repeated")
        if (self.prompt_column is None) != (self.response_column is None):
            raise ValueError("prompt_column and response_column come together")
        return self


class SplitSpec(Words):
    """A part taken from the training sources: this share of each, at its end, cut between documents if it can."""

    fraction: Annotated[float, Field(gt=0, lt=0.5)]


class DataSpec(Words):
    """Three disjoint parts: training; validation (calibration and every choice); held-out (judged once)."""

    sources: Annotated[list[SourceSpec], Field(min_length=1)]
    validation: SplitSpec | list[SourceSpec] = SplitSpec(fraction=0.03)
    held_out: SplitSpec | list[SourceSpec] = SplitSpec(fraction=0.03)
    sequence_length: Annotated[int, Field(ge=8)] = 256


class OnPolicySpec(Words):
    """Batches whose second part the student writes itself, scored by the teachers (GKD, arXiv 2306.13649)."""

    fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the batches."""
    new_tokens: Count = 64
    """Tokens at the end of every window that the student writes; the rest is its prompt."""
    temperature: Positive = 1.0


class TrainSpec(Words):
    tokens: Count
    """Tokens the student sees; steps = tokens / (batch_size x sequence_length x gradient_accumulation), rounded up."""
    batch_size: Count = 8
    """Windows of one micro-step, of all processes together."""
    gradient_accumulation: Count = 1
    learning_rate: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    adam_beta2: OpenFraction = 0.95
    """AdamW's memory of squared gradients (the first beta is 0.9). 0.999 remembers longer than short trainings last."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the processor multiplies it natively (weights and optimizer stay float32)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every_steps: Count = 100
    teacher_cache: Literal["auto", "always", "never"] = "auto"
    """auto: when tokens repeat often enough to pay, or the teachers do not fit in memory together."""
    cache_top_k: Annotated[int, Field(ge=1, le=1024)] = 64
    cache_mode: Literal["top_k", "sampling"] = "top_k"
    """sampling: `cache_samples` draws from the teacher's distribution, an unbiased target (RS-KD, arXiv 2503.16870)."""
    cache_samples: Annotated[int, Field(ge=1, le=1024)] = 64
    on_policy: OnPolicySpec | None = None
    sharding: Literal["none", "full"] = "none"
    """Under torchrun. none: every process keeps the whole student; full: each keeps a share of its weights, gradients and
    optimizer states (FSDP2). Teachers are whole in every process."""


class ReferenceSpec(Words):
    tokens: Count = 16384
    """Held-out tokens that travel with the bundle, spread evenly over the domains."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 32
