"""SipIt is exact where it answers, and answers nothing that it cannot verify."""

import copy
import dataclasses
import pickle
import random
import signal
import time
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import margins
from torch import Tensor
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from sipit_lite import (
    Ambiguous,
    Gradient,
    Interrupted,
    LanguageModel,
    Lens,
    ModelError,
    NotVerified,
    Observation,
    OneStepMap,
    Published,
    Random,
    StatesError,
    invert,
    invert_many,
    load,
)
from sipit_lite.acceptance import repeated
from sipit_lite.experiments.perturb import twins
from sipit_lite.io.text import prompts

Family = tuple[PreTrainedModel, LanguageModel]
FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
TEXTS = [
    ("Language models forget nothing.", 0),
    ("Language models forget nothing.", 3),
    ("Language models forget nothing.", 6),
    ("for i in range(10):\n    print(i)\n", 3),
    ("naïve 🙂 привет 世界", 1),
]


def brute_force(model: LanguageModel, states: Tensor, layer: int) -> list[int]:
    """The oracle: full passes without a cache or radius, the nearest of all tokens."""
    prefix: list[int] = []
    for t, row in enumerate(states):
        rows = torch.tensor(
            [[*prefix, v] for v in range(model.vocab_size)], device=model.device
        )
        with torch.no_grad():
            found = model.decoder(rows, output_hidden_states=True).hidden_states[layer][
                :, t
            ]
        prefix.append(int((found - row).norm(dim=1).argmin()))
    return prefix


def test_every_family_at_every_layer(family: Family, prompt: Tensor) -> None:
    """Exact, and equal to brute force.

    That one reads the layers below the last, of which transformers gives the states.
    """
    model = family[1]
    for layer in range(model.n_layers + 1):
        states = model.states(prompt, layer)
        if layer < model.n_layers:
            assert brute_force(model, states, layer) == prompt.tolist()
        ways = [(Gradient(), len(prompt)), (Random(), len(prompt))]
        # The slow one where the map is simplest, and where it is deepest.
        if layer in (1, model.n_layers):
            ways.append((Published(), 4))
        for policy, count in ways:
            recovery = invert(states[:count], model, layer, policy=policy)
            assert recovery.tokens.tolist() == prompt[:count].tolist(), policy
            assert (recovery.distance <= recovery.radius).all()
            assert (recovery.runner_up > recovery.radius).all()
            assert (recovery.tested >= 2).all()
            assert (recovery.tested <= model.vocab_size).all()


@pytest.mark.parametrize(("text", "layer"), TEXTS)
def test_text_comes_back(pocket: LanguageModel, text: str, layer: int) -> None:
    """First, middle and last layer of the trained model."""
    assert invert(pocket.states(text, layer), pocket, layer).text == text


