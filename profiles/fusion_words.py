"""The teachers of a recipe, and how their answers become one target."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from edgestill.profiles.words import Fraction, Name, OpenFraction, Positive, Words


class TeacherSpec(Words):
    """One frozen causal LM. `model`: a Hugging Face folder, or a Hub id (then `revision` is required)."""

    name: Name
    model: str
    revision: str | None = None
    weight: Positive = 1.0
    """Share under `weights: static`; normalised over the teachers."""
    precision: Literal["auto", "float32", "bfloat16", "8bit", "4bit"] = "auto"
    """auto: bfloat16 where the processor multiplies it, float32 elsewhere. 8bit/4bit: bitsandbytes (LLM.int8 / NF4)."""
    trust_remote_code: bool = False
    """Runs code from the model's repository; only with a revision."""
    domains: list[Name] = Field(default_factory=list)
    """Domains of the data that this teacher answers for under `weights: routed`."""

    @model_validator(mode="after")
    def _remote_code_needs_revision(self) -> TeacherSpec:
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code runs foreign code: name the revision that you read")
        return self


class ReinforcedSpec(Words):
    """Teachers selected by a policy that is trained along (RL-KD, arXiv 2012.06048): one Bernoulli choice per sequence and
    teacher, from that teacher's mean entropy and loss on the true tokens; REINFORCE with a moving-average baseline."""

    learning_rate: Positive = 0.05
    baseline_decay: OpenFraction = 0.95
    """Decay of the mean reward that is subtracted."""


class FusionSpec(Words):
    """How the teachers' output distributions become one target per token (arXiv 2507.15198)."""

    weights: Literal["uniform", "static", "entropy", "label", "routed", "reinforced"] = "entropy"
    """entropy: the surer teacher counts more; label: the one that gives the true token more (FuseLLM's AvgCE, MinCE as
    label_temperature goes to 0); routed: by the domain of the data; reinforced: a policy trained along."""
    granularity: Literal["token", "sequence", "ema"] = "sequence"
    """Where entropy (or the label's log-probability) is averaged before it becomes a weight: not at all, over the window, or
    over the tokens so far with decay `ema_decay`. Per token a wrong but sure teacher wins too often."""
    ema_decay: OpenFraction = 0.98
    entropy_temperature: Positive = 0.01
    """tau in softmax(-H / (tau log V)); smaller is sharper."""
    label_temperature: Positive = 0.5
    """tau in softmax(log p(label) / tau), nats."""
    floor: Fraction = 0.01
    """w <- (1 - floor) w + floor / K keeps every teacher alive. Not read by uniform, static and routed weights."""
    mix: Literal["arithmetic", "geometric"] = "arithmetic"
    """arithmetic: sum of w p (any sure teacher contributes); geometric: normalised product of p^w (a veto counts)."""
    calibrate: bool = True
    """Make the entropies of different teachers comparable, by a fit on validation text."""
    calibration: Literal["temperature", "offset"] = "temperature"
    """temperature: the one that suits each teacher alone best, at which its entropy is taken; offset: taken off each teacher's
    normalised entropy, such that the fused target suits the text best. Which serves a set of teachers better is theirs
    (benchmarks/fusion_settings.py measures both); over the study's three seeds it was the temperature."""
    reinforced: ReinforcedSpec = ReinforcedSpec()
    """Read when weights is reinforced."""
