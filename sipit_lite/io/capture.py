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
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from sipit_lite.io.files import arrays, check_path, replacing
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
                x = (x.float() / scales[layer][:, None]).round()
            stored[layer] = x.to(dtype or x.dtype)
            if not bool(stored[layer].float().isfinite().all()):
                expected = f"one that holds layer {layer}, up to {largest.max():.3g}"
                raise StatesError(f"got dtype {dtype}; expected {expected}")
        return cls(stored, model.name, scales, model.begin, tuple(passes))

    def at(self, layer: int) -> Tensor:
        """The states of one layer as stored; ``StatesError`` for another."""
        if layer not in self.states:
            there = ", ".join(map(str, self.states))
            raise StatesError(f"got layer {layer}; these states are of layers {there}")
        return self.states[layer]

    def check(self, model: LanguageModel) -> None:
        """Raise ``StatesError`` where the tokenizer of ``model`` begins otherwise."""
        if None not in (self.begin, model.tokenizer) and self.begin != model.begin:
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
    passes: list[Tensor] = field(default_factory=list)  # the tokens of each
    cache: Any = None
    thread: int | None = None
    wrong: str = ""  # why nothing more is kept

    def captured(self) -> Captured:
        """The states of all positions that every layer has, at least one."""
        length = 0 if self.cache is None else int(self.cache.get_seq_length())
        if length:
            self._crop(length)  # the last pass may have tried tokens in vain
        # A pass that was cut short has reached the lower layers alone: it is dropped.
        complete = min(len(rows) for rows in self.rows.values())
        if complete == 0:
            got = "got no forward pass inside capture, or one of a compiled model"
            raise StatesError(self.wrong or got)
        states = {x: torch.cat(rows[:complete]) for x, rows in self.rows.items()}
        passes = map(len, self.passes[:complete])
        return Captured.of(states, self.model, self.dtype, passes)

    def before(self, decoder: nn.Module, args: tuple, kwargs: Any = None) -> None:
        """Look at a pass that begins; what cannot be kept is noted, the model runs."""
        thread = threading.get_ident()
        if decoder is not self.model.decoder or kwargs is None:
            # A cut, which shares its hooks, or this hook was removed amid the pass.
            self.thread = None if self.thread == thread else self.thread
            return
        given = args[0] if args else kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        ids = given[0] if given.ndim == 2 else given[0, :, 0]
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        cache = kwargs.get("past_key_values")
        # Where this pass begins, and where the last one ended.
        start = 0 if cache is None else int(cache.get_seq_length())
        old = torch.cat([ids[:0], *self.passes])
        # Tokens that were tried in vain, or the prompt from its start, without a cache.
        if cache is self.cache if start else old.equal(ids[: len(old)].to(old)):
            self._crop(start)
        seen = sum(map(len, self.passes))
        place = f"pass from position {start} after {seen} captured ones"
        wrong = {
            f"batch of {len(given)} prompts or beams; expected one": len(given) != 1,
            "prompt with padding; expected a mask of ones": padded,
            "model in training mode; expected model.eval()": decoder.training,
            f"{place}; expected one prompt, with its cache": start != seen,
            "pass after a failed one": min(map(len, self.rows.values()))
            < len(self.passes),
        }
        for message in filter(wrong.get, wrong):
            self.wrong = self.wrong or f"inside capture, got a {message}"
        self.thread = None if self.wrong else thread
        if not self.wrong:
            self.passes.append(ids)
            self.cache = cache

    def keep(self, layer: int, states: Float[Tensor, "rows pos d_model"]) -> None:
        """Called by each layer as it runs, in a pass of ours or of a cut."""
        if self.thread == threading.get_ident():
            self.rows[layer].append(states[0].detach().cpu())

    def _crop(self, length: int) -> None:
        """Forget what stands behind the first ``length`` positions."""
        for parts in (self.passes, *self.rows.values()):
            room = length
            for i, part in enumerate(parts):
                parts[i] = part[:room]
                room -= len(parts[i])
            parts[:] = filter(len, parts)


