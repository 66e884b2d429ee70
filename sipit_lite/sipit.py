"""SipIt (Algorithm 1): read the exact prompt back from the hidden states of one layer.

One loop, for one prompt and for many: draft (nothing, without a lens), read the draft,
accept what agrees (``acceptance``), search for the first token that does not, read on.
What cannot be verified is an error that carries the verified prefix.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from sipit_lite import acceptance
from sipit_lite.model import LanguageModel, StatesError, plain_settings
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Drafter, Gradient, Policy
from sipit_lite.recovery import Ambiguous, Interrupted, NotVerified, Outcome, Recovery

SALT = 2510_15511  # else a prompt drawn with the same seed would be its own starts
PASS = 4096  # tokens in a pass over drafts
offer: Callable[..., Drafter | None] | None = None  # where no lens is; of extensions


def invert(
    states: Any,
    model: LanguageModel,
    layer: int,
    *,
    policy: Policy | str = "auto",
    lens: Drafter | bool | None = None,
    seed: int = 0,
    epsilon: float | Tensor | None = None,
    half_width: Tensor | None = None,
    passes: Sequence[int] | None = None,
    prefix: Int[Tensor, " pos"] | None = None,
    certify: bool = False,
    on_fail: str = "raise",
    progress: bool = False,
) -> Recovery:
    """Recover the exact prompt from the states of all its positions (Algorithm 1).

    Parameters
    ----------
    states: (T, d_model) in any floating-point format; for layer L + 1 after the norm
    policy, lens, seed: the order of candidates: ``"auto"`` drafts with ``lens`` and
        searches by its policy; without one by ``Gradient()``, or where tokens are many
        by what ``extensions.fitted`` offers, which with ``False`` fits no lens
    epsilon: bound on noise ‖ĥ_t − h_t‖₂ that was added on purpose, one number or one a
        position; without it ε_t is the measured noise floor alone
    half_width: how far rounding may have moved the numbers of each position, where it
        is not that of their format: half the scale, of what was 8-bit integers
    passes: for 16 bits, how many positions each pass computed; one pass by default
    prefix: token ids known to stand before ``states``; recovered with them, 0 tested
    certify: test all tokens and measure the margin of the accepted one; all are tested
        anyway with ``epsilon``, ``"nearest"``, coarser states, and 16-bit searches
    on_fail: ``"nearest"`` takes the nearest token where none or several verify, marks
        it as not ``verified``, and goes on

    Returns
    -------
    The ``Recovery``: tokens, text, and how clearly each was told from the others

    Raises
    ------
    StatesError, ModelError, LensError: no such states or layer, another model's lens
    NotVerified, Ambiguous, Interrupted: with the verified prefix; the last on Ctrl-C

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> invert(model.states("hidden states", 3), model, 3).text
    'hidden states'
    """
    options = {"policy": policy, "lens": lens, "seed": seed, "progress": progress}
    options |= {"epsilon": [epsilon], "half_width": [half_width], "passes": [passes]}
    options |= {"prefix": prefix, "certify": certify, "on_fail": on_fail}
    [outcome] = invert_many([states], model, layer, **options)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def invert_many(
    states: Any,
    model: LanguageModel,
    layer: int,
    *,
    mask: Any = None,
    epsilon: float | Sequence | None = None,
    half_width: Sequence[Tensor | None] | None = None,
    passes: Sequence[Sequence[int] | None] | None = None,
    progress: bool = False,
    **options: object,
) -> list[Outcome]:
    """Recover many prompts of any lengths together, with the options of ``invert``.

    Parameters
    ----------
    states, mask: what ``invert`` takes of each prompt, or a padded batch and its mask
    epsilon, half_width, passes: the last two with one entry a prompt

    Returns
    -------
    One outcome a prompt, in order: a ``Recovery``, or the error that ``invert`` raises

    Raises
    ------
    StatesError: a mask that does not fit the states; a bad option
    ModelError, LensError: no such layer, another model's lens
    Interrupted: on Ctrl-C, with all outcomes

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> states = [model.states(text, 1) for text in ("one prompt", "two")]
    >>> [outcome.text for outcome in invert_many(states, model, 1)]
    ['one prompt', 'two']
    """
    if mask is not None:
        shapes = [tuple(getattr(x, "shape", ())) for x in (states, mask)]
        if len(shapes[1]) != 2 or shapes[0][:-1] != shapes[1]:
            got = f"got states of shape {shapes[0]} with a mask of shape {shapes[1]}"
            raise StatesError(f"{got}; expected (prompts, pos, d) and (prompts, pos)")
        pairs = zip(states, torch.as_tensor(mask).bool(), strict=True)
        states = [rows[shown] for rows, shown in pairs]
    prompts: list[_Prompt] = []
    try:
        with plain_settings():
            shared = _Options(model, layer, **options)
            model.check_layer(layer)
            if shared.lens:
                shared.lens.check(model, layer)
            for i, rows in enumerate(states):
                noise = epsilon[i] if isinstance(epsilon, Sequence) else epsilon
                half = half_width and half_width[i]
                prompts.append(_Prompt(shared, rows, noise, half, passes and passes[i]))
            _recover(prompts, shared, progress)
        return [prompt.error or prompt.recovered() for prompt in prompts]
    except KeyboardInterrupt:
        outcomes = [prompt.error or prompt.recovered() for prompt in prompts]
        outcomes += [_blank(torch.zeros(0)) for _ in states[len(prompts) :]]
        stopped = [prompt for prompt in prompts if not prompt.done] or prompts[:1]
        best = [prompt.recovered() for prompt in stopped] or [_blank(torch.zeros(0))]
        raise Interrupted(best[0], outcomes) from None


@dataclass
class _Options:
    """What all prompts of a call share; see ``invert``."""

    model: LanguageModel
    layer: int
    policy: Policy | str = "auto"
    lens: Drafter | bool | None = None
    seed: int = 0
    prefix: Int[Tensor, " pos"] | None = None
    certify: bool = False
    on_fail: str = "raise"

    def __post_init__(self) -> None:
        named = isinstance(self.policy, str) and self.policy != "auto"
        failing = self.on_fail not in ("raise", "nearest")
        if named or failing or not isinstance(self.seed, int):
            got = f"got policy={self.policy!r}, on_fail={self.on_fail!r}"
            expected = "expected 'auto' or one, 'raise' or 'nearest', an integer"
            raise StatesError(f"{got}, seed={self.seed!r}; {expected}")
        if self.prefix is None:
            self.prefix = self.model.vocabulary[:0]  # no token, on the right device
        if not isinstance(self.prefix, Tensor):
            raise StatesError(f"got prefix={self.prefix!r:.40}; expected a tensor")


class _Prompt:
    """One prompt on its way: ``length`` positions are settled, at best drafted behind.

    ``recovery`` has a row for every position; ``tokens`` are those settled and drafted.
    """

    def __init__(self, options: _Options, states, noise, width, passes) -> None:
        self.options = options
        self.started = time.perf_counter()
        self.generator = torch.Generator().manual_seed(options.seed + SALT)
        self.tokens = options.prefix.to(options.model.device)
        # A lens brings one of its own for each prompt.
        self.policy = Gradient() if options.policy == "auto" else options.policy
        self.length = 0
        self.searched = False  # if not, one pass has read it all
        self.error: StatesError | NotVerified | None = None  # ends the prompt
        where = (options.model, options.layer, noise, width, options.prefix)
        try:
            self.observed = acceptance.Observation.of(states, *where)
            count = len(self.observed.states)
            self.passes = [count] if passes is None else passes
            lengths = self.passes if isinstance(self.passes, Sequence) else ()
            fits = all(isinstance(n, int) and n > 0 for n in lengths)
            if not fits or sum(lengths) != count:
                expected = f"expected lengths of at least 1, {count} in all"
                raise StatesError(f"got passes of {self.passes} positions; {expected}")
        except StatesError as error:
            self.error = error
            self.recovery = _blank(torch.zeros(0))
            return
        self.recovery = _blank(self.observed.radius)
        # Announced noise is no rounding, which a pass of the same length would repeat.
        self.repeatable = options.model.sixteen_bits and noise is None
        # Where two tokens could fit one stored state, only a scan can tell.
        coarse = noise is not None or bool(self.observed.half_width.any())
        coarse = coarse or options.certify or options.on_fail == "nearest"
        self.drafts = options.policy == "auto" and not coarse
        self.exhaustive = coarse or options.model.sixteen_bits
        self.length = known = len(self.tokens)  # nothing is drafted yet
        self.recovery.tokens[:known] = self.tokens.cpu()
        self.recovery.distance[:known] = 0.0
        self.recovery.tested[:known] = 0
        self.recovery.margin[:known] = torch.inf  # no other token is in question

    @property
    def done(self) -> bool:
        return self.error is not None or 0 < self.length == len(self.recovery.tokens)

    def recovered(self) -> Recovery:
        rows = {k: x for k, x in vars(self.recovery).items() if isinstance(x, Tensor)}
        columns = {name: x[: self.length].clone() for name, x in rows.items()}
        text = self.options.model.decode(columns["tokens"])
        seconds = time.perf_counter() - self.started
        return replace(self.recovery, **columns, text=text, seconds=seconds)

    def finish(self, states: Tensor, step: OneStepMap, bar: tqdm) -> None:
        """Accept the draft, search for the first token it has wrong, read on behind."""
        self.accept_draft(states)
        bar.update(self.length)
        while not self.done:
            t = self.length
            step = step.crop(t)
            self.search(step)
            if not self.done:
                states, step = step.follow(self.tokens[t:])
                self.accept_draft(states[1:])  # without that of the accepted token
            bar.update(self.length - t)

    def accept_draft(self, states: Tensor) -> None:
        """Settle the drafted tokens that agree, up to the first that does not."""
        first = self.length
        draft = self.tokens[first:]
        if len(draft) == 0:
            return
        where = (self.options.model, self.options.layer)
        clear = 0.0 if self.repeatable else acceptance.CLEAR
        if self.repeatable:  # to the last bit, which leaves no noise
            states = acceptance.repeated(*where, self.tokens, self.passes)[first:]
        drafted = (draft, states, acceptance.related(*where))
        accepted, read = acceptance.agreeing(self.observed, *drafted, clear)
        end = first + accepted
        self.recovery.distance[first:end] = read[0, :accepted]
        self.recovery.tokens[first:end] = read[1, :accepted]
        self.length = end

    def search(self, step: OneStepMap) -> None:
        """Test candidates at the first open position, and settle it or refuse."""
        t = self.length
        observed = self.observed
        if self.exhaustive:
            states = step.tokens(self.options.model.vocabulary)
            distance = observed.distance(t, states)
            near, token = distance.min(0, keepdim=True)
            acceptance.widen(observed, t, token, float(near), step)
        else:
            order = self.policy.proposals(step, observed.states[t], self.generator)
            learn = getattr(self.policy, "learn", None)
            distance = acceptance.try_candidates(step, observed, t, order, learn)
        radius = float(observed.radius[t])
        if self.repeatable:
            known = (self.tokens[:t], self.passes)
            distance, radius = acceptance.bit_for_bit(distance, observed, *known, step)
        if self.options.certify:
            best = distance.argmin()
            gaps = (states - states[best]).double().norm(dim=1)  # twins included
            self.recovery.margin[t] = gaps.index_fill(0, best, torch.inf).min()
        self.settle(t, distance, radius)

    def settle(self, t: int, distance: Float[Tensor, " vocab"], radius: float) -> None:
        """Accept the one token that verifies; where none or several do, refuse."""
        known = distance.nan_to_num(nan=torch.inf, posinf=torch.inf)
        best = known.topk(min(2, len(known)), largest=False)
        counts = torch.stack([distance <= radius, ~distance.isnan()]).sum(1)
        # One read: how many verify and were tested, the nearest, all distances.
        read = torch.cat([best.values.double(), counts, best.indices[:1]]).tolist()
        nearest, *second, count, tested, token = read
        row = self.recovery
        row.tokens[t] = token
        row.distance[t] = nearest
        row.runner_up[t] = second[0] if second else torch.inf
        row.radius[t] = radius
        row.tested[t] = tested
        row.verified[t] = count == 1
        if count > 1:
            row.twins[t] = (distance <= radius).nonzero()[:, 0].tolist()
        if row.verified[t] or self.options.on_fail == "nearest":
            # The draft behind the position stays: it is read again after this token.
            behind = self.tokens[t + 1 :]
            self.tokens = torch.cat([self.tokens[:t], best.indices[:1], behind])
            self.length = t + 1
            self.searched = True
            return
        model = self.options.model
        hint = acceptance.suspected(self.observed.states, model, self.options.layer)
        what = f"no token verifies ({hint})"
        verified = torch.tensor(row.twins.get(t, []))
        if len(verified):
            rival = f"{int(verified[-1])} {model.decode(verified[-1:])!r}"
            what = f"{len(verified)} tokens verify, among them {rival}"
        token = f"{int(token)} {model.decode(best.indices[:1])!r}"
        what += f"; nearest of {int(tested)} tested is {token} at {nearest:.3g}"
        self._refuse(Ambiguous if count else NotVerified, what)

    def read_once_more(self, states: Float[Tensor, "pos d_model"]) -> None:
        """Compare all verified positions with the states of the prompt in one pass."""
        count = len(self.observed.states)  # padding stands behind
        apart = self.observed.distance(slice(count), states[:count]).cpu()
        agrees = apart <= self.observed.radius
        for t in (self.recovery.verified & ~agrees).nonzero()[:1, 0]:
            self.length = int(t)
            self.recovery.distance[t] = apart[t]
            self.recovery.radius[t] = self.observed.radius[t]
            what = f"the recovered prompt, read in one pass, is {apart[t]:.3g} away"
            self._refuse(NotVerified, what)

    def _refuse(self, kind: type[NotVerified], what: str) -> None:
        """End with an error at the first open position that carries the prefix."""
        row = self.recovery
        t = self.length
        prefix = self.recovered()
        radius = float(row.radius[t])
        what += f", radius {radius:.3g}; verified so far: {t} tokens {prefix.text!r}"
        known = (int(row.tokens[t]), float(row.distance[t]), radius, prefix)
        self.error = kind(f"position {t}: {what}", *known)


def _blank(radius: Float[Tensor, " pos"]) -> Recovery:
    """A row for each position, of a drafted token until a search; its margin is NaN."""
    radius = radius.float().cpu()
    inf = torch.full_like(radius, torch.inf)
    zeros = torch.zeros_like(radius, dtype=torch.int64)
    return Recovery(zeros, inf, inf.clone(), radius, zeros + 1, zeros == 0, inf - inf)


def _recover(prompts: list[_Prompt], options: _Options, progress: bool) -> None:
    """Algorithm 1: draft, read the drafts, finish each prompt; read all once more."""
    prompts = [prompt for prompt in prompts if prompt.error is None]
    quick = [prompt for prompt in prompts if prompt.drafts]
    unread = [prompt.observed.states for prompt in quick]
    lens = options.lens
    if quick and not lens and offer:
        lens = offer(options.model, options.layer, sum(map(len, unread)), lens is None)
    if quick and lens:
        for prompt, (tokens, policy) in zip(quick, lens.read(unread), strict=True):
            prompt.tokens = torch.cat([prompt.tokens, tokens[prompt.length :]])
            prompt.policy = policy
    count = sum(len(prompt.observed.states) for prompt in prompts)
    start = OneStepMap.after(options.model, options.layer)
    with tqdm(total=count, desc="inverting", disable=None if progress else True) as bar:
        for batch, rows in _batches(prompts):
            together = rows  # nothing is drafted, and no model reads empty prompts
            steps = [start] * len(batch)
            if rows.shape[1] > 0:
                together, steps = start.branch(rows)
            for prompt, states, step in zip(batch, together, steps, strict=True):
                prompt.finish(states[prompt.length : len(prompt.tokens)], step, bar)
    searched = [prompt for prompt in prompts if prompt.searched and not prompt.error]
    for batch, rows in _batches(searched):
        # No cache this time: were the one-step map wrong, this pass would show it.
        together = options.model.states(rows, options.layer)
        for prompt, states in zip(batch, together, strict=True):
            prompt.read_once_more(states)


def _batches(prompts: list[_Prompt]) -> Iterator[tuple[list[_Prompt], Tensor]]:
    """Prompts of similar lengths, and their tokens, padded where none of them looks."""
    waiting = sorted(prompts, key=lambda prompt: -len(prompt.tokens))
    while waiting:
        fitting = max(1, PASS // max(1, len(waiting[0].tokens)))
        batch = waiting[:fitting]  # the longest, so that little is padded
        yield batch, pad_sequence([x.tokens for x in batch], batch_first=True)
        waiting = waiting[fitting:]
