"""The prompt from the last state alone: exact, or an error."""

import copy
import itertools
import math
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedModel

from sipit_lite import (
    Interrupted,
    LanguageModel,
    LastStateError,
    ModelError,
    NotRecovered,
    SipItError,
    StatesError,
    invert_last,
    load,
)
from sipit_lite.acceptance import noise_floor
from sipit_lite.experiments.families import small
from sipit_lite.experiments.perturb import noisy, twins
from sipit_lite.extensions import laststate
from sipit_lite.extensions.laststate import (
    Belief,
    Collision,
    Ends,
    LastMap,
    Law,
    error_covariance,
    followers,
    rivals,
    sharpened,
)
from sipit_lite.io.text import prompts

Family = tuple[PreTrainedModel, LanguageModel]
POCKET = Path(__file__).parents[2] / "sipit_lite" / "pocket_gpt2"
TRAINED = 6  # the last layer of pocket-gpt2
ABSOLUTE = (
    "gpt2",
    "gpt_neo",
)  # model types that add a vector for each absolute position; the others rotate


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    """A small random GPT-2 of 500 tokens, width 64 and three layers."""
    return small("GPT2", device="cpu")


def row(model: LanguageModel, ids: list[int] | Tensor, layer: int) -> Tensor:
    """The last-token state of a prompt."""
    return model.states(torch.as_tensor(ids), layer)[-1]


def quick(model: LanguageModel, layer: int, longest: int = 4) -> Ends:
    """A fit of a tenth of a second."""
    return Ends.fit(model, layer, longest, tokens=2000, features=32)


def some(model: LanguageModel, count: int, seed: int) -> Tensor:
    """So many random tokens."""
    return torch.randint(
        model.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)
    )


# The map and its Jacobian


def test_the_map_is_the_last_row_of_transformers(
    family: Family, prompt: Tensor
) -> None:
    """At every layer but the last, where transformers applies the final norm."""
    untouched, model = family
    rows = torch.stack([prompt, prompt.flip(0)])
    with torch.no_grad():
        told = untouched(rows, output_hidden_states=True).hidden_states
    for layer in range(model.n_layers):
        assert torch.allclose(
            LastMap(model, layer).tokens(rows), told[layer][:, -1], atol=1e-5
        )


def test_slopes_are_finite_differences(family: Family, prompt: Tensor) -> None:
    """Central differences in float64 at two of four positions, in random directions."""
    decoder = copy.deepcopy(family[1].decoder).double()
    last = LastMap(LanguageModel(decoder), 2)
    e = last.model.embeddings[prompt[:4]]
    slopes = last.jacobians(e, slice(1, 3))
    # Some families compute norms and rotations in float32 whatever the format, which
    # leaves 1e-7 / step of noise.
    step, generator = 1e-3, torch.Generator().manual_seed(0)
    for k in range(2):
        way = torch.zeros_like(e)
        noise = torch.randn(e.shape[1], generator=generator, dtype=e.dtype)
        way[1 + k] = noise.to(e)
        up, down = (
            last.embeddings((e + sign * step * way)[None])[0].detach()
            for sign in (1, -1)
        )
        expected = slopes[k] @ way[1 + k]
        assert ((up - down) / (2 * step) - expected).norm() < 1e-2 * expected.norm()


def test_layer_zero_is_the_last_embedding(gpt2: LanguageModel) -> None:
    """The slopes are zero and the identity, whatever the block."""
    slopes = LastMap(gpt2, 0).jacobians(gpt2.embeddings[5:8], slice(1, 3))
    assert not slopes[0].any() and slopes[1].equal(torch.eye(64))


def test_a_layer_that_is_not_there(gpt2: LanguageModel) -> None:
    """As everywhere."""
    with pytest.raises(ModelError, match="got layer 5"):
        LastMap(gpt2, 5).tokens(torch.tensor([[1]]))


# The belief


