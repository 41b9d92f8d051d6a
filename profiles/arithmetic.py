"""What the arithmetic of a model and a device says before anything is built, and the budgets it rules out.

Rules of storage (1 MiB = 2**20 bytes), for linear layers, head and input table alike (a tied head is the table):

    float32            4 bytes a weight
    float16, bfloat16  2 bytes
    fp8                1 byte + one scale per output channel (hidden_size weights)
    int8               1 byte + one scale per block; on a GPU per output channel
    int4, nf4, fp4     half a byte + one scale per block (asymmetric int4: + half a byte of zero point)
    scales             float32 on a CPU, 2 bytes on a GPU
    cache              keys and values of every layer: float32 on a CPU, 2 bytes on a GPU (float32 when the weights are)

Norms and biases count as if they were stored like the rest: below 0.1 % of any model worth shipping. Where an ONNX
Runtime has no lookup in blocks of integers, the table is float32 beside the rest; so all of this is a floor. An engine may widen
weights when it is built, as the full TensorRT may do with int8 and fp8 whose activations are not quantized: it then takes and reads
what float16 does, twice the floor (runtime/engines/capabilities.py).

A decode step reads every weight of the linear layers and the head once, and the cache of every sequence. With B bytes a
step and a bandwidth of W bytes/s there are at most W / B steps a second: SmolLM-135M at int4 block 32 (84 MB of weights)
on 20 GB/s cannot exceed 238 tokens/s. Weights that fit in the last-level cache have no such bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgestill.profiles.schema import CPU_ENGINE, Profile
from edgestill.runtime.engines.capabilities import Problem, engine_problem
from edgestill.runtime.errors import BadInput

MIB = float(1 << 20)

CUDA_ENGINE = "onnxruntime-cuda"
CPU_WEIGHTS = ("float32", "int8", "int4", "nf4", "fp4")
"""Precisions built for the CPU engine: ONNX Runtime has no fast CPU kernels for the 16- and 8-bit floats."""

NOT_IN_CUDA = ("bfloat16", "fp8")
"""Precisions that ONNX Runtime's CUDA provider is not given: what goes in and out passes numpy, which has neither type."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that the arithmetic needs.

    parameters: all, a tied head counted once. embedding_parameters: of the input table. head_tied: the head is that
    table. n_kv_heads, head_size: per layer, of the cache. max_tokens: longest prompt + continuation.
    """

    parameters: int
    embedding_parameters: int
    head_tied: bool
    n_layers: int
    n_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_tokens: int


@dataclass(frozen=True)
class Prediction:
    """What a model takes on a device. Rules: the module's docstring."""

    weight_mib: float
    """Weights that a decode step reads: all but an untied input table, of which it looks one row up."""
    graph_mib: float
    """All weights, as the graph's files hold them."""
    cache_mib: float
    """Keys and values at the end of the workload, all sequences; on a GPU the whole cache that is reserved."""
    bytes_per_token: float
    """Bytes read by a decode step at the middle of the workload's new tokens; divided by batch_size, per token."""
    decode_tokens_per_s_bound: float | None
    """No decode is faster, all sequences together; None where the weights fit in the last-level cache."""
    peak_rss_mib_floor: float
    """No process that decodes takes less: weight_mib + cache_mib (an untied table may stay on disk)."""


def bits_per_weight(profile: Profile, hidden_size: int) -> float:
    """Stored bits of one weight, its share of the scales included: int4 in symmetric blocks of 32 is 5."""
    precision = profile.precision
    scale = 16.0 if profile.device.on_gpu else 32.0
    if precision.weights in ("int4", "nf4", "fp4"):
        per_block = scale + (0.0 if precision.symmetric else 4.0)
        return 4.0 + per_block / precision.block_size
    if precision.weights == "int8":
        return 8.0 + scale / (hidden_size if profile.device.on_gpu else precision.block_size)
    if precision.weights == "fp8":
        return 8.0 + scale / hidden_size
    return 32.0 if precision.weights == "float32" else 16.0


def predict(size: ModelSize, profile: Profile) -> Prediction:
    """The prediction for `size` under the profile's precision and workload."""
    precision, workload, device = profile.precision, profile.workload, profile.device
    cache_item = 4 if device.engine == CPU_ENGINE or precision.weights == "float32" else 2

    bytes_per_weight = bits_per_weight(profile, size.hidden_size) / 8
    looked_up = 0 if size.head_tied else size.embedding_parameters
    weight_bytes = (size.parameters - looked_up) * bytes_per_weight

    row_bytes = 2 * size.n_layers * size.n_kv_heads * size.head_size * cache_item * workload.batch_size
    held = workload.prompt_tokens + workload.new_tokens
    if device.on_gpu:  # a cache of fixed length is there whole
        held = max(held, min(size.max_tokens, workload.cache_tokens or size.max_tokens))
    cache_bytes = row_bytes * held
    step_bytes = weight_bytes + row_bytes * (workload.prompt_tokens + workload.new_tokens / 2)

    in_cache = weight_bytes <= device.last_level_cache_mib * MIB
    steps_per_s = device.memory_bandwidth_gb_per_s * 1e9 / step_bytes
    return Prediction(
        weight_mib=weight_bytes / MIB,
        graph_mib=size.parameters * bytes_per_weight / MIB,
        cache_mib=cache_bytes / MIB,
        bytes_per_token=step_bytes / workload.batch_size,
        decode_tokens_per_s_bound=None if in_cache else steps_per_s * workload.batch_size,
        peak_rss_mib_floor=(weight_bytes + cache_bytes) / MIB,
    )


