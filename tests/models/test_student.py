import pytest
import torch

from scfm_core.models.adapters import ADAPTERS, LoRAConfig
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.student import FullModel, LoRAModel


@pytest.fixture
def family(tiny):
    return open_family(str(tiny / "flux"))


@pytest.fixture
def batch(family):
    cond = TextEncoders(family, 8, torch.float32, "cpu").encode(["a handwritten digit four"] * 4, guidance=3.0)
    return torch.randn(4, 1, 8, 8), torch.tensor([0.9, 0.7, 0.5, 0.2]), cond


def perturb(model):
    for number, role in enumerate(ADAPTERS):
        for parameter in model.parameters(role).values():
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


def full_model(family, *, with_teacher=True):
    teacher = family.load_network(torch.float32, "cpu") if with_teacher else None
    return FullModel(family, family.load_network(torch.float32, "cpu"), torch.float32, teacher=teacher)


@pytest.mark.parametrize("weights", ["lora", "full"])
@torch.no_grad()
def test_near_pass_is_the_teacher_where_strength_is_zero(family, batch, weights):
    if weights == "lora":
        model = LoRAModel(family, family.load_network(torch.float32, "cpu"), LoRAConfig(rank=4, alpha=4.0))
    else:
        model = full_model(family)
    perturb(model)
    x, sigma, cond = batch
    strength = torch.tensor([0.0, 1.0, 0.0, 1.0])
    near = model.near_velocity(x, sigma, cond, strength)
    teacher = model.velocity("teacher", x, sigma, cond, strength)
    fast = model.velocity("ema_fast", x, sigma, cond, torch.ones(4))
    slow = model.far_velocity(x, sigma, cond, torch.ones(4))
    torch.testing.assert_close(near[[0, 2]], teacher[[0, 2]])
    torch.testing.assert_close(near[[1, 3]], fast[[1, 3]])
    assert not torch.allclose(fast, teacher)
    assert not torch.allclose(fast, slow)


@pytest.mark.parametrize("strength", [0.0, 1.0])
@torch.no_grad()
def test_full_weights_enter_both_networks_whatever_the_draw(family, batch, strength):
    """A sharded network gathers its weights collectively: a rank that skipped it would hang the others."""
    model = full_model(family)
    calls = []
    for role in ("teacher", "ema_fast"):
        model.networks[role].register_forward_hook(lambda *_, role=role: calls.append(role))
    x, sigma, cond = batch
    near = model.near_velocity(x, sigma, cond, torch.full((4,), strength))
    assert sorted(calls) == ["ema_fast", "teacher"]
    torch.testing.assert_close(near, model.velocity("student", x, sigma, cond, torch.ones(4)))


def test_full_weights_refuse_other_strengths(family, batch):
    x, sigma, cond = batch
    with pytest.raises(ValueError, match="only strengths 0 and 1"):
        full_model(family).student_velocity(x, sigma, cond, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="without a teacher"):
        full_model(family, with_teacher=False).near_velocity(x, sigma, cond, torch.zeros(4))