def a_belief(block: int, vocab: int, length: int, seed: int = 0) -> Belief:
    """Random log-probabilities for the last positions of a random prompt."""
    generator = torch.Generator().manual_seed(seed)
    log = torch.randn(block, vocab, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocab, (length,), generator=generator)
    return Belief(log.log_softmax(-1), ids, slice(length - block, length))


def test_moments_are_sums_over_tokens() -> None:
    """One term a token, written out."""
    belief, table = a_belief(3, 7, 4), torch.randn(7, 5, dtype=torch.float64)
    mean, spread = belief.moments(table)
    for k in range(3):
        law = belief.log[k].exp()
        expected = sum(law[v] * table[v] for v in range(7))
        around = 0
        for v in range(7):
            away = table[v] - expected
            around = around + law[v] * torch.outer(away, away)
        assert torch.allclose(mean[k], expected)
        assert torch.allclose(spread[k], around)


def test_prompts_drawn_follow_the_belief() -> None:
    """Frequencies within five standard deviations, other positions untouched."""
    belief, count = a_belief(2, 5, 3), 20_000
    drawn = belief.draw(count, torch.Generator().manual_seed(0))
    assert drawn.shape == (count, 3) and bool((drawn[:, 0] == belief.ids[0]).all())
    assert torch.equal(drawn[0, 1:], belief.log.argmax(-1))
    for k, v in itertools.product(range(2), range(5)):
        p = float(belief.log[k, v].exp())
        share = float((drawn[:, 1 + k] == v).double().mean())
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)


def test_a_block_of_one_draws_each_of_the_likeliest_once() -> None:
    """All tokens, in the order of belief."""
    belief = a_belief(1, 9, 2)
    drawn = belief.draw(9, torch.Generator().manual_seed(0))
    assert drawn[:, 1].tolist() == belief.log[0].argsort(descending=True).tolist()


class Linear(LastMap):
    """A linear map in place of a model: state = Σ_t A_t e_t + b."""

    def __init__(self, slopes: Tensor, shift: Tensor, table: Tensor):
        for name, value in (
            ("slopes", slopes),
            ("shift", shift),
            ("model", SimpleNamespace(embeddings=table)),
        ):
            object.__setattr__(self, name, value)

    def jacobians(self, e: Tensor, block: slice) -> Tensor:
        """Exact, since there is nothing to linearise."""
        return self.slopes[block]


def test_sharpened_is_a_likelihood_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two unknown positions of three: every token's density, covariances by hand.

    The joint law of both embeddings and the error is one normal vector of 3·4 numbers;
    the state is a linear image of it; a token given makes its embedding a constant.
    """
    monkeypatch.setattr(laststate, "DAMPING", 1.0)
    generator = torch.Generator().manual_seed(3)
    d, vocab = 4, 6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    table = normal(vocab, d)
    last = Linear(normal(3, d, d), normal(d), table)
    belief, observed = a_belief(2, vocab, 3, 1), normal(d)
    law = Law(normal(vocab).softmax(0))
    drawn = belief.draw(50, generator)
    exact = torch.einsum("tij,stj->si", last.slopes, table[drawn]) + last.shift
    states = exact + 0.3 * normal(50, d)
    new = sharpened(belief, law, observed, last, drawn, states)
    q = belief.log.exp()
    means, spreads = [], []
    for k in range(2):
        means.append(sum(q[k, v] * table[v] for v in range(vocab)))
        away = table - means[k]
        spreads.append(
            sum(q[k, v] * torch.outer(away[v], away[v]) for v in range(vocab))
        )
    middle = last.slopes[0] @ table[belief.ids[0]] + last.shift
    # The linear model is right about the mean of what was drawn.
    off = (states - exact).mean(0)
    centre = middle + last.slopes[1] @ means[0] + last.slopes[2] @ means[1] + off
    explained = sum(
        last.slopes[1 + k] @ spreads[k] @ last.slopes[1 + k].T for k in range(2)
    )
    noise = error_covariance(states - exact - off, observed - centre, explained)
    joint = torch.block_diag(spreads[0], spreads[1], noise)
    one = torch.eye(d, dtype=torch.float64)
    image = torch.cat([last.slopes[1], last.slopes[2], one], 1)
    for k in range(2):
        # This embedding is a constant now.
        known = joint.clone()
        known[k * d : (k + 1) * d] = 0
        known[:, k * d : (k + 1) * d] = 0
        law_of_state = image @ known @ image.T
        scores = []
        for v in range(vocab):
            at = centre + last.slopes[1 + k] @ (table[v] - means[k])
            density = torch.distributions.MultivariateNormal(at, law_of_state)
            scores.append(law.anywhere[v].log() + density.log_prob(observed))
        expected = torch.stack(scores).log_softmax(0)
        assert torch.allclose(new.log[k], expected, atol=1e-8)


def test_a_covariance_of_rounding_leaves_the_belief(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when a belief is sure and the state noisy: no error of linear algebra."""
    table = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
    last = Linear(torch.eye(4).double()[None], torch.zeros(4).double(), table)
    belief = a_belief(1, 6, 1)
    belief = Belief(torch.eye(6)[:1].double().log(), belief.ids, belief.block)
    drawn = torch.zeros(9, 1, dtype=torch.long)
    rounding = torch.full((4, 4), -1e-9).double()
    monkeypatch.setattr(laststate, "error_covariance", lambda *given: rounding)
    law = Law(torch.full((6,), 1 / 6).double())
    assert sharpened(belief, law, table[1], last, drawn, table[drawn[:, 0]]) is belief


