"""Is an inversion ever silently wrong: a verified prompt that is not the true one?

Beside random models of all architectures stand adversaries, in which two tokens share a
state though their embeddings differ. Where they do so only at a position at which the
first block was not probed, only a scan can tell: there it is ``certify=True``.
"""

import copy
from collections import defaultdict
from itertools import chain, product

import torch
from torch import Generator
from transformers import GPT2Config, ModernBertDecoderConfig

from sipit_lite.experiments.baselines import Random
from sipit_lite.experiments.checks import Check, judged, progress_bar, share, table
from sipit_lite.experiments.families import SETTINGS, configuration, randomised
from sipit_lite.experiments.perturb import noisy
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.capture import Captured
from sipit_lite.model import LanguageModel, SipItError

PAIR = (20, 30)  # the twins
UNPROBED = "twins at the fourth position"
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ("default", "random order", "lens", "noise")
CELLS = list(product((0, 1, 2), (*FORMATS, torch.int8), WAYS))  # depth, states, way
ROUNDS = 6  # through all of them
STRIDE = 17  # of a sample: prime to the numbers of all choices, so that each occurs
ENDS = ("right", "refused", "wrong")


def safety(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Invert 10 000 prompts of small models, and a few of the given one."""
    draw = Generator().manual_seed(seed)
    models = adversaries()
    for name in SETTINGS:
        models[name] = LanguageModel(randomised(configuration(name, 200, 32)))
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    wrong = []
    plain = []  # where nothing stands in the way: does the prompt come back?
    cases = [*product(models, FORMATS), (model.name, model.dtype)]
    for name, form in progress_bar(cases, "models", progress):
        subject = model
        if name in models:
            decoder = copy.deepcopy(models[name].decoder).to(model.device, form)
            subject = LanguageModel(decoder, name=name)
        start = int(torch.randint(STRIDE, (), generator=draw))
        # Of the given model a sample, too: there a prompt may take seconds.
        sampled = quick or subject is model
        for depth, stored, way in CELLS[start::STRIDE] if sampled else ROUNDS * CELLS:
            layer = (1, (subject.n_layers + 1) // 2, subject.n_layers)[depth]
            row = attempt(subject, layer, stored, way, draw)
            where = (name, f"model in {form}", f"states in {stored}", f"way: {way}")
            for group in ("all", *where):
                counts[group][row["end"]] += 1
            if row["silent error"]:
                wrong.append({"where": where, "layer": layer} | row)
            if name in SETTINGS and form == stored == torch.float32 and way != "noise":
                plain.append(row["exact"])
    rows = [[group, *map(str, counts[group])] for group in sorted(counts)]
    lines = [Check.of("silent errors", len(wrong)), Check.of("exact", share(plain))]
    printed = table(["prompts", *ENDS], rows, ENDS).splitlines()
    return lines, {"reported": {}, "table": printed, "counts": counts, "wrong": wrong}


def attempt(
    model: LanguageModel, layer: int, stored: torch.dtype, way: str, draw: Generator
) -> dict:
    """Invert stored states of a random prompt, often with a twin; how that ends."""
    place, behind, which = torch.randint(9 * 2 * 3, (3,), generator=draw).tolist()
    ids = torch.randint(model.vocab_size, (place % 9 + 1 + behind % 2,), generator=draw)
    ids[place % 9] = (*PAIR, ids[place % 9])[which % 3]
    states = model.states(ids, layer).float()
    options = {"certify": model.name == UNPROBED}
    options |= {"lens": small_lens(model, layer)} if way == "lens" else {}
    options |= {"policy": Random()} if way == "random order" else {}
    if way == "noise":
        # From a tenth of the state's norm to a hundred-thousandth.
        options["epsilon"] = 10.0 ** (-1 - which % 5) * states.norm(dim=1)
        states = noisy(states, options["epsilon"].cpu(), int(ids.sum()))
    try:
        captured = Captured.of({layer: states}, model, stored, [len(ids)])
        row = judged(ids, captured.invert(model, layer, **options))
    except SipItError as error:
        row = judged(ids, error)
    ends = [row["exact"], bool(row["refused"]), row["silent error"]]
    return row | {"end": ends.index(True), "ids": ids.tolist()}


def small_lens(model: LanguageModel, layer: int) -> Lens:
    """A lens of few tokens, once a model and layer."""
    key = ("small lens", layer)
    if key not in model.measured:
        model.measured[key] = Lens.fit(model, layer, tokens=2000, features=0)
    return model.measured[key]


def adversaries() -> dict[str, LanguageModel]:
    """Models whose first block makes the tokens of ``PAIR`` twins."""
    return {
        "scaled rows before a norm": normalising(),
        "a direction that the MLP deletes": deleting(1.0, by_attention=False),
        "twins at the first position": deleting(1.0, by_attention=True),
        UNPROBED: deleting(1 / 4, by_attention=True),
        "twins at the eighth position": deleting(1 / 8, by_attention=True),
    }


def normalising() -> LanguageModel:
    """A decoder that normalises embeddings: one row is three times the other."""
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    decoder = randomised(ModernBertDecoderConfig(**sizes), by=0.0)
    rows = decoder.get_input_embeddings().weight
    rows *= 10_000  # far above the epsilon of the norm
    rows[PAIR[1]] = 3 * rows[PAIR[0]]
    return LanguageModel(decoder, name="normalising")


def deleting(part: float, *, by_attention: bool) -> LanguageModel:
    """A GPT-2 whose first block removes the direction in which two tokens differ.

    The rows are b ± r with r ⟂ b, of one variance σ²: their normal forms differ by
    2r/σ. The MLP, or attention to a ``part`` of its value, subtracts what is along r.
    """
    sizes = {"vocab_size": 400, "n_embd": 32, "n_head": 1, "n_layer": 2}
    sizes |= {"n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    decoder = randomised(GPT2Config(**sizes), by=0.0)
    r = torch.tensor([1.0, -1.0] + 30 * [0.0])
    rows = decoder.wte.weight
    rows[:, :2] = 0  # b
    decoder.wpe.weight.zero_()
    rows[PAIR[1]] = rows[PAIR[0]] - r / 10
    rows[PAIR[0]] += r / 10
    removal = -rows[PAIR[0]].var(correction=0).add(1e-5).sqrt() / 2
    block = decoder.h[0]
    for weight in chain(block.attn.parameters(), block.mlp.parameters()):
        weight.zero_()
    if by_attention:
        # Queries and keys are zero: every position takes equal shares of all values.
        block.attn.c_attn.weight[:, 64:] = removal / part * r.outer(r)
        block.attn.c_proj.weight.copy_(torch.eye(32))
    else:
        # gelu(a) − gelu(−a) = a: two hidden units make a linear map.
        block.mlp.c_fc.weight[:, :2] = torch.stack([r, -r], 1)
        block.mlp.c_proj.weight[:2] = torch.stack([r, -r]) * removal
    return LanguageModel(decoder, name="deleting")
