"""The words of a recipe and of a device profile, strict: unknown keys, wrong types and impossible numbers are errors.

Units stand in the key names. Every field says what it means and which way it moves things; the defaults here are the
only place a default is written (the CLI and the documentation read them). `load.py` turns YAML into these and reports
every error at once with file and line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from edgestill.profiles.nearest import nearest
from edgestill.runtime.metrics import METRICS, metric

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class Words(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


# ---------------------------------------------------------------------------------------------------------- recipe


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

    @model_validator(mode="after")
    def _remote_code_needs_revision(self) -> TeacherSpec:
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code runs foreign code: name the revision that you read")
        return self


class FusionSpec(Words):
    """How the teachers' output distributions become one target per token (arXiv 2507.15198)."""

    weights: Literal["uniform", "static", "entropy"] = "entropy"
    granularity: Literal["token", "sequence"] = "sequence"
    """Where the entropy is averaged before it becomes a weight. Per token a wrong but sure teacher wins too often."""
    entropy_temperature: Positive = 0.02
    """tau in softmax(-H / (tau log V)); smaller is sharper."""
    floor: Fraction = 0.01
    """w <- (1 - floor) w + floor / K keeps every teacher alive."""
    mix: Literal["arithmetic", "geometric"] = "arithmetic"
    """arithmetic: sum of w p (any sure teacher contributes); geometric: normalised product of p^w (a veto counts)."""
    calibrate: bool = True
    """Fit one temperature per teacher on validation text before entropies are compared."""


class OutputLossSpec(Words):
    """Matching the student's output distribution with the fused target."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    temperature: Positive = 1.0
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """JSD(beta): m = beta p + (1 - beta) q. Only read when divergence is jsd."""
    weight: NotNegative = 1.0
    """0 trains without teachers' outputs (with cross_entropy: 1 that is the plain baseline)."""


class FeatureLossSpec(Words):
    """Multi-layer feature alignment (arXiv 2412.19449). Projections never enter the student's checkpoint."""

    ratio: Positive = 0.2
    """The feature loss is scaled to this share of the output loss (a running, detached balance)."""
    layers: Literal["uniform", "last", "first_last"] | list[tuple[int, int]] = "uniform"
    """Student layer <- teacher layer, counted from 0; a list gives [student, teacher] pairs for every teacher."""
    projection: Literal["none", "linear"] = "linear"
    """linear: student width -> teacher width, trained along. none: only for equal widths."""
    loss: Literal["mse", "cosine"] = "mse"
    """mse: squared error over the teacher's mean square (scale-free)."""
    skip_first_tokens: Annotated[int, Field(ge=0)] = 1
    """Attention-sink tokens at the start of a window carry massive activations that would dominate the error."""


class LossesSpec(Words):
    output: OutputLossSpec = OutputLossSpec()
    cross_entropy: NotNegative = 0.2
    """Weight of the loss on the true next token."""
    features: FeatureLossSpec | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossesSpec:
        if self.output.weight == 0 and self.cross_entropy == 0:
            raise ValueError("output.weight and cross_entropy are both 0: nothing would be learnt; raise one")
        return self


class StudentSpec(Words):
    """The student. `init: config` builds `config` from scratch; `init: teacher:NAME` keeps layers of that teacher."""

    init: str = Field(pattern=r"^(config|teacher:.+)$")
    config: dict[str, Any] | None = None
    """Fields of the Hugging Face config, `model_type` among them; the vocabulary is the teachers'."""
    layers: Count | None = None
    """How many layers to keep of the teacher, evenly spaced with the first and the last."""
    keep_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Exactly these layers of the teacher, counted from 0, ascending."""

    @model_validator(mode="after")
    def _one_way(self) -> StudentSpec:
        if self.init == "config":
            if self.config is None or "model_type" not in self.config:
                raise ValueError("init: config needs `config:` with at least model_type")
            if self.layers is not None or self.keep_layers is not None:
                raise ValueError("layers and keep_layers belong to init: teacher:NAME; remove them")
        else:
            if self.config is not None:
                raise ValueError("config belongs to init: config; remove it")
            if (self.layers is None) == (self.keep_layers is None):
                raise ValueError("init: teacher:NAME needs either layers or keep_layers")
            if self.keep_layers is not None and sorted(set(self.keep_layers)) != self.keep_layers:
                raise ValueError(f"keep_layers {self.keep_layers} must be ascending without repeats")
        return self


class SourceSpec(Words):
    """One source of text: a local path (text, .jsonl, .parquet; a folder means all such files) or a Hub data set."""

    path: str | None = None
    hub: str | None = None
    revision: str | None = None
    subset: str | None = None
    split: str = "train"
    domain: Name = "text"
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


class TrainSpec(Words):
    tokens: Count
    """Tokens the student sees; steps = tokens / (batch_size x sequence_length x gradient_accumulation), rounded up."""
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Positive = 1e-3
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Fraction = 0.05
    weight_decay: NotNegative = 0.01
    max_grad_norm: Positive = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the processor multiplies it natively (weights and optimizer stay float32)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every_steps: Count = 100
    teacher_cache: Literal["auto", "always", "never"] = "auto"
    """auto: when tokens repeat often enough to pay, or the teachers do not fit in memory together."""
    cache_top_k: Annotated[int, Field(ge=1, le=1024)] = 64


class ReferenceSpec(Words):
    tokens: Count = 16384
    """Held-out tokens that travel with the bundle, spread evenly over the domains."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 32


