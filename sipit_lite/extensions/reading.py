"""How a lens reads one prompt: likelihood from the states, prior from the model itself.

The states of one layer determine all layers above, and so the law of every next token:
no draft is needed to know what the model expects. The lens is the likelihood, this law
the prior; a weight between them is learned on prompts that the lens was not fitted on.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sipit_lite.extensions.imprints import likely, own_imprints
from sipit_lite.model import LanguageModel, plain_settings
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Batches, State

WEIGHTS = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the prior, to choose from
BATCHES = (16, 16, 32, 64, 128, 256, 512, 1024)  # candidates of each order
ALONE = 96  # candidates of the second batch where a lens alone names them
SPREAD = 64  # drawn at random where no lens is, to predict others from
PREDICTORS = 512  # tested candidates from which states of others are predicted
SEARCH = 2  # passes that a token costs which the draft has wrong, roughly
JUDGED = 64  # positions that decide whether a prompt is what the model expects

States = Float[Tensor, "pos d_model"]


@dataclass(eq=False)
class Reading:
    """A draft of one prompt, and a policy that starts from the lens and the prior.

    Candidates that were tested teach: from their states, those of all others are
    predicted (``imprints``), where the ``lens`` is wrong about a token in this context.
    """

    lens: Any
    states: States
    keeps: bool = False  # what was drafted from, for the search: 2 · pos · |V| numbers
    opening: tuple[Tensor, Tensor] | None = None
    tested: Sequence[tuple[Tensor, Tensor]] = ()  # at one position, with their states
    tests: int = 0

    @property
    def alone(self) -> bool:
        """Whether the lens drafts alone, since a prior would save no time."""
        misses = len(self.states) * (1 - self.lens.hits)
        above = max(0, self.lens.model.n_layers - self.lens.layer)
        return SEARCH * misses <= above / max(self.lens.layer, 1) or self.before is None

    def posterior(self) -> Int[Tensor, " pos"] | None:
        """The likeliest token of each state, by lens and prior; None for no prior."""
        if self.alone and not self.opening:
            return None
        tokens = []
        for first in range(0, len(self.states), JUDGED):
            rows = slice(first, first + JUDGED)
            score = self.near(rows)
            if self.before is not None:
                score = score + self.lens.weight * self.law(rows)
            tokens.append(score.max(1).indices)  # in a third of the time of argmax
        if not self.keeps:
            self.opening = None
        return torch.cat(tokens)

    def near(self, rows: slice) -> Float[Tensor, "rows vocab"]:
        """How near the lens takes each token to be at these positions."""
        held = self.opening and rows.stop <= JUDGED
        return self.opening[0][rows] if held else self.lens.nearness(self.states[rows])

    def law(self, rows: slice) -> Float[Tensor, "rows vocab"]:
        """Log-probability of each token at these positions."""
        before = self.before  # first: it is judged by scores that stay for this
        held = self.opening and rows.stop <= JUDGED
        return self.opening[1][rows] if held else log_law(self.lens.model, before[rows])

    @cached_property
    def before(self) -> States | None:
        """The final state before each position, zero at the first: its prior is flat.

        None where they tell nothing of tokens, as of random ones, which are less
        expected than by chance.
        """
        model = self.lens.model
        if self.lens.weight == 0 or unembedding(model) is None:
            return None
        final = final_states(model, self.states, self.lens.layer)
        before = torch.cat([torch.zeros_like(final[:1]), final[:-1]])
        if not self.lens.fitted:
            return before  # nothing is read that could be judged
        near = self.lens.nearness(self.states[:JUDGED])
        law = log_law(model, before[:JUDGED])
        self.opening = near, law
        expected = law.gather(1, near.max(1, keepdim=True).indices)[1:].mean()
        return before if expected > -math.log(model.vocab_size) else None

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield the first of each order: lens, prior, as the tests teach, and both."""
        untried = torch.ones_like(step.model.vocabulary, dtype=torch.bool)
        left = len(untried)
        law = None
        t = step.position
        self.tested = ()
        for i in count():
            lens = self.lens if self.lens.fitted else self.lens.after(self.tests)
            self.lens = lens  # fitted, once the search has cost as much
            orders = [self.near(slice(t, t + 1))[0]] if lens.fitted else []
            if i > 1 and self.tested:  # what fewer states say is noise
                orders.append(self.predicted(observed, t))
            # The prior costs a pass, once: not for what the lens all but knows.
            wanted = i > 0 or "before" in vars(self) or not lens.fitted
            if law is None and wanted and self.before is not None:
                law = self.law(slice(t, t + 1))[0]
            if law is not None:
                both = [order + lens.weight * law for order in orders]
                orders += both if both and i == 0 else [law, *both]  # law alone: later
            alone = i == 1 and lens.fitted and law is None  # it ranks most true tokens
            size = min(ALONE if alone else BATCHES[min(i, len(BATCHES) - 1)], left)
            best = [order.masked_fill(~untried, -torch.inf) for order in orders]
            parts = [order.topk(size).indices for order in best]
            if (i == 1 and not lens.fitted) or not orders:  # nothing chose these
                drawn = torch.randperm(len(untried), generator=generator)
                parts.append(drawn.to(untried.device)[untried[drawn]][:SPREAD])
            batch = torch.cat(parts).unique()
            batch = batch[untried[batch]]
            untried[batch] = False
            left -= len(batch)
            yield from filter(len, [batch])
            if left == 0:
                return

    def learn(self, tokens: Int[Tensor, " cand"], states: Tensor) -> None:
        """Keep the states of tested tokens, but for those that overflowed."""
        self.tests += len(tokens)
        finite = states.isfinite().all(1)
        if finite.any():
            self.tested += ((tokens[finite], states[finite].float()),)

    def predicted(self, observed: State, t: int) -> Float[Tensor, " vocab"]:
        """How likely each token is at t, by states of the first that were tested."""
        tokens, states = map(torch.cat, zip(*self.tested, strict=True))
        table = own_imprints(self.lens.model, self.lens.layer, first=t == 0)
        return likely(table, tokens[:PREDICTORS], states[:PREDICTORS], observed.float())


