"""The shortcut target, against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from scfm_core.flow.path import flow_velocity, noise_latents, per_sample
from scfm_core.flow.sampler import euler_sample
from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.plan import ShortcutPlan, sample_plan
from scfm_core.scfm.target import scfm_target

B = 64
IDS = torch.arange(B)
MIXED = PlanConfig(teacher_fraction=0.3, flow_fraction=0.4, step_gain=StepGain())


def make_plan(config: PlanConfig | None = None, ids: Tensor = IDS) -> ShortcutPlan:
    return sample_plan(config or PlanConfig(), ids, seed=0)


def gaussian(seed: int = 0, rows: int = B) -> Tensor:
    return torch.randn(rows, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(plan: ShortcutPlan) -> tuple[Tensor, Tensor]:
    start, mid, end = (s.double()[:, None, None] for s in (plan.sigma_start, plan.sigma_mid, plan.sigma_end))
    return start - mid, mid - end


def assert_equal(target: Tensor, expected: Tensor) -> None:
    # Sigmas and their differences are fp32.
    torch.testing.assert_close(target, expected.expand_as(target), atol=2e-6, rtol=1e-6)


class Recorder:
    """A velocity that records its arguments."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, x, sigma, cond, strength):
        self.calls.append((x, sigma, cond, strength))
        return self.field(x, sigma, cond, strength)


def no_pass(*_):
    raise AssertionError("no pass is needed here")


def test_constant_field():
    constant = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    target = scfm_target(make_plan(), gaussian(), None, *[lambda x, *_: constant.expand_as(x)] * 2)
    assert_equal(target, constant)


def test_linear_field():
    # Two Euler steps of dx/dsigma = a x scale x by (1 - a d1)(1 - a d2).
    plan, x, a = make_plan(), gaussian(), 1.7
    target = scfm_target(plan, x, None, *[lambda x, *_: a * x] * 2)
    d1, d2 = deltas(plan)
    assert_equal(target, a * x * (1 - a * d1 * d2 / (d1 + d2)))


def test_target_is_the_mean_velocity_of_two_euler_steps():
    plan, x = make_plan(), gaussian()

    def field(x, sigma):
        return torch.sin(3 * x) + 2 * per_sample(sigma, x)

    target = scfm_target(plan, x, None, *[lambda x, sigma, *_: field(x, sigma)] * 2)
    points = torch.stack([plan.sigma_start, plan.sigma_mid, plan.sigma_end], dim=1)
    for row, sigmas in enumerate(points):
        start = x[row : row + 1]
        end = euler_sample(field, start, sigmas)
        assert_equal(target[row], ((start - end) / (sigmas[0] - sigmas[2]))[0])


def test_near_and_far_are_weighted_by_their_lengths():
    plan = make_plan()
    near, far = (lambda x, *_: torch.full_like(x, 1.0)), (lambda x, *_: torch.full_like(x, 2.0))
    d1, d2 = deltas(plan)
    assert not torch.isclose(d1, d2).any()  # with a shift the two lengths differ
    assert_equal(scfm_target(plan, gaussian(), None, near, far), (d1 + 2 * d2) / (d1 + d2))


def test_each_row_uses_its_own_model():
    plan, x = make_plan(), gaussian()
    teacher, fast, slow = 1.0, 10.0, 100.0

    def near(x, sigma, cond, strength):
        return torch.where(per_sample(strength, x) == 0, teacher, fast) * x

    d1, d2 = deltas(plan)
    v_near = torch.where(plan.is_teacher[:, None, None], teacher, fast) * x
    expected = (d1 * v_near + d2 * slow * (x - d1 * v_near)) / (d1 + d2)
    target = scfm_target(plan, x, None, near, lambda x, *_: slow * x)
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-5)


def test_each_row_runs_at_its_own_strength():
    plan, x = make_plan(PlanConfig(step_gain=StepGain())), gaussian()
    d1, d2 = deltas(plan)
    v_near = plan.near_strength[:, None, None] * x
    v_far = plan.far_strength[:, None, None] * (x - d1 * v_near)
    target = scfm_target(plan, x, None, *[lambda x, sigma, cond, strength: per_sample(strength, x) * x] * 2)
    assert_equal(target, (d1 * v_near + d2 * v_far) / (d1 + d2))


