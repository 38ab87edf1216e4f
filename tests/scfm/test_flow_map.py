"""Flow-map rows: their jumps, the fixed points of their targets, and which rows go through the network."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from scfm_core.flow.path import per_sample
from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.flow_map import flow_map_velocity
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.plan import sample_plan
from scfm_core.scfm.slices import FlowMap
from scfm_core.scfm.starts import own_starts

SHIFT, GAMMA = 3.0, 0.5
JUMPS = {"shortest": 1 / 16, "whole_fraction": 0.1}
FORMS = [
    (form, difference, 1)
    for form in ("lagrangian", "eulerian")
    for difference in ("central", "one_sided", "teacher_step")
] + [("lagrangian", "teacher_step", 3)]


def make_config(fraction=1.0, *, slices=None, **settings: Any):
    return PlanConfig(
        teacher_fraction=0.0, flow_map_fraction=fraction, flow_map=FlowMap(**settings), step_gain=StepGain(gamma=GAMMA),
        shift=(SHIFT, SHIFT), sigma_max=1.0, **(slices or {}),
    )  # fmt: skip


def make_plan(config, rows=16, seed=1):
    return sample_plan(config, torch.arange(rows), seed)


def in_fp64(plan):
    """The same jumps, with sigmas that belong to u to the last bit."""
    u, length, shift = plan.u_start.double(), plan.step_size.double(), plan.shift.double()
    start, end = shift_sigma(u, shift), shift_sigma(u - length, shift)
    return dataclasses.replace(plan, u_start=u, step_size=length, shift=shift, sigma_start=start, sigma_end=end)


def field(x, sigma):
    """A velocity with a known path: dx/dsigma = sigma + x / 2, so x = c exp(sigma / 2) - 2 sigma - 4."""
    return per_sample(sigma, x) + x / 2


def exact_student(x, sigma, cond, strength):
    """The mean of `field` over the jump that the strength means; `field` itself at strength 0."""
    u = sigma / (SHIFT - (SHIFT - 1) * sigma)
    start, end = (per_sample(point, x) for point in (sigma, shift_sigma(u - strength ** (1 / GAMMA), SHIFT)))
    reached = (x + 2 * start + 4) * torch.exp((end - start) / 2) - 2 * end - 4
    is_jump = per_sample(strength, x) > 0
    return torch.where(is_jump, (x - reached) / torch.where(is_jump, start - end, 1.0), field(x, sigma))


class Rows(list):
    """A conditioning: the numbers of its rows."""

    def __getitem__(self, rows):
        return Rows(rows)


def error_of_the_fixed_point(epsilon, form, difference, teacher_steps, rows=64):
    """How far the target of an exact student is from its velocity: the largest error of the rows whose difference has a longer and a
    shorter jump, and of the others."""
    width = {} if difference == "teacher_step" else {"epsilon": epsilon}
    plan = in_fp64(make_plan(make_config(**JUMPS), rows))
    plan = dataclasses.replace(
        plan,
        config=make_config(
            form=form, difference=difference, shortest=epsilon / 2, teacher_steps=teacher_steps, **width
        ),
    )
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = exact_student(x, plan.sigma_start, None, plan.step_size**GAMMA)
    target = flow_map_velocity(plan, x, Rows(range(rows)), exact, exact_student)
    errors = (target - exact).abs().amax(1)
    room = plan.u_start - plan.step_size if form == "lagrangian" else 1 - plan.u_start
    is_central = (room > 0.02 * plan.step_size) & (difference == "central")
    assert not is_central.all()
    return float(errors[is_central].amax()) if is_central.any() else None, float(errors[~is_central].amax())


@pytest.mark.parametrize(("form", "difference", "teacher_steps"), FORMS)
def test_the_exact_flow_map_is_the_fixed_point_at_every_length(form, difference, teacher_steps):
    """Up to an error of the difference's order: the second if it is central, which it cannot be where the jump ends at the data, or at pure noise."""
    errors = [error_of_the_fixed_point(epsilon, form, difference, teacher_steps) for epsilon in (0.02, 0.01, 0.005)]
    for order, found in ((2, [central for central, _ in errors]), (1, [one_sided for _, one_sided in errors])):
        if found[0] is not None:
            assert found[-1] < 0.02**order
            for coarse, fine in itertools.pairwise(found):
                assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_a_student_that_is_not_exact_is_no_fixed_point():
    """The target of an adapter that does nothing is the teacher's velocity where the row lands."""
    plan = in_fp64(make_plan(make_config(difference="central")))
    x = torch.randn(16, 2, dtype=torch.float64)
    prediction = field(x, plan.sigma_start)
    target = flow_map_velocity(plan, x, Rows(range(16)), prediction, lambda x, sigma, cond, strength: field(x, sigma))
    landed = x - (plan.sigma_start - plan.sigma_end)[:, None] * prediction
    torch.testing.assert_close(target, field(landed, plan.sigma_end), rtol=0, atol=1e-12)
    assert ((target - prediction).abs().amax(1) > 1e-3).all()