def test_marginal_likelihood_by_counting() -> None:
    """The other position summed over its tokens: the normal law is close to that sum.

    Both say the same token is likeliest where the others spread little, as here.
    """
    generator = torch.Generator().manual_seed(5)
    d, vocab = 3, 8
    slopes = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    table = torch.randn(vocab, d, generator=generator, dtype=torch.float64)
    slopes[1] *= 0.05
    last = Linear(slopes, torch.zeros(d, dtype=torch.float64), table)
    ids = torch.tensor([2, 6])
    observed = torch.einsum("tij,tj->i", slopes, table[ids])
    flat = torch.full((2, vocab), -math.log(vocab), dtype=torch.float64)
    belief = Belief(flat, ids, slice(0, 2))
    drawn = belief.draw(200, generator)
    states = torch.einsum("tij,stj->si", slopes, table[drawn])
    noise = torch.eye(d, dtype=torch.float64) * 1e-2
    every = (table @ slopes[0].T)[:, None] + table @ slopes[1].T
    density = torch.distributions.MultivariateNormal(observed, noise).log_prob(every)
    counted = density.logsumexp(1).log_softmax(0)
    for _ in range(12):
        belief = sharpened(belief, Law(flat[0].exp()), observed, last, drawn, states)
    assert int(belief.log[0].argmax()) == int(counted.argmax()) == 2


# The law of prompts


def a_law(vocab: int, seed: int = 0) -> Law:
    """A random chain with evidence about the last token."""
    generator = torch.Generator().manual_seed(seed)
    anywhere, after, last = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).log_softmax(-1)
        for shape in ((vocab,), (vocab, vocab), (vocab,))
    )
    return Law(anywhere.exp(), after.exp(), last)


@pytest.mark.parametrize(
    ("length", "first", "block"),
    [(3, 0, 3), (4, 1, 2), (4, 0, 1), (4, 2, 2), (2, 1, 1)],
)
def test_marginals_by_counting_all_prompts(length: int, first: int, block: int) -> None:
    """The oracle sums over every prompt with the known tokens, token by token."""
    vocab, law = 4, a_law(4)
    share = laststate.NEIGHBOURS
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (length,), generator=generator)
    evidence = 2 * torch.randn(block, vocab, generator=generator, dtype=torch.float64)
    where = slice(first, first + block)
    marginals = law.given(ids, where, evidence)
    counted = torch.zeros(block, vocab, dtype=torch.float64)
    for tokens in itertools.product(range(vocab), repeat=block):
        s = ids.tolist()
        s[where] = tokens
        p = float(law.anywhere[s[0]])
        if where.stop == length:
            p *= math.exp(law.last[s[-1]])
        for u, v in itertools.pairwise(s):
            p *= share * float(law.after[u, v]) + (1 - share) * float(law.anywhere[v])
        for k, v in enumerate(tokens):
            p *= math.exp(evidence[k, v])
        for k, v in enumerate(tokens):
            counted[k, v] += p
    assert torch.allclose(marginals.exp(), counted / counted.sum(1, keepdim=True))
    alone = Law(law.anywhere, None, law.last).given(ids, where, evidence)
    if where.stop < length:
        assert torch.allclose(alone, (evidence + law.anywhere.log()).log_softmax(-1))


