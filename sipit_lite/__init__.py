"""Hidden states that give back the prompt: injectivity and SipIt, small enough to read."""

from sipit_lite.acceptance import Observation, noise_floor
from sipit_lite.collisions import (
    CollisionReport,
    Margins,
    closest_pairs,
    continuations,
    margins,
)
from sipit_lite.extensions.laststate import LastStateError, NotRecovered, invert_last
from sipit_lite.extensions.lens import Lens, LensError
from sipit_lite.io.capture import Captured, capture, read_states, write_states
from sipit_lite.io.loading import load
from sipit_lite.io.shards import last_states
from sipit_lite.model import LanguageModel, ModelError, StatesError
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Gradient, Newton, Policy, Random
from sipit_lite.recovery import Ambiguous, Interrupted, NotVerified, Recovery
from sipit_lite.sipit import invert, invert_many

__all__ = [
    "Ambiguous", "Captured", "CollisionReport", "Gradient", "Interrupted", "LanguageModel", "LastStateError", "Lens",
    "LensError", "Margins", "ModelError", "Newton", "NotRecovered", "NotVerified", "Observation", "OneStepMap",
    "Policy", "Random", "Recovery", "StatesError", "capture", "closest_pairs", "continuations", "invert",
    "invert_last", "invert_many", "last_states", "load", "margins", "noise_floor", "read_states", "write_states",
]  # fmt: skip
