"""What the losses remember from step to step: TAID's interpolation and the balance of auxiliary losses.

Both follow sums over a whole optimizer step and all processes, so that gradient accumulation and the number of processes
change nothing. They observe during the forward passes and move once, in `finish`, after the optimizer's step; nothing is read
back to the host. Their state lies in buffers, so it is in every checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgestill.compress.processes import summed
from edgestill.profiles.schema import TaidSpec


class Taid(nn.Module):
    """The interpolation t of TAID (arXiv 2501.16937, algorithm 1): linear in the steps, ahead of it while the loss falls.

    delta_n = (J_{n-1} - J_n) / J_{n-1}                 J: mean cross-entropy of the student to the interpolated target
    m_n     = beta m_{n-1} + (1 - beta) delta_n
    t_n     = min(end, max(start + (end - start) step / steps, t_{n-1} + alpha sigmoid(m_n) (1 - t_{n-1})))
    """

    t: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(self, spec: TaidSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("t", torch.tensor(spec.start))
        self.register_buffer("previous", torch.tensor(-1.0))  # below 0: no step was seen
        self.register_buffer("momentum", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(2), persistent=False)
        self.sums: Tensor

    @torch.no_grad()
    def observe(self, loss: Tensor) -> None:
        """Add the values J of some rows [n]."""
        self.sums += torch.stack([loss.sum().float(), loss.new_full((), float(loss.numel()), dtype=torch.float32)])

    @torch.no_grad()
    def finish(self, step: int, steps: int) -> None:
        """Move t after optimizer step `step` of `steps`."""
        total, count = summed(self.sums)
        loss = total / count.clamp_min(1)
        seen = (self.previous >= 0) & (count > 0)
        delta = (self.previous - loss) / (self.previous + 1e-15)
        momentum = self.spec.momentum * self.momentum + (1 - self.spec.momentum) * delta
        self.momentum.copy_(torch.where(seen, momentum, self.momentum))
        ahead = self.t + self.spec.rate * torch.sigmoid(self.momentum) * (1 - self.t)
        linear = self.spec.start + (self.spec.end - self.spec.start) * step / steps
        self.t.copy_(torch.where(seen, ahead, self.t).clamp_min(linear).clamp_max(self.spec.end))
        self.previous.copy_(torch.where(count > 0, loss, self.previous))
        self.sums.zero_()


class Balance(nn.Module):
    """The factor that makes an auxiliary loss `ratio` times the main one, by running means of both (after ModelOpt's balancer).

    In the very first step it is 0: what a batch says of itself would differ from what the whole step says.
    """

    main: Tensor
    auxiliary: Tensor
    sums: Tensor

    def __init__(self, ratio: float, decay: float = 0.98) -> None:
        super().__init__()
        self.ratio, self.decay = ratio, decay
        self.register_buffer("main", torch.zeros(()))
        self.register_buffer("auxiliary", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(3), persistent=False)

    @torch.no_grad()
    def forward(self, main: Tensor, auxiliary: Tensor, rows: int) -> Tensor:
        """The factor for `auxiliary` (detached scalar); both losses are means over `rows` rows."""
        if self.training:
            observed = torch.stack([main.detach().float(), auxiliary.detach().float(), torch.ones_like(self.main)])
            self.sums += observed * rows
        return self.ratio * self.main / self.auxiliary.clamp_min(1e-12)

    @torch.no_grad()
    def finish(self) -> None:
        """Take the means of the step into the running ones; both start at 0 with the same bias, which cancels in the ratio."""
        main, auxiliary, rows = summed(self.sums)
        seen = (1 - self.decay) * (rows > 0)
        self.main.lerp_(main / rows.clamp_min(1), seen)
        self.auxiliary.lerp_(auxiliary / rows.clamp_min(1), seen)
        self.sums.zero_()
