"""What an inversion gives: a recovered prompt, or an error that carries the verified prefix."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sipit_lite.model import SipItError, StatesError


@dataclass(frozen=True, eq=False)
class Recovery:
    """What SipIt recovered, and how clearly: one entry a position, tensors on the CPU.

    ``distance`` is that of the accepted token, ‖F(v) − ĥ_t‖₂ (beyond the rounding, for states stored in a coarser
    format); ``runner_up`` the smallest among the other tokens tested (infinite where none was); ``radius`` the ε_t that
    ``distance`` had to meet; ``tested`` the number of candidates, the challengers of the accepted one included;
    ``seconds`` the wall-clock time of the whole inversion. ``verified`` is False only where ``on_fail="nearest"`` kept
    a token that no test accepted. ``margin`` holds Δ_{π,t} where ``certify=True`` measured it, else NaN.
    ``layer`` is the one that was taken from a ``Captured``.
    """

    tokens: Int[Tensor, " pos"]
    text: str
    distance: Float[Tensor, " pos"]
    runner_up: Float[Tensor, " pos"]
    radius: Float[Tensor, " pos"]
    tested: Int[Tensor, " pos"]
    verified: Bool[Tensor, " pos"]
    margin: Float[Tensor, " pos"]
    seconds: float
    layer: int | None = None

    @property
    def headroom(self) -> Float[Tensor, " pos"]:
        """Noise that each state could bear on top of its residual: Δ_{π,t}/2 − ``distance`` (Theorem 3.2)."""
        return self.margin / 2 - self.distance

    @property
    def certified(self) -> bool:
        """Whether every residual is below Δ_{π,t}/2: no other token explains its state with so small an error.

        The tokens are the true ones if the noise was below Δ_{π,t}/2 too, the hypothesis of Theorem 3.2.
        """
        return bool((self.headroom > 0).all())


class NotVerified(SipItError):
    """No token lies in the acceptance region; ``recovered`` holds the verified prefix.

    ``position`` counts from 0, ``nearest`` is the closest token tested, ``distance`` its distance, ``radius`` ε_t.
    """

    def __init__(
        self,
        message: str,
        *,
        nearest: int,
        distance: float,
        radius: float,
        recovered: Recovery,
    ):
        super().__init__(message)
        self.nearest, self.distance, self.radius, self.recovered = (
            nearest,
            distance,
            radius,
            recovered,
        )
        self.position = len(recovered.tokens)

    def __reduce__(self) -> tuple:
        # Errors with keywords cannot be pickled as they come, and outcomes have to travel between processes.
        known = {
            name: getattr(self, name)
            for name in ("nearest", "distance", "radius", "recovered")
        }
        return partial(type(self), str(self), **known), ()


class Ambiguous(NotVerified):
    """Several tokens lie in the acceptance region: the noise is too large, or they share one state.

    Exact twins among the embeddings share every state; in a coarse format two tokens may round to the same numbers.
    """


Outcome = Recovery | StatesError | NotVerified


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an inversion; ``recovered`` holds the verified prefix.

    Where several prompts were inverted, ``outcomes`` has what is known of each: finished, failed, or a verified prefix.
    """

    def __init__(self, recovered: Recovery, outcomes: Sequence[Outcome] = ()):
        super().__init__(
            f"interrupted after {len(recovered.tokens)} verified tokens: {recovered.text!r}"
        )
        self.recovered, self.outcomes = recovered, list(outcomes)
