"""Train pocket-gpt2 again: ``python -m sipit_lite.pocket_gpt2.train FOLDER``.

A GPT-2 of six layers, width 256 and 4096 tokens, trained on what every Python install carries: the English of
its docstrings and the code of its libraries. Seeded, with a progress bar; interrupted, it resumes from its last
checkpoint. It writes what the package ships: weights (float16), configuration, tokenizer, card, held-out passages.
"""

import argparse
import json
import platform
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sipit_lite.io import text as prompts

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 4096, 256, 256, 6, 4
BATCH, PROSE_SHARE, PEAK_RATE, WARMUP = 16, 0.7, 2e-3, 100
CODE_CHARACTERS = 24_000_000
END = "<|endoftext|>"


def corpus(folder: Path) -> dict[str, list[str]]:
    """Read the texts of this Python install once: {'prose train': documents, ..., 'code held-out': documents}."""
    path = folder / "corpus.json"
    if not path.exists():
        texts = {
            f"{kind} {split}": list(
                tqdm(prompts.installed(kind, split), f"{kind}, {split}", disable=None)
            )
            for kind in ("prose", "code")
            for split in ("train", "held-out")
        }
        for name in ("code train", "code held-out"):
            random.Random(0).shuffle(texts[name])
            share = CODE_CHARACTERS if name == "code train" else CODE_CHARACTERS // 16
            texts[name] = list(until(texts[name], share))
        path.write_text(json.dumps(texts), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


def until(texts: list[str], characters: int) -> Iterator[str]:
    """Yield texts until they hold so many characters.

    >>> list(until(["ab", "cd", "ef"], 3))
    ['ab', 'cd']
    """
    total = 0
    for text in texts:
        if total >= characters:
            return
        total += len(text)
        yield text


def tokenizer(folder: Path, texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the training texts, or read the one already trained."""
    if not (folder / "tokenizer.json").exists():
        bpe = ByteLevelBPETokenizer()
        sample = texts["prose train"] + list(
            until(texts["code train"], CODE_CHARACTERS // 4)
        )
        bpe.train_from_iterator(
            sample, vocab_size=VOCAB, special_tokens=[END], show_progress=False
        )
        bpe.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token=END,
        bos_token=END,
        unk_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tokens(bpe: PreTrainedTokenizerFast, documents: list[str]) -> Int[Tensor, " pos"]:
    """All documents in one row of tokens, each begun by the end-of-text token."""
    encoded = bpe(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([t for ids in encoded for t in (bpe.eos_token_id, *ids)])


def batch(data: dict[str, Tensor], step: int) -> Int[Tensor, "row pos"]:
    """The training rows of one step; they depend on the step alone, so a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(step)
    prose = torch.rand(BATCH, generator=generator) < PROSE_SHARE
    starts = torch.rand(BATCH, generator=generator)
    rows = [data["prose train" if p else "code train"] for p in prose.tolist()]
    return torch.stack(
        [
            row[(o := int(u * (len(row) - CONTEXT - 1))) : o + CONTEXT + 1]
            for row, u in zip(rows, starts.tolist(), strict=True)
        ]
    )


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then linear decay to zero.

    >>> rate(0, 1000) < rate(WARMUP, 1000) == PEAK_RATE > rate(999, 1000) > 0
    True
    """
    warm = min(WARMUP, steps // 10)
    return PEAK_RATE * min((step + 1) / (warm + 1), (steps - step) / (steps - warm))


def loss_of(model: GPT2LMHeadModel, rows: Int[Tensor, "row pos"]) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train(
    folder: Path, data: dict[str, Tensor], steps: int, save_every: int = 250
) -> GPT2LMHeadModel:
    """AdamW on random windows of the corpus; continues from ``checkpoint.pt`` where there is one."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).train()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    start, path = 0, folder / "checkpoint.pt"
    if path.exists():
        stored = torch.load(path)
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        start = stored["step"]
    bar = tqdm(
        range(start, steps), "training", initial=start, total=steps, mininterval=30
    )
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps)
        loss = loss_of(model, batch(data, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "step": step + 1,
                },
                path.with_suffix(".new"),
            )
            path.with_suffix(".new").replace(
                path
            )  # an interrupted write never spoils the last checkpoint
    return model.eval()


def losses(
    model: GPT2LMHeadModel, data: dict[str, Tensor], kind: str
) -> dict[str, float]:
    """Held-out loss in nats a token: the model's, a unigram's and a bigram's on the same tokens.

    The bigram backs off to the unigram with the weight that suits the held-out tokens best, in its own favour.
    """
    rows = data[f"{kind} held-out"].unfold(0, CONTEXT + 1, CONTEXT)[:400]
    with torch.no_grad():
        own = torch.stack(
            [loss_of(model.float(), chunk) for chunk in rows.split(BATCH)[:-1]]
        ).mean()
    seen = torch.cat([data["prose train"], data["code train"]])
    first, second = rows[:, :-1].flatten(), rows[:, 1:].flatten()
    unigram = (torch.bincount(seen, minlength=VOCAB) + 1.0) / (len(seen) + VOCAB)
    pairs = torch.bincount(seen[:-1] * VOCAB + seen[1:], minlength=VOCAB**2).view(
        VOCAB, VOCAB
    )
    count, total = pairs[first, second], pairs.sum(1)[first]
    bigram = min(
        float(-torch.log((count + weight * unigram[second]) / (total + weight)).mean())
        for weight in (1, 10, 100, 300, 1000, 3000)
    )
    return {
        "model": float(own),
        "bigram": bigram,
        "unigram": float(-torch.log(unigram[second]).mean()),
    }


def sample(
    model: GPT2LMHeadModel, bpe: PreTrainedTokenizerFast, start: str, length: int = 60
) -> str:
    """Text that the model writes after a start, drawn with temperature 0.7 from its 40 likeliest tokens."""
    torch.manual_seed(0)
    ids = bpe(start, return_tensors="pt", add_special_tokens=False)["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=True,
                             temperature=0.7, top_k=40, pad_token_id=0)  # fmt: skip
    return bpe.decode(written[0])


def held_out_passages(
    longest: int = 1500, shortest: int = 300, most: int = 160
) -> dict[str, list[dict[str, str]]]:
    """Held-out passages of the standard library, spread evenly over its files."""
    found = {}
    for kind in ("prose", "code"):
        passages = [
            {"source": name, "text": text}
            for name, document in prompts.standard_library_documents(kind)
            for text in packed(prompts.paragraphs(document), longest)
            if len(text) >= shortest
        ]
        found[kind] = passages[:: max(1, len(passages) // most)][:most]
    return found


def packed(pieces: list[str], longest: int) -> list[str]:
    """Join paragraphs in order into passages of at most ``longest`` characters; longer paragraphs are left out.

    >>> packed(["ab", "cd", "much too long", "ef"], 6)
    ['ab\\n\\ncd', 'ef']
    """
    passages = [""]
    for piece in (piece for piece in pieces if len(piece) <= longest):
        joined = f"{passages[-1]}\n\n{piece}".strip("\n")
        if len(joined) > longest:
            passages.append(piece)
        else:
            passages[-1] = joined
    return passages


CARD = """# pocket-gpt2

A small trained GPT-2 for self-study: `GPT2LMHeadModel`, {layers} layers, width {width}, {heads} heads, {vocab} tokens
of byte-level BPE, context {context}, {parameters:,} parameters, stored as float16. It travels with `sipit_lite`, so
that every chapter, test and demo runs offline, through the same code that loads `gpt2`.

## Data
The English of the docstrings and the source code of a Python {python} install: the standard library and the packages
pinned in `requirements.txt`. One source file in {one_in} is held out, by the hash of its name; its paragraphs are cut
out of the training files. The training text has {prose:,} tokens of prose and {code:,} tokens of code; {share:.0%} of
the rows of a batch are prose.

## Recipe
`python -m sipit_lite.pocket_gpt2.train FOLDER`: {steps} steps of {batch} x {context} tokens, AdamW (peak rate {rate:g}, {warmup}
steps of warm-up, then linear to zero, weight decay 0.1, betas 0.9 and 0.95), gradients clipped at norm 1, bfloat16
autocast, tied embeddings, no dropout, seed 0. About an hour on two CPU cores. The texts differ from machine to machine,
so training again gives a sibling, not the same bits.

## Held-out loss (nats per token)
| tokens | model | bigram | unigram |
|:--|--:|--:|--:|
{table}

The bigram backs off to the unigram with the weight that suits the held-out tokens best.

## What it writes
{samples}

## What it is not
It knows the English of programming manuals and nothing else: do not use it to learn about the world.
Near-copies of held-out paragraphs may stand in the training text; only equal paragraphs were removed.

## Licence of the texts
The standard library is under the PSF licence; the pinned packages are under MIT, BSD, Apache-2.0, PSF, MPL-2.0 and
similar licences. `held_out.json` holds passages of the standard library alone (PSF-2.0, text in `LICENSE-PSF`), so that
prompts quoted in the book never change. The weights are under the licence of this repository.
"""


def publish(
    folder: Path,
    model: GPT2LMHeadModel,
    bpe: PreTrainedTokenizerFast,
    data: dict[str, Tensor],
    steps: int,
) -> None:
    """Write what the package ships: weights, configuration, tokenizer, card and held-out passages."""
    figures = {kind: losses(model, data, kind) for kind in ("prose", "code")}
    samples = [
        sample(model, bpe, start)
        for start in ("Return the", "This module provides", "def __init__(self")
    ]
    model.half().save_pretrained(folder / "pocket_gpt2")
    bpe.save_pretrained(folder / "pocket_gpt2")
    passages = json.dumps(held_out_passages(), ensure_ascii=False, indent=1)
    (folder / "pocket_gpt2" / "held_out.json").write_text(
        passages + "\n", encoding="utf-8"
    )
    card = CARD.format(
        layers=LAYERS, width=WIDTH, heads=HEADS, vocab=VOCAB, context=CONTEXT, parameters=model.num_parameters(),
        python=platform.python_version(), one_in=prompts.HELD_OUT_ONE_IN, prose=len(data["prose train"]),
        code=len(data["code train"]), share=PROSE_SHARE, steps=steps, batch=BATCH, rate=PEAK_RATE, warmup=WARMUP,
        table="\n".join(
            f"| {kind} | {f['model']:.2f} | {f['bigram']:.2f} | {f['unigram']:.2f} |" for kind, f in figures.items()
        ),
        samples="\n\n".join(f"```text\n{text}\n```" for text in samples),
    )  # fmt: skip
    (folder / "pocket_gpt2" / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Read the corpus, train, and write the model into FOLDER/pocket_gpt2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="where the corpus, the checkpoints and the model go"
    )
    parser.add_argument("--steps", type=int, default=3600)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts = corpus(options.folder)
    bpe = tokenizer(options.folder, texts)
    data = {name: tokens(bpe, documents) for name, documents in texts.items()}
    publish(
        options.folder,
        train(options.folder, data, options.steps),
        bpe,
        data,
        options.steps,
    )


if __name__ == "__main__":
    main()
