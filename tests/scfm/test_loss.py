"""The loss, and its means by slice and by sigma."""

import math

import pytest
import torch
from torch import Tensor

from scfm_core.scfm.loss import scfm_loss
from scfm_core.scfm.meter import LossMeter
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.plan import ShortcutPlan, sample_plan

B = 96
ALL_SLICES = PlanConfig(flow_fraction=0.3)


def make_plan(config: PlanConfig = ALL_SLICES, ids: Tensor | None = None) -> ShortcutPlan:
    return sample_plan(config, torch.arange(B) if ids is None else ids, seed=0)


def prediction_and_target(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    prediction, target = torch.randn(2, B, 3, 4, generator=torch.Generator().manual_seed(0))
    return prediction.to(dtype), target


def expected_means(prediction: Tensor, target: Tensor, plan: ShortcutPlan) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in range(len(plan)):
        loss = (prediction[row].double() - target[row].double()).square().mean().item()
        name = "flow" if plan.is_flow[row] else "teacher" if plan.is_teacher[row] else "self"
        low = min(int(4 * plan.sigma_start[row].item()), 3) / 4
        for key in ("loss", f"loss/{name}", f"loss/sigma_{low:.2f}-{low + 0.25:.2f}"):
            groups.setdefault(key, []).append(loss)
    return {key: sum(losses) / len(losses) for key, losses in groups.items()}


def means_of(*parts: tuple[Tensor, Tensor, ShortcutPlan]) -> dict[str, float]:
    meter = LossMeter("cpu")
    for prediction, target, plan in parts:
        meter.add(prediction, target, plan)
    return meter.compute()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_squared_error_in_fp32(dtype):
    prediction, target = prediction_and_target(dtype)
    loss = scfm_loss(prediction, target, make_plan())
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert loss.item() == pytest.approx(
        ((prediction.double() - target.double()) ** 2).sum().item() / (B * 12), rel=1e-6
    )


def test_the_student_gets_the_gradient_of_the_mean():
    prediction, target = prediction_and_target()
    prediction.requires_grad_()
    scfm_loss(prediction, target, make_plan()).backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - target).detach() / target.numel())


@pytest.mark.parametrize(
    ("prediction", "target", "rows"),
    [((4, 3), (4, 1), 4), ((4, 3), (3,), 4), ((4, 3), (4, 3), 3)],
    ids=["prediction broadcasts", "target broadcasts", "plan of another batch"],
)
def test_shapes_that_would_broadcast_are_errors(prediction, target, rows):
    with pytest.raises(ValueError, match=rf"a plan of {rows} rows differ"):
        scfm_loss(torch.zeros(prediction), torch.zeros(target), make_plan(ids=torch.arange(rows)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meter_splits_the_loss_by_slice_and_sigma(dtype):
    prediction, target = prediction_and_target(dtype)
    plan = make_plan()
    expected = expected_means(prediction, target, plan)
    assert len(expected) == 1 + 3 + 4
    measured = means_of((prediction, target, plan))
    assert measured == pytest.approx(expected, rel=1e-6)
    assert measured["loss"] == pytest.approx(scfm_loss(prediction, target, plan).item(), rel=1e-6)


def test_meter_does_not_depend_on_the_micro_batches():
    prediction, target = prediction_and_target()
    pieces = [1, 20, B - 21]
    ids = torch.arange(B).split(pieces)
    parts = zip(prediction.split(pieces), target.split(pieces), [make_plan(ids=i) for i in ids], strict=True)
    assert means_of(*parts) == pytest.approx(means_of((prediction, target, make_plan())), rel=1e-12)


def test_meter_omits_slices_and_bins_without_samples():
    plan = make_plan(PlanConfig(teacher_fraction=0))
    [row] = ((plan.sigma_start > 0.5) & (plan.sigma_start < 0.75)).nonzero()[0]
    plan = make_plan(PlanConfig(teacher_fraction=0), plan.sample_ids[row : row + 1])
    means = means_of((torch.ones(1, 2), torch.zeros(1, 2), plan))
    assert means == {"loss": 1.0, "loss/self": 1.0, "loss/sigma_0.50-0.75": 1.0}


def test_sigma_1_is_in_the_last_bin():
    plan = make_plan(PlanConfig(teacher_fraction=0, self_grids=(2,), sigma_max=1.0))
    assert set(plan.sigma_start.tolist()) == {1.0}
    means = means_of((torch.ones(B, 2), torch.zeros(B, 2), plan))
    assert means == {"loss": 1.0, "loss/self": 1.0, "loss/sigma_0.75-1.00": 1.0}


def test_meter_keeps_no_graph():
    prediction, target = prediction_and_target()
    meter = LossMeter("cpu")
    meter.add(prediction.requires_grad_(), target, make_plan())
    assert not meter.sums.requires_grad


def test_spikes_are_looked_for_without_matching_rows():
    """Their loss is no measure of progress; but a loss that is not finite counts on every row."""
    plan = make_plan(PlanConfig(matching_fraction=0.3, step_gain=StepGain()))
    prediction, target = prediction_and_target()
    target[plan.is_matching] = 1e3
    meter = LossMeter("cpu")
    meter.add(prediction, target, plan)
    meter.add_fake(torch.full((5,), 1e6))
    rows = ~plan.is_matching
    assert meter.regression() == pytest.approx((prediction - target)[rows].square().mean().item())
    means = meter.compute()
    assert means["loss/fake"] == 1e6 and means["loss"] == pytest.approx((prediction - target).square().mean().item())
    assert means["loss/matching"] > 1e5
    assert [row for row, _ in meter.by_sample()] == plan.sample_ids[rows].tolist()
    prediction[plan.matching_rows[0]] = math.nan
    meter.add(prediction, target, plan)
    assert math.isnan(meter.regression())
    assert plan.matching_rows[0] in {row for row, _ in meter.by_sample()}


def test_matching_rows_alone_cannot_be_compared():
    plan = make_plan(PlanConfig(matching_fraction=1.0, teacher_fraction=0.0, step_gain=StepGain()))
    meter = LossMeter("cpu")
    meter.add(*prediction_and_target(), plan)
    assert meter.regression() is None
