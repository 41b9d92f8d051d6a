"""The words of a recipe and of a device profile, strict: unknown keys, wrong types and impossible numbers are errors.

Units stand in the key names. Every field says what it means and which way it moves things; the defaults in the `*_words`
files are the only place a default is written (the CLI and the documentation read them). `load.py` turns YAML into these and
reports every error at once with file and line.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from edgestill.profiles.data_words import DataSpec, OnPolicySpec, ReferenceSpec, SourceSpec, SplitSpec, TrainSpec
from edgestill.profiles.fusion_words import FusionSpec, ReinforcedSpec, TeacherSpec
from edgestill.profiles.loss_words import (
    AttentionLossSpec,
    FeatureLossSpec,
    LossesSpec,
    OutputLossSpec,
    PrototypeSpec,
    RankingLossSpec,
    StochasticSpec,
    TaidSpec,
)
from edgestill.profiles.nearest import nearest
from edgestill.profiles.quantize_words import QuantizeSpec
from edgestill.profiles.student_words import LowRankSpec, NarrowSpec, StudentSpec
from edgestill.profiles.words import Count, NotNegative, Positive, Words
from edgestill.runtime.metrics import METRICS, metric

__all__ = [
    "AttentionLossSpec",
    "DataSpec",
    "DeviceSpec",
    "FeatureLossSpec",
    "FusionSpec",
    "LimitsFile",
    "LossesSpec",
    "LowRankSpec",
    "NarrowSpec",
    "OnPolicySpec",
    "OutputLossSpec",
    "PrecisionSpec",
    "Profile",
    "PrototypeSpec",
    "QuantizeSpec",
    "RankingLossSpec",
    "Recipe",
    "ReferenceSpec",
    "ReinforcedSpec",
    "SourceSpec",
    "SplitSpec",
    "StochasticSpec",
    "StudentSpec",
    "TaidSpec",
    "TeacherSpec",
    "TrainSpec",
    "Words",
    "WorkloadSpec",
]

CPU_ENGINE = "onnxruntime-cpu"
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
    quantize: QuantizeSpec | None = None
    """Train with the weights that ship; None trains in float, and the profile's precision is rounded to afterwards."""
    reference: ReferenceSpec = ReferenceSpec()
    limits: dict[LimitName, Positive] = Field(default_factory=dict)
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
    def _some_losses_need_teachers(self) -> Recipe:
        wants = {
            "losses.features": self.losses.features is not None,
            "losses.attention": self.losses.attention is not None,
            "train.on_policy": self.train.on_policy is not None,
        }
        if self.train.teacher_cache == "always":
            for name, wanted in wants.items():
                if wanted:
                    raise ValueError(
                        f"{name} needs the teachers during training, which train.teacher_cache: always replaces; remove one"
                    )
        return self

    @model_validator(mode="after")
    def _reaches_the_grid(self) -> Recipe:
        if self.quantize is not None:
            train = self.train
            steps = math.ceil(
                train.tokens / (train.batch_size * train.gradient_accumulation * self.data.sequence_length)
            )
            reached = self.quantize.from_step + self.quantize.ramp_steps
            if reached >= steps:
                raise ValueError(
                    f"quantize: weights reach the grid at step {reached} and training ends at step {steps}; lower from_step or "
                    "ramp_steps, or raise train.tokens"
                )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Recipe:
        if self.losses.ranking is not None and self.losses.output.weight == 0:
            raise ValueError("losses.ranking ranks against the fused target; raise losses.output.weight above 0")
        if self.train.on_policy is not None and self.losses.output.weight == 0:
            raise ValueError("train.on_policy is scored by the fused target; raise losses.output.weight above 0")
        if self.train.on_policy is not None and self.fusion.weights == "label":
            raise ValueError(
                "fusion.weights: label trusts teachers by the true tokens, and windows that train.on_policy writes have none; "
                "use weights: entropy"
            )
        if self.quantize is not None and self.quantize.initialize == "gptq" and self.train.sharding == "full":
            raise ValueError(
                "quantize.initialize: gptq needs whole weights on each device; use train.sharding: none or initialize: nearest"
            )
        if self.train.cache_mode == "sampling":
            self._draws_stay_unbiased()
        if self.fusion.weights == "routed":
            unplaced = [t.name for t in self.teachers if not t.domains]
            if unplaced:
                raise ValueError(
                    f"fusion.weights: routed, but teacher {unplaced[0]!r} names no domains; add domains: [...]"
                )
        return self

    def _draws_stay_unbiased(self) -> None:
        """The mean over draws of a loss is the loss of the mean only where the loss is linear in the target."""
        output = self.losses.output
        wrong = {
            f"losses.output.divergence: {output.divergence}": output.divergence != "forward_kl",
            f"losses.output.temperature: {output.temperature}": output.temperature != 1,
            "fusion.mix: geometric": self.fusion.mix == "geometric",
        }
        for words, found in wrong.items():
            if found:
                raise ValueError(
                    f"train.cache_mode: sampling is unbiased for forward_kl at temperature 1 and an arithmetic mix only, not for "
                    f"{words}; use cache_mode: top_k"
                )


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
        if self.on_gpu and self.compute_capability is None:
            raise ValueError(f"engine {self.engine} needs compute_capability (8.9 for an RTX 4090)")
        return self

    @property
    def on_gpu(self) -> bool:
        """Whether its engine runs on a GPU, in 16-bit floats at most precisions."""
        return self.engine != CPU_ENGINE


