"""Whatever the caller has set: the same results, and nothing of the caller's changes."""

import logging
import os
import random
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

import sipit_lite as sl
from sipit_lite import continuations
from sipit_lite.extensions.laststate import Ends
from sipit_lite.extensions.newton import jacobian
from sipit_lite.io.files import fingerprint

IDS = torch.tensor([5, 17, 40, 3, 22])
PRODUCTS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)


def small() -> GPT2LMHeadModel:
    """A random GPT-2 with weights that want gradients, as ``from_pretrained`` gives."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"vocab_size": 60, "n_embd": 32, "n_head": 2, "n_layer": 2}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(**sizes, n_positions=40, **ends)).eval()


HF = small()
PLAIN = sl.LanguageModel(HF)
POCKET = sl.load(device="cpu")
STATES = PLAIN.states(IDS, 2)
TEXTS = [torch.arange(first, first + 16) % 60 for first in range(40)]
LENS = sl.Lens.fit(PLAIN, 2, prompts=TEXTS, features=8)
ENDS = Ends.fit(PLAIN, 2, 2, tokens=500, features=8)
ROWS = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))


def new() -> sl.LanguageModel:
    """The model with nothing measured, so that all is computed in the call."""
    return sl.LanguageModel(HF)


def captured() -> sl.Captured:
    """What a pass of the model itself leaves on the tape."""
    with sl.capture(HF, layers=[1, 2]) as tape:
        HF(input_ids=IDS[None])
    return tape.captured()


def stored(folder: Path, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The prompt from a file of its states."""
    sl.write_states(folder / "states", POCKET, "two words", [1], dtype=dtype)
    return sl.read_states(folder / "states").invert(POCKET).tokens


def lens_from_a_file(folder: Path) -> torch.Tensor:
    """What a lens reads that was saved and loaded."""
    LENS.save(folder / "lens")
    return sl.Lens.load(folder / "lens", new()).slope


def calls(folder: Path) -> dict[str, Callable[[], object]]:
    """Every public function, on a model of which nothing is measured yet."""
    observe = sl.Observation.of
    return {
        "LanguageModel": lambda: new().embeddings,
        "fingerprint": lambda: fingerprint(new()),
        "load": lambda: sl.load(device="cpu").states(IDS, 1),
        "states": lambda: new().states(IDS, 2),
        "Observation": lambda: observe(STATES, new(), 2, 0.1).radius,
        "noise_floor": lambda: sl.noise_floor(new(), 2),
        "invert": lambda: sl.invert(STATES, new(), 2),
        "certify": lambda: sl.invert(STATES, new(), 2, certify=True),
        "epsilon": lambda: sl.invert(STATES, new(), 2, epsilon=1e-3),
        "rounded": lambda: sl.invert(STATES.bfloat16(), new(), 2),
        "lens": lambda: sl.invert(STATES, new(), 2, lens=LENS),
        "random": lambda: sl.invert(STATES, new(), 2, policy=sl.Random()),
        "newton": lambda: sl.invert(STATES, new(), 2, policy=sl.Newton()),
        "published": lambda: sl.invert(STATES, new(), 2, policy=sl.Published()),
        "invert_many": lambda: sl.invert_many([STATES, STATES[:2]], new(), 2),
        "Ends.fit": lambda: Ends.fit(new(), 2, 2, tokens=500, features=8).slope,
        "invert_last": lambda: sl.invert_last(STATES[1], PLAIN, 2, 2, ends=ENDS).tokens,
        "Lens.fit": lambda: sl.Lens.fit(new(), 2, tokens=999, features=8).slope,
        "Lens.draft": lambda: LENS.draft(STATES),
        "Lens.load": lambda: lens_from_a_file(folder),
        "last_states": lambda: sl.last_states(new(), [IDS, IDS[:3]], [1, 2]),
        "shards": lambda: sl.last_states(new(), [IDS], [1], folder=folder / "f"),
        "file": lambda: stored(folder),
        "eight bits": lambda: stored(folder, torch.int8),
        "continuations": lambda: list(continuations(new(), [IDS], 2)),
        "closest_pairs": lambda: sl.closest_pairs(ROWS, 5, nearest=True),
        "follow": lambda: sl.OneStepMap.after(new(), 2, IDS).follow(IDS)[0],
        "tokens": lambda: sl.OneStepMap.after(new(), 2, IDS).tokens(IDS),
        "embedding": lambda: sl.OneStepMap.after(new(), 2).embedding(PLAIN.embeddings),
        "jacobian": lambda: jacobian(
            sl.OneStepMap.after(new(), 2), PLAIN.embeddings[3]
        ),
    }


