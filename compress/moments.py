"""Second moments of feature streams, summed in float64, and what can be solved from them."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6
"""Over the mean of the diagonal: enough to invert the moments of features that are constant or repeat each other."""


def unit_rms(features: Tensor) -> Tensor:
    """Each token of features [..., d] at a root mean square of 1, float32 (float64 stays); a token of zeros stays zero.

    Blocks normalise what they read, so the size of what they leave says nothing, grows with depth, and moves in training.
    """
    wide = features if features.dtype == torch.float64 else features.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True).clamp_min(1e-12))


class Product:
    """Streamed E[x y'] of two features of the same tokens."""

    def __init__(self) -> None:
        self.count = 0
        self._product: Tensor | None = None
        self._left: Tensor | None = None
        self._right: Tensor | None = None

    def add(self, x: Tensor, y: Tensor) -> None:
        """A batch of tokens: x [n, d_x] and y [n, d_y], any floating type, on one device."""
        x, y = x.double(), y.double()
        if self._product is None or self._left is None or self._right is None:
            self._product, self._left, self._right = x.T @ y, x.sum(0), y.sum(0)
        else:
            self._product.addmm_(x.T, y)
            self._left += x.sum(0)
            self._right += y.sum(0)
        self.count += x.shape[0]

    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._product is None or self._left is None or self._right is None:
            raise ValueError("no tokens were added")
        return self._product, self._left, self._right

    def raw(self) -> Tensor:
        """E[x y'], float64 [d_x, d_y]."""
        return self._sums()[0] / self.count

    def mean_left(self) -> Tensor:
        """E[x], float64 [d_x]."""
        return self._sums()[1] / self.count

    def covariance(self) -> Tensor:
        """E[x y'] - E[x] E[y]', float64 [d_x, d_y]."""
        product, left, right = self._sums()
        return product / self.count - torch.outer(left / self.count, right / self.count)


def principal_directions(covariance: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` directions of largest variance, rows [width, d], and their variances, descending.

    The largest entry of a direction is positive, so that every linear algebra library gives the same one.
    """
    variances, vectors = torch.linalg.eigh(covariance)
    rows, variances = vectors.T.flip(0)[:width], variances.flip(0)[:width]
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign(), variances


def with_ridge(moment: Tensor) -> Tensor:
    """C + RIDGE tr(C) / d I of C = E[x x'] [d, d]; the identity for features that are always zero."""
    size = len(moment)
    eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
    mean = moment.diagonal().mean()
    return torch.where(mean > 0, moment + RIDGE * mean * eye, eye)


def least_squares(xx: Tensor, yx: Tensor) -> Tensor:
    """W [d_y, d_x] with the least E|W x - y|^2, from E[x x'] [d_x, d_x] and E[y x'] [d_y, d_x]; a small ridge (`RIDGE`)."""
    return torch.cholesky_solve(yx.T, torch.linalg.cholesky(with_ridge(xx))).T


@torch.no_grad()
def low_rank_factors(weight: Tensor, xx: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """E [d_y, rank] and R [rank, d_x], float64: E R is nearest to `weight` [d_y, d_x] on inputs x with E[x x'] = `xx` (float64).

    With C = L L' the moment and U S V' = W L, the best product is U_r U_r' W, and E|W x - E R x|^2 is the sum of s_i^2 beyond
    r; each row of R and its column of E are scaled to the same length. The plain decomposition of the weight would spend its
    rank on inputs that never occur.
    """
    wide = weight.double()
    variances, directions = torch.linalg.eigh(xx)  # Cholesky's L needs a ridge where inputs lie in a plane
    kept = torch.linalg.svd(wide @ (directions * variances.clamp_min(0).sqrt()), full_matrices=False).U[:, :rank]
    reduce = kept.T @ wide
    root = reduce.norm(dim=1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return kept * root.T, reduce / root


def linear_cka(xx: Product, yy: Product, xy: Product) -> float:
    """Linear CKA of two features, 0 to 1 (Kornblith et al., arXiv 1905.00414); 0 where one of them is constant."""
    own = torch.linalg.matrix_norm(xx.covariance()) * torch.linalg.matrix_norm(yy.covariance())
    shared = torch.linalg.matrix_norm(xy.covariance()).square()
    return float(shared / own) if float(own) > 0 else 0.0
