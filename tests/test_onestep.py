"""The one-step map over a cache is the full pass.

Its margin and gradient have oracles of their own.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel

from sipit_lite import LanguageModel, ModelError, OneStepMap, onestep
from sipit_lite.acceptance import noise_floor
from sipit_lite.extensions.newton import jacobian

Family = tuple[PreTrainedModel, LanguageModel]


def test_cached_step_is_the_full_pass(family: Family, prompt: Tensor) -> None:
    """Every family, layer and position, within the measured noise.

    Windows shorter than the prompt are included.
    """
    model = family[1]
    for layer in range(model.n_layers + 1):
        full, step = model.states(prompt, layer), OneStepMap.after(model, layer)
        for t, token in enumerate(prompt.tolist()):
            found = step.tokens(model.vocabulary)[token]
            assert (found - full[t]).norm() <= noise_floor(model, layer) * full[
                t
            ].norm()
            step = step.follow(prompt[t : t + 1].to(model.device))[1]
        assert step.position == len(prompt)


def test_reading_a_prefix_at_once_or_by_token_is_the_same(
    family: Family, prompt: Tensor
) -> None:
    """after(prefix) and repeated extend agree."""
    model = family[1]
    grown = OneStepMap.after(model, 3)
    for token in prompt.to(model.device).split(1):
        grown = grown.follow(token)[1]
    at_once = OneStepMap.after(model, 3, prompt)
    tokens = torch.arange(7, device=model.device)
    torch.testing.assert_close(at_once.tokens(tokens), grown.tokens(tokens))


def test_branches_are_prompts_of_their_own(family: Family, prompt: Tensor) -> None:
    """Several continuations in one pass: states of full passes, maps that go on."""
    model, layer, prefix = family[1], 3, prompt[:3]
    rows = torch.stack(
        [prompt[3:7], prompt[3:7].flip(0), (prompt[3:7] + 1) % model.vocab_size]
    )
    states, steps = OneStepMap.after(model, layer, prefix).branch(rows)
    tokens = torch.arange(5, device=model.device)
    for row, found, step in zip(rows, states, steps, strict=True):
        ids = torch.cat([prefix, row])
        torch.testing.assert_close(found, model.states(ids, layer)[3:])
        torch.testing.assert_close(
            step.tokens(tokens), OneStepMap.after(model, layer, ids).tokens(tokens)
        )


def test_maps_do_not_share_what_they_grow(pocket: LanguageModel) -> None:
    """Extending one way leaves the other ways alone."""
    start = OneStepMap.after(pocket, 2, pocket.encode("one"))
    tokens = torch.arange(5, device=pocket.device)
    before = start.tokens(tokens)
    start.follow(tokens[3:])[1].tokens(tokens)
    assert torch.equal(start.tokens(tokens), before)


def test_chunks_do_not_matter(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More candidates than rows in one pass: same states, in order."""
    step = OneStepMap.after(pocket, 2, pocket.encode("chunks"))
    tokens = torch.arange(50, device=pocket.device)
    rows = step.tokens(tokens)
    monkeypatch.setattr(onestep, "ROWS", 7)
    torch.testing.assert_close(step.tokens(tokens), rows)


