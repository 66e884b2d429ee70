"""Inversion of a model that others trained, over the time of one forward pass."""

from torch import Tensor

from sipit_lite.acceptance import related
from sipit_lite.experiments.checks import Check, progress_bar, share
from sipit_lite.experiments.inversion import measure, sample
from sipit_lite.extensions.fitted import lens_of
from sipit_lite.model import LanguageModel

LENGTH = 20  # tokens of a prompt
# Passes at layers 1, L/2 and L: of the median and of the slowest twentieth.
KNOWN = ((5, 10, 100), (30, 60, 600))
STRANGE = ((30, 100, 1000),)
KINDS = {"prose": KNOWN, "code": KNOWN, "other languages": STRANGE, "random": STRANGE}
# Pushkin, Goethe, Cervantes, La Fontaine, Li Bai: long out of copyright.
OTHERS = """У лукоморья дуб зелёный; златая цепь на дубе том: и днём и ночью кот учёный
всё ходит по цепи кругом; идёт направо - песнь заводит, налево - сказку говорит.
Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind; er hat den
Knaben wohl in dem Arm, er faßt ihn sicher, er hält ihn warm. Mein Sohn, was birgst du
so bang dein Gesicht? Siehst, Vater, du den Erlkönig nicht?
En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que
vivía un hidalgo de los de lanza en astillero, adarga antigua, rocín flaco y galgo.
Maître Corbeau, sur un arbre perché, tenait en son bec un fromage. Maître Renard, par
l'odeur alléché, lui tint à peu près ce langage: Hé! bonjour, Monsieur du Corbeau.
Там чудеса: там леший бродит, русалка на ветвях сидит; там на неведомых дорожках следы
невиданных зверей; избушка там на курьих ножках стоит без окон, без дверей.
床前明月光，疑是地上霜。举头望明月，低头思故乡。白日依山尽，黄河入海流。欲穷千里目，更上一层楼。
千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。春眠不觉晓，处处闻啼鸟。"""


def real(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Exactness and passes at three layers, beside the published loop and LM order."""
    rows = {}
    lines = []
    reported = {}
    for n, layer in enumerate((1, model.n_layers // 2, model.n_layers)):
        lens = lens_of(model, layer)
        for kind, limits in progress_bar(KINDS.items(), f"layer {layer}", progress):
            drawn = options(model, kind, 2 if quick else 30, seed)
            place = f"{kind}, layer {layer}"
            row = measure(model, drawn, lens, 1, 0.1 if quick else 20.0)
            rows[place] = row
            reported |= {f"{place}: {what}": value for what, value in row.items()}
            for name, bounds in zip(("median", "slowest 5 %"), limits, strict=False):
                value = row[f"passes, {name}"]
                known = (value, bounds[n], "lower", value <= bounds[n])
                lines.append(Check(f"passes, {name}, {place}", *known))
    exact = Check.of("exact", share(row["exact"] == 1 for row in rows.values()))
    silent = sum(row["silent errors"] for row in rows.values())
    first = [exact, Check.of("silent errors", silent)]
    return first + lines, {"reported": reported, "rows": rows}


def options(model: LanguageModel, kind: str, count: int, seed: int) -> list[Tensor]:
    """Held-out prompts of a kind; random tokens are none that share their states."""
    if kind == "other languages":
        ids = model.encode(OTHERS)
        return [ids for ids in ids.split(LENGTH) if len(ids) == LENGTH][:count]
    drawn = sample(model, kind, count, LENGTH, seed)
    alone = (~related(model, 1)).nonzero()[:, 0]
    return [alone[ids % len(alone)] if kind == "random" else ids for ids in drawn]
