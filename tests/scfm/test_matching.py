"""Matching rows: closed forms of their targets, and which rows go through the networks."""

import dataclasses
from typing import Any

import pytest
import torch

from scfm_core.flow.path import euler_step, per_sample
from scfm_core.flow.schedule import shift_sigma
from scfm_core.scfm.draws import LEVELS
from scfm_core.scfm.matching import fake_losses, matching_velocity, student_images
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.plan import SLICES, ShortcutPlan, sample_plan
from scfm_core.scfm.slices import FlowMap, Matching
from scfm_core.scfm.starts import own_starts

SHIFT, GAMMA = 3.0, 0.5


def make_config(fraction: float = 1.0, *, slices: dict[str, Any] | None = None, **settings: Any) -> PlanConfig:
    return PlanConfig(
        teacher_fraction=0.0, matching_fraction=fraction, matching=Matching(**settings), step_gain=StepGain(gamma=GAMMA),
        shift=(SHIFT, SHIFT), **(slices or {}),
    )  # fmt: skip


def make_plan(config: PlanConfig, rows: int = 16, first: int = 0) -> ShortcutPlan:
    return sample_plan(config, torch.arange(first, first + rows), seed=1)


class Rows(list):
    """A conditioning: the numbers of its rows."""

    def __getitem__(self, rows):
        return Rows(rows)


def score_of(mean, deviation=1.0):
    """The velocity of samples from a normal distribution: E[noise - clean | x]."""

    def velocity(x, sigma, cond, strength):
        s = per_sample(sigma, x)
        rest = (x - (1 - s) * mean) / (((1 - s) * deviation) ** 2 + s**2)
        return s * rest - (mean + (1 - s) * deviation**2 * rest)

    return velocity


def target_of(plan, x, prediction, real, fake, known=None):
    images, cond = student_images(plan, x, prediction), Rows(range(len(plan)))
    return matching_velocity(plan, images, prediction, (real, cond), (fake, cond), 0, known)


def test_equal_scores_give_no_gradient():
    """Exactly none: the target is the prediction, bit by bit."""
    x, prediction = torch.randn(2, 16, 3)
    plan = make_plan(make_config())
    assert torch.equal(target_of(plan, x, prediction, score_of(0.5), score_of(0.5)), prediction)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_gradient_is_that_of_dmd(weight):
    """Of its loss 0.5 |y - (y - gradient)|^2, times twice the weight."""
    plan = make_plan(make_config(weight=weight))
    x, scale = torch.randn(16, 3), torch.tensor(0.7, requires_grad=True)
    real, fake, seen = score_of(1.0), score_of(-0.5, deviation=0.5), []

    def kept(x, sigma, cond, strength):
        seen.append((x, sigma))
        assert not strength.any(), "the teacher"
        return real(x, sigma, cond, strength)

    target = target_of(plan, x, scale * x, kept, fake)
    (ours,) = torch.autograd.grad((scale * x - target).square().mean(), scale)
    [(noised, level)] = seen
    assert torch.equal(level, plan.level) and not target.requires_grad
    image = euler_step(x, scale * x, plan.sigma_start)
    real_image, fake_image = (euler_step(noised, score(noised, level, None, None), level) for score in (real, fake))
    gradient = (image - real_image) - (image - fake_image)
    gradient = (gradient / (image - real_image).abs().mean(1, keepdim=True)).detach()
    (theirs,) = torch.autograd.grad(0.5 * (image - (image - gradient).detach()).square().mean(), scale)
    torch.testing.assert_close(ours, 2 * weight * theirs)


def test_images_of_one_normal_distribution_move_to_another():
    """A student whose images are normal with a learned mean, and the exact score of its images: it ends at the teacher's mean."""
    mean = torch.zeros(2)
    wanted = torch.tensor([1.5, -1.0])
    for step in range(100):
        plan = make_plan(
            make_config(weight=1.0, whole_fraction=1.0, slices={"sigma_max": 1.0}), rows=64, first=64 * step
        )
        x = torch.randn(64, 2, generator=torch.Generator().manual_seed(step))
        target = target_of(plan, x, -mean.expand(64, 2), score_of(wanted), score_of(mean))
        mean = mean - 0.1 * (target + mean).mean(0)  # the images are x + mean: noise of deviation 1, moved
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.01)


def test_the_fake_score_learns_the_students_images():
    """Its loss is that of plain flow matching on them: least at their own score, with a gradient, at levels of its own."""
    plan = make_plan(make_config(slices={"sigma_max": 1.0}), rows=4000)
    x, bias = torch.randn(4000, 2), torch.zeros(2, requires_grad=True)
    images = student_images(plan, x, torch.zeros(4000, 2))
    assert not torch.equal(images.level, images.fake_level)
    losses = {}
    for mean in (-1.0, 0.0, 1.0):
        score = score_of(mean)
        fake = (lambda x, *rest, score=score: score(x, *rest) + bias), Rows(range(4000))
        found = fake_losses(images, fake, seed=0)
        assert found.shape == (4000,)
        losses[mean] = found.mean()
    assert losses[0.0] < min(losses[-1.0], losses[1.0])
    (gradient,) = torch.autograd.grad(losses[0.0], bias)
    assert gradient.abs().max() < 0.1


