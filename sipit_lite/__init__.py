"""Hidden states that give back the prompt: injectivity and SipIt, small to read."""

from sipit_lite.acceptance import Observation, noise_floor
from sipit_lite.collisions import CollisionReport, closest_pairs
from sipit_lite.experiments.margins import Margins, continuations, margins
from sipit_lite.extensions.laststate import LastStateError, NotRecovered, invert_last
from sipit_lite.extensions.lens import Lens, LensError
from sipit_lite.extensions.newton import Newton
from sipit_lite.io.capture import Captured, capture, read_states, write_states
from sipit_lite.io.loading import load
from sipit_lite.io.shards import last_states
from sipit_lite.model import LanguageModel, ModelError, SipItError, StatesError
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Drafter, Gradient, Policy, Published, Random
from sipit_lite.recovery import Ambiguous, Interrupted, NotVerified, Recovery
from sipit_lite.sipit import invert, invert_many
