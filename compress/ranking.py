"""Agreement on the order of the likely tokens: 1 - Spearman's correlation of soft ranks (RLKD, arXiv 2409.12545).

    U    = top k of the target and top k of the student, each token once
    r_i  = 1 + sum over j in U, j != i, of sigmoid((z_j - z_i) / epsilon)         soft rank, 1 is the likeliest
    rho  = cos(r_S - mean, r_T - mean)                                            value: 1 - rho

The paper sorts softly through a C++ extension; for 2k <= 128 tokens the pairwise sigmoid needs (2k)^2 numbers a row in plain
torch. Ranks of the target carry no gradient; that of the student's goes to the tokens of U alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgestill.compress.divergence import LOG_TINY
from edgestill.compress.targets import Buckets, Dense
from edgestill.profiles.schema import RankingLossSpec


def ranking_loss(logits: Tensor, target: Dense | Buckets, spec: RankingLossSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row and where its gradient goes.

    Args:
        logits: the student's, float32 [n, V], at temperature 1; without gradient.

    Returns:
        Value [n] in 0..2; tokens int64 [n, 2k]; gradient with respect to their logits [n, 2k] (0 for a token's repeat).
    """
    ids, theirs, used = _candidates(logits, target, min(spec.top_k, logits.shape[1]))
    with torch.enable_grad():
        ours = logits.gather(1, ids).requires_grad_()
        value = 1 - _correlation(
            _soft_ranks(ours, used, spec.sharpness), _soft_ranks(theirs, used, spec.sharpness), used
        )
        (gradient,) = torch.autograd.grad(value.sum(), ours)
    return value.detach(), ids, gradient


def _candidates(logits: Tensor, target: Dense | Buckets, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [n, 2k], the target's log-probabilities of them, and which of them are not repeats."""
    own = logits.topk(k, dim=-1).indices
    if isinstance(target, Dense):
        ids = torch.cat([target.p.topk(k, dim=-1).indices, own], dim=1)
        theirs = target.log_p.gather(1, ids).to(logits.dtype)
    else:
        stored = target.log_p[:, :-1]
        best = stored.topk(min(k, stored.shape[1]), dim=-1)
        ids = torch.cat([target.ids.gather(1, best.indices), own], dim=1)
        # a token of the student that no teacher stored ranks below all that are stored: its exact place is not known
        same = (own.unsqueeze(2) == target.ids.unsqueeze(1)) & target.used.unsqueeze(1)
        known = torch.where(same, stored.unsqueeze(1), LOG_TINY).amax(-1)
        theirs = torch.cat([best.values, known], dim=1).to(logits.dtype)
    earlier = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril(-1).any(-1)
    return ids, theirs, ~earlier


def _soft_ranks(scores: Tensor, used: Tensor, sharpness: float) -> Tensor:
    """[n, u] from [n, u]; the rank of a token that is not used means nothing."""
    above = torch.sigmoid((scores.unsqueeze(1) - scores.unsqueeze(2)) / sharpness)  # [n, i, j]: j above i
    others = used.unsqueeze(1) & ~torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    return 1 + (above * others).sum(-1)


def _correlation(a: Tensor, b: Tensor, used: Tensor) -> Tensor:
    """Pearson correlation [n] of the used entries of a and b [n, u]."""
    weight = used.to(a.dtype)
    count = weight.sum(-1, keepdim=True)
    a = (a - (a * weight).sum(-1, keepdim=True) / count) * weight
    b = (b - (b * weight).sum(-1, keepdim=True) / count) * weight
    norms = (a.square().sum(-1) * b.square().sum(-1)).clamp_min(torch.finfo(a.dtype).eps ** 2).sqrt()
    return (a * b).sum(-1) / norms