def test_followers_are_the_next_token_law(pocket: LanguageModel) -> None:
    """What transformers says after one token; not there without the unembedding."""
    head = GPT2LMHeadModel.from_pretrained(POCKET, dtype=torch.float32).eval()
    found = followers(pocket)
    assert (
        found.shape == (pocket.vocab_size, pocket.vocab_size)
        and followers(pocket) is found
    )
    for token in (0, 17, 4000):
        with torch.no_grad():
            told = head(torch.tensor([[token]])).logits[0, -1].softmax(-1)
        assert torch.allclose(found[token].cpu(), told, atol=1e-5)
    assert followers(small("Llama", device="cpu")) is None


# Last token and length


def test_ends_is_a_law_over_tokens_and_lengths(gpt2: LanguageModel) -> None:
    """It sums to one, and is the normal density of what the regression leaves."""
    ends = Ends.fit(gpt2, 2, longest=3, tokens=4000, features=16)
    state = row(gpt2, [7, 8], 2)
    likely = ends.read(state)
    assert likely.shape == (500, 3) and float(likely.exp().sum()) == pytest.approx(
        1, abs=1e-4
    )
    seen = ends.predict(state)
    inverse = ends.whiten.double() @ ends.whiten.double().T
    for (v, n), (w, m) in (((8, 2), (7, 2)), ((8, 2), (8, 3)), ((100, 1), (3, 3))):
        far = []
        for token, length in ((v, n), (w, m)):
            left = (
                torch.cat([gpt2.embeddings[token], torch.eye(3)[length - 1]]).double()
                - seen.double()
            )
            far.append(float(left @ inverse @ left))
        said = float(likely[v, n - 1] - likely[w, m - 1])
        assert said == pytest.approx(
            -laststate.TRUST / 2 * (far[0] - far[1]), rel=1e-3, abs=1e-3
        )
    assert (
        int(likely.logsumexp(0).argmax()) == 1
        and 8 in likely.logsumexp(1).topk(20).indices
    )
    assert float(ends.frequency.sum()) == pytest.approx(1, abs=1e-5) and bool(
        (ends.frequency > 0).all()
    )


def test_ends_of_another_layer_model_or_length_are_refused(gpt2: LanguageModel) -> None:
    """It says which it got and which it needs."""
    ends = Ends.fit(gpt2, 2, longest=3, tokens=2000, features=0)
    state = row(gpt2, [7, 8], 3)
    with pytest.raises(
        LastStateError,
        match=r"for layer 2 and up to 3 tokens of this model; expected .*layer 3",
    ):
        invert_last(state, gpt2, 3, length=2, ends=ends)
    with pytest.raises(
        LastStateError,
        match=r"up to 3 tokens of this model; expected one for layer 2 .* and 4 tokens",
    ):
        invert_last(state, gpt2, 2, length=4, ends=ends)
    with pytest.raises(
        LastStateError,
        match="of another model; expected one for layer 2 of small GPT2, seed 1",
    ):
        invert_last(state, small("GPT2", seed=1, device="cpu"), 2, length=2, ends=ends)


# Whole prompts, against exhaustive search