def test_the_teacher_takes_the_last_steps():
    """The target is the mean over the shorter jump and over Euler steps of the teacher, weighted so that the gradient is the teacher's."""
    plan = in_fp64(make_plan(make_config(**JUMPS)))
    plan = dataclasses.replace(plan, config=make_config(shortest=1 / 16, teacher_steps=4))
    x = torch.randn(16, 2, dtype=torch.float64)
    exact = exact_student(x, plan.sigma_start, None, plan.step_size**GAMMA)
    target = flow_map_velocity(plan, x, Rows(range(16)), exact, exact_student)
    rest = (plan.step_size - 4 / 16).clamp(min=0)
    assert (rest == 0).any() and (rest > 0).any()
    mid = shift_sigma(plan.u_start - rest, plan.shift)
    near = exact_student(x, plan.sigma_start, None, rest**GAMMA)
    reached, u = x - (plan.sigma_start - mid)[:, None] * near, plan.u_start - rest
    for _ in range(4):
        after = u - (plan.step_size - rest) / 4
        step = (shift_sigma(u, plan.shift) - shift_sigma(after, plan.shift))[:, None]
        reached, u = reached - step * field(reached, shift_sigma(u, plan.shift)), after
    whole = (x - reached) / (plan.sigma_start - plan.sigma_end)[:, None]
    factor = ((plan.sigma_start - plan.sigma_end) / (mid - plan.sigma_end))[:, None]
    torch.testing.assert_close(target - exact, factor * (whole - exact), rtol=0, atol=1e-9)


def test_jumps_are_drawn_as_the_settings_say():
    plan = make_plan(make_config(shortest=1 / 16, noise_fraction=0.3, whole_fraction=0.2), rows=20_000)
    u, length = plan.u_start, plan.step_size
    is_whole = length == 1
    assert is_whole.double().mean().item() == pytest.approx(0.2, abs=0.01)
    assert (u[~is_whole] == 1).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert (length > 1 / 16).all() and (u >= length).all() and (u <= 1).all()
    logarithm = length[~is_whole].log() / torch.tensor(1 / 16).log()
    torch.testing.assert_close(logarithm.sort().values, torch.linspace(0, 1, len(logarithm)), rtol=0, atol=0.02)
    assert set(plan.moved_rows) == set((u < 1).nonzero()[:, 0].tolist())
    torch.testing.assert_close(plan.student_strength, length**GAMMA)
    for point, sigma in ((u, plan.sigma_start), (u, plan.sigma_mid), (u - length, plan.sigma_end)):
        torch.testing.assert_close(shift_sigma(point, SHIFT), sigma, rtol=0, atol=1e-6)


def test_other_rows_are_the_same_as_without_flow_map_rows():
    slices = {"flow_fraction": 0.3, "trajectory_fraction": 0.1}
    without = make_plan(make_config(0.0, slices=slices), 4000)
    plan = make_plan(make_config(0.2, slices=slices), 4000)
    rows = plan.is_flow_map
    assert rows.double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert not (rows & (plan.is_flow | plan.is_trajectory | plan.is_teacher)).any()
    assert plan.flow_map_rows == rows.nonzero()[:, 0].tolist()
    for name in ("sigma_start", "sigma_mid", "sigma_end", "student_strength", "shift", "guidance", "grid", "interval"):
        assert torch.equal(getattr(plan, name)[~rows], getattr(without, name)[~rows]), name


@pytest.mark.parametrize("is_sharded", [True, False])
@pytest.mark.parametrize(
    ("fraction", "settings", "calls"),
    [
        (0.5, {"difference": "central"}, "moved 3"),
        (0.5, {"difference": "one_sided"}, "moved 2"),
        (0.5, {"form": "eulerian", "difference": "central"}, "moved 1 2"),
        (0.5, {}, "moved 1 1"),
        (0.5, {"teacher_steps": 3}, "moved 1 1 1 1"),
        (0.5, {"noise_fraction": 1.0}, "1 1"),
        (1e-9, {}, "moved 1 1"),  # no row of this batch
    ],
)
def test_only_flow_map_rows_go_through_the_network(fraction, settings, calls, is_sharded):
    """In a sharded run every process enters the network as often, without such rows with one row whose result is not used."""
    plan = make_plan(make_config(fraction, **settings))
    entered = []

    def student(x, sigma, cond, strength):
        assert len(x) == len(sigma) == len(cond) == len(strength) and not torch.is_grad_enabled()
        entered.append(list(cond))
        return x

    x, noise = torch.zeros(16, 2), torch.randn(16, 2)
    start = own_starts(plan, x, noise, Rows(range(16)), student, is_sharded=is_sharded)
    prediction = torch.ones(16, 2, requires_grad=True)
    known = torch.full((16, 2), 7.0)
    target = flow_map_velocity(plan, start, Rows(range(16)), prediction, student, known, is_sharded=is_sharded)
    rows, moved = plan.flow_map_rows, plan.moved_rows
    assert bool(rows) == (fraction == 0.5)
    needed = [moved if number == "moved" else rows * int(number) for number in calls.split()]
    if not rows:
        needed = [[0] * (1 if number == "moved" else int(number)) * is_sharded for number in calls.split()]
    assert entered == [call for call in needed if call]
    others = [row for row in range(16) if row not in rows]
    assert not start[others].any() and (target[others] == 7).all() and not target.requires_grad
    at_noise = [row for row in rows if row not in moved]
    assert torch.equal(start[at_noise], noise[at_noise])
    assert not (start[moved] == noise[moved]).any()