def test_few_after_a_long_prefix_go_in_parts(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of at most 96 rows here, with the states of one pass; a scan has longer ones."""
    ids = torch.arange(200, device=pocket.device)
    step = OneStepMap.after(pocket, 6, ids)
    together = step.embedding(pocket.embeddings[ids]).detach()
    sizes = []
    run = OneStepMap._run

    def counted(self: OneStepMap, embeds: torch.Tensor, cache: object) -> torch.Tensor:
        sizes.append(len(embeds))
        return run(self, embeds, cache)

    monkeypatch.setattr(OneStepMap, "_run", counted)
    away = (step.tokens(ids) - together).norm(dim=1)
    assert sizes == [96, 96, 8]
    assert (away <= noise_floor(pocket, 6) * together.norm(dim=1)).all()
    sizes.clear()
    step.tokens(torch.arange(300, device=pocket.device))
    assert sizes[0] > 96


class Copies(TorchFunctionMode):
    """Counts the numbers that are copied to put a prefix of nine before rows."""

    numbers = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch; those that join or repeat tensors are counted."""
        result = function(*args, **kwargs or {})
        joins = getattr(function, "__name__", "") in ("cat", "repeat", "clone")
        if joins and result.shape[2:3] == (10,):
            self.numbers += result.numel()
        return result


def test_a_scan_copies_its_prefix_once(family: Family, prompt: Tensor) -> None:
    """In passes of any size, the last smaller: the states of each pass by itself."""
    model = family[1]
    step = OneStepMap.after(model, 2, prompt[:9])
    table = model.embeddings[:50]
    alone = torch.cat([step.embedding(e) for e in table.split(8)])
    with Copies() as copies:
        assert torch.equal(step.embedding(table, 8), alone)
    past = sum(x.numel() for pair in step.past for x in pair)
    # Eight rows of ten positions, where seven passes would copy fifty.
    assert copies.numbers == 8 * past * 10 // 9
    # Where nothing stands before it, nothing is shared.
    start = OneStepMap.after(model, 2)
    alone = torch.cat([start.embedding(e) for e in table.split(8)])
    assert torch.equal(start.embedding(table, 8), alone)


def test_slopes_of_rows_are_those_of_each_alone(pocket: LanguageModel) -> None:
    """Written behind the prefix, keys and values carry gradients."""
    step = OneStepMap.after(pocket, 3, pocket.encode("slopes of many"))
    rows = pocket.embeddings[20:23].clone().requires_grad_()
    step.embedding(rows).square().sum().backward()
    for i in range(3):
        row = pocket.embeddings[20 + i].clone().requires_grad_()
        step.embedding(row[None]).square().sum().backward()
        torch.testing.assert_close(rows.grad[i], row.grad, rtol=1e-4, atol=1e-3)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many candidates each pass took, and the honest states of all."""
    sizes: list[int] = []
    honest = OneStepMap._run

    def run(self: OneStepMap, embeds: Tensor, cache: Cache) -> Tensor:
        sizes.append(len(embeds))
        return honest(replace(self, model=here(self.model)), embeds, cache)

    monkeypatch.setattr(OneStepMap, "_run", run)
    return sizes


def on_a_gpu(model: LanguageModel) -> LanguageModel:
    """The same model, which says that it is elsewhere."""
    there = copy.copy(model)
    there.device = torch.device("cuda", 0)
    return there


def here(model: LanguageModel) -> LanguageModel:
    """The same model, which says where it is."""
    real = copy.copy(model)
    real.device = model.embeddings.device
    return real


@pytest.mark.parametrize("gigabytes", [0.0, 0.5, 70.0])
@pytest.mark.parametrize("text", ["", "a prefix of several tokens " * 8])
def test_on_a_gpu_a_pass_takes_what_fits(
    pocket: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[int],
    gigabytes: float,
    text: str,
) -> None:
    """Of a scan thousands, where half the free memory holds them, else as elsewhere."""
    if pocket.embeddings.is_cuda:
        pytest.skip("the memory of this device is its own")
    free = int(gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 10**9))
    prefix = pocket.encode(text) if text else None
    step = OneStepMap.after(pocket, 2, prefix)
    passes.clear()
    expected = step.tokens(pocket.vocabulary)
    assert passes == [256] * 16
    passes.clear()
    found = replace(step, model=on_a_gpu(pocket)).tokens(pocket.vocabulary)
    torch.testing.assert_close(found, expected)
    assert sum(passes) == 4096
    # Keys and values of two blocks, twice, and sixty-four widths, four bytes each.
    row = 4 * (2 * 2 * 2 * 256 * step.position + 64 * 256)
    fits = free // 2 // row
    assert passes[0] == min(max(fits, 256), 4096)
    assert (gigabytes > 60) == (passes == [4096]) or not text


def test_few_candidates_ask_no_gpu_for_its_memory(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch, passes: list[int]
) -> None:
    """It costs a call to the driver; a search proposes few at a time."""

    def refuse(device: object) -> None:
        raise AssertionError("was queried")

    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    there = replace(OneStepMap.after(pocket, 2), model=on_a_gpu(pocket))
    assert there.tokens(pocket.vocabulary[:256]).shape == (256, 256)
    assert passes == [256]


def test_gradient_is_that_of_finite_differences() -> None:
    """In float64, where central differences have ten digits."""
    from sipit_lite import load

    model = load("pocket-gpt2", device="cpu", dtype=torch.float64)
    step = OneStepMap.after(model, 6, model.encode("slope"))
    e, generator = (
        model.embeddings[7].clone().requires_grad_(),
        torch.Generator().manual_seed(1),
    )
    direction, weights = torch.randn(
        2, model.d_model, dtype=torch.float64, generator=generator
    )
    slope = (
        torch.autograd.grad((step.embedding(e[None])[0] * weights).sum(), e)[0]
        @ direction
    )
    h = 1e-5
    with torch.no_grad():
        ahead, behind = (
            step.embedding(torch.stack([e + h * direction, e - h * direction]))
            @ weights
        )
    assert float(slope) == pytest.approx(float((ahead - behind) / (2 * h)), rel=1e-6)


def test_the_context_has_an_end(family: Family) -> None:
    """The last position works, one more is refused."""
    model = family[1]
    full = torch.zeros(model.n_positions, dtype=torch.int64, device=model.device)
    assert OneStepMap.after(model, 1, full[:-1]).tokens(full[:1]).shape == (
        1,
        model.d_model,
    )
    with pytest.raises(ModelError, match=f"prefix of {model.n_positions} tokens"):
        OneStepMap.after(model, 1, full).tokens(full[:1])


def test_jacobian_by_finite_differences(family: Family, prompt: Tensor) -> None:
    """Central differences of the same map, at an embedding that is no token's."""
    model = family[1]
    step = OneStepMap.after(model, 2, prompt[:5])
    e = (model.embeddings[3] + model.embeddings[4]) / 2
    found, size = jacobian(step, e), 1e-3
    moved = size * torch.eye(len(e)).to(e)
    with torch.no_grad():
        expected = (step.embedding(e + moved) - step.embedding(e - moved)).T / (
            2 * size
        )
    assert torch.allclose(found, expected, atol=5e-3 * float(expected.abs().max()))


def test_a_full_device_gets_fewer_candidates_a_pass(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is halved until it fits, and the states are the same.

    One candidate that does not fit is an error.
    """
    step, honest, sizes = (
        OneStepMap.after(pocket, 2, pocket.encode("full")),
        OneStepMap._run,
        [],
    )

    def small(self: OneStepMap, e: Tensor, cache: Cache) -> Tensor:
        sizes.append(len(e))
        if len(e) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, e, cache)

    tokens = torch.arange(300, device=pocket.device)
    expected, room = step.tokens(tokens), 20
    monkeypatch.setattr(OneStepMap, "_run", small)
    with pytest.warns(UserWarning, match="out of memory: fewer rows at a time"):
        torch.testing.assert_close(step.tokens(tokens), expected)
    assert max(sizes) > 20 and min(sizes) > 1 and sizes[-1] <= 20
    room = 0
    refused = r"got one candidate after 2 tokens, which do not fit .* lower layer"
    with pytest.warns(UserWarning), pytest.raises(ModelError, match=refused):
        step.tokens(tokens)


def test_a_full_device_is_an_answer(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Jacobian, a pass over a prompt: what was too much, and what may fit.

    Other errors stay what they are.
    """
    step, token = (
        OneStepMap.after(pocket, 2, pocket.encode("full")),
        pocket.embeddings[5],
    )

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(OneStepMap, "_run", full)
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(
        ModelError, match="got a Jacobian of 256 rows after 2 tokens, which do not fit"
    ):
        jacobian(step, token)
    with pytest.raises(ModelError, match="got 1 prompts of 3 tokens, which do not fit"):
        step.follow(torch.tensor([5], device=step.model.device))
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        jacobian(step, token)
