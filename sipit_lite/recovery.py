"""What an inversion gives: a recovered prompt, or an error that carries one."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sipit_lite.model import SipItError, StatesError


@dataclass(eq=False)
class Recovery:
    """What SipIt recovered, and how clearly: one entry a position, on the CPU.

    ``distance`` is ‖F(v) − ĥ_t‖₂ of the accepted token v, ``radius`` the ε_t it had to
    meet, ``runner_up`` the least distance of another token tested, infinite where none
    was; ``tested`` counts v too. ``verified`` is False where none or several verify and
    the nearest was taken (``on_fail="nearest"``); ``twins`` lists by position the
    tokens that verify where several do. ``margin`` is the distance from v's state to
    the nearest of another token, at least Δ_{π,t}, with ``certify=True``, else NaN.
    """

    tokens: Int[Tensor, " pos"]
    distance: Float[Tensor, " pos"]
    runner_up: Float[Tensor, " pos"]
    radius: Float[Tensor, " pos"]
    tested: Int[Tensor, " pos"]
    verified: Bool[Tensor, " pos"]
    margin: Float[Tensor, " pos"]
    text: str = ""
    seconds: float = 0.0
    layer: int | None = None
    twins: dict[int, list[int]] = field(default_factory=dict)

    @property
    def headroom(self) -> Float[Tensor, " pos"]:
        """Noise each state could still bear: ``margin``/2 − ``distance`` (Thm. 3.2)."""
        return self.margin / 2 - self.distance

    @property
    def certified(self) -> bool:
        """Whether all are verified, each residual below half its token's margin."""
        return bool((self.verified & (self.headroom > 0)).all())


class NotVerified(SipItError):
    """No token verifies at ``position``, counted from 0.

    ``recovered`` is the verified prefix, ``nearest`` the closest token tested, at
    ``distance``, and ``radius`` the ε_t that it missed.
    """

    def __init__(self, message: str, *known: "int | float | Recovery") -> None:
        # All of them go to the base: so the error can travel between processes.
        super().__init__(message, *known)
        self.nearest, self.distance, self.radius, self.recovered = known
        self.position = len(self.recovered.tokens)

    def __str__(self) -> str:
        return self.args[0]


class Ambiguous(NotVerified):
    """Several tokens verify: too much noise, or they share one state."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C: ``recovered`` is what one prompt has, ``outcomes`` what each has."""

    def __init__(self, recovered: Recovery, outcomes: "list[Outcome] | None" = None):
        super().__init__(recovered, outcomes)
        self.recovered = recovered
        self.outcomes = outcomes or []

    def __str__(self) -> str:
        return f"interrupted after {self.recovered.verified.sum()} verified tokens"


Outcome = Recovery | StatesError | NotVerified
