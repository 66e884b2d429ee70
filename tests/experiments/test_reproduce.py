"""The paper's experiments against brute force, and its numbers as it prints them."""

import copy
import json
import math
from itertools import combinations
from pathlib import Path
from statistics import mode

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.linalg import vector_norm
from transformers import LlamaConfig, LlamaForCausalLM

from sipit_lite import LanguageModel, ModelError, OneStepMap, Recovery, load
from sipit_lite.cli import main
from sipit_lite.experiments import paper, reproduce
from sipit_lite.experiments.families import small
from sipit_lite.experiments.paper import PAPER, Line, RunsError, comparison, read_runs
from sipit_lite.experiments.reproduce import (
    EXPERIMENTS,
    Plan,
    PlanError,
    at_random,
    texts,
)

SMALL = {"prompts": 12, "length": 6, "source": "bundled"}
LENS = {"lens_tokens": 2000, "features": 0, "limit": 0.1, "lengths": (2, 5)}


def run(experiment: str, model: LanguageModel, **changes: object) -> dict:
    """A small run, through JSON and back."""
    options = SMALL | LENS | changes
    parts = EXPERIMENTS[experiment].parts
    used = {name: value for name, value in options.items() if name in parts}
    result = reproduce.reproduce(experiment, model, quick=True, **used)
    return json.loads(json.dumps(result, allow_nan=False))


def closest(model: LanguageModel, prompts: list[Tensor], layer: int) -> float:
    """The smallest distance of two last-token states, pair by pair in float64."""
    last = [model.states(ids, layer)[-1].double() for ids in prompts]
    return min(float(vector_norm(a - b)) for a, b in combinations(last, 2))


def test_minima_are_those_of_all_pairs(pocket: LanguageModel) -> None:
    """Every layer of the options, and every text with its distance."""
    rows = run("layers", pocket, layers=(1, 2, 6))["rows"]
    prompts = texts(pocket, 12, Plan(**SMALL))
    assert [row["condition"] for row in rows] == ["first", "layer 2", "last"]
    for row in rows:
        minimum = closest(pocket, prompts, row["layer"])
        assert row["minimum"] == pytest.approx(minimum, rel=1e-4)
        assert row["pairs"] == math.comb(12, 2)
        assert row["collisions"] == row["practical"] == 0
    nearest = rows[-1]["closest"][0]
    ends = [pocket.states(pocket.encode(text), 6)[-1] for text in nearest["texts"]]
    distance = float(vector_norm(ends[0] - ends[1]))
    assert distance == pytest.approx(nearest["distance"], rel=1e-3)


def test_lengths_are_beginnings_of_the_same_windows(pocket: LanguageModel) -> None:
    """The smallest distance at two tokens, again by all pairs."""
    rows = run("lengths", pocket, lengths=(1, 2, 5))["rows"]
    windows = texts(pocket, 12, Plan(**SMALL | {"length": 5}))
    starts = {tuple(ids[:2].tolist()) for ids in windows}
    assert [row["length"] for row in rows] == [1, 2, 5]
    assert rows[1]["prompts"] == len(starts)
    minimum = closest(pocket, [torch.tensor(start) for start in starts], 6)
    assert rows[1]["minimum"] == pytest.approx(minimum, rel=1e-4)


@pytest.fixture(scope="module")
def drawn() -> LanguageModel:
    """A small rotary model with windows and no tokenizer: prompts are random tokens."""
    return small("Mistral", device="cpu")


def test_continuations_are_margins_of_the_closest(drawn: LanguageModel) -> None:
    """The two prompts of the closest pair, each with every token behind it."""
    [row] = run("continuations", drawn, closest=2)["rows"]
    prompts = texts(drawn, 12, Plan(**SMALL))
    ends = torch.stack([drawn.states(ids, 3)[-1].double() for ids in prompts])
    distance = torch.cdist(ends, ends).fill_diagonal_(torch.inf)
    pair = divmod(int(distance.argmin()), len(ends))
    margins = []
    for i in pair:
        step = OneStepMap.after(drawn, 3, prompts[i])
        cloud = step.tokens(drawn.vocabulary).double()
        margins.append(float(torch.pdist(cloud).min()))
    assert row["minimum"] == pytest.approx(min(margins), rel=1e-5)
    assert (row["prompts"], row["compared"]) == (2, 2 * math.comb(500, 2))


