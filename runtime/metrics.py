"""The names of everything that can be limited: unit, direction, and who states the limit.

Direction belongs to the metric, never to the reader of a report: a limit on something that should be low is tested on
the upper confidence bound, on something that should be high on the lower one (gate.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher"]
"""`lower`: lower is better, the limit is a maximum. `higher`: higher is better, the limit is a minimum."""


@dataclass(frozen=True)
class Metric:
    """One row of the verdict table."""

    unit: str
    direction: Direction
    source: Literal["recipe", "profile", "fixed"]
    """Who may limit it: the recipe (quality), the profile (resources), or the build itself (parity)."""
    about: str


METRICS: dict[str, Metric] = {
    "perplexity": Metric("", "lower", "recipe", "exp of the mean negative log-likelihood on the held-out tokens"),
    "perplexity_ratio_to_teacher": Metric(
        "", "lower", "recipe", "perplexity / that of the fused teachers at T = 1, paired"
    ),
    "kl_nats_per_token": Metric(
        "nats", "lower", "recipe", "KL(fused || artifact) over the k + 1 stored buckets, a lower bound"
    ),
    "top1_agreement": Metric(
        "", "higher", "recipe", "share of tokens on which artifact and fused teachers agree on the first"
    ),
    "quantization_perplexity_ratio": Metric("", "lower", "recipe", "perplexity / that of the float student, paired"),
    "parity_max_abs_logit": Metric(
        "", "lower", "fixed", "largest difference from the stored logit rows of the shipped weights"
    ),
    "first_token_ms_p50": Metric("ms", "lower", "profile", "median time from prompt to first token"),
    "first_token_ms_p95": Metric("ms", "lower", "profile", "95th percentile of the time from prompt to first token"),
    "inter_token_ms_p50": Metric("ms", "lower", "profile", "median time between tokens while decoding"),
    "inter_token_ms_p95": Metric("ms", "lower", "profile", "95th percentile of the time between tokens"),
    "prefill_tokens_per_s": Metric("tokens/s", "higher", "profile", "prompt tokens / time to first token"),
    "decode_tokens_per_s": Metric("tokens/s", "higher", "profile", "new tokens after the first / time they took"),
    "peak_rss_mib": Metric("MiB", "lower", "profile", "peak resident memory of a process that loads and generates"),
    "peak_device_mib": Metric("MiB", "lower", "profile", "peak device memory of this process"),
    "load_ms": Metric("ms", "lower", "profile", "opening the bundle for generation, hashing included"),
    "bundle_mib": Metric("MiB", "lower", "profile", "all shipped files"),
    "energy_j_per_token": Metric("J", "lower", "profile", "energy over the decode window, idle subtracted, per token"),
    "bandwidth_fraction": Metric("", "higher", "profile", "bytes read per token x tokens/s / measured bandwidth"),
}
"""Every metric by name. `perplexity/<domain>` takes the metric of `perplexity`."""


def metric(name: str) -> Metric | None:
    """The metric called `name` (`perplexity/<domain>` included), or None."""
    if name.startswith("perplexity/") and len(name) > len("perplexity/"):
        return METRICS["perplexity"]
    return METRICS.get(name)