def test_a_weight_is_a_factor_of_the_gradient_of_flow_map_rows_alone():
    x, known = torch.randn(16, 2), torch.full((16, 2), 7.0)
    prediction = torch.zeros(16, 2, requires_grad=True)
    gradient = {}
    for weight in (1.0, 0.25):
        plan = make_plan(make_config(0.5, weight=weight))
        target = flow_map_velocity(plan, x, Rows(range(16)), prediction, exact_student, known)
        (gradient[weight],) = torch.autograd.grad((prediction - target).square().sum(), prediction)
    factor = torch.where(plan.is_flow_map, 0.25, 1.0)[:, None]
    torch.testing.assert_close(gradient[0.25], factor * gradient[1.0])
    assert plan.flow_map_rows and not plan.is_flow_map.all()


def test_a_start_is_where_one_jump_of_the_student_ends():
    plan = make_plan(make_config())
    noise = torch.randn(16, 2)

    def student(x, sigma, cond, strength):
        assert (sigma == 1).all()
        torch.testing.assert_close(strength, (1 - plan.u_start[list(cond)]) ** GAMMA)
        return 2 * x

    start = own_starts(plan, torch.zeros(16, 2), noise, Rows(range(16)), student)
    torch.testing.assert_close(start, noise * (1 - 2 * (1 - plan.sigma_start))[:, None])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_gain": None}, "method.flow_map_fraction needs method.step_gain"),
        ({"flow_map_fraction": 0.0}, "method.flow_map has no effect without flow-map rows"),
        ({"flow_fraction": 0.5}, r"method.flow_fraction \+ method.flow_map_fraction must be at most 1, got 0.5 \+ 1.0"),
        (
            {"flow_map": {"difference": "central", "epsilon": 1.0}},
            "method.flow_map.epsilon must be between 0 and 1, got 1.0",
        ),
        ({"flow_map": {"shortest": 0.0}}, r"method.flow_map.shortest must be in \[0.0001, 1\], got 0.0"),
        ({"flow_map": {"teacher_steps": 0}}, "method.flow_map.teacher_steps must be in 1 to 32"),
        ({"flow_map": {"teacher_steps": 9, "shortest": 1 / 8}}, "method.flow_map.teacher_steps must be in 1 to 8"),
        ({"flow_map": {"teacher_steps": 2, "form": "eulerian"}}, "method.flow_map.teacher_steps has no effect without"),
        ({"flow_map": {"weight": 0.0}}, "method.flow_map.weight must be positive and finite, got 0.0"),
        ({"flow_map": {"weight": 0.02}}, "method.flow_map.weight has no effect with method.flow_map_fraction=1"),
        ({"flow_map": {"noise_fraction": 1.5}}, r"method.flow_map.noise_fraction must be in \[0, 1\], got 1.5"),
        ({"flow_map": {"shortest": 1e-4}, "sigma_max": 0.9999}, "reaches sigma_max 0.9999"),
    ],
    ids=str,
)
def test_invalid_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        settings = change.get("flow_map", {"noise_fraction": 0.2})
        dataclasses.replace(make_config(), **{**change, "flow_map": FlowMap(**settings)})


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({"whole_fraction": 0.0}, 2.7),  # 70 % start where the student's own jump ends
        ({"whole_fraction": 0.5}, 2.35),
        ({"noise_fraction": 1.0}, 2),
        ({"noise_fraction": 1.0, "teacher_steps": 4}, 5),
        ({"difference": "central", "starts": "data"}, 3),
        ({"difference": "one_sided", "whole_fraction": 0.0, "noise_fraction": 0.5}, 2.5),
    ],
)
def test_passes(settings, target):
    config = make_config(**settings)
    assert config.passes(1) == (1, pytest.approx(target)) and config.passes(2) == (2, pytest.approx(2 * target))
    assert config.is_student_first and config.has_teacher and not config.has_pairs and not config.has_self
