"""What ``invert`` takes where no lens is given: one that is fitted, or what needs none.

A vocabulary of many thousand tokens is dear to search, so there what was tested teaches
(``reading``). Where even that would cost more than a lens, one is fitted and kept.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from platformdirs import user_cache_path
from torch import Tensor

from sipit_lite.extensions.leaked import Leaked
from sipit_lite.extensions.lens import Lens, LensError
from sipit_lite.extensions.reading import Reading
from sipit_lite.io.files import fingerprint
from sipit_lite.model import LanguageModel, SipItError
from sipit_lite.policies import Drafter

TOKENS = 20_000  # of a fit; a smaller vocabulary is searched in less time
FEATURES = 2048
BOUND = 2**23  # tests, T·|V| of Theorem 3.1, from which on a lens comes first
FOLDER = user_cache_path("sipit-lite")  # where lenses are kept


def offered(
    model: LanguageModel, layer: int, positions: int, fits: bool
) -> Drafter | None:
    """A drafter for so many positions, or None where the gradient is good enough."""
    # Blocks that run: the one that reads a layer caches it.
    depth = layer + (isinstance(model, Leaked) and model.cached)
    large = model.vocab_size > TOKENS and depth > 0
    bound = positions * model.vocab_size + model.measured.get(("bound", layer), 0)
    if large:  # a token may cost as much as the fit, so calls add up
        model.measured["bound", layer] = bound
    # The fingerprint reads all weights: only where some lens is there at all.
    stored = large and any(FOLDER.glob(f"*-{layer}.safetensors"))
    wanted = bound > BOUND or (stored and place(model, layer).exists())
    lens = lens_of(model, layer) if fits and depth > 0 and wanted else None
    return lens or (Unfitted(model, layer, fits) if large else None)


def place(model: LanguageModel, layer: int) -> Path:
    """The file of the lens of a model, by its weights, and a layer."""
    return FOLDER / f"{fingerprint(model)[:32]}-{layer}.safetensors"


def lens_of(model: LanguageModel, layer: int) -> Lens | None:
    """The lens of an earlier call or fit, else a new one; None where it cannot be."""
    key = ("lens", layer)
    if key in model.measured:
        return model.measured[key]
    path = place(model, layer)
    say = {"file": sys.stderr, "flush": True}
    try:
        lens = Lens.load(path, model)
        lens.check(model, layer)
    except LensError:  # none there, or spoilt
        lens = None
        print(f"sipit-lite fits a lens of layer {layer}, kept as {path}; "
              "lens=False does without", **say)  # fmt: skip
        sizes = {"tokens": TOKENS, "features": FEATURES}
        try:
            lens = Lens.fit(model, layer, **sizes, progress=True)
            lens.save(path)
        except SipItError as error:  # too little memory or text, or a full disk
            print(f"sipit-lite: {error}", **say)
    return model.measured.setdefault(key, lens)


@dataclass(frozen=True, eq=False)
class Unfitted:
    """In the place of a lens: nothing drafted, all is learned in the search."""

    model: LanguageModel
    layer: int
    fits: bool  # a lens, once a prompt has cost as much
    fitted: ClassVar[bool] = False
    weight: ClassVar[float] = 10.0  # of the prior: 1 to 100 test as many, to 5 %

    def check(self, model: LanguageModel, layer: int) -> None:
        """Nothing to refuse: it was made for this call."""

    def read(self, prompts: Sequence[Tensor]) -> list[tuple[Tensor, Reading]]:
        """No draft, and a search for every token."""
        return [(self.model.vocabulary[:0], Reading(self, x)) for x in prompts]

    def after(self, tests: int) -> "Lens | Unfitted":
        """What to go on with after so many tests of one prompt."""
        wanted = self.fits and tests > TOKENS
        return (lens_of(self.model, self.layer) if wanted else None) or self
