"""What leaks in the place of states: keys, values, states less a mean or of length one.

Or logits, from which the state after the final norm is solved for.

The map s ↦ H^(ℓ)(s) ends in what leaked; noise floor, search and verification stay as
they are. That no prompts share it is proved of states alone (Theorem 2.2): tokens that
do are refused as ambiguous.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from sipit_lite.model import LanguageModel, ModelError, StatesError, plain_settings


class Leaked(LanguageModel):
    """A model whose states are what leaked of them, for ``invert`` and ``Lens.fit``.

    ``"keys"`` and ``"values"`` of layer ℓ, from 0 to L − 1, are what a cache keeps as
    ``past_key_values.layers[ℓ]``, all heads in one row; keys depend on the position.
    ``"centred"`` states have no mean over their d_model numbers, as in TransformerLens;
    ``"unit"`` states have length one, as services of embeddings give them; ``"logits"``
    or log-probabilities of the next token stand for the state of layer L + 1.
    Raises ``ModelError`` for anything else, or layers that do not cache alike.

    >>> from sipit_lite import invert, load
    >>> model = load(device="cpu")
    >>> cache = model.decoder(model.encode("hidden states")[None]).past_key_values
    >>> values = Leaked(model, "values")
    >>> invert(values.rows(cache, 3), values, 3).text
    'hidden states'
    """

    @plain_settings()
    def __init__(self, model: LanguageModel, what: str) -> None:
        vars(self).update(vars(model))
        self.base = model
        self.what = what
        self.name = f"{model.name}, {what}"
        self.measured = {}  # what leaks has noise of its own
        self.hf_model = None  # no block goes on from it
        self.cached = what not in ("centred", "unit", "logits")
        head = model.hf_model and model.hf_model.get_output_embeddings()
        tied = model.decoder.config.tie_word_embeddings
        if what == "logits" and head is None and not tied:
            got = f"got {model.name} without the matrix that makes its logits"
            raise ModelError(f"{got}; expected a model with its head in memory")
        self.unembedding = model.embeddings if head is None else head.weight
        self.bias = 0.0 if getattr(head, "bias", None) is None else head.bias
        if not self.cached:
            return
        one = {"inputs_embeds": model.embeddings[:1][None], "use_cache": True}
        with torch.no_grad():
            cache = model.cut(model.n_layers)(**one).past_key_values
        stored = [getattr(x, str(what), None) for x in getattr(cache, "layers", ())]
        shapes = {tuple(getattr(x, "shape", ())) for x in stored}
        if what not in ("keys", "values") or [*map(len, shapes)] != [4]:
            got = f"got {what!r} of {model.name}, with caches of shapes {shapes}"
            expected = "'keys' or 'values', alike in all layers, or 'centred', 'unit'"
            raise ModelError(f"{got}; expected {expected}, 'logits'")
        [(_, self.heads, _, self.width)] = shapes
        self.d_model = self.heads * self.width

    @property
    def parts(self) -> tuple[str, str]:
        """No blocks whose outputs one could take for these: ``ModelError``."""
        raise ModelError(f"got {self.name}; expected the model itself for this")

    def check_layer(self, layer: int) -> None:
        """Raise ``ModelError`` unless 0 ≤ layer ≤ L + 1, or for a cache < L."""
        super().check_layer(layer)
        if self.cached and layer >= self.n_layers:
            last = self.n_layers - 1
            raise ModelError(f"got layer {layer}; {self.name} have layers 0 to {last}")

    def cut(self, layer: int) -> Any:
        """What gives, in the place of the states of a layer, what leaked of them."""
        self.check_layer(layer)
        # The block that reads a layer caches it.
        return partial(self._read, self.base.cut(layer + self.cached), layer)

    def _read(self, cut: nn.Module, layer: int, **inputs: Any) -> SimpleNamespace:
        cache = inputs.get("past_key_values", DynamicCache())
        if self.cached:
            inputs |= {"past_key_values": cache, "use_cache": True}
        h = cut(**inputs).last_hidden_state
        leaked = h
        if self.what == "centred":
            leaked = h - h.mean(-1, keepdim=True)
        if self.what == "unit":
            leaked = nn.functional.normalize(h, dim=-1)
        if self.cached:
            leaked = getattr(cache.layers[layer], self.what)[:, :, -h.shape[1] :]
            leaked = leaked.transpose(1, 2).flatten(2)
        return SimpleNamespace(last_hidden_state=leaked)

    def rows(self, cache: Any, layer: int) -> Float[Tensor, "*rows d_model"]:
        """What ``invert`` takes of a layer of ``past_key_values``, a row a position.

        Or of the tensor in it, (prompts, heads, pos, width); or of logits (…, vocab).
        Raises ``StatesError`` for another shape or positions, ``ModelError``: a layer.
        """
        self.check_layer(layer)
        if self.what == "logits":
            return self._solved(cache, layer)
        if not self.cached:
            return cache
        stored = dict(enumerate(getattr(cache, "layers", ()))).get(layer)
        x = getattr(stored, self.what, cache)
        shape = tuple(getattr(x, "shape", ()))
        if not isinstance(x, Tensor) or shape[-3::2] != (self.heads, self.width):
            got = f"got {self.what} of shape {shape}"
            expected = f"past_key_values or (prompts, {self.heads}, pos, {self.width})"
            raise StatesError(f"{got}; expected {expected}")
        # A static cache has room behind; a sliding window has lost what came first.
        seen = shape[-2] if stored is None else int(stored.get_seq_length())
        if seen > shape[-2]:
            got = f"got the last {shape[-2]} of {seen} positions; expected all"
            raise StatesError(f"{got}: past_key_values=DynamicCache() keeps them")
        return x[..., :seen, :].transpose(-3, -2).flatten(-2)

    def _solved(self, logits: Any, layer: int) -> Float[Tensor, "*rows d_model"]:
        """The h with U h + b = logits + c, by least squares; c is any constant."""
        vocab = len(self.unembedding)
        shape = tuple(getattr(logits, "shape", ()))
        if layer != self.n_layers + 1 or shape[-1:] != (vocab,):
            got = f"got logits of shape {shape} for layer {layer}"
            expected = f"(…, {vocab}) and layer {self.n_layers + 1}"
            raise StatesError(f"{got}; expected {expected}")
        # Less its mean row it is orthogonal to constants, which therefore drop out.
        table = self.unembedding.double()
        table = table - table.mean(0)
        # Also with fewer tokens than numbers, where no h is the only one.
        weights = table @ torch.linalg.pinv(table.T @ table, hermitian=True)
        linear = torch.as_tensor(logits).to(weights) - self.bias
        return (linear @ weights).to(self.dtype)
