"""The moment of the embedding's gradients says what errors in looked-up rows cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from edgestill.compress.quantize.lookup_moment import lookup_moment

WINDOWS = np.random.default_rng(5).integers(1, 263, (24, 16))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_it_predicts_the_divergence_that_noise_makes(family: str, tmp_path: Path) -> None:
    """Noise of its own at every position, in every direction: KL = 1/2 sigma^2 tr E[g g'] per token."""
    student = AutoModelForCausalLM.from_pretrained(write_model(tmp_path, family), dtype=torch.float32).eval()
    moment = lookup_moment(student, WINDOWS)
    assert torch.equal(moment, moment.T) and torch.linalg.eigvalsh(moment).min() > -1e-9 * moment.trace()
    assert torch.equal(moment, lookup_moment(student, WINDOWS))
    assert all(parameter.grad is None for parameter in student.parameters())
    sigma = float((2 * 1e-4 / moment.trace()).sqrt())  # to cost 1e-4 nats
    generator = torch.Generator().manual_seed(1)

    def noisy(module: nn.Module, arguments: object, output: Tensor) -> Tensor:
        return output + sigma * torch.randn(output.shape, generator=generator)

    ids = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        plain = torch.log_softmax(student(ids).logits.double(), -1)
        handle = student.get_input_embeddings().register_forward_hook(noisy)
        found = [torch.log_softmax(student(ids).logits.double(), -1) for _ in range(8)]
        handle.remove()
    divergence = float(np.mean([(plain.exp() * (plain - q)).sum(-1).mean() for q in found]))
    print(f"{family}: {divergence:.2e} nats, predicted 1e-4")
    assert divergence == pytest.approx(1e-4, rel=0.25)
