"""What the student learns: output, ranking, features and attention."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgestill.profiles.words import Count, Fraction, NotNegative, OpenFraction, Positive, Words


class TaidSpec(Words):
    """Temporally adaptive interpolation (TAID, arXiv 2501.16937): the target moves from the student to the teachers."""

    start: Fraction = 0.4
    end: Fraction = 1.0
    rate: Positive = 5e-4
    """alpha: how far progress pushes the interpolation beyond its linear schedule, per step."""
    momentum: OpenFraction = 0.99

    @model_validator(mode="after")
    def _forward(self) -> TaidSpec:
        if self.end <= self.start:
            raise ValueError(f"taid.end {self.end} must be above taid.start {self.start}")
        return self


class OutputLossSpec(Words):
    """Matching the student's output distribution with the fused target."""

    divergence: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "adaptive_kl", "tvd", "taid"
    ] = "forward_kl"
    temperature: Positive = 1.0
    beta: OpenFraction = 0.5
    """JSD(beta): m = beta p + (1 - beta) q. Only read when divergence is jsd."""
    skew: OpenFraction = 0.1
    """lambda of the skewed divergences (DistiLLM): the share of the other side that is mixed in."""
    head_mass: OpenFraction = 0.5
    """adaptive_kl: the most likely tokens with this much of the target's mass are its head."""
    taid: TaidSpec = TaidSpec()
    """Read when divergence is taid."""
    weight: NotNegative = 1.0
    """0 trains without teachers' outputs (with cross_entropy: 1 that is the plain baseline)."""
    chunk_mib: Count = 512
    """Memory for the logits, their gradients and the target at a time; smaller chunks are slower, not different."""


class RankingLossSpec(Words):
    """Agreement on the order of the likely tokens, beside the divergence (RLKD, arXiv 2409.12545)."""

    weight: Positive = 0.5
    top_k: Annotated[int, Field(ge=2, le=64)] = 15
    """The student's and the target's k most likely tokens are ranked."""
    sharpness: Positive = 1.0
    """epsilon of the soft rank 1 + sum_j sigmoid((z_j - z_i) / epsilon), nats; smaller is nearer to the true rank."""


class StochasticSpec(Words):
    """Several noisy passes of each teacher; the student keeps those near to it (SSD, arXiv 2504.14307)."""

    passes: Annotated[int, Field(ge=2, le=4)] = 2
    dropout: OpenFraction = 0.1
    """On every block's output, for these passes only."""
    temperature: Positive = 0.1
    """tau in softmax(cosine / tau) over the passes that are kept."""


class PrototypeSpec(Words):
    """Soft assignment to prototypes of the teacher's features is matched too (after ProC-KD, arXiv 2212.13180)."""

    count: Annotated[int, Field(ge=2, le=4096)] = 64
    temperature: Positive = 0.1
    weight: Positive = 1.0
    """Beside the feature distance."""


class FeatureLossSpec(Words):
    """Multi-layer feature alignment (arXiv 2412.19449). Projections never enter the student's checkpoint."""

    ratio: Positive = 0.2
    """The feature loss is scaled to this share of the output loss (a running, detached balance)."""
    layers: Literal["origin", "uniform", "last", "first_last", "every", "cka"] | list[tuple[int, int]] = "uniform"
    """Student layer <- teacher layer, counted from 0. origin: the layer it was copied from; every: each `every`-th student
    layer; cka: the most similar ones, in order; a list gives [student, teacher] pairs for every teacher."""
    every: Count = 2
    """Read when layers is every."""
    projection: Literal["none", "pca", "linear", "low_rank"] = "linear"
    """linear: student width -> teacher width, from a least-squares fit, trained along; low_rank: the same of rank `rank`;
    pca: the teacher's features on their main directions, fixed; none: only for equal widths."""
    rank: Count = 64
    """Read when projection is low_rank."""
    loss: Literal["mse", "cosine", "l1_logcos"] = "mse"
    """mse: squared error over the teacher's mean square (scale-free); l1_logcos: Lillama's (arXiv 2412.16719)."""
    skip_first_tokens: Annotated[int, Field(ge=0)] = 1
    """Attention-sink tokens at the start of a window carry massive activations that would dominate the error."""
    fit_tokens: Count = 50_000
    """Training tokens on which projections and CKA are fitted."""
    stochastic: StochasticSpec | None = None
    prototypes: PrototypeSpec | None = None


class AttentionLossSpec(Words):
    """Attention alignment (arXiv 2412.19449): relations of queries, keys and values (MiniLMv2) or the maps themselves."""

    ratio: Positive = 0.2
    """The attention loss is scaled to this share of the output loss."""
    kind: Literal["relation", "maps"] = "relation"
    """relation: head counts may differ and any attention kernel runs; maps: needs eager attention."""
    relation_heads: Count | None = None
    """Heads that queries, keys and values are split into anew; None: the most that fit all widths, at most 16."""
    layers: Literal["last"] | list[tuple[int, int]] = "last"
    """Student layer <- teacher layer, counted from 0."""
    max_map_tokens: Count = 1024
    """maps: longer windows are refused, their memory grows with the square."""


class LossesSpec(Words):
    output: OutputLossSpec = OutputLossSpec()
    cross_entropy: NotNegative = 0.2
    """Weight of the loss on the true next token."""
    ranking: RankingLossSpec | None = None
    features: FeatureLossSpec | None = None
    attention: AttentionLossSpec | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossesSpec:
        if self.output.weight == 0 and self.cross_entropy == 0:
            raise ValueError("output.weight and cross_entropy are both 0: nothing would be learnt; raise one")
        return self
