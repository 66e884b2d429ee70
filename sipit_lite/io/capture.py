"""Hidden states from any running model into a file, and back: ``sipit-lite states 2``.

A safetensors file holds the states of one prompt. Tensors: ``layer.ℓ``, shape (T, d),
and, for 8-bit integers, ``layer.ℓ.scale``, shape (T,): the states are their product.
Metadata: ``format``, ``model``, ``begin`` (the token that the tokenizer puts first),
``passes`` (positions of each). Never the prompt: the file shows what states tell.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sipit_lite.io.files import read, replacing
from sipit_lite.model import LanguageModel, StatesError
from sipit_lite.recovery import NotVerified, Recovery
from sipit_lite.sipit import invert

FORMAT = "sipit-lite states 2"
LAYER = re.compile(r"layer\.\d{1,6}")
STEPS = 127  # of an 8-bit integer, on either side of zero


@dataclass(frozen=True, eq=False)
class Captured:
    """The states of one prompt at one or more layers, and where they come from.

    ``states`` maps a layer to its states, shape (T, d), ``scales`` one of 8-bit
    integers to its scale, shape (T,). The rest is as in a file.
    """

    states: Mapping[int, Tensor]
    model: str
    scales: Mapping[int, Tensor] = field(default_factory=dict)
    begin: int | None = None
    passes: tuple[int, ...] | None = None

    @classmethod
    def of(cls, states: Mapping, model: Any, dtype: Any, passes: Any) -> "Captured":
        """States rounded to a format; ``StatesError`` for one that cannot hold them."""
        if not (dtype in (None, torch.int8) or dtype.is_floating_point):
            raise StatesError(f"got dtype {dtype}; expected torch.float32, int8, ...")
        stored = {}
        scales = {}
        for layer, x in states.items():
            largest = x.float().abs().amax(1)  # at each position, shape (T,)
            if dtype == torch.int8:
                scales[layer] = torch.where(largest > 0, largest / STEPS, 1.0)
                # The largest number of each position takes all 127 steps.
                x = (x.float() / scales[layer][:, None]).round()
            stored[layer] = x.to(dtype or x.dtype)
            if not bool(stored[layer].float().isfinite().all()):
                expected = f"one that holds layer {layer}, up to {largest.max():.3g}"
                raise StatesError(f"got dtype {dtype}; expected {expected}")
        return cls(stored, model.name, scales, model.begin, tuple(passes))

    @property
    def layer(self) -> int:
        """The cheapest layer to invert: the lowest."""
        return min(self.states)

    def at(self, layer: int) -> Shaped[Tensor, "pos d_model"]:
        """The states of one layer as stored; ``StatesError`` for another."""
        if layer not in self.states:
            there = ", ".join(map(str, self.states))
            raise StatesError(f"got layer {layer}; these states are of layers {there}")
        return self.states[layer]

    def check(self, model: LanguageModel) -> None:
        """Raise ``StatesError`` where the tokenizer of ``model`` begins otherwise."""
        known = self.begin is not None and model.tokenizer is not None
        if known and self.begin != model.begin:
            got = f"got prompts with begin-of-text token {self.begin}"
            puts = "none" if model.begin is None else f"token {model.begin}"
            there = f"the tokenizer of {model.name} puts {puts} first"
            raise StatesError(f"{got}; {there}: expected another")

    def invert(
        self, model: LanguageModel, layer: int | None = None, **options: Any
    ) -> Recovery:
        """Recover the prompt by ``invert``, with its options and errors.

        Without a layer, from that of the lens, or the cheapest that does not refuse.
        """
        self.check(model)
        if layer is None:
            layer = getattr(options.get("lens"), "layer", None)
        refusal = StatesError("got a Captured without states")
        for number in sorted(self.states) if layer is None else [layer]:
            states = self.at(number)
            known: dict[str, Any] = {"passes": self.passes}
            if number in self.scales:
                states = states.float() * self.scales[number][:, None]
                known["half_width"] = self.scales[number] / 2
            try:
                recovered = invert(states, model, number, **known, **options)
                return replace(recovered, layer=number)
            except NotVerified as error:
                refusal = error  # a deeper layer may tell apart what this one cannot
        raise refusal


@dataclass(eq=False)
class Tape:
    """What a running ``capture`` has so far; ``captured`` reads it at any time."""

    model: LanguageModel
    dtype: torch.dtype | None
    rows: dict[int, list[Tensor]]
    passes: list[int] = field(default_factory=list)
    thread: int | None = None

    def captured(self) -> Captured:
        """The states of all positions that every layer has, at least one."""
        # A pass that was cut short has reached the lower layers alone: it is dropped.
        complete = min(len(rows) for rows in self.rows.values())
        if complete == 0:
            raise StatesError("got no forward pass inside capture; expected one prompt")
        states = {x: torch.cat(rows[:complete]) for x, rows in self.rows.items()}
        return Captured.of(states, self.model, self.dtype, self.passes[:complete])

    def before(self, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
        """Raise ``StatesError`` for a pass that does not go on with the one prompt."""
        thread = threading.get_ident()
        if decoder is not self.model.decoder:
            # A cut, which shares its hooks: an inversion beside us, not to be kept.
            self.thread = None if self.thread == thread else self.thread
            return
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        cache = kwargs.get("past_key_values")
        # Where this pass begins, and where the last one ended.
        start = 0 if cache is None else int(cache.get_seq_length())
        seen = sum(self.passes)
        place = f"pass from position {start} after {seen} captured ones"
        wrong = {
            f"batch of {len(given)} prompts; expected one": len(given) != 1,
            "prompt with padding; expected a mask of ones": padded,
            "model in training mode; expected model.eval()": decoder.training,
            f"{place}; expected one prompt, with its cache": start != seen,
        }
        for message in filter(wrong.get, wrong):
            raise StatesError(f"inside capture, got a {message}")
        self.passes.append(given.shape[1])
        self.thread = thread

    def keep(self, layer: int, states: Float[Tensor, "1 pos d_model"]) -> None:
        """Called by each layer as it runs, in a pass of ours or of a cut."""
        if self.thread == threading.get_ident():
            self.rows[layer].append(states[0].detach().cpu())


@contextmanager
def tapped(
    model: LanguageModel, layers: Iterable[int], keep: Callable | None = None
) -> Iterator[dict[int, Tensor]]:
    """Layer → its latest states in this thread; ``keep`` gets both, of any thread."""
    # Not ``output_hidden_states``: it leaves hooks in blocks that all cuts share.
    blocks = getattr(model.decoder, model.parts[0])
    states: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def hook(layer: int, _: Any, args: tuple, kwargs: dict, output: Any) -> None:
        h = output if isinstance(output, Tensor) else output[0]
        if layer == 0:  # what enters the first block
            h = args[0] if args else kwargs["hidden_states"]
        if keep is not None:
            keep(layer, h)
        # All cuts share the blocks: passes of other threads come by here as well.
        elif threading.get_ident() == thread:
            states[layer] = h

    with ExitStack() as hooks:
        for layer in set(layers):
            take = partial(hook, layer)
            block = blocks[max(layer - 1, 0)]
            hooks.enter_context(block.register_forward_hook(take, with_kwargs=True))
        yield states


@contextmanager
def capture(
    model: Any,
    path: str | Path | None = None,
    *,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> Iterator[Tape]:
    """Record the hidden states of one prompt while any ``transformers`` decoder runs.

    A generation adds its tokens pass by pass, all but the last, which no model reads.
    An error or Ctrl-C inside leaves, and writes, the passes that are complete. With a
    tokenizer, the file says which token it puts first; ``dtype``, as ``torch.int8``, is
    a format to round to. Raises ``StatesError`` for a bad one or a layer beyond 0
    (embeddings) to L, and inside for a batch, padding, dropout or another prompt.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> with capture(model.decoder, layers=[3]) as tape:  # or any other of transformers
    ...     _ = model.decoder(input_ids=model.encode("hidden states")[None])
    >>> tape.captured().invert(model).text
    'hidden states'
    """
    ours = LanguageModel(model, tokenizer)
    wanted = [ours.n_layers] if layers is None else sorted(set(layers))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] <= ours.n_layers:
        there = f"{ours.name} has layers 0 (embeddings) to {ours.n_layers}"
        raise StatesError(f"got layers {wanted}; {there}")
    Captured.of({}, ours, dtype, ())  # a bad format is refused before the model runs
    tape = Tape(ours, dtype, {layer: [] for layer in wanted})
    hook = ours.decoder.register_forward_pre_hook(tape.before, with_kwargs=True)
    finished = False
    try:
        with hook, tapped(ours, wanted, tape.keep):
            yield tape
        finished = True
    finally:
        # After an error, a file only where there is something to write.
        if path is not None and (finished or all(tape.rows.values())):
            _save(path, tape.captured())


def write_states(
    path: str | Path,
    model: LanguageModel,
    text: str,
    layers: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Captured:
    """Write the hidden states of a text at one or more layers into a safetensors file.

    ``dtype`` rounds them first. Raises ``ModelError`` for a bad text or layer,
    ``StatesError`` for a bad ``dtype``, or a file that cannot be written.
    """
    layers = [layers] if isinstance(layers, int) else sorted(set(layers))
    ids = model.encode(text)
    states = {layer: model.states(ids, layer).cpu() for layer in layers}
    captured = Captured.of(states, model, dtype, [len(ids)])
    _save(path, captured)
    return captured


def read_states(path: str | Path) -> Captured:
    """Read a file of states; ``StatesError`` if missing, cut off, or without fields."""
    got = f"got {str(path)!r}"
    try:
        tensors, metadata = read(path)
    except (SafetensorError, OSError) as error:
        reason = f"not a complete safetensors file ({error})"
        raise StatesError(f"{got}, {reason}") from error
    named = {int(name[6:]): x for name, x in tensors.items() if LAYER.fullmatch(name)}
    states = dict(sorted(named.items()))  # by number: as names, 10 is before 2
    scales = {}
    try:
        if not states or metadata["format"] != FORMAT:
            raise KeyError(FORMAT)
        for layer, x in states.items():
            # Integers are states only times their scale.
            if not x.is_floating_point() or f"layer.{layer}.scale" in tensors:
                scales[layer] = tensors[f"layer.{layer}.scale"]
        begin = int(metadata["begin"]) if "begin" in metadata else None
        passes = tuple(map(int, metadata.get("passes", "").split())) or None
        return Captured(states, metadata["model"], scales, begin, passes)
    except (KeyError, ValueError) as error:  # a field is missing, or is no number
        there = f"tensors {sorted(tensors)} and metadata {sorted(metadata)}"
        fields = f"'layer.ℓ', 'layer.ℓ.scale' for 8-bit integers; 'format' ({FORMAT!r})"
        expected = f"expected tensors {fields}, 'model' ({str(error)[:60]})"
        raise StatesError(f"{got} with {there}; {expected}") from error


def _save(path: str | Path, captured: Captured) -> None:
    """Write captured states in the format at the head of this file."""
    tensors = {f"layer.{layer}": x.contiguous() for layer, x in captured.states.items()}
    tensors |= {f"layer.{layer}.scale": x for layer, x in captured.scales.items()}
    metadata = {"format": FORMAT, "model": captured.model}
    if captured.begin is not None:
        metadata["begin"] = str(captured.begin)
    if captured.passes:
        metadata["passes"] = " ".join(map(str, captured.passes))
    with replacing(path, StatesError, folders=False) as part:
        save_file(tensors, part, metadata)
