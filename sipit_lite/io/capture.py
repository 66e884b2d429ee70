"""Hidden states from any running model into a file, and back: the layout ``sipit-lite states 2``.

One safetensors file holds the states of one prompt. Tensors: ``layer.ℓ`` of shape (T, d_model) for each layer ℓ kept,
in the format they were captured in; ``layer.ℓ.scale`` of shape (T,), float32, where that format is an 8-bit integer, so
that the states are ``layer.ℓ · scale``. Metadata: ``format``, ``model``; ``begin``, the begin-of-text token that the
tokenizer put first, where it puts one; ``passes``, the number of positions that each forward pass computed.
The prompt itself is written only when asked for: metadata ``text`` and tensor ``ids``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Float32, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sipit_lite.model import LanguageModel, StatesError, begin_token, tap

FORMAT, OLD = "sipit-lite states 2", "sipit-lite states 1"
STEPS = 127  # of an 8-bit integer, on either side of zero


@dataclass(frozen=True, eq=False)
class Captured:
    """The states of one prompt at one or more layers, and what is known of where they come from.

    ``states`` maps a layer to its states, shape (T, d_model); ``scales`` a layer of 8-bit integers to its scale, shape
    (T,). ``begin`` is the begin-of-text token that the tokenizer puts first, None where it puts none or is not known;
    ``passes`` counts the positions of each forward pass; ``text`` is there where it was kept.
    """

    states: Mapping[int, Tensor]
    model: str
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    begin: int | None = None
    passes: tuple[int, ...] | None = None
    text: str | None = None

    @property
    def layer(self) -> int:
        """The cheapest layer to invert: the lowest, since the one-step map runs the blocks up to it alone."""
        return min(self.states)

    def check(self, model: LanguageModel) -> None:
        """Raise ``StatesError`` where the tokenizer of ``model`` begins its prompts in another way."""
        if (
            self.begin is not None
            and model.tokenizer is not None
            and self.begin != model.begin
        ):
            own = "none" if model.begin is None else f"token {model.begin}"
            raise StatesError(
                f"got states of prompts that begin with the begin-of-text token {self.begin}; the tokenizer of "
                f"{model.name} puts {own} first: expected states captured with the same tokenizer"
            )

    def at(self, layer: int) -> Shaped[Tensor, "pos d_model"]:
        """The states of one layer as they are stored; raises ``StatesError`` for a layer that was not kept."""
        if layer not in self.states:
            raise StatesError(
                f"got layer {layer}; these states are of layers {', '.join(map(str, self.states))}"
            )
        return self.states[layer]


@dataclass(eq=False)
class Tape:
    """What a running ``capture`` has kept so far; ``captured`` reads it at any time."""

    name: str
    dtype: torch.dtype | None
    begin: int | None
    rows: dict[int, list[Tensor]]
    passes: list[int] = field(default_factory=list)

    def captured(self) -> Captured:
        """The states of all positions that every layer has; raises ``StatesError`` before the first pass."""
        whole = min(
            len(rows) for rows in self.rows.values()
        )  # a pass that was cut short is dropped
        if whole == 0:
            raise StatesError(
                "got no forward pass inside capture; expected the model to run on one prompt"
            )
        kept = {layer: torch.cat(rows[:whole]) for layer, rows in self.rows.items()}
        states, scales = _stored(kept, self.dtype)
        return Captured(
            states, self.name, scales, self.begin, tuple(self.passes[:whole])
        )

    def check(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before each pass of the decoder: one prompt, no padding, its positions in turn, no dropout."""
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if len(given) != 1:
            raise StatesError(
                f"got a batch of {len(given)} prompts inside capture; expected one prompt at a time"
            )
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            raise StatesError(
                "got a prompt with padding inside capture; expected every position to be attended to"
            )
        if decoder.training:
            raise StatesError(
                "got a model in training mode; expected model.eval(), since dropout changes the states"
            )
        before, kept = (
            0 if cache is None else int(cache.get_seq_length()),
            sum(self.passes),
        )
        if before != kept:
            raise StatesError(
                f"got a pass that starts at position {before} after {kept} captured ones; expected one prompt from its "
                "first token on, with its cache: a capture for each prompt"
            )
        self.passes.append(given.shape[1])

    def keep(self, layer: int, states: Float[Tensor, "1 pos d_model"]) -> None:
        """Called by each layer as it runs."""
        self.rows[layer].append(states[0].detach().cpu())


