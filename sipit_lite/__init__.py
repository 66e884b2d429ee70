"""Hidden states that give back the prompt: injectivity and SipIt, small to read."""

from importlib import import_module
from typing import Any

# What each room offers, imported at its first use: torch takes seconds.
ROOMS = {
    "model": ("LanguageModel", "ModelError", "SipItError", "StatesError"),
    "onestep": ("OneStepMap",),
    "acceptance": ("Observation", "noise_floor"),
    "policies": ("Drafter", "Gradient", "Policy"),
    "recovery": ("Ambiguous", "Interrupted", "NotVerified", "Recovery"),
    "extensions": ("invert", "invert_many"),
    "collisions": ("CollisionReport", "closest_pairs"),
    "io.loading": ("load",),
    "io.capture": ("Captured", "capture", "read_states", "write_states"),
    "io.shards": ("last_states",),
    "extensions.lens": ("Lens", "LensError"),
    "extensions.laststate": ("LastStateError", "NotRecovered", "invert_last"),
    "extensions.newton": ("Newton",),
    "extensions.leaked": ("Leaked",),
    "experiments.baselines": ("Published", "Random"),
    "experiments.reproduce": ("continuations",),
}
__all__ = [name for names in ROOMS.values() for name in names]


def __getattr__(name: str) -> Any:
    """A public name, from its room."""
    for room, names in ROOMS.items():
        if name in names:
            return getattr(import_module(f"sipit_lite.{room}"), name)
    raise AttributeError(f"module 'sipit_lite' has no attribute {name!r}")
