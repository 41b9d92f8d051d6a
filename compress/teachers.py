"""Teachers: found, checked against each other, loaded frozen, and asked for hidden states instead of logits.

A teacher hands out what its head multiplies ([B, T, d]) and the head itself ([V, d]); whoever needs logits multiplies them chunk
by chunk, so no [batch, time, vocabulary] tensor per teacher ever exists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgestill.compress import teacher_files
from edgestill.compress.teacher_files import TeacherFacts
from edgestill.compress.tokenizer_check import compare_tokenizers, load_tokenizer, real_vocabulary
from edgestill.profiles.schema import TeacherSpec
from edgestill.runtime.errors import BadInput

__all__ = [
    "Teacher",
    "TeacherFacts",
    "best_device",
    "check_same_tokenizer",
    "decoder_blocks",
    "fit_together",
    "hidden_states",
    "load_teacher",
    "native_bfloat16",
    "resolve_teachers",
]

PROBE_TOKENS = 8
BITSANDBYTES_8BIT = "bitsandbytes.autograd._functions"


def best_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware: compute capability 8.0 on, AVX-512 BF16, AMX or Arm's bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    facts = Path("/proc/cpuinfo")
    if device.type != "cpu" or not facts.is_file():
        return False
    lines = (line for line in facts.read_text().splitlines() if line.lower().startswith(("flags", "features")))
    flags = set(next(lines, "").replace(":", " ").split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def resolve_teachers(
    specs: Sequence[TeacherSpec], resolve: Callable[[str], Path], *, device: torch.device | None = None
) -> list[TeacherFacts]:
    """Find every teacher and state its facts. No weights are loaded; files are hashed.

    Args:
        resolve: a path as written in the recipe -> a path on this machine.
        device: where the teachers will run (default: `best_device()`); decides `precision: auto`.

    Raises:
        BadInput: a teacher that is missing, not in safetensors, not a causal LM, or of a shape its precision cannot hold.
    """
    device = device or best_device()
    return [_facts(spec, resolve, device) for spec in specs]


def _facts(spec: TeacherSpec, resolve: Callable[[str], Path], device: torch.device) -> TeacherFacts:
    native = native_bfloat16(device)
    folder, revision = teacher_files.find_folder(spec, resolve)
    files = teacher_files.weight_files(folder, spec.name)
    config = teacher_files.read_config(folder, spec.name, trust_remote_code=spec.trust_remote_code)
    text = config.get_text_config()
    precision = ("bfloat16" if native else "float32") if spec.precision == "auto" else spec.precision
    parameters = teacher_files.count_parameters(files)
    memory = teacher_files.resident_bytes(
        config, parameters, precision, spec, on_cpu=device.type == "cpu", native=native
    )
    tokenizer = load_tokenizer(folder, f"teacher {spec.name!r}", trust_remote_code=spec.trust_remote_code)
    vocabulary = real_vocabulary(tokenizer)
    if vocabulary > text.vocab_size:
        raise BadInput(
            f"teacher {spec.name!r}: its tokenizer has {vocabulary} tokens, its model knows {text.vocab_size}; "
            "use the tokenizer it was trained with"
        )
    return TeacherFacts(
        name=spec.name,
        path=folder,
        revision=revision,
        weights_sha256=teacher_files.hash_weights(folder, files),
        model_type=config.model_type,
        parameters=parameters,
        hidden_size=text.hidden_size,
        n_layers=text.num_hidden_layers,
        vocab_size=vocabulary,
        head_width=text.vocab_size,
        precision=precision,
        memory_bytes=memory,
        max_tokens=getattr(text, "max_position_embeddings", None),
        trust_remote_code=spec.trust_remote_code,
    )


def check_same_tokenizer(facts: Sequence[TeacherFacts]) -> int:
    """The real vocabulary size V that all teachers share.

    Raises:
        BadInput: names the first token, special token or probe string on which two of them differ.
    """
    tokenizers = [load_tokenizer(f.path, f"teacher {f.name!r}", trust_remote_code=f.trust_remote_code) for f in facts]
    return compare_tokenizers([f.name for f in facts], tokenizers)


def fit_together(facts: Sequence[TeacherFacts], available_bytes: int) -> bool:
    """Whether all teachers' weights fit into `available_bytes` at once."""
    return sum(f.memory_bytes for f in facts) <= available_bytes