@contextmanager
def capture(
    model: PreTrainedModel,
    path: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Tape]:
    """Keep the hidden states of one prompt while any ``transformers`` decoder runs, and write them to a file.

    ``layers`` are 0 (embeddings) to L, the last alone by default; ``dtype`` rounds the states, ``torch.int8`` with a
    scale for each position. A generation adds its tokens pass by pass, all but the last, which the model never reads.
    With ``tokenizer``, the file says which begin-of-text token it puts first. An error or Ctrl-C inside keeps, and
    writes, the passes that are whole. Raises ``StatesError`` for a layer outside 0..L, and, from inside the model's
    pass, for a batch of prompts, padding, a second prompt, or dropout.

    >>> from sipit_lite import invert, load
    >>> model = load(device="cpu")
    >>> with capture(model.decoder, layers=[3]) as tape:  # any model of transformers, not only ours
    ...     _ = model.decoder(input_ids=model.encode("hidden states")[None])
    >>> invert(tape.captured(), model).text
    'hidden states'
    """
    decoder = model.get_decoder()
    depth = decoder.config.num_hidden_layers
    asked = [depth] if layers is None else sorted(set(layers))
    if not asked or not 0 <= asked[0] <= asked[-1] <= depth:
        raise StatesError(
            f"got layers {asked}; {type(model).__name__} has layers 0 (embeddings) to {depth}"
        )
    name = model.config.name_or_path or type(model).__name__
    tape = Tape(
        name,
        _check_dtype(dtype),
        begin_token(tokenizer),
        {layer: [] for layer in asked},
    )
    hook = decoder.register_forward_pre_hook(tape.check, with_kwargs=True)
    whole = False
    try:
        with tap(decoder, asked, tape.keep):
            yield tape
        whole = True
    finally:
        hook.remove()
        if path is not None and (whole or all(tape.rows.values())):
            _save(path, tape.captured())


def write_states(
    path: str | Path,
    model: LanguageModel,
    text: str,
    layers: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    keep_text: bool = False,
) -> Captured:
    """Capture the hidden states of a text at one or more layers into a safetensors file; ``dtype`` rounds them first.

    Raises ``ModelError`` for an empty or too long text or a bad layer, ``StatesError`` where the file cannot be
    written, or ``dtype`` is no floating-point format or 8-bit integer, or cannot hold the states.

    >>> import tempfile; from sipit_lite import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_states(f"{folder}/states.safetensors", load(device="cpu"), "hidden states", [3, 6])
    ...     captured = read_states(f"{folder}/states.safetensors")
    >>> captured.model, captured.layer, list(captured.states), captured.text
    ('pocket-gpt2', 3, [3, 6], None)
    """
    layers = [layers] if isinstance(layers, int) else sorted(set(layers))
    ids = model.encode(text)
    model.check_ids(ids)
    kept = {layer: model.states(ids, layer).cpu() for layer in layers}
    states, scales = _stored(kept, _check_dtype(dtype))
    captured = Captured(
        states,
        model.name,
        scales,
        model.begin,
        (len(ids),),
        text if keep_text else None,
    )
    _save(path, captured, {"ids": ids.cpu()} if keep_text else {})
    return captured