def test_the_same_answer_is_that_of_transformers(untied: LanguageModel) -> None:
    """An unembedding that is not the table; begin-of-text tokens in front."""
    rows = run("same-answer", untied, prompts=30, length=5)["rows"]
    untouched = LlamaForCausalLM.from_pretrained(untied.name).eval()
    suffix = untied.encode(reproduce.SUFFIX)[1:]
    prompts = []
    answers = []
    for ids in at_random(untied, 30, Plan(30, 5)):
        prompts.append(torch.cat([ids, suffix]).cpu())
        with torch.no_grad():
            answers.append(int(untouched(prompts[-1][None]).logits[0, -1].argmax()))
    common = mode(answers)
    pairs = zip(prompts, answers, strict=True)
    alike = [ids for ids, answer in pairs if answer == common]
    assert {row["prompts"] for row in rows} == {len(alike)} and len(alike) > 1
    minimum = closest(untied, alike, untied.n_layers)
    assert rows[-1]["minimum"] == pytest.approx(minimum, rel=1e-4)
    drawn_anew = LanguageModel(untied.decoder, name="Llama at random initialisation")
    with pytest.raises(ModelError, match="is its own and not kept; expected one to"):
        run("same-answer", drawn_anew, prompts=30, length=5)


@pytest.fixture(scope="module")
def untied(
    pocket: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    """A small Llama in a folder, untied; its tokenizer puts token 0 before a text."""
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(0)
    sizes = {"vocab_size": pocket.vocab_size, "hidden_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64}
    options = {"max_position_embeddings": 64, "initializer_range": 0.2}
    config = LlamaConfig(**sizes, **options, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = copy.deepcopy(pocket.tokenizer)
    name = tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, 0)]
    )
    tokenizer.save_pretrained(folder)
    return load(folder)


def test_prompts_begin_with_the_begin_of_text_token(untied: LanguageModel) -> None:
    """Once, in front, and not counted in the length."""
    plan = Plan(20, 6, source="bundled")
    held_out = texts(untied, 20, plan, "held-out")
    for prompts in (texts(untied, 20, plan), at_random(untied, 20, plan), held_out):
        assert len(prompts) == 20 and {len(ids) for ids in prompts} == {7}
        assert all(int(ids[0]) == 0 for ids in prompts)
    assert sum(int((ids == 0).sum()) for ids in texts(untied, 20, plan)) == 20
    rows = run("lengths", untied, lengths=(1, 3))["rows"]
    assert [row["length"] for row in rows] == [1, 3]


def test_shape_by_hand(pocket: LanguageModel) -> None:
    """The margin of few continuations by all pairs; correlations by numpy."""
    rows = run("shape", pocket, prompts=2, tokens=30)["rows"]
    sample = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:30]
    prompts = texts(pocket, 2, Plan(**SMALL | {"prompts": 2}))
    for row in (rows[0], rows[5]):
        minima = []
        for ids in prompts:
            longer = [torch.cat([ids.cpu(), token[None]]) for token in sample]
            minima.append(closest(pocket, longer, row["layer"]))
        assert row["margin"] == pytest.approx(sum(minima) / 2, rel=1e-4)
    x = [row["margin"] for row in rows[:6]]
    y = [row["dimension"] for row in rows[:6]]
    expected = np.corrcoef(x, y)[0, 1]
    assert rows[6]["margin and dimension"] == pytest.approx(expected, abs=1e-4)