LIMITS = tuple(name for name, m in METRICS.items() if m.source == "recipe")
BUDGETS = tuple(name for name, m in METRICS.items() if m.source == "profile")


def _metric_of(source: Literal["recipe", "profile"], known: tuple[str, ...]) -> AfterValidator:
    """A check that a key names a metric which `source` may limit; the error says where a misplaced one belongs."""

    def check(name: str) -> str:
        found = metric(name)
        if found is None:
            raise ValueError(f"unknown metric; {nearest(name, known)}")
        if found.source == "fixed":
            raise ValueError("is set by the build itself; remove it")
        if found.source != source:
            home = "the budget of a profile" if found.source == "profile" else "the limits of a recipe"
            raise ValueError(f"belongs in {home}; move it there")
        return name

    return AfterValidator(check)


LimitName = Annotated[str, _metric_of("recipe", LIMITS)]
BudgetName = Annotated[str, _metric_of("profile", BUDGETS)]


class LimitsFile(Words):
    """Quality limits alone, for `edgestill export --limits FILE`."""

    format: Literal[1]
    limits: dict[LimitName, Positive]


class Recipe(Words):
    """Which teachers, which text, which student, which losses, quality limits."""

    format: Literal[1]
    teachers: Annotated[list[TeacherSpec], Field(min_length=1)]
    fusion: FusionSpec = FusionSpec()
    student: StudentSpec
    losses: LossesSpec = LossesSpec()
    data: DataSpec
    train: TrainSpec
    reference: ReferenceSpec = ReferenceSpec()
    limits: dict[LimitName, Positive] = {}
    """Metric -> limit on its one-sided 95 % bound; `perplexity/<domain>` is allowed."""

    @model_validator(mode="after")
    def _names_fit(self) -> Recipe:
        names = [t.name for t in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teacher names {names} repeat; each must be its own")
        if self.student.init != "config" and self.student.init.removeprefix("teacher:") not in names:
            raise ValueError(f"student.init {self.student.init!r} names no teacher; there are {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _features_need_teachers(self) -> Recipe:
        if self.losses.features is not None and self.train.teacher_cache == "always":
            raise ValueError(
                "losses.features needs the teachers during training, which train.teacher_cache: always replaces; remove one"
            )
        return self


# --------------------------------------------------------------------------------------------------------- profile


class DeviceSpec(Words):
    arch: Literal["x86_64", "aarch64"]
    engine: Literal["onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
    threads: Count = 2
    memory_mib: Count
    """Memory a process may use; device memory for a GPU engine, the one pool where memory is unified."""
    unified_memory: bool = False
    memory_bandwidth_gb_per_s: Positive
    """Read bandwidth (1 GB = 1e9 bytes) of the memory the weights lie in."""
    last_level_cache_mib: NotNegative = 0
    """Weights that fit here are not bounded by the memory's bandwidth."""
    gpu: str | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d{1,2}\.\d$")

    @model_validator(mode="after")
    def _gpu_facts(self) -> DeviceSpec:
        needs = self.engine != "onnxruntime-cpu"
        if needs and self.compute_capability is None:
            raise ValueError(f"engine {self.engine} needs compute_capability (8.9 for an RTX 4090)")
        return self


class WorkloadSpec(Words):
    prompt_tokens: Count = 128
    new_tokens: Annotated[int, Field(ge=2)] = 64
    batch_size: Count = 1


class PrecisionSpec(Words):
    weights: Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8"] = "int4"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share one scale (int8 repeats its one scale per output for each block)."""
    accuracy_level: Literal[0, 4] = 4
    """4: activations are quantized to int8 inside the int4 product (fast); 0: float32 arithmetic."""
    symmetric: bool = True


class Profile(Words):
    """One device, its workload, its resource budgets, and the precision and engine to build for it."""

    format: Literal[1]
    device: DeviceSpec
    workload: WorkloadSpec = WorkloadSpec()
    precision: PrecisionSpec = PrecisionSpec()
    portable: bool = False
    """Also ship plain ONNX operators under portable/, for other runtimes."""
    budget: dict[BudgetName, Positive] = {}
    """Metric -> limit on its one-sided 95 % bound."""
