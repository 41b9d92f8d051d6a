"""The student of a recipe: made from a configuration, or from a teacher that is cut down."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgestill.profiles.words import Count, OpenFraction, Positive, Words


class NarrowSpec(Words):
    """Widths that the student keeps of its teacher, the most important channels by activation; None keeps all."""

    intermediate_size: Count | None = None
    """Neurons of each MLP."""
    key_value_heads: Count | None = None
    """Key/value heads, each with its group of query heads."""
    hidden_size: Count | None = None
    """Channels of the residual stream, the same in every layer."""

    @model_validator(mode="after")
    def _something(self) -> NarrowSpec:
        if self.intermediate_size is None and self.key_value_heads is None and self.hidden_size is None:
            raise ValueError("narrow names no width; give intermediate_size, key_value_heads or hidden_size")
        return self


class LowRankSpec(Words):
    """Linear layers as products of two thin ones, each then fitted to its own layer's output (Lillama, arXiv 2412.16719)."""

    rank_fraction: OpenFraction = 0.5
    """Rank over the smaller of the two widths."""
    steps: Annotated[int, Field(ge=0)] = 200
    """Steps of local feature distillation; 0 leaves the decomposition as it is."""
    learning_rate: Positive = 1e-3


class StudentSpec(Words):
    """The student. `init: config` builds `config` from scratch; `init: teacher:NAME` cuts that teacher down."""

    init: str = Field(pattern=r"^(config|teacher:.+)$")
    config: dict[str, Any] | None = None
    """Fields of the Hugging Face config, `model_type` among them; the vocabulary is the teachers'."""
    layers: Count | None = None
    """How many layers to keep of the teacher."""
    choose: Literal["uniform", "block_influence", "iterative"] = "uniform"
    """Which: evenly spaced with the first and the last; those that change their input most (ShortGPT, arXiv 2403.03853); or
    by removing, one after the other, the one that is missed least (arXiv 2511.05085)."""
    keep_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Exactly these layers of the teacher, counted from 0, ascending."""
    narrow: NarrowSpec | None = None
    low_rank: LowRankSpec | None = None
    calibration_tokens: Count = 32_768
    """Training tokens on which importance is measured."""

    @property
    def measures(self) -> bool:
        """Whether importance is measured on text before anything is cut."""
        return self.choose != "uniform" or self.narrow is not None or self.low_rank is not None

    @model_validator(mode="after")
    def _one_way(self) -> StudentSpec:
        if self.init == "config":
            if self.config is None or "model_type" not in self.config:
                raise ValueError("init: config needs `config:` with at least model_type")
            if self.layers is not None or self.keep_layers is not None:
                raise ValueError("layers and keep_layers belong to init: teacher:NAME; remove them")
            if self.narrow is not None or self.low_rank is not None:
                raise ValueError("narrow and low_rank belong to init: teacher:NAME; remove them")
        else:
            self._cuts_fit()
        return self

    def _cuts_fit(self) -> None:
        if self.config is not None:
            raise ValueError("config belongs to init: config; remove it")
        if self.layers is not None and self.keep_layers is not None:
            raise ValueError("init: teacher:NAME takes either layers or keep_layers, not both")
        if self.layers is None and self.keep_layers is None and self.narrow is None and self.low_rank is None:
            raise ValueError("init: teacher:NAME needs layers, keep_layers, narrow or low_rank")
        if self.keep_layers is not None and sorted(set(self.keep_layers)) != self.keep_layers:
            raise ValueError(f"keep_layers {self.keep_layers} must be ascending without repeats")