def everything(
    model: LanguageModel, layer: int, state: Tensor, longest: int
) -> tuple[list[list[int]], list[int]]:
    """All prompts up to ``longest`` tokens within the noise floor, and the closest."""
    inside, best = [], (math.inf, [])
    for length in range(1, longest + 1):
        rows = torch.cartesian_prod(*[torch.arange(model.vocab_size)] * length).view(
            -1, length
        )
        far = (model.states(rows, layer)[:, -1] - state).norm(dim=1)
        inside += rows[(far <= noise_floor(model, layer) * state.norm()).cpu()].tolist()
        best = min(best, (float(far.min()), rows[int(far.argmin())].tolist()))
    return inside, best[1]


def test_every_family_against_all_prompts(family: Family) -> None:
    """All 3660 prompts are read: what is returned is the only one that fits."""
    model, found = family[1], 0
    asked = [[5], [9, 30], [41, 2], [7, 7]]
    for layer in (1, model.n_layers):
        ends = quick(model, layer, 2)
        for ids in asked:
            state = row(model, ids, layer)
            inside, best = everything(model, layer, state, 2)
            assert ids in inside
            try:
                recovered = invert_last(
                    state, model, layer, ends=ends, longest=2, seconds=3.0
                )
                assert inside == [recovered.tokens.tolist()] == [best] == [ids]
                found += 1
            except Collision as refusal:
                assert sorted(inside) == sorted(
                    [refusal.recovered.tokens.tolist(), refusal.other.tolist()]
                )
            except NotRecovered as refusal:
                assert refusal.recovered.tokens.tolist() not in inside
    # A constant prompt of a rotary model fits at both lengths, as its token does.
    assert found == (8 if model.decoder.config.model_type in ABSOLUTE else 4), found


def test_constant_prompts_of_rotary_models(family: Family) -> None:
    """With the length they are unique, without it they are not, as the error says."""
    model = family[1]
    if model.decoder.config.model_type in ABSOLUTE:
        return
    state, ends = row(model, [7, 7], 2), quick(model, 2)
    assert invert_last(state, model, 2, 2, ends=ends).tokens.tolist() == [7, 7]
    with pytest.raises(
        Collision,
        match=r"\(. tokens\) is .* away, radius .*; so is '[t7 ]+' \(. tokens\)",
    ) as refusal:
        invert_last(state, model, 2, ends=ends, longest=4)
    lengths = len(refusal.value.recovered.tokens), len(refusal.value.other)
    assert (
        abs(lengths[0] - lengths[1]) == 1 and not refusal.value.recovered.verified.any()
    )
    assert (
        set(refusal.value.recovered.tokens.tolist())
        == set(refusal.value.other.tolist())
        == {7}
    )


def test_rivals(gpt2: LanguageModel) -> None:
    """Near embeddings at each position; no empty prompt, none beyond the longest."""
    table = gpt2.embeddings
    near, *_ = rivals(gpt2, torch.tensor([5, 6]), None)
    for t, token in enumerate((5, 6)):
        changed = near[near[:, t] != token, t]
        apart = (table - table[token]).norm(dim=1)
        nearest = apart.topk(laststate.RIVALS + 1, largest=False).indices[1:]
        assert sorted(changed.tolist()) == sorted(nearest.tolist())
    for ids, longest, expected in (
        ([5], 1, []),
        ([5], 2, [[[5, 5]]]),
        ([5, 6], 2, [[[6]]]),
        ([5, 6], None, []),
    ):
        others = rivals(gpt2, torch.tensor(ids), longest)[1:]
        assert [rows.tolist() for rows in others] == expected


@pytest.mark.parametrize("layer", [1, 3])
def test_three_and_four_tokens_of_a_small_gpt2(gpt2: LanguageModel, layer: int) -> None:
    """One of 125 million, length not given; half the prompts have a token twice."""
    ends = quick(gpt2, layer, 8)
    for seed in range(4):
        ids = some(gpt2, 3 + seed % 2, seed)
        ids[0] = ids[1] if seed > 1 else ids[0]
        assert torch.equal(
            invert_last(
                row(gpt2, ids, layer), gpt2, layer, ends=ends, longest=8
            ).tokens,
            ids,
        )


@pytest.fixture(scope="module")
def trained(pocket: LanguageModel) -> Ends:
    """A fit of a second for the last layer of the trained model."""
    return Ends.fit(pocket, TRAINED, 3, tokens=3000, features=64)