def test_each_pass_is_one_call_for_all_rows():
    plan, x, cond = make_plan(PlanConfig(step_gain=StepGain())), gaussian(), object()
    near, far = Recorder(lambda x, *_: 2 * x), Recorder(lambda x, *_: x)
    scfm_target(plan, x, cond, near, far)

    [(near_x, near_sigma, near_cond, near_strength)] = near.calls
    assert near_cond is cond
    assert torch.equal(near_x, x)
    assert torch.equal(near_sigma, plan.sigma_start)
    assert torch.equal(near_strength, plan.near_strength)

    [(far_x, far_sigma, far_cond, far_strength)] = far.calls
    assert far_cond is cond
    assert_equal(far_x, x - 2 * deltas(plan)[0] * x)
    assert torch.equal(far_sigma, plan.sigma_mid)
    assert torch.equal(far_strength, plan.far_strength)


def test_a_straight_field_is_a_fixed_point():
    plan, latents, noise = make_plan(), gaussian(0), gaussian(1)
    x = noise_latents(latents, noise, plan.sigma_start)

    def straight(x, sigma, *_):
        return (x - latents) / per_sample(sigma, x)

    target = scfm_target(plan, x, None, straight, straight)
    assert_equal(target, straight(x, plan.sigma_start))
    assert_equal(target, flow_velocity(latents, noise))
    assert scfm_loss(straight(x, plan.sigma_start), target, plan) < 1e-12


def test_a_bf16_network_gives_an_fp32_target():
    plan, x = make_plan(), gaussian().float()
    target = scfm_target(plan, x, None, *[lambda x, *_: x.bfloat16()] * 2)
    d1, d2 = (delta.float() for delta in deltas(plan))
    v_near = x.bfloat16().float()
    v_far = (x - d1 * v_near).bfloat16().float()
    assert target.dtype == torch.float32
    # An Euler step or a mean in bf16 would have errors of 1e-2.
    close = torch.isclose(target, (d1 * v_near + d2 * v_far) / (d1 + d2), atol=1e-5)
    assert close.float().mean() > 0.99


def test_flow_rows_have_the_flow_velocity_and_only_pairs_run():
    plan, x, velocity = make_plan(MIXED), gaussian(), gaussian(1)
    pairs = ~plan.is_flow
    assert 0 < pairs.sum() < B

    def field(x, sigma, cond, strength):
        return torch.cos(x) * per_sample(strength + cond, x)

    near, far = Recorder(field), Recorder(field)
    cond = torch.arange(B) / B
    target = scfm_target(plan, x, cond, near, far, flow_velocity=velocity)

    assert torch.equal(target[plan.is_flow], velocity[plan.is_flow])
    pair_plan = make_plan(MIXED, IDS[pairs])
    alone = scfm_target(pair_plan, x[pairs], cond[pairs], field, field, flow_velocity=velocity[pairs])
    assert torch.equal(target[pairs], alone)

    [(near_x, near_sigma, near_cond, near_strength)], [(_, far_sigma, far_cond, far_strength)] = near.calls, far.calls
    assert torch.equal(near_x, x[pairs])
    assert torch.equal(near_sigma, plan.sigma_start[pairs])
    assert torch.equal(near_strength, plan.near_strength[pairs])
    assert torch.equal(far_sigma, plan.sigma_mid[pairs])
    assert torch.equal(far_strength, plan.far_strength[pairs])
    assert torch.equal(near_cond, cond[pairs])
    assert torch.equal(far_cond, cond[pairs])


def test_flow_rows_do_not_change_the_target_of_pairs():
    mixed = make_plan(MIXED)
    pairs = ~mixed.is_flow
    plan, x = make_plan(MIXED, IDS[pairs]), gaussian(rows=int(pairs.sum()))
    target = scfm_target(plan, x, None, *[lambda x, *_: 1.7 * x] * 2, flow_velocity=torch.zeros_like(x))
    d1, d2 = deltas(plan)
    assert_equal(target, 1.7 * x * (1 - 1.7 * d1 * d2 / (d1 + d2)))


