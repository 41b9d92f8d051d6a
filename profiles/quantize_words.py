"""Quantization-aware training: which grid the student's weights lie on while it learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgestill.profiles.words import Count, Words

Scheme = Literal["int4", "int8", "nf4", "fp4"]


class QuantizeSpec(Words):
    """The student learns with the weights that ship: their bytes are copied into every bundle whose profile wants this scheme."""

    scheme: Scheme
    """int4: onnxruntime's MatMulNBits; int8: one scale per output; nf4, fp4: bitsandbytes' 16 values per block."""
    block_size: Literal[16, 32, 64, 128, 256] = 32
    """Weights along the input that share a scale; not read by int8. nf4 and fp4: 32 or more."""
    symmetric: bool = True
    """int4 only: false gives each block a zero point."""
    from_step: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps in float before."""
    initialize: Literal["nearest", "gptq"] = "nearest"
    """How float weights enter the grid at from_step. gptq: they move once, so that rounding them to nearest makes up for its own
    errors (arXiv 2210.17323), from what 64 training windows bring to each layer, and from what the loss feels of each row that
    the embedding looks up. For schemes of 4 bits."""
    ramp_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the weights move from float to the grid, linearly."""
    freeze_scales_at_step: Count | None = None
    """From this step on scales (and zero points) stay, and only the codes move; weights beyond the grid's ends are clipped."""
    embeddings: bool = True
    """Also the embedding table; one that is tied to the head goes with it."""
    head: bool = True
    activations: bool = False
    """Inputs of linear layers on int8 too, per token and block, as accuracy_level 4 computes. int4 only."""

    @model_validator(mode="after")
    def _scheme_has_it(self) -> QuantizeSpec:
        if self.scheme in ("nf4", "fp4") and self.block_size < 32:
            raise ValueError(
                f"quantize.block_size {self.block_size}: bitsandbytes has blocks of 32 and more for {self.scheme}"
            )
        if not self.symmetric and self.scheme != "int4":
            raise ValueError(f"quantize.symmetric: false is for int4, {self.scheme} has no zero point; remove it")
        if self.initialize == "gptq" and self.scheme == "int8":
            raise ValueError("quantize.initialize: gptq is for schemes of 4 bits; int8 loses nothing, remove it")
        if self.initialize == "gptq" and self.from_step == 0:
            raise ValueError(
                "quantize.initialize: gptq at from_step 0 meets an untrained student; raise from_step (most of the training in "
                "float works best) or remove it"
            )
        if self.activations and self.scheme != "int4":
            raise ValueError(f"quantize.activations is for int4 at accuracy_level 4, not for {self.scheme}; remove it")
        if self.freeze_scales_at_step is not None and self.freeze_scales_at_step <= self.from_step + self.ramp_steps:
            raise ValueError(
                f"quantize.freeze_scales_at_step {self.freeze_scales_at_step} is not after the weights reached the grid at step "
                f"{self.from_step + self.ramp_steps}; raise it"
            )
        return self