def test_rows_jump_to_the_image():
    plan = make_plan(make_config(whole_fraction=0.25, shortest=1 / 8), rows=20_000)
    length, u = plan.step_size, plan.u_start
    assert torch.equal(length, u) and not plan.sigma_end.any()
    assert (length == 1).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert length.min() >= 1 / 8 and set(plan.moved_rows) == set((length < 1).nonzero()[:, 0].tolist())
    torch.testing.assert_close(plan.student_strength, length**GAMMA)
    torch.testing.assert_close(plan.sigma_start, shift_sigma(length, SHIFT).clamp(max=plan.config.sigma_max))
    for level in (plan.level, plan.fake_level):
        assert LEVELS[0] <= level.min() < 0.03 and 0.97 < level.max() <= LEVELS[1]
        u = (level / (SHIFT - (SHIFT - 1) * level)).sort().values
        torch.testing.assert_close(u, torch.linspace(0, 1, len(u)), rtol=0, atol=0.06)  # but for the limits


def test_other_rows_are_the_same_as_without_matching_rows():
    slices = {"flow_fraction": 0.2, "trajectory_fraction": 0.1, "flow_map_fraction": 0.1}
    without, plan = (make_plan(make_config(share, slices=slices), 4000) for share in (0.0, 0.2))
    rows = plan.is_matching
    assert rows.double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert plan.matching_rows == rows.nonzero()[:, 0].tolist()
    assert (plan.slice_number[rows] == SLICES.index("matching")).all()
    for name, value in vars(plan).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[~rows], getattr(without, name)[~rows]), name


def test_a_start_is_where_one_jump_of_the_student_ends():
    """Also beside flow-map rows that start on noised data."""
    config = make_config(0.5, slices={"flow_map_fraction": 0.5, "flow_map": FlowMap(starts="data", noise_fraction=0.0)})
    plan, noise = make_plan(config), torch.randn(16, 2)

    def student(x, sigma, cond, strength):
        rows = list(cond)
        torch.testing.assert_close(strength, (1 - plan.u_start[rows]) ** GAMMA)
        return 2 * x

    start = own_starts(plan, torch.zeros(16, 2), noise, Rows(range(16)), student)
    moved = noise * (1 - 2 * (config.sigma_max - plan.sigma_start))[:, None]
    torch.testing.assert_close(start, torch.where(plan.is_matching[:, None], moved, 0.0))


@pytest.mark.parametrize("fraction", [0.5, 1e-9], ids=["some rows", "none in this batch"])
def test_only_matching_rows_go_through_the_networks(fraction):
    """Without one, row 0 stands for them, so that every process enters the networks equally often, and its result is not used."""
    plan, entered = make_plan(make_config(fraction)), []

    def score(x, sigma, cond, strength):
        assert len(x) == len(sigma) == len(cond) == len(strength) and not torch.is_grad_enabled()
        entered.append(list(cond))
        return x

    known, prediction = torch.full((16, 2), 7.0), torch.ones(16, 2, requires_grad=True)
    target = target_of(plan, torch.zeros(16, 2), prediction, score, score, known)
    rows = plan.matching_rows
    assert bool(rows) == (fraction == 0.5)
    assert entered == [rows or [0]] * 2
    assert student_images(plan, torch.zeros(16, 2), prediction).share == len(rows) / 16
    others = [row for row in range(16) if row not in rows]
    assert (target[others] == 7).all() and not target.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_gain": None}, "method.matching_fraction needs method.step_gain"),
        ({"matching_fraction": 0.0}, "method.matching has no effect without matching rows"),
        ({"flow_fraction": 0.5}, r"method.flow_fraction \+ method.matching_fraction must be at most 1, got 0.5 \+ 1.0"),
        ({"distil_guidance": True}, "pairs, flow-map or matching rows would learn guidance and shortcuts at once"),
        ({"matching": {"weight": 0.0}}, "method.matching.weight must be positive and finite, got 0.0"),
        ({"matching": {"fake_lr": -1.0}}, "method.matching.fake_lr must be positive and finite, got -1.0"),
        ({"matching": {"guidance_share": 1.5}}, r"method.matching.guidance_share must be in \[0, 1\], got 1.5"),
        ({"matching": {"shortest": 0.0}}, r"method.matching.shortest must be in \[0.0001, 1\], got 0.0"),
        ({"matching": {"every": 0}}, "method.matching.every must be at least 1, got 0"),
        ({"matching": {"warmup": -1}}, "method.matching.warmup must be at least 0, got -1"),
    ],
    ids=str,
)
def test_invalid_settings_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        settings = change.get("matching", {"whole_fraction": 0.5})
        dataclasses.replace(make_config(), **{**change, "matching": Matching(**settings)})


def test_the_student_learns_in_every_kth_step_after_the_warm_up():
    settings = Matching(every=3, warmup=2)
    assert [step for step in range(12) if settings.teaches_student(step)] == [4, 7, 10]
    assert all(Matching().teaches_student(step) for step in range(3))


@pytest.mark.parametrize(
    ("settings", "one_pass", "two_passes"),
    [
        ({"whole_fraction": 1.0}, 2, 3),
        ({"whole_fraction": 0.5}, 2.5, 4),
        ({"whole_fraction": 1.0, "guidance_share": 0.0}, 2, 2),
        ({"whole_fraction": 0.5, "every": 4}, 1, 1.75),
    ],
)
def test_passes(settings, one_pass, two_passes):
    config = make_config(**settings)
    assert config.passes(1) == (1, one_pass) and config.passes(2) == (2, two_passes)
    assert config.is_student_first and config.has_teacher and not config.has_pairs and not config.has_self
