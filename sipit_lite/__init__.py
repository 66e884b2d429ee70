"""Hidden states that give back the prompt: injectivity and SipIt, small enough to read."""

from sipit_lite.models import LanguageModel, ModelError, load
from sipit_lite.onestep import OneStepMap

__all__ = ["LanguageModel", "ModelError", "OneStepMap", "load"]