class WorkloadSpec(Words):
    prompt_tokens: Count = 128
    new_tokens: Annotated[int, Field(ge=2)] = 64
    batch_size: Count = 1
    cache_tokens: Count | None = None
    """Engines: the longest prompt + continuation that the cache is made for; None: all that the model takes. Attention reads no
    more of it than is filled, device memory holds all of it."""

    @model_validator(mode="after")
    def _cache_holds_it(self) -> WorkloadSpec:
        total = self.prompt_tokens + self.new_tokens
        if self.cache_tokens is not None and self.cache_tokens < total:
            raise ValueError(
                f"workload.cache_tokens {self.cache_tokens} is less than prompt_tokens + new_tokens = {total}; raise it"
            )
        return self


class PrecisionSpec(Words):
    weights: Literal["float32", "float16", "bfloat16", "int8", "int4", "nf4", "fp4", "fp8"] = "int4"
    """nf4, fp4: bitsandbytes' types, for students trained on them; onnxruntime computes with them in float32 and slowly."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights that share one scale (int8 repeats its one scale per output for each block)."""
    accuracy_level: Literal[0, 4] = 4
    """4: activations are quantized to int8 inside the int4 product (fast); 0: float32 arithmetic."""
    symmetric: bool = True
    method: Literal["nearest", "gptq", "hqq"] = "nearest"
    """How weights of a student that was not trained on this grid get there. gptq: least error of each layer's output on training
    text (arXiv 2210.17323); hqq: least |w - w'|^0.7, without text. Both int4."""

    graph_mib: Positive | None = None
    """int4 only: what the quantized weights may take together. What int4 leaves of it goes to layers in 8 bits, those first whose
    rounding is felt most per byte (measured on training text); None: all stay int4."""

    @model_validator(mode="after")
    def _mixes_int4(self) -> PrecisionSpec:
        if self.graph_mib is not None and (self.weights != "int4" or not self.symmetric):
            raise ValueError(
                "precision.graph_mib mixes symmetric int4 with int8; use weights: int4 and symmetric: true"
            )
        return self

    @model_validator(mode="after")
    def _method_makes_it(self) -> PrecisionSpec:
        if self.method != "nearest" and self.weights != "int4":
            raise ValueError(f"precision.method: {self.method} makes int4, not {self.weights}; use nearest")
        return self

    @property
    def needs_text(self) -> bool:
        """Whether quantizing looks at what the layers read."""
        return self.method == "gptq" or self.graph_mib is not None

    @property
    def rounds_activations(self) -> bool:
        """Whether products round their inputs to int8 (onnxruntime on a CPU; engines keep them in float16)."""
        return self.weights in ("int4", "int8") and self.accuracy_level == 4


class Profile(Words):
    """One device, its workload, its resource budgets, and the precision and engine to build for it."""

    format: Literal[1]
    device: DeviceSpec
    workload: WorkloadSpec = WorkloadSpec()
    precision: PrecisionSpec = PrecisionSpec()
    portable: bool = False
    """Also ship plain ONNX operators under portable/, for other runtimes."""
    compare_weights: list[Literal["int8", "int4", "nf4", "fp4"]] = Field(default_factory=list)
    """Also store the student's weights so, each in every way there is (rounded, GPTQ, HQQ, trained), and judge the files on
    validation text beside the float weights: a table in report.html, seconds per way for a small student. Not for engines."""
    ship_engine: bool = False
    """tensorrt-rtx: also ship the engine, built where the bundle is; else the target builds it at first use."""
    budget: dict[BudgetName, Positive] = Field(default_factory=dict)
    """Metric -> limit on its one-sided 95 % bound."""

    @model_validator(mode="before")
    @classmethod
    def _activations_stay_narrow(cls, words: Any) -> Any:
        """On a GPU the default of accuracy_level is 0."""
        if isinstance(words, dict) and isinstance(words.get("device"), dict):
            precision = words.get("precision", {})
            if words["device"].get("engine") not in (None, CPU_ENGINE) and isinstance(precision, dict):
                return {**words, "precision": {"accuracy_level": 0, **precision}}
        return words

    @model_validator(mode="after")
    def _engine_fits(self) -> Profile:
        if self.ship_engine and self.device.engine != "tensorrt-rtx":
            raise ValueError(
                f"ship_engine: {self.device.engine} builds engines on the target only; use tensorrt-rtx or ship_engine: false"
            )
        if self.compare_weights and self.device.engine != CPU_ENGINE:
            raise ValueError(
                f"compare_weights: runs every way on {CPU_ENGINE}, not on {self.device.engine}; compare in a profile for a CPU"
            )
        if self.device.on_gpu and self.precision.accuracy_level == 4:
            raise ValueError(
                "precision.accuracy_level 4 is onnxruntime's on a CPU, engines keep activations in 16 bits; use 0"
            )
        return self