def tensors(result: object) -> list[torch.Tensor]:
    """All tensors of a result, and of the lists and records in it."""
    if isinstance(result, str):
        return [torch.tensor(list(result.encode()))]
    if isinstance(result, float):
        return [torch.tensor(result)]
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    parts = result if isinstance(result, list) else list(vars(result).values())
    inside = [part for part in parts if isinstance(part, torch.Tensor | sl.Recovery)]
    inside += [part for part in parts if isinstance(part, sl.CollisionReport)]
    assert inside, result
    return [tensor for part in inside for tensor in tensors(part)]


@contextmanager
def default(set_it: Callable, value: object, before: object) -> Iterator[None]:
    """A global of torch, set for a while."""
    set_it(value)
    try:
        yield
    finally:
        set_it(before)


@contextmanager
def coarse_products() -> Iterator[None]:
    """The coarsest float32 products, on the CPU and on CUDA."""
    before = [setting.fp32_precision for setting in PRODUCTS]
    for setting, coarse in zip(PRODUCTS, ("bf16", "tf32"), strict=True):
        setting.fp32_precision = coarse
    try:
        yield
    finally:
        for setting, usual in zip(PRODUCTS, before, strict=True):
            setting.fp32_precision = usual


def set_dtype(dtype: torch.dtype) -> object:
    """That format as the default one."""
    return default(torch.set_default_dtype, dtype, torch.float32)


SETTINGS: dict[str, Callable] = {
    "nothing": lambda: torch.enable_grad(),
    "no grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "bfloat16": lambda: set_dtype(torch.bfloat16),
    "float64": lambda: set_dtype(torch.float64),
    "meta": lambda: default(torch.set_default_device, "meta", None),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: default(torch.use_deterministic_algorithms, True, False),
    "coarse products": coarse_products,
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[torch.Tensor]]:
    """The results outside of any setting."""
    every = calls(tmp_path_factory.mktemp("outside"))
    return {name: tensors(call()) for name, call in every.items()}


def legacy_precision() -> str:
    """By the older way to ask, which refuses where the newer one was used to set it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "mixed"


def state_of_the_process() -> dict[str, object]:
    """Every global that a library could change, by name."""
    mode = torch.get_deterministic_debug_mode()
    place, keys, *rest = numpy.random.get_state()[1:]  # noqa: NPY002
    return {
        "products": [setting.fp32_precision for setting in PRODUCTS],
        "all products": legacy_precision(),
        "all precisions": torch.backends.fp32_precision,
        "TF32": torch.backends.cudnn.allow_tf32,
        "cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "format": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": (mode, torch.is_deterministic_algorithms_warn_only_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomalies": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "printing": repr(vars(torch._tensor_str.PRINT_OPTS)),
        "generator of torch": torch.random.get_rng_state().tolist(),
        "generator of NumPy": (place.tolist(), keys, *rest),
        "floating point of NumPy": numpy.geterr(),
        "verbosity": transformers_logging.get_verbosity(),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "logging": (
            logging.root.level,
            list(logging.root.handlers),
            logging.lastResort,
        ),
        "warnings": list(warnings.filters),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "thread names": sorted(thread.name for thread in threading.enumerate()),
        "training": [part.training for part in HF.modules()],
        "hooks": [len(p._forward_hooks | p._forward_pre_hooks) for p in HF.modules()],
        "gradients of weights": [p.requires_grad for p in HF.parameters()],
    }


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether all tensors are equal to the bit, on one device and in one format."""
    for a, b in zip(one, other, strict=True):
        if (a.dtype, a.device, a.shape) != (b.dtype, b.device, b.shape):
            return False
        if not torch.equal(a.nan_to_num(nan=-1), b.nan_to_num(nan=-1)):
            return False
    return True


