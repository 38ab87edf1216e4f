from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scfm_core.models.adapters import ADAPTERS, LoRAConfig
from scfm_core.models.conditioning import Conditioning
from scfm_core.models.encoders import TextEncoders
from scfm_core.models.families import open_family
from scfm_core.models.student import FullModel, LoRAModel
from scfm_core.scfm.method import PlanConfig
from scfm_core.scfm.plan import sample_plan
from scfm_core.scfm.target import scfm_target
from scfm_core.scfm.trajectory import take_paths


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


def full_model(family, *, with_teacher=True, is_sharded=False):
    roles = (*ADAPTERS, "teacher") if with_teacher else ADAPTERS
    networks = {role: family.load_network(torch.float32, "cpu") for role in roles}
    return FullModel(family, networks, {}, torch.float32, near_is_collective=is_sharded)


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


@pytest.mark.parametrize("is_sharded", [True, False])
@pytest.mark.parametrize("strength", [0.0, 1.0])
@torch.no_grad()
def test_full_weights_enter_both_networks_only_if_they_are_sharded(family, batch, strength, is_sharded):
    """A sharded network gathers its weights collectively: a rank that skipped it would hang the others."""
    model = full_model(family, is_sharded=is_sharded)
    calls = []
    for role in ("teacher", "ema_fast"):
        model.networks[role].register_forward_hook(lambda *_, role=role: calls.append(role))
    x, sigma, cond = batch
    near = model.near_velocity(x, sigma, cond, torch.full((4,), strength))
    own = "teacher" if strength == 0 else "ema_fast"
    assert sorted(calls) == (["ema_fast", "teacher"] if is_sharded else [own])
    torch.testing.assert_close(near, model.velocity("student", x, sigma, cond, torch.ones(4)))


class NoCopies(TorchDispatchMode):
    """Refuses copies of host tensors to a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default:
            assert args[0].is_meta or kwargs.get("device", torch.device("cpu")).type == "cpu", "a copy in a pass"
        return function(*args, **kwargs)


@pytest.mark.parametrize("lengths", [None, tuple(range(1, 9)) * 2], ids=["whole", "masked"])
@torch.no_grad()
def test_a_target_with_full_weights_reads_and_copies_nothing(family, monkeypatch, lengths):
    """A read from a GPU waits for its queue. Tensors on the meta device have nothing to read."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for the meta device
    networks = {role: family.empty_network(torch.float32) for role in (*ADAPTERS, "teacher")}
    model = FullModel(family, networks, {}, torch.float32)
    for config in (
        PlanConfig(self_grids=(16, 8)),
        PlanConfig(self_grids=(16, 8), teacher_fraction=0.4, flow_fraction=0.3),
        PlanConfig(self_grids=(16, 8), trajectory_fraction=0.3, trajectory_grids=(2, 4), trajectory_steps=4),
    ):
        plan = sample_plan(config, torch.arange(16), seed=0)
        assert {0.0, 1.0} == set(plan.near_strength[plan.pair_rows].tolist())
        cond = Conditioning(
            fields={name: torch.empty(16, *shape, device="meta") for name, shape in family.shapes(8).items()},
            lengths=lengths,
            guidance=plan.guidance.to("meta"),
        )
        x = torch.empty(16, 1, 8, 8, device="meta")
        moved = plan.to("meta", with_strengths=False)
        with NoCopies():
            if config.has_trajectory:
                assert plan.is_trajectory.any()
                _, ends = take_paths(moved, x, x, cond, partial(model.velocity, "teacher"), 4)
                assert ends.shape == x.shape
            target = scfm_target(moved, x, cond, model.near_velocity, model.far_velocity, flow_velocity=x)
            assert target.shape == x.shape
            model.student_velocity(x, moved.sigma_start, cond, moved.student_strength)


def test_rows_of_a_conditioning_keep_their_lengths():
    """Their tokens are as long as the longest of them."""
    text = torch.arange(1.0, 25).view(3, 4, 2)
    cond = Conditioning(fields={"text": text, "pooled": text[:, 0]}, lengths=(4, 1, 2), guidance=torch.arange(3.0))
    for rows in ([2, 1], [1, 2], slice(1, None)):
        part = cond[rows]
        assert part.lengths == ((2, 1) if part.guidance[0] == 2 else (1, 2))
        assert torch.equal(part.fields["text"], text[rows][:, :2])
        assert torch.equal(part.fields["pooled"], text[rows][:, 0])
        assert torch.equal(part.guidance, torch.arange(3.0)[rows])


@pytest.mark.parametrize("weights", ["lora", "full"])
@torch.no_grad()
def test_a_pass_does_not_look_at_every_module(family, batch, weights, monkeypatch):
    """With adapters in Flux.1-dev there are 5,815; diffusers' `dtype` looks at all of them, which takes 11 ms."""
    if weights == "lora":
        model = LoRAModel(family, family.load_network(torch.float32, "cpu"), LoRAConfig(rank=4, alpha=4.0))
    else:
        model = full_model(family)
    looked_at, walk = 0, torch.nn.Module.named_modules

    def counted(module, *arguments, **options):
        nonlocal looked_at
        for found in walk(module, *arguments, **options):
            looked_at += 1
            yield found

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    x, sigma, cond = batch
    model.student_velocity(x, sigma, cond, torch.ones(4))
    monkeypatch.undo()
    # One level of the recursion after the other is counted.
    assert looked_at < 25 < sum(1 for _ in model.networks["student"].modules())


def test_full_weights_refuse_other_strengths(family, batch):
    x, sigma, cond = batch
    with pytest.raises(ValueError, match="only strengths 0 and 1"):
        full_model(family).student_velocity(x, sigma, cond, torch.full((4,), 0.5))
    with pytest.raises(ValueError, match="without a teacher"):
        full_model(family, with_teacher=False).near_velocity(x, sigma, cond, torch.zeros(4))
