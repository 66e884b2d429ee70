"""The verifier: distances with an oracle, cells that hold what they must, refusals."""

import re
from dataclasses import replace

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.linalg import vector_norm
from transformers import ModernBertConfig, ModernBertModel

from sipit_lite import (
    LanguageModel,
    ModelError,
    Observation,
    OneStepMap,
    StatesError,
    load,
    noise_floor,
)
from sipit_lite.acceptance import (
    CLEAR,
    distance_to_stored,
    rounding_half_width,
    try_candidates,
    widen,
)

FLOATS = st.floats(-6e4, 6e4, width=32, allow_subnormal=True)
COARSE = [torch.float16, torch.bfloat16]
CPU_POCKET = load(
    "pocket-gpt2", device="cpu"
)  # hypothesis runs a test many times: no fixture of narrower scope


@pytest.mark.parametrize("dtype", COARSE)
@given(values=arrays("float32", (3, 4), elements=FLOATS))
def test_rounding_never_moves_a_number_out_of_its_cell(
    dtype: torch.dtype, values: object
) -> None:
    """What was stored lies within half a unit of the truth: the true token passes."""
    truth = torch.as_tensor(values)
    stored = truth.to(dtype)
    if not torch.isfinite(stored).all():
        return
    half_width = rounding_half_width(stored, CPU_POCKET)
    assert ((stored.float() - truth).abs() <= half_width).all()
    for row in range(3):
        assert (
            distance_to_stored(
                truth[row : row + 1], stored[row].float(), half_width[row]
            ).item()
            == 0
        )


@pytest.mark.parametrize("dtype", COARSE)
def test_cells_are_no_wider_than_they_must(dtype: torch.dtype) -> None:
    """Numbers that round to different values share no more of a cell than a border."""
    grid = torch.linspace(1, 4, 100_001)
    stored = grid.to(dtype)
    half_width = rounding_half_width(stored[None], CPU_POCKET)[0]
    outside = (grid[:-1] - stored[1:].float()).abs() - half_width[1:]
    # Below a power of two the true cell is half as wide; that side is taken at full
    # width, never too narrow.
    apart = (stored[:-1] != stored[1:]) & (
        torch.frexp(stored[:-1].float()).exponent
        == torch.frexp(stored[1:].float()).exponent
    )
    assert apart.any() and (outside[apart] > -2 * 3e-5).all()


def test_float32_and_float64_have_no_cell(pocket: LanguageModel) -> None:
    """Nothing was lost, so nothing is forgiven."""
    states = pocket.states("exact", 2)
    for dtype in (torch.float32, torch.float64):
        assert not Observation.of(states.to(dtype), pocket, 2).half_width.any()
    assert Observation.of(states.to(torch.bfloat16), pocket, 2).half_width.any()


@given(
    arrays("float32", (5, 6), elements=st.floats(-100, 100, width=32)),
    arrays("float32", 6, elements=st.floats(-100, 100, width=32)),
)
def test_without_a_cell_it_is_the_euclidean_distance(
    candidates: object, observed: object
) -> None:
    """Against a sum of squares in Python's own numbers."""
    found = distance_to_stored(
        torch.as_tensor(candidates), torch.as_tensor(observed), torch.zeros(6)
    )
    for row, value in zip(candidates.tolist(), found.tolist(), strict=True):
        expected = (
            sum((a - b) ** 2 for a, b in zip(row, observed.tolist(), strict=True))
            ** 0.5
        )
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_an_overflowed_candidate_is_infinitely_far() -> None:
    """NaN compares false with everything: not to be read as untested, or as near."""
    found = distance_to_stored(
        torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0]]),
        torch.zeros(2),
        torch.zeros(2),
    )
    assert found.tolist() == [torch.inf, torch.inf]


def test_noise_floor_holds_for_other_prompts(pocket: LanguageModel) -> None:
    """Measured on a random prompt, it bounds the difference of routes on prose.

    At the first, a middle and the last layer, and at every so many positions.
    """
    text = "The noise floor was measured on random tokens; this prompt is prose. "
    ids = pocket.encode(text * 20)[:256]
    assert len(ids) == pocket.n_positions
    for layer in (1, 3, pocket.n_layers):
        states = pocket.states(ids, layer)
        assert noise_floor(pocket, layer) < 1e-4
        for t in range(0, len(ids), 60):
            step = OneStepMap.after(pocket, layer, ids[:t])
            distance = (step.tokens(ids[t : t + 1])[0] - states[t]).norm()
            bound = noise_floor(pocket, layer) * states[t].norm() / 4
            assert distance <= bound, (layer, t)


