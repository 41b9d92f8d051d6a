"""What training tells of itself: sums that stay on the device until a log interval ends, and histograms of the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgestill.compress.processes import summed
from edgestill.compress.targets import Target

BINS = 20


class Meter(nn.Module):
    """Sums since the last reading, and how often each teacher had which weight and entropy, per domain.

    The histograms are buffers, so a resumed run goes on counting: [teachers, domains, BINS] over weights in 0..1 and over
    entropies as a share of log V. Each process counts for itself; what all of them saw is added up by `gather`.
    """

    weight_counts: Tensor
    entropy_counts: Tensor
    recent: Tensor

    def __init__(self, teachers: int, domains: int, log_vocabulary: float) -> None:
        super().__init__()
        self.shape = (teachers, domains)
        self.log_vocabulary = log_vocabulary
        self.sums: dict[str, Tensor] = {}
        for name in ("weight_counts", "entropy_counts"):
            self.register_buffer(name, torch.zeros(teachers, domains, BINS, dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(2, teachers, domains, BINS, dtype=torch.int64), persistent=False)

    def add(self, name: str, value: Tensor) -> None:
        """Add a tensor to the sum called `name`."""
        value = value.detach()
        self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def add_target(self, target: Target, domain: Tensor) -> None:
        """Add a target's weights and entropies [K, n]; `domain` int64 [n]."""
        teachers, domains = self.shape
        for name, values in (("weights", target.weights), ("entropies", target.entropies)):
            self.add(name, values.new_zeros(teachers, domains).index_add_(1, domain, values))
        self.add("rows", target.weights.new_zeros(domains).index_add_(0, domain, torch.ones_like(target.weights[0])))
        self._count(self.recent[0], target.weights, domain)
        self._count(self.recent[1], target.entropies / self.log_vocabulary, domain)

    def _count(self, counts: Tensor, values: Tensor, domain: Tensor) -> None:
        teachers, domains = self.shape
        bins = (values * BINS).long().clamp_(0, BINS - 1)
        place = (torch.arange(teachers, device=values.device).unsqueeze(1) * domains + domain) * BINS + bins
        counts.view(-1).index_add_(0, place.flatten(), torch.ones_like(place.flatten()))

    def gather(self) -> None:
        """Take what all processes counted lately into the histograms. Every process must call it."""
        if not self.recent.numel():
            return
        weights, entropies = summed(self.recent)
        self.weight_counts += weights
        self.entropy_counts += entropies
        self.recent.zero_()

    def read(self) -> dict[str, Tensor]:
        """The sums over all processes, on the host; starts anew. Every process must call it."""
        self.gather()
        if not self.sums:
            return {}
        shapes = {name: value.shape for name, value in self.sums.items()}
        flat = summed(torch.cat([value.float().flatten() for value in self.sums.values()])).cpu()
        self.sums = {}
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    def histograms(self, names: Sequence[str], domains: Sequence[str]) -> dict[str, Any]:
        """JSON-able: {"bins", "weights": {domain: {teacher: counts}}, "entropies": ...}; entropies as a share of log V."""
        found: dict[str, Any] = {"bins": BINS}
        for word, counts in (("weights", self.weight_counts), ("entropies", self.entropy_counts)):
            found[word] = {
                domain: {name: counts[k, d].tolist() for k, name in enumerate(names)}
                for d, domain in enumerate(domains)
            }
        return found