@plain_settings()
@torch.no_grad()
def final_states(
    model: LanguageModel, states: States, layer: int, positions: Tensor | None = None
) -> States:
    """The states after the final norm, from those of a layer: blocks above it alone.

    ``positions`` says where the states belong, if not at the start, without gaps.
    """
    states = states.to(model.dtype)
    if layer > model.n_layers:  # what left the norm
        return states
    norm = getattr(model.decoder, model.parts[1])
    if layer == model.n_layers:
        return norm(states)
    above = model.cut(model.n_layers)
    blocks = getattr(above, model.parts[0])

    def giving(block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (states[None], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": states[None]}

    # Whatever enters the decoder, its first block now reads the states.
    first = copy.copy(blocks[layer])
    first._forward_pre_hooks = OrderedDict()
    first._forward_pre_hooks_with_kwargs = OrderedDict()
    first.register_forward_pre_hook(giving, with_kwargs=True)
    setattr(above, model.parts[0], nn.ModuleList([first, *blocks[layer + 1 :]]))
    config = above.config = copy.copy(above.config)
    if getattr(config, "layer_types", None):  # masks go by the number of a block
        config.layer_types = config.layer_types[layer:]
    inputs = {"inputs_embeds": model.embeddings[:1].expand(len(states), -1)[None]}
    if positions is not None:
        inputs["position_ids"] = positions[None].to(model.device)
        # Without a mask, gaps are taken for several prompts packed into one.
        inputs["attention_mask"] = torch.ones(1, len(states)).to(states)
    return norm(above(**inputs, use_cache=False).last_hidden_state[0])


def unembedding(model: LanguageModel) -> Float[Tensor, "vocab d_model"] | None:
    """What turns final states into logits; None where the model came without it."""
    if model.hf_model is None:
        return None
    table = model.decoder.get_input_embeddings()
    tied = table if model.decoder.config.tie_word_embeddings else None
    return getattr(model.hf_model.get_output_embeddings() or tied, "weight", None)


def log_law(model: LanguageModel, final: States) -> Float[Tensor, "pos vocab"]:
    """Log-probabilities of the token behind each state after the final norm."""
    with torch.no_grad():
        return torch.log_softmax((final @ unembedding(model).T).float(), -1)


def calibrated(lens: Any, prompts: Iterable[Tensor]) -> tuple[float, float]:
    """The weight of the prior that ranks true tokens best, and the share read right."""
    right = []
    ranks: dict[float, list] = {weight: [] for weight in WEIGHTS}
    for ids in prompts:
        ids = ids.to(lens.model.device)
        reading = Reading(lens, lens.model.states(ids, lens.layer))
        flat = reading.before is None  # first, since it keeps the scores
        rows = slice(1, len(ids))
        near = reading.near(rows)
        right.append(near.argmax(1) == ids[1:])
        if flat:
            continue
        law = reading.law(rows)
        # Random tokens say nothing of it, though a poor lens takes them for likely.
        text = law.gather(1, ids[1:, None]).mean() > -math.log(law.shape[1])
        for weight in WEIGHTS if text else ():
            score = near + weight * law
            ahead = score > score.gather(1, ids[1:, None])
            ranks[weight].append(ahead.sum(1).add(1).log2())
    if not right:
        return 0.0, 1.0
    hits = float(torch.cat(right).double().mean())
    mean = {w: float(torch.cat(parts).mean()) for w, parts in ranks.items() if parts}
    return min(mean, key=mean.get, default=0.0), hits