def test_ways_to_invert(drawn: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is exact; a wrong prompt is none, and no time leaves nothing finished."""
    [slow, ours] = run("inversion", drawn, prompts=3, length=4, limit=0.0)["rows"]
    assert (slow["condition"], slow["finished"]) == ("published", 0.0)
    assert slow["exact"] == 0
    assert (ours["condition"], ours["exact"], ours["tokens"]) == ("here", 1.0, 4)
    assert ours["explored, %"] > 0
    honest = reproduce.invert

    def short(states: Tensor, *rest: object, **options: object) -> Recovery:
        """A wrong prompt: one token is missing."""
        return honest(states[:-1], *rest, **options)

    monkeypatch.setattr(reproduce, "invert", short)
    [ours] = run("inversion", drawn, prompts=3, length=4, ways=("here",))["rows"]
    assert ours["exact"] == 0


def test_splits_of_bundled_text_have_no_training_text(pocket: LanguageModel) -> None:
    """It is all held out, so there are the other two."""
    rows = run("splits", pocket, prompts=2, ways=("here",))["rows"]
    conditions = ["test, here", "random, here"]
    assert [row["condition"] for row in rows] == conditions
    assert [row["exact"] for row in rows] == [1.0, 1.0]


@pytest.mark.parametrize(
    "name", [name for name in EXPERIMENTS if name != "same-answer"]
)
def test_every_experiment_runs_without_a_tokenizer(
    name: str, drawn: LanguageModel
) -> None:
    """On a rotary model with windows, whose prompts are then random tokens."""
    result = run(name, drawn, prompts=4, lengths=(2, 5), limit=0.1)
    assert result["rows"] and result["vocabulary"] == 500
    assert result["where"] == EXPERIMENTS[name].where
    for row in result["rows"]:
        if row["condition"].endswith("here"):
            assert row["exact"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "table"}, "got the experiment 'table'; expected one of"),
        ({"prompts": 1}, "got prompts=1; expected 2 or more"),
        ({"prompts": 0}, "got prompts=0; expected 2 or more"),
        ({"length": 0}, "got length=0; expected 1 or more"),
        ({"experiment": "times", "lengths": (0, 3)}, "got lengths=.0, 3."),
        ({"experiment": "times", "lengths": ()}, "expected numbers from 1"),
        ({"experiment": "times", "length": 4}, "got 'length'; times takes prompts"),
        ({"experiment": "splits", "ways": ("luck",)}, "got ways=.'luck',.; expected"),
        ({"experiment": "splits", "limit": math.nan}, "got limit=nan; expected 0"),
        ({"ways": ("here",)}, "got 'ways'; layers takes"),
        ({"size": 3}, "got 'size'; layers takes prompts"),
        ({"layers": (8,)}, "8"),
    ],
)
def test_bad_plans_are_refused(
    pocket: LanguageModel, changes: dict, message: str
) -> None:
    """The message has what was received and what was expected."""
    options = {"experiment": "layers", "model": pocket, "quick": True} | changes
    with pytest.raises((PlanError, ModelError), match=message):
        reproduce.reproduce(**options)


def test_constants_have_no_correlation() -> None:
    """None, which JSON has, and not NaN; nor have two points."""
    rows = [{"x": 1.0, "y": float(i)} for i in range(4)]
    assert reproduce._pearson(rows, "y", "y") == pytest.approx(1)
    assert reproduce._pearson(rows, "x", "y") is None
    assert reproduce._pearson(rows[:2], "y", "y") is None


# As they are printed in the paper, table by table, typed anew.
PRINTED = {
    "Table 1": [0.001, 0.129, 0.620, 0.002, 0.187, 1.274],
    "Table 2": [2.281, 6.597, 1.274, 1.748, 2.692, 1.136, 18.368, 20.956, 8.780],
    "Table 4": [111.78, 1, 0.19, 549.48, 1, 0.21],
    "Table 5": [6132.59, 0, 3889.61, 1, 28.01, 1],
    "Table 6": [72.99, 0.21, 345.35, 0.22],
    "Table 7": [146.48, 1, 128.62, 1, 106.87, 1],
    "Table 11": [1.85, 4.64, 0.288, 20.8, 16.4, 0.72, -0.60],
    "E.3": [0.012, 0.265, 3.494, 0.046, 0.733, 6.227, 0.087, 2.302, 18.913],
}
PRINTED["Table 1"] += [0.014, 1.336, 9.020, 0.029, 1.434, 2.793]
SPREADS = [46.50, 265.75, 104.61, 691.17, 35.87, 37.57, 181.30, 91.52, 83.40, 39.10]


def test_the_papers_numbers() -> None:
    """All of them, each for a model of the paper and an experiment that is there."""
    values = {where: [] for where in PRINTED}
    for number in PAPER:
        values[number.where].append(number.value)
        where = EXPERIMENTS[number.experiment].where
        assert number.where.removeprefix("Table ") in where
    assert values == PRINTED
    spreads = [number.spread for number in PAPER if number.spread is not None]
    assert spreads == SPREADS
    assert set(paper.SHOWN) == set(EXPERIMENTS)


def test_a_run_stands_beside_the_paper() -> None:
    """Folders count as the paper's models; not other weights, models or layers."""
    first = {"condition": "first", "minimum": 0.5, "collisions": 0}
    between = {"condition": "layer 2", "minimum": 0.6}
    run = {"experiment": "layers", "model": "/models/llama-3.1-8b", "weights": "full"}
    run["rows"] = [first, between]
    ours = run | {"model": "pocket-gpt2", "rows": [first]}
    coarse = run | {"weights": "fp4, rounded"}
    lines = paper.side_by_side([run | {"rows": []}, run, ours, coarse], "layers")
    values = {}
    for line in lines:
        key = (line.where, line.model, line.condition, line.quantity)
        values[key] = line.measured
    assert values["Table 1", "Llama-3.1-8B", "first", "minimum"] == 0.5
    assert values["Table 1", "Llama-3.1-8B", "last", "minimum"] is None
    assert values["Table 2", "Llama-3.1-8B, fp4", "last", "minimum"] is None
    others = [key[1:] for key in values if key[0] == "not in the paper"]
    assert others == [
        ("Llama-3.1-8B", "first", "collisions"),
        ("pocket-gpt2", "first", "minimum"),
        ("pocket-gpt2", "first", "collisions"),
        ("Llama-3.1-8B, fp4, rounded", "first", "minimum"),
        ("Llama-3.1-8B, fp4, rounded", "first", "collisions"),
    ]
    only = Line("Table 5", "gpt2", "here", "seconds", None, None, 0.12345, 0.01)
    printed = comparison([*lines[:2], only]).splitlines()
    assert printed[1].split() == "Llama-3.1-8B first minimum 0.001 0.5".split()
    assert printed[2].endswith("not run")
    assert printed[-1].endswith("–      0.123 ± 0.01")


def test_a_number_in_two_tables_is_measured_once() -> None:
    """The last layer of Llama stands in Tables 1 and 2."""
    run = {"experiment": "layers", "model": "Llama-3.1-8B", "weights": "full"}
    run["rows"] = [{"condition": "last", "minimum": 0.5}]
    lines = paper.side_by_side([run], "layers")
    assert [line.where for line in lines if line.measured] == ["Table 1", "Table 2"]


def test_files_of_runs(tmp_path: Path) -> None:
    """One run, a list of them, a folder; anything else is refused with its name."""
    run = {"experiment": "layers", "model": "m", "weights": "full", "rows": []}
    (tmp_path / "one.json").write_text(json.dumps(run))
    (tmp_path / "two.json").write_text(json.dumps([run, run]))
    assert len(read_runs(tmp_path / "one.json")) == 1
    assert len(read_runs(tmp_path)) == 3
    (tmp_path / "bench.json").write_text(json.dumps({"bench": "scan"}))
    (tmp_path / "text.json").write_text("no")
    for name, message in (
        ("none", "expected JSON, or a folder"),
        ("bench.json", "with .*'scan'.* expected runs of"),
    ):
        with pytest.raises(RunsError, match=message):
            read_runs(tmp_path / name)
    with pytest.raises(RunsError, match=r"text\.json.; expected JSON"):
        read_runs(tmp_path / "text.json")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text on the terminal, JSON in the folder, with what was done to the weights."""
    folder = tmp_path / "results"
    command = ["reproduce", "layers", "--quick", "--device", "cpu"]
    wanted = [*command, "--prompts", "20", "--rounded", "fp4", "--layers", "6"]
    assert main([*wanted, "-o", str(folder)]) == 0
    assert "pocket-gpt2, fp4, rounded  last" in capsys.readouterr().out
    [path] = folder.iterdir()
    assert path.name == "pocket-gpt2-layers-fp4-rounded.json"
    [result] = read_runs(folder)
    assert result["weights"] == "fp4, rounded"
    assert (result["plan"]["prompts"], result["plan"]["limit"]) == (20, 0.5)
    # An earlier run is never overwritten without a word.
    before = path.read_bytes()
    assert main([*wanted, "-o", str(folder)]) == 2
    assert "an earlier run; --force replaces it" in capsys.readouterr().err
    assert main([*wanted, "--seed", "1", "--force", "-o", str(folder)]) == 0
    assert path.read_bytes() != before and len(list(folder.iterdir())) == 1
    for option in ("--prompts", "--length"):
        assert main([*command, option, "0", "--json"]) == 2
        assert f"got {option[2:]}=0" in capsys.readouterr().err
    assert main([*wanted, "-o", str(path)]) == 2
    assert "no file can be written" in capsys.readouterr().err


def test_a_full_disk_spoils_no_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was there stays, and nothing half written stays beside it."""
    path = tmp_path / "run.json"
    path.write_text("earlier")

    def full(self: Path, text: str, **options: object) -> None:
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PlanError, match=r"no file can be written .*No space left"):
        reproduce.keep_result({"rows": []}, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]
