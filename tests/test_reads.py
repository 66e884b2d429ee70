"""How often a search waits for the device, counted on the CPU, where waiting is free."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sipit_lite import Gradient, LanguageModel, Lens, OneStepMap, invert
from sipit_lite.acceptance import related
from sipit_lite.experiments.baselines import Random
from sipit_lite.extensions import lens as lens_module
from sipit_lite.io.text import prompts
from sipit_lite.sipit import _Prompt

NUMBERS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")
SHAPES = ("nonzero", "unique", "equal")  # known when the numbers are


class Reads(TorchFunctionMode):
    """All that is made of these tensors counts as on the device, until it is copied.

    Read are numbers, shapes that depend on them, copies to the CPU, and whatever is
    indexed by a mask or by a number on the device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        for tensor in tensors:
            tensor.remote = True

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch; count it if it reads, mark its result if not."""
        name = getattr(function, "__name__", "")
        leaves = tree_leaves((args, kwargs))
        remote = [x for x in leaves if getattr(x, "remote", False)]
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        # What is made or sent by its device's name is there.
        sent = name == "to" and any(isinstance(x, torch.device) for x in args)
        if not remote and not sent and kwargs.get("device") is None:
            return result
        if sent and result is args[0]:
            result = result.clone()  # else what is on the CPU, marked
        read = name in NUMBERS + SHAPES
        if name == "__getitem__":
            parts = [x for x in tree_leaves(args[1]) if getattr(x, "remote", False)]
            read = any(x.ndim == 0 or x.dtype == torch.bool for x in parts)
        if name == "__setitem__":
            read = not getattr(args[0], "remote", False)
        if name == "cpu":
            read = True
            result = result.clone()  # else the very tensor, marked
        else:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    x.remote = True
        self.reads[name] += read
        return result


def counted(model: LanguageModel, layer: int, **options: Any) -> tuple[Reads, dict]:
    """Reads of one inversion that was done before, its passes and its searches."""
    ids = next(prompts(model.tokenizer, "prose", 12, seed=3)).to(model.device)
    states = model.states(ids, layer)
    expected = invert(states, model, layer, **options)
    done = Counter()
    honest = (OneStepMap.tokens, _Prompt.search)

    def tokens(self: OneStepMap, rows: Tensor) -> Tensor:
        done["passes"] += 1
        return honest[0](self, rows)

    def search(self: _Prompt, step: OneStepMap) -> None:
        done["searches"] += 1
        honest[1](self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OneStepMap, "tokens", tokens)
        patch.setattr(_Prompt, "search", search)
        weights = model.decoder.parameters()
        table = (model.embeddings, model.vocabulary, related(model, layer))
        with Reads(*weights, *table, states) as reads:
            recovery = invert(states, model, layer, **options)
    assert torch.equal(recovery.tokens, expected.tokens)
    assert torch.equal(recovery.tokens, ids.cpu())
    return reads, done


def test_the_counter_counts() -> None:
    """What waits for a device is read once, what does not never."""
    x = torch.arange(4.0)
    with Reads(x) as reads:
        y = (2 * x)[1:].cumsum(0)
        assert sum(reads.reads.values()) == 0
        y.tolist(), float(y[0]), bool((y > 3).any()), y.cpu(), y.nonzero()
        y[y > 3], y[y.argmin()], y[y.argmin(0, keepdim=True)]
        host = y.cpu() + 1
        seen = sum(reads.reads.values())
        host.tolist(), bool(host.any())  # on the CPU already
        host[0] = y[0]
    assert (seen, sum(reads.reads.values())) == (8, 9)


# A read a layer would show with the first; a read a batch, or a proposal, with the others.
@pytest.mark.parametrize(
    ("layer", "policy"),
    [(6, Gradient()), (1, Gradient()), (1, Gradient(4)), (1, Random(64))],
)
def test_one_read_a_pass_and_one_a_search(
    pocket: LanguageModel, layer: int, policy: Any
) -> None:
    """Of a batch its nearest token, of a search how it ended; then a few of a prompt."""
    reads, done = counted(pocket, layer, policy=policy, lens=False)
    count = sum(reads.reads.values())
    assert done["searches"] == 12
    # Rivals take a pass of each search, and are read with what ends it.
    assert count <= done["passes"] + 10, dict(reads.reads)


def test_a_draft_is_read_once(pocket: LanguageModel) -> None:
    """One read of all that a draft decides; what it misses is searched."""
    text = list(prompts(pocket.tokenizer, "prose", 32))[:200]
    lens = Lens.fit(pocket, 1, prompts=text, tokens=4000, features=0)
    reads, done = counted(pocket, 1, lens=lens)
    assert done["searches"] <= 1
    assert sum(reads.reads.values()) <= 10 * done["searches"] + 12, dict(reads.reads)


def test_a_fit_waits_once_a_pass(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments stay where they are summed; transformers reads if prompts are packed."""
    # The prior is weighed after the fit, on few prompts.
    monkeypatch.setattr(lens_module, "calibrated", lambda lens, others: (0.0, 1.0))
    text = list(prompts(pocket.tokenizer, "prose", 32))[:256]
    table = (pocket.embeddings, pocket.vocabulary)
    with Reads(*pocket.decoder.parameters(), *table) as reads:
        Lens.fit(pocket, 1, prompts=text, features=8)
    passes = len(text) * 32 // lens_module.PASS
    assert sum(reads.reads.values()) == passes == 4, dict(reads.reads)
