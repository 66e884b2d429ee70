"""Lower bounds of squared distances that never lie, whatever the format (chapter 6)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.linalg import vector_norm

U = 2.0**-24  # unit roundoff of float32
CUT = 4 * U  # what tensor cores lose a product: they cut where float32 rounds


def float32_slack(axes: int, unit: float = U) -> float:
    """What ‖a‖² + ‖b‖² − 2a·b can lose in float32, as a share of ‖a‖² + ‖b‖².

    Higham's γ for ``axes`` + 6 operations bounds product and sums, for norms in float64
    added after the product; 6u is for rounding a and b to float32, 3u/2 of each norm at
    most. Of 16-bit numbers tensor cores lose ``CUT`` a product: ``unit`` (chapter 6).
    """
    return (axes + 6) * unit / (1 - (axes + 6) * unit) + 6 * U


class Bounds:
    """Points, in 16 bits at most ``moved`` farther apart than what they stand for."""

    def __init__(self, parts: Iterable[Tensor], dtype: torch.dtype) -> None:
        points = []
        squares = []
        moved = [0.0]
        for exact in parts:
            points.append(exact.to(dtype))
            squares.append(points[-1].double().square().sum(1))
            if dtype != torch.float32:  # there a share of the norm, within the slack
                moved += vector_norm(points[-1].double() - exact, dim=1).amax(0, True)
        self.points = torch.cat(points)
        self.moved = 2 * float(max(moved))
        unit = U if dtype == torch.float32 else CUT
        self.slack = float32_slack(self.points.shape[1], unit)
        self.lowered = ((1 - self.slack) * torch.cat(squares)).float()
        # Tensor cores sum in float32; where there are none, 11-bit products are exact.
        cores = self.points.is_cuda and dtype != torch.float32
        self.sums = {"out_dtype": torch.float32} if cores else {}
        self.points = self.points if cores else self.points.float()

    def between(self, a: Tensor, b: Tensor) -> Float32[Tensor, "rows cols"]:
        """Lower bounds of the squared distances, by one matrix product."""
        low = torch.mm(self.points[a] * -2, self.points[b].T, **self.sums)
        # Added afterwards: a sum that starts from the norms can lose twice the slack.
        return low.add_(self.lowered[b]).add_(self.lowered[a][:, None])