def test_a_model_that_sees_later_tokens_is_refused() -> None:
    """Its one-step map is no map of the prefix: routes differ by more than rounding."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
    }
    sizes |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    decoder = ModernBertModel(
        ModernBertConfig(**sizes, num_attention_heads=4, max_position_embeddings=40)
    ).eval()
    model = LanguageModel(decoder, name="both ways")
    with pytest.raises(
        ModelError,
        match=r"got both ways, whose states at layer 2 differ by .* \(is it causal\?\)",
    ):
        noise_floor(model, 2)


BAD_STATES = {
    "width": (
        torch.zeros(3, 255),
        "states of shape (3, 255); pocket-gpt2 has shape (T, 256) with T from 1 to 256",
    ),
    "no position": (torch.zeros(0, 256), "states of shape (0, 256)"),
    "too many positions": (torch.zeros(257, 256), "states of shape (257, 256)"),
    "a batch": (torch.zeros(2, 3, 256), "states of shape (2, 3, 256)"),
    "integers": (
        torch.zeros(3, 256, dtype=torch.int64),
        "states of torch.int64; expected",
    ),
    "NaN": (torch.full((2, 256), torch.nan), "NaN or Inf in the state at position 0"),
    "Inf": (
        torch.cat([torch.zeros(4, 256), torch.full((1, 256), torch.inf)]),
        "NaN or Inf in the state at position 4",
    ),
    "overflow": (
        torch.full((2, 256), 1e38),
        "got states of norm 1.6e+39; torch.float32 overflows",
    ),
    "sparse": (
        torch.zeros(2, 256).to_sparse(),
        "torch.sparse_coo; not convertible to torch.float32",
    ),
    "no tensor": ([[0.0] * 256], "states of type list; expected a torch.Tensor"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_states_that_no_prompt_has_are_refused(
    pocket: LanguageModel, case: str
) -> None:
    """Each refusal quotes what was received and what was expected."""
    states, message = BAD_STATES[case]
    with pytest.raises(StatesError, match=re.escape(message)):
        Observation.of(states, pocket, 3)


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), float("inf")])
def test_bad_epsilon_is_refused(pocket: LanguageModel, epsilon: float) -> None:
    """A bound on the noise is finite and not negative."""
    with pytest.raises(StatesError, match=f"got epsilon={epsilon}"):
        Observation.of(torch.zeros(1, 256), pocket, 3, epsilon)


@pytest.mark.parametrize(
    "epsilon", ["a", object(), [0.1, 0.2]], ids=["a word", "an object", "too many"]
)
def test_what_is_no_bound_is_refused(
    pocket: LanguageModel, epsilon: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no one checks annotations: here types are checked before we see them."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    message = re.escape(f"got epsilon={epsilon}; expected one finite")
    with pytest.raises(StatesError, match=message):
        Observation.of(torch.zeros(1, 256), pocket, 3, epsilon)


def test_bad_layer_is_refused(pocket: LanguageModel) -> None:
    """Before anything is computed."""
    with pytest.raises(ModelError, match="got layer 9; pocket-gpt2 has layers 0"):
        Observation.of(Tensor(torch.zeros(1, 256)), pocket, 9)


def test_eight_bit_integers_come_with_their_half_width(pocket: LanguageModel) -> None:
    """Alone they are refused; times their scale, half of it is what rounding moved."""
    states = pocket.states("scale", 3)
    scale = states.abs().amax(1) / 127
    stored = (states / scale[:, None]).round().to(torch.int8)
    with pytest.raises(
        StatesError, match=r"got states of torch\.int8; expected a float"
    ):
        Observation.of(stored, pocket, 3)
    product = stored.float() * scale[:, None]
    seen = Observation.of(product, pocket, 3, half_width=scale / 2)
    torch.testing.assert_close(seen.half_width, (scale / 2)[:, None].expand_as(states))
    assert seen.distance(0, states[:1]) <= seen.radius[0]
    for bad in (scale[1:], -scale, scale * torch.nan, scale[:, None, None]):
        with pytest.raises(StatesError, match=r"got half_width=.* expected one finite"):
            Observation.of(product, pocket, 3, half_width=bad)


def test_the_radius_grows_to_the_noise_of_the_token_itself(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a token is noisier than those measured; never up to another token."""
    ids = pocket.encode("on their way")
    seen = Observation.of(pocket.states(ids, 3), pocket, 3)
    step = OneStepMap.after(pocket, 3, ids[:2])
    # As if its states differed by 1e-4 of their norm from one size of pass to another.
    exact = OneStepMap.tokens

    def noisy(self: OneStepMap, tokens: Tensor) -> Tensor:
        return exact(self, tokens) * (1 + 1e-4 / len(tokens))

    monkeypatch.setattr(OneStepMap, "tokens", noisy)
    radius = float(seen.radius[2])
    distance = seen.distance(2, step.tokens(ids[2:3]))
    assert radius < distance <= 64 * radius
    widen(seen, 2, ids[2:3], float(distance), step)
    assert distance <= seen.radius[2] < 0.05 * vector_norm(seen.states[2])
    # Another token is much farther away, and widens nothing.
    other = Observation.of(pocket.states(ids, 3), pocket, 3)
    wrong = (ids[2:3] + 1) % pocket.vocab_size
    apart = float(other.distance(2, step.tokens(wrong)))
    widen(other, 2, wrong, apart, step)
    assert float(other.radius[2]) == radius