def _base(model: Any) -> nn.Module:
    """The decoder without its head."""
    base = model.base_model
    return cast(nn.Module, model.get_decoder() if base is model else base)


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal LM: the longest ModuleList below its base model."""
    lists = [module for module in _base(model).modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise BadInput(f"{type(model).__name__} keeps its layers in no ModuleList; use another architecture")
    return max(lists, key=len)


def hidden_states(model: nn.Module, input_ids: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
    """What the head of a causal LM multiplies, and the outputs of some blocks, without computing logits. Differentiable.

    Args:
        input_ids: int64 [B, T], no padding.
        layers: blocks counted from 0.

    Returns:
        [B, T, d] after the final norm, and {layer: [B, T, d]} of block outputs (before that norm).
    """
    blocks = decoder_blocks(model)
    taken: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            taken[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [blocks[layer].register_forward_hook(keep(layer)) for layer in dict.fromkeys(layers)]
    try:
        last = _base(model)(input_ids=input_ids, use_cache=False, return_dict=True).last_hidden_state
    finally:
        for handle in hooks:
            handle.remove()
    return last, taken


class Teacher:
    """A loaded teacher: frozen, in evaluation mode, on its device.

    facts: what was known before loading; model: the causal LM; head_weight: [V, d] with V the real vocabulary (rows of
    padding are cut off); head_bias: [V] or None. A factor that some architectures put on their logits is folded into the
    hidden states and the bias, so logits are always head_weight @ hidden + head_bias.
    """

    def __init__(self, facts: TeacherFacts, model: Any) -> None:
        model.eval().requires_grad_(False)
        model.config.use_cache = False
        self.facts = facts
        self.model = model
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self._scale = _logit_scale(model.config.get_text_config())
        self.head_weight: Tensor = head.weight[: facts.vocab_size]
        self.head_bias: Tensor | None = None if bias is None else bias[: facts.vocab_size] * self._scale
        self._check_head()

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """See `hidden_states`; without gradient. input_ids int64 [B, T] on the teacher's device."""
        last, taken = hidden_states(self.model, input_ids, layers)
        return (last if self._scale == 1.0 else last * self._scale), taken

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] of hidden states [n, d]; the product runs in the head's own precision."""
        return nn.functional.linear(hidden.to(self.head_weight.dtype), self.head_weight, self.head_bias).float()

    @torch.no_grad()
    def _check_head(self) -> None:
        """An architecture may do more to its logits than its configuration's known fields say: compare once."""
        ids = torch.arange(PROBE_TOKENS, device=self.head_weight.device).remainder(self.facts.vocab_size).unsqueeze(0)
        theirs = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.facts.vocab_size].float()
        error = (self.logits(self.hidden(ids)[0][0]) - theirs).abs().max()
        spread = theirs.std(unbiased=False)
        precise = self.head_weight.dtype == torch.float32
        if not bool(error <= (1e-3 if precise else 0.05) * spread + 1e-5):
            raise BadInput(
                f"teacher {self.facts.name!r}: {self.facts.model_type} computes its logits in a way its head alone does not "
                f"(difference {float(error):.3g}); use another architecture"
            )


def _logit_scale(config: Any) -> float:
    """The factor between head(hidden) and logits: logit_scale multiplies (Cohere), logits_scaling divides (Granite)."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)


def load_teacher(facts: TeacherFacts, device: torch.device) -> Teacher:
    """Load a teacher onto `device` in its precision.

    Raises:
        BadInput: weights that do not fit the configuration, or an architecture whose logits are more than its head.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    compute = torch.bfloat16 if native_bfloat16(device) else torch.float32
    arguments: dict[str, Any] = {"dtype": torch.float32 if facts.precision == "float32" else torch.bfloat16}
    if facts.precision == "8bit":
        arguments = {"dtype": compute, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        logging.getLogger(BITSANDBYTES_8BIT).setLevel(logging.ERROR)  # it warns of its float16 cast in every product
    elif facts.precision == "4bit":
        arguments = {
            "dtype": compute,
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=compute,
                bnb_4bit_use_double_quant=False,
            ),
        }
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(facts.path),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=facts.trust_remote_code,
            device_map={"": device},
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"teacher {facts.name!r}: {facts.path} cannot be loaded ({reason}); check the folder") from error
    if missing := sorted(loading["missing_keys"]):
        raise BadInput(
            f"teacher {facts.name!r}: {facts.path} has no weights for {missing[0]} (of {len(missing)} missing), which would be "
            "random; complete the folder"
        )
    return Teacher(facts, model)