@contextmanager
def tapped(
    model: LanguageModel, layers: Iterable[int], keep: Callable | None = None
) -> Iterator[dict[int, Tensor]]:
    """Layer → its latest states in this thread; ``keep`` gets both, of any thread."""
    # Not ``output_hidden_states``: it leaves hooks in blocks that all cuts share.
    blocks, norm = (getattr(model.decoder, name) for name in model.parts)
    states: dict[int, Tensor] = {}
    thread = threading.get_ident()

    def hook(layer: int, _: Any, args: tuple, *rest: Any) -> None:
        *kwargs, output = rest  # no keywords where it was removed amid another's pass
        h = output if isinstance(output, Tensor) else output[0]
        if layer == 0 and (args or kwargs):  # what enters the first block
            h = args[0] if args else kwargs[0]["hidden_states"]
        if keep is not None:
            keep(layer, h)
        elif threading.get_ident() == thread:  # all cuts share the blocks
            states[layer] = h

    with ExitStack() as hooks:
        for layer in set(layers):
            take = partial(hook, layer)
            block = norm if layer > len(blocks) else blocks[max(layer - 1, 0)]
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

    Parameters
    ----------
    model, tokenizer: of ``transformers``; the file says which token this puts first
    path: a file, written at the end, with the complete passes also after an error
    layers, dtype: by default the last; a format to round to, as ``torch.int8``

    Yields
    ------
    A ``Tape``: its ``captured()`` are the states so far, of all that the model has read

    Raises
    ------
    StatesError: a bad layer or format; at the end a batch, padding, a second prompt
    """
    ours = LanguageModel(model, tokenizer)
    wanted = [ours.n_layers] if layers is None else sorted(set(layers))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] <= ours.n_layers + 1:
        there = f"{ours.name} has layers 0 (embeddings) to {ours.n_layers}"
        raise StatesError(f"got layers {wanted}; {there}, and one after the norm")
    Captured.of({}, ours, dtype, ())  # a bad format is refused before the model runs
    if path is not None:
        check_path(path, StatesError)
    tape = Tape(ours, dtype, {layer: [] for layer in wanted})
    hook = ours.decoder.register_forward_pre_hook(tape.before, with_kwargs=True)
    finished = False
    try:
        with hook, tapped(ours, wanted, tape.keep):
            yield tape
        finished = True
    finally:
        if path is not None and (finished or all(tape.rows.values())):
            _save(path, tape.captured())
    if tape.wrong:
        raise StatesError(tape.wrong)


def write_states(
    path: str | Path,
    model: LanguageModel,
    text: str,
    layers: int | Sequence[int],
    *,
    dtype: torch.dtype | None = None,
) -> Captured:
    """Write the hidden states of a text at one or more layers into a safetensors file.

    Parameters
    ----------
    layers, dtype: from 0 to L + 1; a format to round to, as ``torch.int8``

    Returns
    -------
    What ``read_states`` reads from ``path``, shape (T, d_model) at each layer

    Raises
    ------
    ModelError, StatesError: a bad text or layer; a bad format, or no place for a file
    """
    layers = [layers] if isinstance(layers, int) else sorted(set(layers))
    ids = model.encode(text)
    check_path(path, StatesError)
    states = {layer: model.states(ids, layer).cpu() for layer in layers}
    captured = Captured.of(states, model, dtype, [len(ids)])
    _save(path, captured)
    return captured


def read_states(path: str | Path, layers: Sequence[int] | None = None) -> Captured:
    """Read a file of ``write_states``, ``capture``, NumPy, PyTorch or vLLM.

    Parameters
    ----------
    path, layers: the file; the numbers of its layers where it does not say them

    Returns
    -------
    The ``Captured``, states as stored; its ``invert`` recovers the prompt

    Raises
    ------
    StatesError: no such file, a damaged one, or layers without their numbers
    """
    got = f"got {str(path)!r}"
    try:
        tensors, metadata = arrays(Path(path))
    except Exception as error:  # each format has errors of its own
        reason = f"not a complete safetensors file, .npy, or .pt of tensors ({error}"
        raise StatesError(f"{got}, {reason.splitlines()[0][:200]})") from error
    plain = Path(path).suffix in (".npy", ".pt", ".pth") or "hidden_states" in tensors
    if plain or (layers and not metadata):
        return Captured(_numbered(got, tensors, layers), "")
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


def _numbered(got: str, tensors: Mapping, layers: Sequence[int] | None) -> dict:
    """The states of a file that does not say their layers, by layer."""
    rows = [x for x in tensors.values() if isinstance(x, Tensor) and x.ndim > 1]
    vllm = "hidden_states" in tensors  # positions come first, and tokens beside
    if len(rows) == 1 and rows[0].ndim == 3:
        rows = list(rows[0].unbind(int(vllm)))
    # What transformers gives last has gone through the final norm.
    usual = [] if vllm or len(rows) < 2 else [*range(len(rows) - 1), len(rows)]
    for numbers in filter(None, (layers, usual)):
        if len(numbers) == len(rows):
            states = [x[0] if x.shape[:-2] == (1,) else x for x in rows]
            return dict(zip(numbers, states, strict=True))
    there = f"{got} of {len(rows)} layers, without their numbers"
    raise StatesError(f"{there}; expected layers=[...] (or --layer for one)")


def _save(path: str | Path, captured: Captured) -> None:
    tensors = {f"layer.{layer}": x.contiguous() for layer, x in captured.states.items()}
    tensors |= {f"layer.{layer}.scale": x for layer, x in captured.scales.items()}
    metadata = {"format": FORMAT, "model": captured.model}
    if captured.begin is not None:
        metadata["begin"] = str(captured.begin)
    if captured.passes:
        metadata["passes"] = " ".join(map(str, captured.passes))
    with replacing(path, StatesError, folders=False) as part:
        save_file(tensors, part, metadata)
