"""Caches, centred streams, unit states and logits give the prompt back, or one line."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel, StaticCache

from sipit_lite import (
    Ambiguous,
    LanguageModel,
    Leaked,
    Lens,
    LensError,
    ModelError,
    Newton,
    NotRecovered,
    NotVerified,
    SipItError,
    StatesError,
    invert,
    invert_last,
    invert_many,
    last_states,
)
from sipit_lite.experiments.families import small
from sipit_lite.experiments.perturb import twins
from sipit_lite.extensions import fitted
from sipit_lite.extensions.laststate import Ends
from sipit_lite.io.text import prompts
from sipit_lite.model import plain_settings

Family = tuple[PreTrainedModel, LanguageModel]
TEXT = "Read this."


@pytest.fixture(scope="module")
def narrow() -> LanguageModel:
    """A GPT-2 of 500 tokens and three blocks, for what no training changes."""
    return small("GPT2", device="cpu")


@plain_settings()
@torch.no_grad()
def cache_of(hf: PreTrainedModel, ids: Tensor, cache: object = None) -> object:
    """What transformers caches of a prompt, of all positions by default."""
    cache = DynamicCache() if cache is None else cache
    inputs = {"input_ids": ids.reshape(-1, ids.shape[-1]), "use_cache": True}
    return hf(**inputs, past_key_values=cache).past_key_values


@pytest.mark.parametrize("what", ["keys", "values"])
def test_caches_of_every_family(family: Family, prompt: Tensor, what: str) -> None:
    """Of every layer, from what transformers itself keeps: shared heads and rotations."""
    hf, model = family
    leaked = Leaked(model, what)
    cache = cache_of(hf, prompt)
    for layer in range(model.n_layers):
        rows = leaked.rows(cache, layer)
        assert rows.shape == (1, len(prompt), leaked.d_model)
        recovered = invert(rows, leaked, layer)
        assert torch.equal(recovered.tokens, prompt.cpu()) and recovered.verified.all()
        # The tensor by itself, and of one prompt, is the same.
        alone = leaked.rows(getattr(cache.layers[layer], what)[0], layer)
        assert torch.equal(alone, rows[0])


def test_centred_states_of_every_family(family: Family, prompt: Tensor) -> None:
    """At every layer, also after the norm; as they are, no prompt has them."""
    model = family[1]
    leaked = Leaked(model, "centred")
    for layer in range(model.n_layers + 2):
        states = model.states(prompt, layer)
        rows = leaked.rows(states - states.mean(1, keepdim=True), layer)
        assert torch.equal(invert(rows, leaked, layer).tokens, prompt.cpu())


def processed(model: LanguageModel) -> GPT2LMHeadModel:
    """GPT-2 as TransformerLens processes it: all that writes to the stream is centred."""
    decoder = copy.deepcopy(model.decoder)
    writing = [decoder.wte.weight, decoder.wpe.weight]
    for block in decoder.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            writing += [part.weight, part.bias[None]]
    with torch.no_grad():
        for weight in writing:
            weight -= weight.mean(-1, keepdim=True)
    return decoder


def test_the_stream_of_transformer_lens(narrow: LanguageModel) -> None:
    """Computed by weights that were centred, not by ours; named where it is not said."""
    decoder = processed(narrow)
    ids = torch.tensor([5, 71, 300, 5])
    with torch.no_grad():
        states = decoder(input_ids=ids[None], output_hidden_states=True).hidden_states
    leaked = Leaked(narrow, "centred")
    for layer in range(narrow.n_layers):
        assert states[layer].mean(-1).abs().max() < 1e-4
        assert torch.equal(invert(states[layer], leaked, layer).tokens, ids)
    with pytest.raises(NotVerified, match=r"centred ones Leaked\(model, 'centred'\)"):
        invert(states[2], narrow, 2)


def test_a_padded_batch_with_its_mask(pocket: LanguageModel) -> None:
    """Of caches and of states, padded on either side; another mask is refused."""
    texts = ["hidden states", "give back the prompt"]
    rows = [pocket.encode(text) for text in texts]
    length = max(map(len, rows))
    leaked = Leaked(pocket, "values")
    for side in ("left", "right"):
        ids = torch.zeros(2, length, dtype=torch.int64, device=pocket.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(len(row)) if side == "right" else slice(-len(row), None)
            ids[i, place] = row
            mask[i, place] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        with torch.no_grad():
            output = pocket.decoder(**inputs, use_cache=True, output_hidden_states=True)
        values = leaked.rows(output.past_key_values, 1)
        pairs = ((output.hidden_states[1], pocket), (values, leaked))
        for batch, model in pairs:
            outcomes = invert_many(batch, model, 1, mask=mask)
            assert [outcome.text for outcome in outcomes] == texts
    arrays = (output.hidden_states[1].cpu().numpy(), mask.cpu().numpy())
    outcomes = invert_many(arrays[0], pocket, 1, mask=arrays[1])
    assert [outcome.text for outcome in outcomes] == texts
    for wrong in (mask[0], mask[:1], mask[:, 1:], mask[..., None], mask[:0]):
        got = r"got states of shape \(2, \d+, 256\) with a mask of shape \("
        with pytest.raises(StatesError, match=got) as refusal:
            invert_many(output.hidden_states[1], pocket, 1, mask=wrong)
        assert "expected (prompts, pos, d) and (prompts, pos)" in str(refusal.value)
    blank = torch.zeros_like(mask)
    [outcome, _] = invert_many(output.hidden_states[1], pocket, 1, mask=blank)
    assert isinstance(outcome, StatesError)


def test_static_caches_and_sliding_windows(family: Family, prompt: Tensor) -> None:
    """Room behind is left out; where positions were dropped, that is said."""
    hf, model = family
    leaked = Leaked(model, "keys")
    static = cache_of(hf, prompt, StaticCache(config=hf.config, max_cache_len=32))
    usual = cache_of(hf, prompt, DynamicCache(config=hf.config))
    full = cache_of(hf, prompt)
    for layer in range(model.n_layers):
        # GPT-Neo attends to the room in a static cache.
        for cache in (static, usual)[hf.config.model_type == "gpt_neo" :]:
            if getattr(cache.layers[layer], "is_sliding", False):
                dropped = r"got the last \d+ of 13 positions; expected all: past_key"
                with pytest.raises(StatesError, match=dropped):
                    leaked.rows(cache, layer)
                continue
            rows = leaked.rows(cache, layer)
            torch.testing.assert_close(rows, leaked.rows(full, layer))


def test_a_known_prefix_and_a_policy(narrow: LanguageModel) -> None:
    """All options of ``invert`` go on as they do for states."""
    ids = torch.tensor([5, 71, 300, 5])
    leaked = Leaked(narrow, "keys")
    rows = leaked.rows(cache_of(narrow.decoder, ids), 2)[0]
    noise = 1e-3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    for back in (
        invert(rows[1:], leaked, 2, prefix=ids[:1]),
        invert(rows, leaked, 2, policy=Newton()),
        invert(rows, leaked, 2, policy="auto"),
        invert(rows + noise, leaked, 2, epsilon=0.1),
    ):
        assert torch.equal(back.tokens, ids)
    certified = invert(rows[:2], leaked, 2, certify=True)
    assert certified.certified and (certified.tested == narrow.vocab_size).all()


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_sixteen_bits(name: str) -> None:
    """A cache in half precision comes out bit for bit, like states."""
    half = LanguageModel(small(name, device="cpu").decoder.to(torch.bfloat16))
    ids = torch.tensor([5, 71, 300, 5, 12, 64, 499])
    for what in ("keys", "values"):
        leaked = Leaked(half, what)
        rows = leaked.rows(cache_of(half.decoder, ids), 2)
        assert torch.equal(invert(rows, leaked, 2).tokens, ids)


def test_a_lens_of_what_leaked(pocket: LanguageModel, tmp_path: object) -> None:
    """It drafts; and is that of no other part, also where the numbers are as many."""
    values = Leaked(pocket, "values")
    text = list(prompts(pocket.tokenizer, "prose", 32))
    lens = Lens.fit(values, 1, prompts=text, features=0)
    lens.save(tmp_path / "lens")
    kept = Lens.load(tmp_path / "lens", Leaked(pocket, "values"))
    rows = values.rows(cache_of(pocket.decoder, pocket.encode(TEXT)), 1)
    recovered = invert(rows, values, 1, lens=kept)
    assert recovered.text == TEXT and recovered.tested.double().mean() < 8
    for other in (Leaked(pocket, "keys"), pocket):
        with pytest.raises(LensError, match="other weights"):
            Lens.load(tmp_path / "lens", other)


def test_narrow_caches_of_many_tokens(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, family: Family, prompt: Tensor
) -> None:
    """Fewer numbers than an embedding has: what learns from the search, and a lens."""
    monkeypatch.setattr(fitted, "FOLDER", tmp_path)
    monkeypatch.setattr(fitted, "TOKENS", 50)
    monkeypatch.setattr(fitted, "FEATURES", 0)
    # Without a tokenizer: a lens of random tokens.
    leaked = Leaked(LanguageModel(family[1].decoder), "values")
    for layer in (0, 2):
        rows = leaked.rows(cache_of(family[0], prompt), layer)
        for bound, lens in ((2**23, False), (0, None), (0, None)):
            monkeypatch.setattr(fitted, "BOUND", bound)
            recovered = invert(rows, leaked, layer, lens=lens)
            assert torch.equal(recovered.tokens, prompt.cpu())


def test_tokens_that_share_a_cache_are_refused(narrow: LanguageModel) -> None:
    """Twins by their embeddings, and those that the values alone do not tell apart."""
    ids = torch.tensor([5, 71, 300, 5])
    same = twins(narrow, int(ids[2]), 7)
    merging = copy.deepcopy(narrow.decoder)
    # Queries, keys and values stand side by side.
    values = slice(2 * narrow.d_model, None)
    with torch.no_grad():
        merging.h[2].attn.c_attn.weight[:, values] = 0
        merging.h[2].attn.c_attn.bias[values] = 1
    for model, layer in ((same, 1), (LanguageModel(merging), 2)):
        leaked = Leaked(model, "values")
        with pytest.raises(Ambiguous, match="tokens verify, among them"):
            invert(leaked.rows(cache_of(model.decoder, ids), layer), leaked, layer)


def test_what_is_refused(pocket: LanguageModel) -> None:
    """Each in one line, with what came, what was expected, and a way out."""
    values = Leaked(pocket, "values")
    cache = cache_of(pocket.decoder, pocket.encode(TEXT))
    x = cache.layers[2].values
    expected = r"expected past_key_values or \(prompts, 4, pos, 64\)"
    cut = DynamicCache()
    wrong = (x.transpose(1, 2), x[..., 1:], x[0, 0], [x, x], (), None, "x", cut)
    for thing in (*wrong, x.cpu().numpy()):
        with pytest.raises(StatesError, match=f"got values of shape .*; {expected}"):
            values.rows(thing, 2)
    for layer in (-1, 6, 7, 8, True):
        for ask in (lambda n: values.rows(cache, n), lambda n: invert(x, values, n)):
            with pytest.raises(ModelError, match="got layer") as refusal:
                ask(layer)
            assert "\n" not in str(refusal.value)
    with pytest.raises(ModelError, match=r"pocket-gpt2, values have layers 0 to 5"):
        values.states(TEXT, 6)
    for what in ("both", "key", ""):
        with pytest.raises(ModelError, match="expected 'keys' or 'values', alike in"):
            Leaked(pocket, what)
    with pytest.raises(ModelError, match="expected the model itself"):
        last_states(values, [pocket.encode(TEXT)], [2])
    with pytest.raises(StatesError, match="got states of shape"):
        invert(x, values, 2)  # heads are not yet in one row
    with pytest.raises(NotVerified):
        invert(values.rows(cache, 3), values, 2)
    with pytest.raises(SipItError):
        invert(values.rows(cache, 3), pocket, 3)


# States of length one, and logits


def test_states_of_length_one(family: Family, prompt: Tensor) -> None:
    """What transformers gives after the final norm, divided by its length."""
    hf, model = family
    with torch.no_grad():
        read = hf(prompt[None], output_hidden_states=True).hidden_states
    leaked = Leaked(model, "unit")
    for layer, states in ((1, read[1]), (model.n_layers + 1, read[-1])):
        unit = states / states.square().sum(-1, keepdim=True).sqrt()
        recovered = invert(unit, leaked, layer)
        assert torch.equal(recovered.tokens, prompt.cpu()) and recovered.verified.all()
        with pytest.raises(NotVerified):
            invert(1.01 * unit, leaked, layer)


@pytest.mark.parametrize("form", ["logits", "log-probabilities"])
def test_next_token_logits_give_the_prompt_back(
    narrow: LanguageModel, form: str
) -> None:
    """Of a head of its own with a bias, in float32; what no prompt has is refused."""
    torch.manual_seed(0)
    head = GPT2LMHeadModel(copy.deepcopy(narrow.decoder.config))
    head.config.tie_word_embeddings = False
    head.lm_head = torch.nn.Linear(64, 500)
    head.transformer.load_state_dict(narrow.decoder.state_dict())
    model = LanguageModel(head.eval())
    ids = torch.tensor([7, 300, 41, 7])
    with torch.no_grad():
        logits = head(ids[None]).logits[0]
    if form != "logits":
        logits = logits.log_softmax(-1)
    leaked = Leaked(model, "logits")
    layer = model.n_layers + 1
    rows = leaked.rows(logits, layer)
    assert torch.allclose(rows, model.states(ids, layer), atol=1e-4)
    assert invert(rows, leaked, layer).tokens.tolist() == ids.tolist()
    last = leaked.rows(logits[1], layer)
    assert invert_last(last, leaked, layer, length=2).tokens.tolist() == [7, 300]
    with pytest.raises(NotVerified):
        invert(leaked.rows(logits.flip(1), layer), leaked, layer)
    assert torch.equal(leaked.rows(logits.numpy(), layer), rows)
    for bad, place in ((logits[:, :-1], layer), (logits, layer - 1), ("x", layer)):
        with pytest.raises(StatesError, match=r"expected \(…, 500\) and layer 4"):
            leaked.rows(bad, place)
    untied = LanguageModel(head.transformer)
    with pytest.raises(ModelError, match="without the matrix that makes its logits"):
        Leaked(untied, "logits")


@pytest.mark.parametrize("what", ["unit", "values", "centred"])
def test_one_row_of_what_leaked_gives_two_tokens(
    narrow: LanguageModel, what: str
) -> None:
    """The last row alone, also of another width; a row of no prompt is refused."""
    leaked = Leaked(narrow, what)
    ids = torch.tensor([7, 300])
    row = leaked.states(ids, 2)[-1]
    ends = Ends.fit(leaked, 2, 2, tokens=2000, features=32)
    recovered = invert_last(row, leaked, 2, longest=2, ends=ends)
    assert recovered.tokens.tolist() == [7, 300]
    with pytest.raises(NotRecovered):
        invert_last(row.flip(0), leaked, 2, longest=2, ends=ends, seconds=0.5)