def engine_field(profile: Profile) -> str:
    """The word of the profile that `precision_problem` is about."""
    problem = _card_problem(profile) if profile.device.on_gpu else None
    return "precision.weights" if problem is None else problem.field


def precision_problem(profile: Profile) -> str | None:
    """Why the engine or the GPU cannot run the profile's precision, in one line with the repair; None when it can."""
    device, weights = profile.device, profile.precision.weights
    if device.engine == CPU_ENGINE:
        if weights in CPU_WEIGHTS:
            return None
        return f"'{weights}' is not built for engine {CPU_ENGINE}; use {', '.join(CPU_WEIGHTS)}"
    problem = _card_problem(profile)
    if problem is None and weights == "int4" and not profile.precision.symmetric:
        return "'int4' with zero points has no kernel in an engine; use symmetric: true"
    return None if problem is None else problem.line


def _card_problem(profile: Profile) -> Problem | None:
    """What the engine says of the card and of the weights."""
    device, weights = profile.device, profile.precision.weights
    capability = device.compute_capability or ""
    if device.engine != CUDA_ENGINE:
        return engine_problem(device.engine, capability, weights, device.gpu)
    if weights in NOT_IN_CUDA:
        line = f"'{weights}' is not run by engine {CUDA_ENGINE}; use float16, or engine tensorrt or tensorrt-rtx"
        return Problem("precision.weights", line)
    return engine_problem("tensorrt", capability, weights, device.gpu, name=CUDA_ENGINE)


def refuse_impossible(size: ModelSize, profile: Profile, name: str = "profile") -> None:
    """Raise when the arithmetic rules a budget of `profile` out for a model of `size`.

    Raises:
        BadInput: one line per impossible demand, each with its arithmetic and the repair.
    """
    problem = precision_problem(profile)
    problems = [f"{engine_field(profile)}: {problem}"] if problem else []
    problems += _too_long(size, profile) + _too_large(size, profile) + _too_fast(size, profile)
    if problems:
        raise BadInput("\n".join(f"profile {name}: {line}" for line in problems))


def _too_long(size: ModelSize, profile: Profile) -> list[str]:
    workload = profile.workload
    total = workload.prompt_tokens + workload.new_tokens
    if total <= size.max_tokens:
        return []
    return [
        f"workload: prompt_tokens {workload.prompt_tokens} + new_tokens {workload.new_tokens} = {total} "
        f"exceed the model's {size.max_tokens} tokens; shorten the workload"
    ]


def _too_large(size: ModelSize, profile: Profile) -> list[str]:
    found, weights = predict(size, profile), profile.precision.weights
    lines = []
    graph = f"the {weights} graph of {size.parameters:,} parameters takes {found.graph_mib:.1f} MiB"
    memory, bundle = profile.device.memory_mib, profile.budget.get("bundle_mib")
    mixed = profile.precision.graph_mib
    if mixed is not None and mixed < found.graph_mib:
        lines.append(f"precision.graph_mib {mixed:g}: {graph}; raise it to that at least")
    if found.graph_mib + found.cache_mib > memory:
        lines.append(
            f"device.memory_mib {memory}: {graph} + a cache of {found.cache_mib:.1f} MiB; "
            "use a smaller student or fewer bits"
        )
    if bundle is not None and found.graph_mib > bundle:
        lines.append(f"budget.bundle_mib {bundle:g}: {graph}; raise it, or use a smaller student or fewer bits")
    resident = "peak_rss_mib" if profile.device.engine == CPU_ENGINE else "peak_device_mib"
    limit = profile.budget.get(resident)
    if limit is not None and found.peak_rss_mib_floor > limit:
        lines.append(
            f"budget.{resident} {limit:g}: {found.weight_mib:.1f} MiB of weights + {found.cache_mib:.1f} MiB of cache "
            f"= {found.peak_rss_mib_floor:.1f} MiB; raise it, or use a smaller student or fewer bits"
        )
    return lines


def _too_fast(size: ModelSize, profile: Profile) -> list[str]:
    found, device = predict(size, profile), profile.device
    bound = found.decode_tokens_per_s_bound
    if bound is None:
        return []
    gb_per_s = device.memory_bandwidth_gb_per_s
    weight_mb = found.weight_mib * MIB / 1e6
    step_mb = found.bytes_per_token * profile.workload.batch_size / 1e6
    floors_ms = {
        "inter_token_ms": (step_mb / gb_per_s, f"{step_mb:.1f} MB read per step"),
        "first_token_ms": (weight_mb / gb_per_s, f"{weight_mb:.1f} MB of weights"),
    }
    why = (
        f"({found.weight_mib:.1f} MiB of weights do not fit in the {device.last_level_cache_mib:g} MiB "
        "last-level cache); {} it, or use a smaller student or fewer bits"
    )
    lines = []
    for budget, limit in profile.budget.items():
        floor_ms, read = floors_ms.get(budget.removesuffix("_p50").removesuffix("_p95"), (0.0, ""))
        if limit < floor_ms:
            arithmetic = f"{read} / {gb_per_s:g} GB/s = {floor_ms:.2f} ms"
            lines.append(f"budget.{budget} {limit:g} ms: {arithmetic} {why.format('raise')}")
        if budget == "decode_tokens_per_s" and limit > bound:
            token_mb = found.bytes_per_token / 1e6
            arithmetic = f"{gb_per_s:g} GB/s / {token_mb:.1f} MB read per token = {bound:.1f} tokens/s"
            lines.append(f"budget.{budget} {limit:g}: {arithmetic} {why.format('lower')}")
    return lines
