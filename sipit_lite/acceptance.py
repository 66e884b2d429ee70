"""The local verifier: when does a candidate's state agree with the observed one?

No magic ε: the radius of the acceptance region is the float noise of this model at this layer, measured,
and the rounding of a coarser stored format is treated as what it is, an interval around each number.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sipit_lite.model import LanguageModel, ModelError, StatesError
from sipit_lite.onestep import EXACT, ROWS, OneStepMap

SAFETY = 16  # the noise is measured on a few positions; other prompts and machines stay within this factor
PROBES = (
    0,
    1,
    3,
    7,
    15,
    31,
    63,
    127,
    255,
)  # where it is measured: it grows with the prefix, and position 0 is special
APART = 64  # radii that different tokens must be apart for a draft to be trusted without rivals being tested
_MEASURED: WeakKeyDictionary[LanguageModel, dict[int, float]] = WeakKeyDictionary()
_SEPARATED: WeakKeyDictionary[LanguageModel, dict[int, bool]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Observation:
    """Observed states with what is known of their noise: the acceptance regions A_{π,t}(·; ε_t) of a whole prompt.

    ``half_width`` is how far rounding to the stored format may have moved each number; ``radius`` holds ε_t.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> seen = Observation.of(model.states("hidden states", 3), model, 3)
    >>> len(seen) == len(seen.radius) and seen.exact
    True
    """

    states: Float[Tensor, "pos d_model"]
    half_width: Float[Tensor, "pos d_model"]
    radius: Float[Tensor, " pos"]

    @classmethod
    def of(
        cls,
        states: object,
        model: LanguageModel,
        layer: int,
        epsilon: float | Tensor | None = None,
        scale: Tensor | None = None,
    ) -> "Observation":
        """Check the states and work out their acceptance regions; ``epsilon`` bounds noise added on purpose.

        It is one number, or one for each position. With ``scale``, one number a position, the states are
        ``states · scale``. Raises ``StatesError`` for states that no prompt has, a bad ``epsilon`` or ``scale``,
        ``ModelError`` for a bad layer.
        """
        model.check_layer(layer)
        scale = None if scale is None else check_scale(scale, states, model)
        values = check_states(states, model, scale)
        bound = torch.as_tensor(
            0.0 if epsilon is None else epsilon, device=model.device
        )
        if bound.shape not in ((), (len(values),)) or not bool(
            ((bound >= 0) & bound.isfinite()).all()
        ):
            raise StatesError(
                f"got epsilon={epsilon}; a bound on the noise is finite and not negative"
            )
        radius = noise_floor(model, layer) * torch.linalg.vector_norm(
            values, dim=1
        ) + bound.to(values)
        if not torch.isfinite(radius).all():
            raise StatesError(
                f"got states of norm {float(values.double().norm(dim=1).max()):.1e}; {model.dtype} overflows"
            )
        return cls(values, rounding_half_width(states, model, scale), radius)

    def __len__(self) -> int:
        return len(self.states)

    @property
    def exact(self) -> bool:
        """Whether the states were stored at least as finely as the model computes."""
        return not bool(self.half_width.any())

    def distance(
        self, t: int, candidates: Float[Tensor, "cand d_model"]
    ) -> Float[Tensor, " cand"]:
        """Distance of each candidate state from the observed one at position t, see ``distance_to_stored``."""
        return distance_to_stored(candidates, self.states[t], self.half_width[t])


def distance_to_stored(
    candidates: Float[Tensor, "cand d_model"],
    observed: Float[Tensor, " d_model"],
    half_width: Float[Tensor, " d_model"],
) -> Float[Tensor, " cand"]:
    """ℓ2 distance from each candidate's state to the nearest state that would have been stored as the observed one.

    With half width zero this is ‖F(v) − ĥ_t‖₂, the distance of the paper's local verifier.
    A candidate that overflowed is infinitely far.

    >>> candidates = torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    >>> distance_to_stored(candidates, torch.zeros(2), torch.zeros(2)).tolist()
    [5.0, 0.5]
    >>> distance_to_stored(candidates, torch.zeros(2), torch.ones(2))[1].item()
    0.0
    """
    beyond = ((candidates - observed).abs() - half_width).clamp(min=0)
    return torch.linalg.vector_norm(beyond.float(), dim=1).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def check_scale(
    scale: Tensor, states: object, model: LanguageModel
) -> Float[Tensor, "pos 1"]:
    """The scale of each position, shape (T, 1), float32, on the model's device.

    Raises ``StatesError`` for anything but T finite numbers above zero, in shape (T,) or (T, 1).
    """
    count = len(states) if isinstance(states, Tensor) and states.ndim else 0
    values = torch.as_tensor(scale).detach().to(model.device, torch.float32)
    if values.shape not in ((count,), (count, 1)) or not bool(
        ((values > 0) & values.isfinite()).all()
    ):
        raise StatesError(
            f"got a scale of shape {tuple(values.shape)}; expected one finite number above 0 for each of the {count} "
            "positions"
        )
    return values.reshape(-1, 1)


def check_states(
    states: object, model: LanguageModel, scale: Float[Tensor, "pos 1"] | None = None
) -> Float[Tensor, "pos d_model"]:
    """The observed states, times their scale where they have one, on the model's device.

    In the model's format, or in float32 where a coarser one would round the product once more. Raises
    ``StatesError`` for anything but (T, d_model) finite numbers with 1 ≤ T ≤ K, floating-point ones without a scale.

    >>> from sipit_lite import load
    >>> check_states(torch.zeros(3, 256), load(device="cpu")).shape
    torch.Size([3, 256])
    """
    if not isinstance(states, Tensor):
        raise StatesError(
            f"got states of type {type(states).__name__}; expected a torch.Tensor"
        )
    if not states.is_floating_point() and (
        scale is None or states.dtype not in (torch.int8, torch.uint8)
    ):
        raise StatesError(
            f"got states of {states.dtype} {'without' if scale is None else 'with'} a scale; expected a floating-point "
            "format such as torch.float32, or 8-bit integers with a scale for each position"
        )
    if (
        states.ndim != 2
        or states.shape[1] != model.d_model
        or not 1 <= len(states) <= model.n_positions
    ):
        raise StatesError(
            f"got states of shape {tuple(states.shape)}; {model.name} has shape (T, {model.d_model}) "
            f"with T from 1 to {model.n_positions}"
        )
    try:
        if scale is None:
            values = states.detach().to(model.device, model.dtype)
        else:
            values = (states.detach().to(model.device, torch.float32) * scale).to(
                _at_least_float32(model)
            )
        bad = (~torch.isfinite(values)).any(1).nonzero()
    except (NotImplementedError, RuntimeError) as error:
        raise StatesError(
            f"got states of {states.dtype}, {states.layout}; not convertible to {model.dtype}"
        ) from error
    if len(bad):
        raise StatesError(
            f"got NaN or Inf in the state at position {int(bad[0])}; expected finite {model.dtype} numbers"
        )
    return values


def _at_least_float32(model: LanguageModel) -> torch.dtype:
    return torch.promote_types(model.dtype, torch.float32)


def rounding_half_width(
    states: Shaped[Tensor, "pos d_model"],
    model: LanguageModel,
    scale: Float[Tensor, "pos 1"] | None = None,
) -> Float[Tensor, "pos d_model"]:
    """How far rounding to the stored format may have moved each number: half a unit in its last place.

    For integers that is half the scale. Zero where the states are stored at least as finely as the model computes.

    >>> from sipit_lite import load
    >>> rounding_half_width(torch.tensor([[1.0, 1.5, 2.0]], dtype=torch.bfloat16), load(device="cpu")).tolist()
    [[0.00390625, 0.00390625, 0.0078125]]
    """
    if not states.is_floating_point() and scale is not None:
        return (scale / 2).expand(states.shape).to(_at_least_float32(model))
    if scale is not None:
        return rounding_half_width(states, model).to(_at_least_float32(model)) * scale
    stored, own = torch.finfo(states.dtype), torch.finfo(model.dtype)
    values = states.to(model.device, torch.float32)
    if stored.eps <= own.eps:
        return torch.zeros_like(values, dtype=model.dtype)
    unit = torch.ldexp(
        torch.full_like(values, stored.eps), torch.frexp(values).exponent - 1
    )
    return (unit / 2).clamp(min=stored.tiny * stored.eps / 2).to(model.dtype)


def noise_floor(model: LanguageModel, layer: int) -> float:
    """Relative float noise of a state, measured: the same state by three routes, times a safety factor.

    The routes are one pass over the whole prompt, one cached step, and a cached step inside a full batch. The
    figure is the largest distance between two of them over the norm of the state, at several positions of a
    random prompt, never below half a unit of rounding, times ``SAFETY``. Measured once for a model and layer: load
    the model anew after changing its weights.
    Raises ``ModelError`` where the routes differ by more than half the digits of the model's format: that is no
    rounding, but a model whose states depend on later tokens or on how they are computed.

    >>> from sipit_lite import load
    >>> 0 < noise_floor(load(device="cpu"), 3) < 1e-3
    True
    """
    known = _MEASURED.setdefault(model, {})
    if layer not in known:
        generator = torch.Generator().manual_seed(0)
        length = min(max(PROBES) + 1, model.n_positions)
        ids = torch.randint(model.vocab_size, (length,), generator=generator).to(
            model.device
        )
        whole = model.states(ids, layer)
        spread = max(
            _disagreement(model, layer, ids, whole, t) for t in PROBES if t < length
        )
        unit = torch.finfo(model.dtype).eps
        if not spread <= unit**0.5:
            raise ModelError(
                f"got {model.name}, whose states at layer {layer} differ by {spread:.1e} of their norm between one "
                f"whole pass and cached steps; expected rounding alone, under {unit**0.5:.1e} (is it causal?)"
            )
        known[layer] = SAFETY * max(unit / 2, spread)
    return known[layer]


def separated(model: LanguageModel, layer: int) -> bool:
    """Whether states of different tokens are far apart on the scale of the float noise, as measured once.

    At the positions where the noise was measured, ``ROWS`` random tokens, among them pairs whose embeddings are
    nearest neighbours, must be at least ``APART`` radii from each other. Where they are not, say because one huge
    dimension makes all norms and so all radii large, a token is not accepted before its rivals were tested.

    >>> from sipit_lite import load
    >>> separated(load(device="cpu"), 3)
    True
    """
    known = _SEPARATED.setdefault(model, {})
    if layer not in known:
        generator = torch.Generator().manual_seed(1)
        length = min(max(PROBES) + 1, model.n_positions)
        ids = torch.randint(model.vocab_size, (length,), generator=generator).to(
            model.device
        )
        some = torch.randperm(model.vocab_size, generator=generator)[: ROWS // 2].to(
            model.device
        )
        apart = torch.cdist(model.embeddings[some].float(), model.embeddings.float())
        crowd = torch.cat(
            [some, apart.scatter(1, some[:, None], torch.inf).argmin(1)]
        ).unique()
        floor = noise_floor(model, layer)
        known[layer] = all(
            _least_gap(OneStepMap.after(model, layer, ids[:t]).tokens(crowd))
            >= APART * floor
            for t in PROBES
            if t < length
        )
    return known[layer]


def _least_gap(states: Float[Tensor, "rows d_model"]) -> float:
    """The smallest distance between two rows over the largest norm."""
    rows = states.double()
    pairs = torch.cdist(rows, rows, compute_mode=EXACT).fill_diagonal_(torch.inf)
    return float(
        pairs.min() / rows.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    )


def _disagreement(
    model: LanguageModel,
    layer: int,
    ids: Int[Tensor, " pos"],
    whole: Float[Tensor, "pos d_model"],
    t: int,
) -> float:
    step = OneStepMap.after(model, layer, ids[:t])
    crowd = torch.arange(min(ROWS, model.vocab_size), device=ids.device)
    crowd[-1] = ids[t]
    routes = (
        torch.stack([whole[t], step.tokens(ids[t : t + 1])[0], step.tokens(crowd)[-1]])
        .cpu()
        .double()
    )
    return float(
        torch.cdist(routes, routes, compute_mode=EXACT).max() / routes[0].norm()
    )
