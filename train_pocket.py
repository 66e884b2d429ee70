"""Train pocket-gpt2 again: ``python train_pocket.py FOLDER``.

A small GPT-2 from the docstrings and the code of every Python install: seeded, without
a network, resumed where it was interrupted. It writes what the package ships.
"""

import bisect
import itertools
import platform
import random
import shutil
from importlib.resources import files
from pathlib import Path

import torch
import typer
from jaxtyping import Int
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sipit_lite.io import text as prompts
from sipit_lite.io.files import replacing

VOCAB = 4096
CONTEXT = 256
BATCH = 16
WARMUP = 100  # steps
PEAK_RATE = 2e-3
PROSE_SHARE = 0.7  # of the rows of a batch
CODE_CHARACTERS = 24_000_000  # there is far more code than prose
END = "<|endoftext|>"
# The activation is the function that GPT-2 has, computed in one pass over the numbers.
CONFIG = GPT2Config(
    vocab_size=VOCAB, n_positions=CONTEXT, n_embd=256, n_layer=6, n_head=4,
    activation_function="gelu_pytorch_tanh",
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def corpus() -> dict[str, list[str]]:
    """The texts of this Python by kind and split, such as "prose train"."""
    texts = {}
    for name in ("prose train", "prose held-out", "code train", "code held-out"):
        texts[name] = list(prompts.installed(*name.split()))
    for name, share in (("code train", 1), ("code held-out", 16)):
        # Packages are of very different sizes: a sample of all of them.
        random.Random(0).shuffle(texts[name])
        texts[name] = until(texts[name], CODE_CHARACTERS // share)
    return texts


def until(texts: list[str], characters: int) -> list[str]:
    """The fewest of the first texts that hold so many characters; all, if none do."""
    ends = list(itertools.accumulate(map(len, texts)))
    return texts[: bisect.bisect_left(ends, characters) + 1]


def tokenizer(folder: Path, texts: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE on the training texts, or read the one there is."""
    path = folder / "tokenizer.json"
    if not path.exists():
        code = until(texts["code train"], CODE_CHARACTERS // 4)
        bpe = ByteLevelBPETokenizer()
        options = {"special_tokens": [END], "show_progress": False}
        bpe.train_from_iterator(texts["prose train"] + code, VOCAB, **options)
        bpe.save(str(path))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=END, bos_token=END, unk_token=END,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tokens(bpe: PreTrainedTokenizerFast, documents: list[str]) -> Int[Tensor, " pos"]:
    """All documents in one row of tokens, an end-of-text token before each."""
    row = []
    for ids in bpe(documents, add_special_tokens=False, verbose=False)["input_ids"]:
        row += [bpe.eos_token_id, *ids]  # END begins a text, too
    return torch.tensor(row)


def batch(data: dict[str, Tensor], step: int) -> Int[Tensor, "row pos"]:
    """The training rows of a step, which is their seed: a resumed run sees the same."""
    generator = torch.Generator().manual_seed(step)
    # Which rows are prose, and where each begins, as a share of its text.
    draws = torch.rand(2, BATCH, generator=generator)
    rows = []
    for kind, place in draws.T.tolist():
        source = data["prose train" if kind < PROSE_SHARE else "code train"]
        start = int(place * (len(source) - CONTEXT - 1))
        rows.append(source[start : start + CONTEXT + 1])
    return torch.stack(rows)


def rate(step: int, steps: int) -> float:
    """Learning rate: linear warm-up, then linear decay to zero."""
    warm = min(WARMUP, steps // 10)  # short runs warm up as well
    return PEAK_RATE * min((step + 1) / (warm + 1), (steps - step) / (steps - warm))


def loss_of(model: GPT2LMHeadModel, rows: Int[Tensor, "row pos"]) -> Tensor:
    """Mean cross-entropy of the next token, nats."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train(
    folder: Path, data: dict[str, Tensor], steps: int, save_every: int = 250
) -> GPT2LMHeadModel:
    """AdamW on random windows; continues from ``checkpoint.pt`` where there is one."""
    # The seed of the weights, and the caller's generator as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(CONFIG).train()
    # Biases and gains do not decay.
    matrices = {"params": [p for p in model.parameters() if p.ndim == 2]}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2]}
    groups = [matrices | {"weight_decay": 0.1}, vectors | {"weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    start = 0
    path = folder / "checkpoint.pt"
    if path.exists():
        stored = torch.load(path, weights_only=True)
        model.load_state_dict(stored["model"])
        optimiser.load_state_dict(stored["optimiser"])
        start = stored["step"]
    bar = tqdm(range(start, steps), "training", initial=start, total=steps)
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
            stored = {"model": model.state_dict(), "step": step + 1}
            # An interrupted write never spoils the last checkpoint.
            with replacing(path, OSError) as part:
                torch.save(stored | {"optimiser": optimiser.state_dict()}, part)
    return model.eval()


def losses(model: GPT2LMHeadModel, data: dict[str, Tensor], kind: str) -> list[float]:
    """Held-out loss in nats a token: the model's, a bigram's and a unigram's."""
    rows = data[f"{kind} held-out"].unfold(0, CONTEXT + 1, CONTEXT)[:400]
    with torch.no_grad():
        parts = [loss_of(model.float(), part) for part in rows.split(BATCH)[:-1]]
    # The two baselines count the training tokens.
    seen = torch.cat([data["prose train"], data["code train"]])
    first = rows[:, :-1].flatten()
    second = rows[:, 1:].flatten()
    unigram = (torch.bincount(seen, minlength=VOCAB) + 1.0) / (len(seen) + VOCAB)
    # Bigrams as numbers of two digits to the base |V|.
    pairs = torch.bincount(seen[:-1] * VOCAB + seen[1:], minlength=VOCAB**2)
    pairs = pairs.view(VOCAB, VOCAB)
    shares = []
    # It backs off to the unigram, with the weight that suits the held-out tokens best.
    for weight in (1, 10, 100, 300, 1000, 3000):
        count = pairs[first, second] + weight * unigram[second]
        shares.append(count / (pairs.sum(1)[first] + weight))
    bigram = min(float(-share.log().mean()) for share in shares)
    one = float(-unigram[second].log().mean())
    return [float(torch.stack(parts).mean()), bigram, one]


def sample(model: GPT2LMHeadModel, bpe: PreTrainedTokenizerFast, start: str) -> str:
    """60 tokens that the model writes after a start, temperature 0.7, top 40."""
    ids = bpe(start, return_tensors="pt", add_special_tokens=False)["input_ids"]
    options = {"do_sample": True, "temperature": 0.7, "top_k": 40, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 60}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        written = model.generate(ids, **options)
    return bpe.decode(written[0])


def main(folder: Path, steps: int = 3600) -> None:
    """Train pocket-gpt2 into FOLDER/pocket_gpt2; go on where an earlier run stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = corpus()
    bpe = tokenizer(folder, texts)
    data = {name: tokens(bpe, documents) for name, documents in texts.items()}
    model = train(folder, data, steps)
    rows = []
    for kind in ("prose", "code"):
        cells = [f"{loss:.2f}" for loss in losses(model, data, kind)]
        rows.append(f"| {' | '.join([kind, *cells])} |")
    starts = ("Return the", "This module provides", "def __init__(self")
    samples = [f"```text\n{sample(model, bpe, start)}\n```" for start in starts]
    target = folder / "pocket_gpt2"
    model.half().save_pretrained(target)
    bpe.save_pretrained(target)
    shipped = Path(str(files("sipit_lite"))) / "pocket_gpt2"
    # What the book quotes never changes: the passages are those of the package.
    shutil.copy(shipped / "held_out.json", target)
    card = (shipped / "card.md").read_text(encoding="utf-8").format(
        layers=CONFIG.n_layer, width=CONFIG.n_embd, heads=CONFIG.n_head, vocab=VOCAB,
        context=CONTEXT, parameters=model.num_parameters(), steps=steps, batch=BATCH,
        python=platform.python_version(), one_in=prompts.HELD_OUT_ONE_IN,
        prose=len(data["prose train"]), code=len(data["code train"]),
        share=PROSE_SHARE, rate=PEAK_RATE, warmup=WARMUP,
        table="\n".join(rows), samples="\n\n".join(samples),
    )  # fmt: skip
    (target / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