@pytest.mark.parametrize("setting", SETTINGS)
def test_results_are_the_same_whatever_the_caller_has_set(
    setting: str, expected: dict[str, list[torch.Tensor]], tmp_path: Path
) -> None:
    """To the bit; and what the caller has set is still set afterwards."""
    for name, call in calls(tmp_path).items():
        with SETTINGS[setting]():
            before = state_of_the_process()
            result = call()
            assert state_of_the_process() == before, name
        assert same(tensors(result), expected[name]), name


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_tape_holds_what_the_model_computes(setting: str) -> None:
    """Its own hidden states under the same settings; ours are float32 for all that."""
    with SETTINGS[setting]():
        tape = captured()
        theirs = HF(input_ids=IDS[None], output_hidden_states=True).hidden_states
        for layer in (1, 2):
            norm = HF.transformer.ln_f if layer == 2 else torch.nn.Identity()
            assert torch.equal(norm(tape.at(layer)), theirs[layer][0])
        try:
            assert torch.equal(tape.invert(new()).tokens, IDS)
        except sl.NotVerified:
            # States of a model that computed in 16 bits are refused, never guessed at.
            assert setting in ("autocast", "coarse products")


@contextmanager
def unusual() -> Iterator[None]:
    """No global has its default: what is reset instead of restored is noticed."""
    verbosity = transformers_logging.get_verbosity()
    legacy = default(torch.set_float32_matmul_precision, "high", "highest")
    with legacy, set_dtype(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        transformers_logging.set_verbosity_info()
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)  # noqa: NPY002
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@pytest.mark.parametrize("name", calls(Path()))
def test_nothing_of_the_caller_changes(name: str, tmp_path: Path) -> None:
    """Precision, generators, formats, verbosity, filters, folder, environment."""
    call = calls(tmp_path)[name]
    with unusual():
        before = state_of_the_process()
        call()
        after = state_of_the_process()
    for key, value in before.items():
        assert after[key] == value, key


def test_a_model_made_in_inference_mode_is_refused_in_one_line() -> None:
    """No gradient can ever pass it; ``load`` makes its own outside, wherever it is."""
    with torch.inference_mode():
        made = small()
        ours = sl.load(device="cpu")
        with pytest.raises(sl.ModelError, match="got weights made in inference"):
            sl.LanguageModel(made)
    assert jacobian(sl.OneStepMap.after(ours, 1), ours.embeddings[3]).isfinite().all()


def report() -> None:
    """Name the calls that draw from Python's generator: ``python tests/test_settings.py``."""
    with tempfile.TemporaryDirectory() as folder:
        for name, call in calls(Path(folder)).items():
            before = random.getstate()
            call()
            if random.getstate() != before:
                print(name)


def test_nobody_draws_from_the_generator_of_python() -> None:
    """In a process of its own: here the checks of types draw from it."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


def test_what_is_refused_or_interrupted_changes_nothing() -> None:
    """Errors leave by the same door."""

    class Pressed(sl.Random):
        def proposals(self, *given: object) -> Iterator[torch.Tensor]:
            raise KeyboardInterrupt

    refused = {
        sl.StatesError: lambda: sl.invert(STATES[:, 1:], new(), 2),
        sl.NotVerified: lambda: sl.invert(STATES.flip(0), new(), 2),
        sl.Interrupted: lambda: sl.invert(STATES, new(), 2, policy=Pressed()),
        sl.ModelError: lambda: sl.load("no-such-model"),
        sl.LensError: lambda: sl.Lens.fit(new(), 2, tokens=1),
    }
    for kind, call in refused.items():
        with unusual(), torch.autocast("cpu", torch.bfloat16):
            before = state_of_the_process()
            with pytest.raises(kind):
                call()
            assert state_of_the_process() == before


def test_threads_get_right_results_and_leave_no_trace() -> None:
    """Four of them, 200 calls on one model, under settings that none of them wants."""
    shared = new()
    prompts = [(IDS + shift) % 60 for shift in range(4)]
    states = [shared.states(ids, 2) for ids in prompts]
    wrong = []

    def work(own: int) -> None:
        for _ in range(25):
            tokens = sl.invert(states[own], shared, 2, lens=LENS).tokens
            ends = sl.last_states(shared, [prompts[own]], [2])[0]
            right = torch.equal(tokens, prompts[own])
            right &= torch.allclose(ends, states[own][-1:], atol=1e-5)
            wrong.extend([own] * (not right))

    with unusual():
        before = state_of_the_process()
        threads = [threading.Thread(target=work, args=[own]) for own in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        after = state_of_the_process()
    assert wrong == []
    assert after == before


if __name__ == "__main__":
    report()