@pytest.mark.parametrize("kind", ["random", "prose"])
def test_the_trained_model(pocket: LanguageModel, trained: Ends, kind: str) -> None:
    """One to three tokens from the last layer alone, length not given: alone inside."""
    for length in (1, 2, 3):
        ids = next(prompts(pocket.tokenizer, kind, length, seed=3))
        options = {"ends": trained, "longest": 3}
        recovered = invert_last(row(pocket, ids, TRAINED), pocket, **options)
        assert torch.equal(recovered.tokens, ids.cpu())
        assert recovered.text == pocket.decode(ids)
        distance, radius, runner_up = (
            float(x[-1])
            for x in (recovered.distance, recovered.radius, recovered.runner_up)
        )
        assert distance <= radius < runner_up
        assert recovered.layer == TRAINED and recovered.verified.all()
        assert recovered.tested[-1] > 0
        assert recovered.distance[:-1].isnan().all()
        assert recovered.radius[:-1].isnan().all()


def test_seeds_and_the_default_fit(gpt2: LanguageModel) -> None:
    """The same seed reads the same prompts, another seed recovers the same tokens."""
    ids = some(gpt2, 3, 11)
    state = row(gpt2, ids, 3)
    first, again = (invert_last(state, gpt2, length=3, seed=5) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.tested, again.tested)
    assert torch.equal(invert_last(state, gpt2, length=3, seed=6).tokens, ids)
    fitted = [key for key in gpt2.measured if key[0] == "ends"]
    assert fitted == [("ends", 3, laststate.LONGEST)]


def test_layer_zero_knows_the_last_token_alone(gpt2: LanguageModel) -> None:
    """Refused unless the prompt has one token."""
    for length in (None, 2):
        with pytest.raises(LastStateError, match=r"got layer 0, .*; expected length=1"):
            invert_last(row(gpt2, [3, 4], 0), gpt2, 0, length)
    assert invert_last(
        row(gpt2, [9], 0), gpt2, 0, length=1, ends=quick(gpt2, 0, 16)
    ).tokens.tolist() == [9]


def test_double_precision() -> None:
    """A model that computes in float64 is inverted in float64, in a smaller radius."""
    coarse = small("GPT2", device="cpu")
    decoder = copy.deepcopy(coarse.decoder).double()
    model = LanguageModel(decoder, name="double")
    found = invert_last(
        row(model, [3, 400], 2), model, 2, ends=quick(model, 2), longest=4
    )
    assert found.tokens.tolist() == [3, 400] and float(found.radius[-1]) < 1e-10


# What cannot be answered


def refusal_of_twins(gpt2: LanguageModel) -> Collision:
    """The error for a prompt with a token whose embedding another one has."""
    model = twins(gpt2, 20, 30)
    with pytest.raises(Collision, match="so is") as refusal:
        invert_last(row(model, [5, 20], 3), model, ends=quick(model, 3), longest=4)
    return refusal.value


def test_twins_collide(gpt2: LanguageModel) -> None:
    """Two tokens of one embedding: both prompts are named, none is verified."""
    collision = refusal_of_twins(gpt2)
    named = [collision.recovered.tokens.tolist(), collision.other.tolist()]
    assert sorted(named) == [[5, 20], [5, 30]]
    assert not collision.recovered.verified.any()
    assert "5 20" in str(collision) and "5 30" in str(collision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_coarse_formats_are_never_wrong(
    gpt2: LanguageModel, dtype: torch.dtype
) -> None:
    """Rounding is an interval, not noise: mostly exact, else a named refusal."""
    exact = 0
    for seed in range(4):
        ids = some(gpt2, 2, seed)
        try:
            assert torch.equal(
                invert_last(
                    row(gpt2, ids, 3).to(dtype), gpt2, length=2, seconds=2.0
                ).tokens,
                ids,
            )
            exact += 1
        except NotRecovered as refusal:
            assert (
                isinstance(refusal, Collision)
                or refusal.recovered.distance[-1] > refusal.recovered.radius[-1]
            )
    assert exact >= 3


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-8])
def test_close_embeddings_are_never_wrong(spread: float) -> None:
    """Twelve tokens that hardly differ, stored coarsely: exact, or a named refusal."""
    model = small("GPT2", device="cpu")
    table, refused = model.decoder.get_input_embeddings().weight, 0
    table[:12] = table[:1] + spread * torch.randn(
        12, 64, generator=torch.Generator().manual_seed(0)
    )
    ends = quick(model, 2, 2)
    for seed in range(3):
        ids = some(model, 2, seed) % 12
        try:
            state = row(model, ids, 2).to(torch.bfloat16)
            assert torch.equal(
                invert_last(state, model, 2, length=2, ends=ends, seconds=1.0).tokens,
                ids,
            )
        except NotRecovered:
            refused += 1
    assert refused == {1e-2: 0, 1e-5: 3, 1e-8: 3}[spread]


