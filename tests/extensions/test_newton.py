"""Newton's method on the one-step map: its step, its path, its settings."""

import pytest
import torch

from sipit_lite import LanguageModel, Newton, OneStepMap
from sipit_lite.extensions.newton import damped_step


def test_damped_step_is_the_ridge_solution() -> None:
    """It minimises ‖Jδ − r‖² + λ Σ ‖J_i‖² δ_i²: least squares with more rows."""
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(6, 6, generator=generator)
    residual = torch.randn(6, generator=generator)
    right = torch.cat([residual, torch.zeros(6)]).double()
    for damping in (0.0, 0.1, 10.0):
        more = torch.diag(jacobian.norm(dim=0) * damping**0.5)
        rows = torch.cat([jacobian, more]).double()
        expected = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
        step = damped_step(jacobian, residual, damping).double()
        assert torch.allclose(step, expected, atol=1e-4)
    nowhere = damped_step(torch.zeros(3, 3), torch.ones(3), 0.1)
    assert torch.equal(nowhere, torch.zeros(3))


def test_newton_arrives_within_a_few_steps(pocket: LanguageModel) -> None:
    """From the mean embedding to the token, at the last layer; residuals never grow."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(pocket.vocab_size, (8,), generator=generator)
    table = pocket.embeddings
    taken = []
    for ids in (pocket.encode("Return the number of items."), random.to(table.device)):
        states = pocket.states(ids, 6)
        for t in range(len(ids)):
            step = OneStepMap.after(pocket, 6, ids[:t])
            before = torch.inf
            for k, e in enumerate(Newton().path(step, table.mean(0), states[t])):
                residual = float((step.embedding(e[None])[0] - states[t]).norm())
                assert residual <= before
                before = residual
                nearest = int((table - e).norm(dim=1).argmin())
                if nearest == int(ids[t]) or k == 30:
                    taken.append(k)
                    break
    assert sorted(taken)[len(taken) // 2] <= 4 and max(taken) < 30


@pytest.mark.parametrize(
    "bad", [{"max_steps": 0}, {"proposals_per_step": 0}, {"damping": 0.0}]
)
def test_bad_settings_of_newton_are_refused(bad: dict[str, float]) -> None:
    """The setting and its value are quoted."""
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"got {name}={value}; expected"):
        Newton(**bad)