def test_a_batch_of_flow_rows_still_enters_the_network():
    # Another process of a sharded run may have a pair: it would wait in the network's collectives.
    plan = make_plan(MIXED, IDS[make_plan(MIXED).is_flow][:5])
    assert plan.is_flow.all()
    near, far = Recorder(lambda x, *_: x), Recorder(lambda x, *_: x)
    velocity = gaussian(1, rows=5)
    target = scfm_target(plan, gaussian(rows=5), None, near, far, flow_velocity=velocity)
    assert [len(x) for x, *_ in near.calls + far.calls] == [1, 1]
    assert torch.equal(target, velocity)  # no 0/0 from a jump of length zero
    alone = scfm_target(plan, gaussian(rows=5), None, no_pass, no_pass, flow_velocity=velocity, is_sharded=False)
    assert torch.equal(alone, velocity)


@pytest.mark.parametrize("flow_fraction", [0.0, 0.4])
def test_the_students_velocity_is_the_near_half_of_self_rows(flow_fraction):
    plan = make_plan(PlanConfig(teacher_fraction=0.3, flow_fraction=flow_fraction, near="student"))
    x, student, velocity, cond = gaussian(), gaussian(1), gaussian(2), torch.arange(B) / B

    def teacher(x, sigma, cond, strength):
        return torch.cos(x) * per_sample(sigma + cond, x)

    def far(x, sigma, cond, strength):
        return torch.sin(x) * per_sample(sigma - cond, x)

    def near(x, sigma, cond, strength):  # of all pairs, as in the paper, with the student in place of the fast EMA
        rows = [int(row) for row in (cond * B).round()]
        return torch.where(per_sample(strength, x) == 0, teacher(x, sigma, cond, strength), student[rows])

    expected = scfm_target(plan, x, cond, near, far, flow_velocity=velocity)
    only_teacher, only_far = Recorder(teacher), Recorder(far)
    target = scfm_target(plan, x, cond, only_teacher, only_far, flow_velocity=velocity, student=student)
    assert torch.equal(target, expected)
    assert [len(x) for x, *_ in only_teacher.calls + only_far.calls] == [plan.is_teacher.sum(), (~plan.is_flow).sum()]


@pytest.mark.parametrize(("is_sharded", "entered"), [(True, 1), (False, 0)])
def test_a_batch_of_self_rows_needs_the_teacher_only_in_a_sharded_run(is_sharded, entered):
    config = PlanConfig(near="student")
    plan = make_plan(config, IDS[~make_plan(config).is_teacher][:5])
    teacher, student = Recorder(lambda x, *_: torch.full_like(x, math.nan)), gaussian(1, rows=5)
    target = scfm_target(
        plan, gaussian(rows=5), None, teacher, lambda x, *_: x.sin(), student=student, is_sharded=is_sharded
    )
    assert len(teacher.calls) == entered
    assert target.isfinite().all()


def test_only_flow_rows_need_no_pass():
    plan = make_plan(PlanConfig(teacher_fraction=0, flow_fraction=1))
    velocity = gaussian(1)
    target = scfm_target(plan, gaussian(), None, no_pass, no_pass, flow_velocity=velocity)
    assert torch.equal(target, velocity)


@pytest.mark.parametrize("flow_fraction", [0.4, 0.6])
def test_flow_rows_need_the_flow_velocity(flow_fraction):
    plan = make_plan(PlanConfig(flow_fraction=flow_fraction))
    with pytest.raises(ValueError, match="for flow-matching rows noise - latents"):
        scfm_target(plan, gaussian(), None, no_pass, no_pass)


@pytest.mark.parametrize(
    "flow_fraction",
    [
        0.0,
        0.5,
        1.0,
    ],
)
def test_the_target_has_no_gradient(flow_fraction):
    plan = make_plan(PlanConfig(teacher_fraction=0, flow_fraction=flow_fraction))
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    x, velocity = gaussian().requires_grad_(), gaussian(1).requires_grad_()
    target = scfm_target(plan, x, None, *[lambda x, *_: weight * x] * 2, flow_velocity=velocity)
    assert not target.requires_grad


@pytest.mark.parametrize("flow_fraction", [0.0, 0.5])
def test_a_student_that_predicts_the_target_has_no_loss(flow_fraction):
    plan = make_plan(PlanConfig(flow_fraction=flow_fraction))
    target = scfm_target(plan, gaussian(), None, *[lambda x, *_: x.sin()] * 2, flow_velocity=gaussian(1))
    assert scfm_loss(target.clone(), target, plan) == 0
    assert scfm_loss(target + 0.5, target, plan) == pytest.approx(0.25)