def hopeless(gpt2: LanguageModel) -> dict[str, tuple[Tensor, LanguageModel]]:
    """States of layer 3 that no prompt has there, and the model that is asked."""
    state = row(gpt2, [3, 4], 3)
    return {
        "noise": (noisy(state[None], 0.1)[0], gpt2),
        "no prompt": (
            torch.randn(64, generator=torch.Generator().manual_seed(0)),
            gpt2,
        ),
        "zero": (torch.zeros(64), gpt2),
        "another layer": (row(gpt2, [3, 4], 2), gpt2),
        "another model": (state, small("GPT2", seed=1, device="cpu")),
        "huge": (state * 1e6, gpt2),
    }


def test_states_of_no_prompt_end_in_an_error_with_the_best(gpt2: LanguageModel) -> None:
    """The closest prompt comes with its distance, not verified, also when pickled."""
    for case, (state, model) in hopeless(gpt2).items():
        with pytest.raises(
            NotRecovered, match=r"the closest of \d+ read, .* is .* away, radius"
        ) as refusal:
            invert_last(state, model, 3, ends=quick(model, 3), longest=4, seconds=0.2)
        best = refusal.value.recovered
        assert not isinstance(refusal.value, Collision) and not best.verified.any(), (
            case
        )
        assert best.distance[-1] > best.radius[-1] and 1 <= len(best.tokens) <= 4, case
        far = (row(model, best.tokens, 3) - state).norm()
        assert float(best.distance[-1]) == pytest.approx(float(far), rel=1e-4), case
        assert best.text in str(refusal.value)
        copied = pickle.loads(pickle.dumps(refusal.value))
        assert str(copied) == str(refusal.value) and torch.equal(
            copied.recovered.tokens, best.tokens
        )
    # Noise did not lead astray: the prompt is the closest, and still not verified.
    with pytest.raises(NotRecovered) as refusal:
        invert_last(
            noisy(row(gpt2, [3, 4], 3)[None], 0.1)[0], gpt2, length=2, seconds=1.0
        )
    assert refusal.value.recovered.tokens.tolist() == [3, 4]
    assert float(refusal.value.recovered.distance[-1]) == pytest.approx(0.1, rel=1e-3)


def test_a_collision_travels_between_processes(gpt2: LanguageModel) -> None:
    """With both prompts."""
    collision = refusal_of_twins(gpt2)
    copied = pickle.loads(pickle.dumps(collision))
    assert type(copied) is Collision and str(copied) == str(collision)
    assert torch.equal(copied.other, collision.other)
    assert torch.equal(copied.recovered.tokens, collision.recovered.tokens)