def read_states(path: str | Path) -> Captured:
    """Read a file that ``capture`` or ``write_states`` wrote, or one of the older layout with one layer.

    Raises ``StatesError`` for a file that is missing, truncated, not safetensors, or without the fields.
    """
    if not Path(path).is_file():
        raise StatesError(
            f"got the path {str(path)!r}, where there is no file; expected a safetensors file of states"
        )
    try:
        with safe_open(path, framework="pt") as stored:
            told = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except (SafetensorError, OSError) as error:
        raise StatesError(
            f"got {str(path)!r}, which is not a whole safetensors file ({error})"
        ) from error
    if told.get("format") == OLD and told.get("layer", "").isdecimal():
        tensors = {
            f"layer.{told['layer']}" if name == "states" else name: x
            for name, x in tensors.items()
        }
    states = {
        int(name[6:]): x
        for name, x in tensors.items()
        if re.fullmatch(r"layer\.\d{1,6}", name)
    }
    if told.get("format") not in (FORMAT, OLD) or "model" not in told or not states:
        raise StatesError(
            f"got {str(path)!r} with tensors {sorted(tensors)} and metadata {sorted(told)}; expected tensors 'layer.ℓ' "
            f"and metadata 'format' ({FORMAT!r}) and 'model'"
        )
    scales = {
        layer: tensors[f"layer.{layer}.scale"]
        for layer in states
        if f"layer.{layer}.scale" in tensors
    }
    bare = [
        layer
        for layer in states
        if not states[layer].is_floating_point() and layer not in scales
    ]
    if bare:
        raise StatesError(
            f"got {str(path)!r} with layer {bare[0]} in {states[bare[0]].dtype} and no scale; expected the tensor "
            f"'layer.{bare[0]}.scale', one number a position"
        )
    passes = tuple(_number(count, path) for count in told.get("passes", "").split())
    begin = _number(told["begin"], path) if "begin" in told else None
    return Captured(
        dict(sorted(states.items())),
        told["model"],
        scales,
        begin,
        passes or None,
        told.get("text"),
    )


def _number(text: str, path: str | Path) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise StatesError(
            f"got {text[:20]!r} in the metadata of {str(path)!r}; expected a whole number"
        )
    return int(text)


def _check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype.is_floating_point or dtype == torch.int8:
        return dtype
    raise StatesError(
        f"got dtype {dtype}; states are stored in a floating-point format such as torch.float32, or in torch.int8"
    )


def _stored(
    kept: Mapping[int, Tensor], dtype: torch.dtype | None
) -> tuple[dict[int, Tensor], dict[int, Float32[Tensor, " pos"]]]:
    """The states in the format to be stored, and the scales that 8-bit integers need."""
    if dtype == torch.int8:
        largest = {layer: x.float().abs().amax(1) for layer, x in kept.items()}
        scales = {
            layer: torch.where(top > 0, top / STEPS, 1.0)
            for layer, top in largest.items()
        }
        steps = {
            layer: (x.float() / scales[layer][:, None]).round()
            for layer, x in kept.items()
        }
        return {layer: x.to(torch.int8) for layer, x in steps.items()}, scales
    rounded = {layer: x.to(dtype or x.dtype) for layer, x in kept.items()}
    for layer, x in rounded.items():
        if not bool(x.float().isfinite().all()):
            largest = float(kept[layer].float().abs().max())
            raise StatesError(
                f"got dtype {dtype}; expected one that holds the states of layer {layer}, up to {largest:.3g}"
            )
    return rounded, {}


def _save(
    path: str | Path, captured: Captured, beside: Mapping[str, Tensor] | None = None
) -> None:
    tensors = {f"layer.{layer}": x.contiguous() for layer, x in captured.states.items()}
    tensors |= {
        f"layer.{layer}.scale": x for layer, x in captured.scales.items()
    } | dict(beside or {})
    passes = " ".join(map(str, captured.passes)) if captured.passes else None
    known = {"begin": captured.begin, "text": captured.text, "passes": passes}
    told = {"format": FORMAT, "model": captured.model} | {
        k: str(v) for k, v in known.items() if v is not None
    }
    try:
        save_file(tensors, path, told)
    except (OSError, SafetensorError) as error:
        raise StatesError(
            f"got the path {str(path)!r}, where no file can be written ({error})"
        ) from error