@pytest.mark.parametrize("trusted", [True, False])
def test_a_token_far_out_by_its_own_noise_costs_no_scan(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """Within the radius, but not clearly: where states are apart, its noise says why."""
    ids = pocket.encode("on their way")
    seen = Observation.of(pocket.states(ids, 3), pocket, 3)
    seen = replace(seen, trusted=torch.full_like(seen.trusted, trusted))
    step = OneStepMap.after(pocket, 3, ids[:2])
    radius = float(seen.radius[2])
    share = radius / 2 / float(vector_norm(seen.states[2]))
    exact = OneStepMap.tokens

    def noisy(self: OneStepMap, tokens: Tensor) -> Tensor:
        return exact(self, tokens) * (1 + share / len(tokens))

    order = [ids[2:3], pocket.vocabulary]
    monkeypatch.setattr(OneStepMap, "tokens", noisy)
    distance = try_candidates(step, seen, 2, order, learn=lambda tokens, states: None)
    assert CLEAR * radius < distance[ids[2]] <= radius
    tested = int((~distance.isnan()).sum())
    assert tested == (1 if trusted else pocket.vocab_size)
    # What is as far out with no noise of its own has all tokens tested.
    monkeypatch.setattr(OneStepMap, "tokens", exact)
    moved = replace(seen, states=seen.states * (1 + share))
    moved.radius[2] = radius
    distance = try_candidates(step, moved, 2, order, learn=lambda tokens, states: None)
    assert CLEAR * radius < distance[ids[2]] <= radius
    assert not distance.isnan().any() and float(moved.radius[2]) == radius


def test_a_radius_that_grew_never_hides_the_true_token(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong token, so noisy that it verifies by its own noise: then all are tested."""
    ids = pocket.encode("on their way")
    seen = Observation.of(pocket.states(ids, 3), pocket, 3)
    step = OneStepMap.after(pocket, 3, ids[:2])
    states = step.tokens(pocket.vocabulary)
    distance = seen.distance(2, states)
    wrong = (distance + (distance < 1) * 1e9).argmin()[None]
    # A state as at a sink: huge noise, and tokens no farther apart than it.
    seen.radius[2] = float(distance[wrong]) / 5
    sink = replace(seen, trusted=torch.zeros_like(seen.trusted))
    exact = OneStepMap.tokens

    def noisy(self: OneStepMap, tokens: Tensor) -> Tensor:
        return exact(self, tokens) * (1.5 if len(tokens) == 7 else 1.0)

    monkeypatch.setattr(OneStepMap, "tokens", noisy)
    tested = try_candidates(step, sink, 2, [wrong])
    assert tested[wrong] <= CLEAR * sink.radius[2]  # clearly, by its own noise
    assert tested.isnan().sum() == 0 and int(tested.argmin()) == int(ids[2])
    # Where the growth would reach beyond half of the distance of tokens, there is none.
    near = Observation.of(pocket.states(ids, 3), pocket, 3)
    near.radius[2] = float(distance[wrong]) / 40
    apart = float(near.distance(2, step.tokens(wrong)))
    widen(near, 2, wrong, apart, step)
    assert float(near.radius[2]) == pytest.approx(float(distance[wrong]) / 40)
