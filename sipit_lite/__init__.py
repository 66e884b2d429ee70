"""Hidden states that give back the prompt: injectivity and SipIt, small enough to read."""

from sipit_lite.activations import Captured, capture, read_states, write_states
from sipit_lite.collisions import CollisionReport, closest_pairs, continuations
from sipit_lite.laststate import LastStateError, NotRecovered, invert_last
from sipit_lite.lens import Lens, LensError
from sipit_lite.margin import Margins, margins
from sipit_lite.models import LanguageModel, ModelError, load
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Gradient, Newton, Policy, Random
from sipit_lite.shards import last_states
from sipit_lite.sipit import Ambiguous, Interrupted, NotVerified, Recovery, invert, invert_many
from sipit_lite.verify import Observation, StatesError, noise_floor

__all__ = [
    "Ambiguous", "Captured", "CollisionReport", "Gradient", "Interrupted", "LanguageModel", "LastStateError", "Lens",
    "LensError", "Margins", "ModelError", "Newton", "NotRecovered", "NotVerified", "Observation", "OneStepMap",
    "Policy", "Random", "Recovery", "StatesError", "capture", "closest_pairs", "continuations", "invert",
    "invert_last", "invert_many", "last_states", "load", "margins", "noise_floor", "read_states", "write_states",
]  # fmt: skip