@dataclasses.dataclass(frozen=True)
class Spy:
    """The vocabulary in order; it notes the numbers that a policy would have drawn."""

    drawn: list[int]

    def proposals(
        self, step: OneStepMap, observed: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """All tokens at once."""
        self.drawn.append(
            int(torch.randint(step.model.vocab_size, (), generator=generator))
        )
        yield step.model.vocabulary


def test_random_starts_are_not_the_answers(pocket: LanguageModel) -> None:
    """Else a prompt drawn with the seed of the inversion would leak into the search."""
    ids, spy = next(prompts(pocket.tokenizer, "random", 6, seed=5)), Spy([])
    invert(pocket.states(ids, 1), pocket, 1, policy=spy, seed=5)
    assert len(spy.drawn) == 6 and not set(spy.drawn) & set(ids.tolist())


def test_edge_prompts(pocket: LanguageModel) -> None:
    """One token, the end-of-text token, one token repeated, and the full context."""
    end = pocket.tokenizer.eos_token_id
    for prompt in ([7], [end], [7] * 20, [end] * 5):
        ids = torch.tensor(prompt)
        assert torch.equal(invert(pocket.states(ids, 1), pocket, 1).tokens, ids)
    small = TINY[0]
    full = torch.randint(300, (16,), generator=torch.Generator().manual_seed(0))
    assert len(full) == small.n_positions
    assert torch.equal(invert(small.states(full, 1), small, 1).tokens, full)


def test_certified_means_the_whole_vocabulary(pocket: LanguageModel) -> None:
    """Every token tested, so the runner-up is the nearest of all others."""
    ids = pocket.encode("certify")
    recovery = invert(pocket.states(ids, 2), pocket, 2, certify=True)
    assert (recovery.tested == pocket.vocab_size).all()
    states = OneStepMap.after(pocket, 2).tokens(pocket.vocabulary)
    expected = (states - states[ids[0]]).norm(dim=1).topk(2, largest=False).values[1]
    assert float(recovery.runner_up[0]) == pytest.approx(float(expected), rel=1e-3)


def test_rounded_states_are_exact_where_noise_is_under_half_the_margin(
    pocket: LanguageModel,
) -> None:
    """Theorem 3.2's hypothesis, measured at each position, and its conclusion."""
    ids = pocket.encode("Rounded, yet exact.")[:2]
    for layer, dtype in ((1, torch.bfloat16), (3, torch.float16)):
        states = pocket.states(ids, layer)
        half = margins(pocket, ids, layer).prefix / 2
        stored = states.to(dtype)
        assert ((states - stored.float()).norm(dim=1).cpu() < half).all()
        assert torch.equal(invert(stored, pocket, layer).tokens, ids.cpu())


def tiny(seed: int, spread: float) -> LanguageModel:
    """A random model whose embeddings lie close together: coarse formats collide."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=16)
    decoder = GPT2Model(config).eval().requires_grad_(False)
    noise = torch.randn(12, 64, generator=torch.Generator().manual_seed(seed))
    decoder.wte.weight[:12] = decoder.wte.weight[:1] + spread * noise
    return LanguageModel(decoder)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    layer=st.sampled_from([0, 1, 2]),
    spread=st.sampled_from([1e-1, 1e-3, 3e-5, 1e-6, 1e-8]),
    dtype=st.sampled_from(FORMATS),
    policy=st.sampled_from([Gradient(), Gradient(4, 3), Random(), Random(3)]),
)
def test_no_silent_error(
    seed: int, spread: float, layer: int, dtype: torch.dtype, policy: Gradient | Random
) -> None:
    """However coarse the format and however close the tokens.

    Exact, or a named refusal with a true prefix.
    """
    model = TINY[seed % len(TINY)] if spread == 1e-1 else tiny(seed, spread)
    ids = torch.randint(12, (3,), generator=torch.Generator().manual_seed(seed))
    states = model.states(ids, layer).to(dtype)
    try:
        assert torch.equal(
            invert(states, model, layer, seed=seed, policy=policy).tokens, ids
        )
    except NotVerified as refusal:
        assert torch.equal(refusal.recovered.tokens, ids[: refusal.position])
        assert refusal.position < len(ids) and refusal.distance >= 0


TINY = [tiny(seed, 1e-1) for seed in range(2)]


@pytest.mark.parametrize(
    ("policy", "seeds"), [(Published(), 5), (Random(16), 20), (Random(), 20)], ids=repr
)
def test_no_silent_error_beside_a_massive_dimension(
    policy: Gradient | Random, seeds: int
) -> None:
    """GPT-2 has states of norm 3000 at position 0: other tokens fit into such a radius.

    Whichever token is tested first, the answer is the prompt or a refusal; and some
    prompts are refused.
    """
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    decoder = GPT2Model(config).eval().requires_grad_(False)
    decoder.wpe.weight[:, 0] += 120_000
    model, refused = LanguageModel(decoder, name="massive"), 0
    for seed in range(seeds):
        ids = torch.randint(500, (2,), generator=torch.Generator().manual_seed(seed))
        try:
            assert torch.equal(
                invert(model.states(ids, 0), model, 0, policy=policy, seed=seed).tokens,
                ids,
            )
        except NotVerified:
            refused += 1
    assert refused > 0


def test_coarse_formats_are_refused_where_tokens_collide() -> None:
    """Else the test above would pass if nothing was ever refused, or everything."""
    model, ids = tiny(0, 1e-8), torch.tensor([3, 5])
    with pytest.raises(Ambiguous, match=r"position 0: \d+ tokens verify, among them"):
        invert(model.states(ids, 0).to(torch.bfloat16), model, 0)
    assert torch.equal(
        invert(TINY[0].states(ids, 0).to(torch.bfloat16), TINY[0], 0).tokens, ids
    )


@pytest.mark.parametrize("policy", [Gradient(), Random(1)], ids=repr)
def test_twin_embeddings_are_ambiguous(policy: Gradient | Random) -> None:
    """Two tokens with one embedding row.

    No state can tell them apart, whatever the policy tries first.
    """
    model = twins(TINY[0], 4, 9)
    with pytest.raises(Ambiguous, match="2 tokens verify") as refusal:
        invert(model.states(torch.tensor([8, 4]), 2), model, 2, policy=policy)
    assert refusal.value.position == 1
    assert refusal.value.recovered.tokens.tolist() == [8]


def test_noise_within_epsilon_is_exact_and_without_it_refused(
    pocket: LanguageModel,
) -> None:
    """Theorem 3.2: noise under half the margin; the user says how much there may be."""
    ids = pocket.encode("noise")
    states = pocket.states(ids, 1)
    half = float(margins(pocket, ids, 1).prefix.min()) / 2
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(
        states
    )
    noisy = states + 0.9 * half * noise / noise.norm(dim=1, keepdim=True)
    assert torch.equal(invert(noisy, pocket, 1, epsilon=0.95 * half).tokens, ids.cpu())
    with pytest.raises(
        NotVerified, match=r"position 0: no token verifies \(noisy states need epsilon"
    ):
        invert(noisy, pocket, 1)


def test_noise_beyond_the_margin_is_refused_not_guessed(pocket: LanguageModel) -> None:
    """An epsilon so large that several tokens fit."""
    with pytest.raises(Ambiguous, match="tokens verify"):
        invert(pocket.states("loud", 3), pocket, 3, epsilon=1e4)


def test_states_of_another_layer_or_model_are_refused(pocket: LanguageModel) -> None:
    """Nothing verifies: position, nearest token, its distance and radius are named."""
    states = pocket.states("another layer", 1)
    for model, layer in (
        (pocket, 2),
        (load("pocket-gpt2", random_init=True, device=pocket.device), 1),
    ):
        with pytest.raises(
            NotVerified,
            match=r"position 0: no token verifies.*nearest of 4096 tested is \d+",
        ) as refusal:
            invert(states, model, layer)
        assert refusal.value.distance > refusal.value.radius > 0
        assert (
            refusal.value.recovered.text == ""
            and len(refusal.value.recovered.tokens) == 0
        )


@pytest.mark.parametrize("spoiled", [1, 4])
def test_what_was_recovered_comes_with_the_error(
    pocket: LanguageModel, spoiled: int
) -> None:
    """A state changed in one place stops the inversion there; the prefix stays."""
    ids = pocket.encode("the prefix is kept, always")
    states = pocket.states(ids, 1).clone()
    states[spoiled, 0] += 1.0
    with pytest.raises(NotVerified) as refusal:
        invert(states, pocket, 1)
    assert refusal.value.position == spoiled
    assert torch.equal(refusal.value.recovered.tokens, ids[:spoiled].cpu())
    assert repr(pocket.decode(ids[:spoiled])) in str(refusal.value)


@dataclasses.dataclass(frozen=True)
class StopsAt:
    """A policy during which somebody presses Ctrl-C."""

    position: int

    def proposals(
        self, step: OneStepMap, observed: Tensor, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """The vocabulary, until the position comes."""
        if step.position == self.position:
            raise KeyboardInterrupt
        yield step.model.vocabulary


def test_ctrl_c_keeps_the_prefix(pocket: LanguageModel) -> None:
    """The exception is still a KeyboardInterrupt, and carries what was verified."""
    ids = pocket.encode("stop here, please")
    with pytest.raises(KeyboardInterrupt) as stop:
        invert(pocket.states(ids, 2), pocket, 2, policy=StopsAt(3))
    assert isinstance(stop.value, Interrupted)
    assert torch.equal(stop.value.recovered.tokens, ids[:3].cpu())


def test_ctrl_c_while_states_are_checked_keeps_all_outcomes(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One outcome a prompt, the verified tokens among them; the error can travel."""
    honest = Observation.of
    calls = []

    def pressed(*given: object) -> Observation:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(Observation, "of", pressed)
    states = [pocket.states(text, 2) for text in ("one", "two", "three")]
    with pytest.raises(Interrupted) as stop:
        invert_many(states, pocket, 2)
    assert len(stop.value.outcomes) == 3
    copied = pickle.loads(pickle.dumps(stop.value))
    assert str(copied) == str(stop.value) == "interrupted after 0 verified tokens"
    assert len(copied.outcomes) == 3


@pytest.fixture
def alarm(bars: None) -> Iterator[None]:
    """The signal of a timer presses Ctrl-C."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_ctrl_c_at_any_moment_loses_nothing(pocket: LanguageModel, alarm: None) -> None:
    """Signals at random times: all outcomes, each a prefix; settings are restored."""
    ids = [pocket.encode(text) for text in ("one, two", "three, four", "five")]
    states = [pocket.states(row, 1) for row in ids]
    invert_many(states, pocket, 1)  # measures what is measured once
    started = time.perf_counter()
    invert_many(states, pocket, 1)
    usual = time.perf_counter() - started
    draws = random.Random(0)
    format_before = torch.get_default_dtype()
    stopped = 0
    for _ in range(30):
        # A timer sends what Ctrl-C sends; from within the call to just behind it.
        signal.setitimer(signal.ITIMER_REAL, draws.uniform(0.05, 0.9) * usual)
        try:
            outcomes = invert_many(states, pocket, 1)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted as stop:
            outcomes = stop.outcomes
            stopped += 1
        assert len(outcomes) == 3
        for row, outcome in zip(ids, outcomes, strict=True):
            known = outcome.tokens
            assert outcome.verified.all() and torch.equal(known, row[: len(known)])
        assert torch.get_default_dtype() == format_before
    assert stopped > 15


def test_ctrl_c_during_the_last_look_keeps_everything(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are verified by then, so all come with the exception."""
    ids = pocket.encode("nearly done")
    states = pocket.states(ids, 2)
    invert(states, pocket, 2)  # measures the noise floor, which reads states too

    def pressed(self: LanguageModel, prompt: object, layer: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "states", pressed)
    with pytest.raises(Interrupted) as stop:
        invert(states, pocket, 2)
    assert torch.equal(stop.value.recovered.tokens, ids.cpu())


def test_the_whole_prompt_is_read_once_more(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the one-step map were wrong, the pass over the whole prompt would show it."""
    ids = pocket.encode("one more look")
    states = pocket.states(ids, 2)
    honest = LanguageModel.states
    monkeypatch.setattr(
        LanguageModel,
        "states",
        lambda self, prompt, layer: honest(self, prompt, layer) * 1.01,
    )
    with pytest.raises(NotVerified, match="read in one pass, is"):
        invert(states, pocket, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_that_compute_in_other_formats(dtype: torch.dtype) -> None:
    """The noise floor follows the format: exact in float64 and, scanned, in float16."""
    decoder = copy.deepcopy(TINY[0].decoder).to(dtype)
    model = LanguageModel(decoder)
    ids = torch.tensor([200, 7, 31])
    recovery = invert(model.states(ids, 1), model, 1)
    assert torch.equal(recovery.tokens, ids)
    assert bool((recovery.tested == model.vocab_size).all()) == (dtype == torch.float16)


@pytest.fixture(scope="module")
def sixteen_bits() -> LanguageModel:
    """The bundled model, computing in bfloat16."""
    return load("pocket-gpt2", dtype=torch.bfloat16)


def test_gpt2_architecture_at_initialisation() -> None:
    """The shape of GPT-2, all 50 257 tokens, its first block: exact."""
    model = load("gpt2", random_init=True, layers=1)
    # A search for near relatives of all tokens takes a minute; random ones have none.
    model.measured["related", 1] = torch.zeros(model.vocab_size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2,), generator=generator)
    # By the gradient: what searches learn from tests, and the look at all tokens that
    # goes before, a third of a minute, is tested on small ones (``test_fitted``).
    recovery = invert(model.states(ids, 1), model, 1, policy=Gradient())
    assert torch.equal(recovery.tokens, ids)


@pytest.mark.parametrize("layer", [1, 3])
def test_a_model_of_sixteen_bits_agrees_with_itself_bit_for_bit(
    sixteen_bits: LanguageModel, layer: int
) -> None:
    """In bfloat16 several tokens lie inside the noise floor.

    The pass that made the states tells them apart.
    """
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(sixteen_bits.vocab_size, (14,), generator=generator)[:6]
    recovery = invert(sixteen_bits.states(ids, layer), sixteen_bits, layer)
    assert torch.equal(recovery.tokens, ids)
    assert bool((recovery.radius == 0).any()), "no position was ambiguous"


def test_passes_of_a_generation_are_repeated(sixteen_bits: LanguageModel) -> None:
    """States of eight positions at once, then of one after the other.

    Passes of these lengths agree with them in each bit.
    """
    model = sixteen_bits
    ids = torch.randint(
        model.vocab_size, (11,), generator=torch.Generator().manual_seed(8)
    )
    states, step = OneStepMap.after(model, 1).follow(ids[:8])
    rows = [states]
    for t in range(8, 11):
        states, step = step.follow(ids[t : t + 1])
        rows.append(states)
    assert torch.equal(
        invert(torch.cat(rows), model, 1, passes=[8, 1, 1, 1]).tokens, ids
    )
    for passes in ([8, 1], [11, 0], []):
        with pytest.raises(
            StatesError, match="expected lengths of at least 1, 11 in all"
        ):
            invert(torch.cat(rows), model, 1, passes=passes)


@pytest.fixture(scope="module")
def lens_of_sixteen_bits(sixteen_bits: LanguageModel) -> Lens:
    """A small lens of its layer 3."""
    return Lens.fit(sixteen_bits, 3, tokens=6000, features=128)


@pytest.mark.parametrize("passes", [None, [9, 1, 1, 1]])
def test_a_draft_in_sixteen_bits_is_compared_bit_for_bit(
    sixteen_bits: LanguageModel, lens_of_sixteen_bits: Lens, passes: list[int] | None
) -> None:
    """What the scan of all tokens finds, and nearly all of it without a scan."""
    model = sixteen_bits
    ids = next(prompts(model.tokenizer, "prose", 12))
    states = repeated(model, 3, ids, passes or [12])
    drafted = invert(states, model, 3, lens=lens_of_sixteen_bits, passes=passes)
    assert drafted.tokens.tolist() == ids.tolist()
    assert int((drafted.tested == 1).sum()) >= 8
    assert (drafted.distance[drafted.tested == 1] == 0).all()


def test_bits_of_other_hardware_are_scanned(
    sixteen_bits: LanguageModel, lens_of_sixteen_bits: Lens
) -> None:
    """One unit in the last place of one number: the draft no longer counts there."""
    model = sixteen_bits
    ids = next(prompts(model.tokenizer, "prose", 6))
    states = model.states(ids, 3)
    states[2, 5] *= 1 + 2 * torch.finfo(torch.bfloat16).eps
    recovery = invert(states, model, 3, lens=lens_of_sixteen_bits)
    assert recovery.tokens.tolist() == ids.tolist()
    assert recovery.tested[2] == model.vocab_size and recovery.distance[2] > 0


def test_twins_in_sixteen_bits_are_refused_with_a_lens(pocket: LanguageModel) -> None:
    """Two tokens with one row: equal bits prove nothing, and both are named."""
    model = load("pocket-gpt2", dtype=torch.bfloat16)
    twin = int(model.encode(" the")[0])
    other = (twin + 1) % model.vocab_size
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight[other] = model.embeddings[twin]
    ids = model.encode("over the hidden state")
    assert twin in ids.tolist()
    lens = Lens.fit(model, 1, tokens=6000, features=128)
    with pytest.raises(Ambiguous) as refusal:
        invert(model.states(ids, 1), model, 1, lens=lens)
    assert refusal.value.position == ids.tolist().index(twin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_known_prefix_stands_before(
    dtype: torch.dtype,
    pocket: LanguageModel,
    sixteen_bits: LanguageModel,
    lens_of_sixteen_bits: Lens,
) -> None:
    """Rows from some position on: the prompt, and nothing searched for before them."""
    model = sixteen_bits
    lens = lens_of_sixteen_bits
    if dtype == torch.float32:
        model = pocket
        lens = Lens.fit(pocket, 3, tokens=3000, features=0)
    ids = next(prompts(model.tokenizer, "code", 7))
    states = model.states(ids, 3)
    ways = [{}, {"lens": lens}, {"half_width": torch.full((2,), 1e-6)}]
    # Where all tokens are scanned, two positions show it.
    cases = [(1, ways[0]), (1, ways[1]), *((5, way) for way in ways)]
    for known, options in [*cases, (5, {"certify": True})]:
        prefix = ids[:known]
        recovery = invert(states[known:], model, 3, prefix=prefix, **options)
        assert recovery.tokens.tolist() == ids.tolist()
        assert recovery.tested[:known].tolist() == [0] * known
        assert recovery.verified.all() and (recovery.tested[known:] > 0).all()
        assert recovery.certified == ("certify" in options)


def test_another_prefix_is_refused(pocket: LanguageModel) -> None:
    """States that do not follow it, too many of them, and what is no prefix."""
    ids = next(prompts(pocket.tokenizer, "code", 9))
    rows = pocket.states(ids, 3)[4:]
    wrong = ids[:4].flip(0)
    with pytest.raises(NotVerified) as refusal:
        invert(rows, pocket, 3, prefix=wrong)
    assert refusal.value.position == 4
    assert refusal.value.recovered.tokens.tolist() == wrong.tolist()
    many = torch.zeros(pocket.n_positions, dtype=torch.int64)
    with pytest.raises(StatesError, match="with T from 1 to"):
        invert(rows, pocket, 3, prefix=many)
    with pytest.raises(ModelError, match="tokens are 0 to"):
        invert(rows, pocket, 3, prefix=torch.tensor([pocket.vocab_size]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "a"}, "seed='a'; expected"),
        ({"seed": 1.5}, "seed=1.5; expected"),
        ({"epsilon": "a"}, "got epsilon=a; expected one finite number"),
        ({"half_width": "a"}, "got half_width=a; expected one finite number"),
        ({"prefix": "def"}, "got prefix='def'; expected a tensor"),
        ({"passes": 3}, "got passes of 3 positions; expected lengths"),
        ({"passes": ["a"]}, "expected lengths of at least 1, 2 in all"),
        ({"passes": [1.0, 1.0]}, "expected lengths of at least 1, 2 in all"),
    ],
)
def test_options_of_other_types(
    pocket: LanguageModel,
    options: dict,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line that quotes them, where no one checks annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    states = pocket.states(torch.tensor([5, 6]), 1)
    with pytest.raises(StatesError, match=message):
        invert(states, pocket, 1, **options)