BAD = r"got a state of shape .*; expected .*\(64,\)"
REFUSED: list[tuple[dict, type[SipItError], str]] = [
    ({"state": torch.full((64,), torch.nan)}, StatesError, "got NaN or Inf"),
    ({"state": torch.zeros(63)}, StatesError, r"got states of shape \(1, 63\)"),
    ({"state": torch.zeros(2, 64)}, StatesError, BAD),
    ({"state": torch.tensor(1.0)}, StatesError, BAD),
    ({"state": torch.zeros(64).long()}, StatesError, "got states of torch.int64"),
    ({"state": torch.zeros(0)}, StatesError, r"got states of shape \(1, 0\)"),
    ({"layer": 5}, ModelError, "got layer 5; .* has layers 0"),
    ({"layer": -1}, ModelError, "got layer -1"),
    ({"length": 0}, LastStateError, "got length=0; .* reads 1 to 48 tokens"),
    ({"length": 49}, LastStateError, "got length=49; .* reads 1 to 48 tokens"),
    ({"longest": 49}, LastStateError, "got longest=49; .* reads 1 to 48 tokens"),
    ({"seconds": 0.0}, LastStateError, "got seconds=0.0; expected a budget above 0"),
    ({"seconds": -1.0}, LastStateError, "got seconds=-1.0; expected a budget"),
    ({"seconds": math.nan}, LastStateError, "got seconds=nan; expected a budget"),
]


def test_bad_questions_are_refused(gpt2: LanguageModel) -> None:
    """At once, before anything is fitted; the line says what was expected."""
    good = {"state": row(gpt2, [3, 4], 3), "layer": 3}
    for asked, error, piece in REFUSED:
        with pytest.raises(error, match=piece):
            invert_last(model=gpt2, **good | asked)
    assert issubclass(LastStateError, SipItError)


def test_models_of_sixteen_bits_are_refused() -> None:
    """Their noise floor is too wide, and nothing is factorised in their formats."""
    model = load(device="cpu", dtype=torch.bfloat16, layers=1)
    with pytest.raises(
        LastStateError,
        match=r"computes in torch.bfloat16; expected torch.float32 or torch.float64",
    ):
        invert_last(row(model, [3], 1), model, 1)


def test_a_short_budget_ends_soon(pocket: LanguageModel, trained: Ends) -> None:
    """After the first step: a second or two, not minutes."""
    nowhere = torch.randn(256, generator=torch.Generator().manual_seed(1))
    with pytest.raises(NotRecovered) as refusal:
        invert_last(nowhere, pocket, ends=trained, longest=3, seconds=1e-3)
    assert refusal.value.recovered.seconds < 20


@pytest.mark.parametrize("pressed", [0, 2])
def test_ctrl_c_returns_the_best(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch, pressed: int
) -> None:
    """Still a KeyboardInterrupt; its prompt is the closest so far, not verified."""
    honest, calls = laststate.sharpened, []

    def press(*given: object) -> Belief:
        calls.append(given)
        if len(calls) > pressed:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(laststate, "sharpened", press)
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        KeyboardInterrupt, match="interrupted after 0 verified tokens"
    ) as stop:
        invert_last(state, gpt2, 3, longest=2)
    best = stop.value.recovered
    assert isinstance(stop.value, Interrupted) and not best.verified.any()
    far = (row(gpt2, best.tokens, 3) - state).norm()
    assert float(best.distance[-1]) == pytest.approx(float(far), rel=1e-4)


def test_ctrl_c_during_the_last_look_keeps_the_prompt(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found, but not checked yet."""
    state = row(gpt2, [3, 4], 3)
    invert_last(
        state, gpt2, length=2
    )  # measures the noise floor, which reads states too

    def pressed(self: LanguageModel, prompt: object, layer: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "states", pressed)
    with pytest.raises(Interrupted) as stop:
        invert_last(state, gpt2, length=2)
    assert (
        stop.value.recovered.tokens.tolist() == [3, 4]
        and not stop.value.recovered.verified.any()
    )


def test_the_prompt_is_read_once_more(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the map were wrong, the pass over the whole prompt would show it."""
    state = row(gpt2, [3, 4], 3)
    invert_last(state, gpt2, length=2)
    honest = LanguageModel.states
    monkeypatch.setattr(
        LanguageModel,
        "states",
        lambda self, prompt, layer: honest(self, prompt, layer) * 1.01,
    )
    with pytest.raises(NotRecovered, match="no prompt was found"):
        invert_last(state, gpt2, length=2)
