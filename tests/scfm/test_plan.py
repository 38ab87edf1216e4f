"""The plan: draws of slices, grids, sigmas, strengths and guidance."""

import dataclasses
import math
from functools import cache

import pytest
import torch
from torch import Tensor

from scfm_core.flow.random import Stream, uniform
from scfm_core.flow.schedule import dynamic_shift, sigma_grid
from scfm_core.scfm import plan as plan_module
from scfm_core.scfm.method import PlanConfig, StepGain, sampling_strength
from scfm_core.scfm.plan import ShortcutPlan, sample_plan
from scfm_core.scfm.slices import MODE_LIMIT, FlowSigma

N = 20_000
CHI_SQUARE = {1: 10.8, 2: 13.8, 3: 16.3, 7: 24.3, 15: 37.7}  # p = 0.001, by degrees of freedom


@cache
def draw(config: PlanConfig = PlanConfig()) -> ShortcutPlan:  # noqa: B008 (frozen)
    return sample_plan(config, torch.arange(N), seed=0, dynamic_shift=flux_shift)


def flux_shift(num_steps: int) -> float:
    """Flux's shift for 256 tokens, which does not depend on the number of steps."""
    return dynamic_shift(256, ((256, 0.5), (4096, 1.15)))


def tensors(plan: ShortcutPlan) -> dict[str, Tensor]:
    """The plan's tensors of shape [B], by name."""
    fields = ((field.name, getattr(plan, field.name)) for field in dataclasses.fields(plan))
    return {name: value for name, value in fields if isinstance(value, Tensor)}


def assert_share(mask: Tensor, probability: float) -> None:
    """The mask's mean is within four standard errors of a binomial; exact at 0 and 1."""
    error = (probability * (1 - probability) / len(mask)) ** 0.5
    assert abs(mask.double().mean().item() - probability) <= 4 * error


def assert_uniform(values: Tensor, support: list[int]) -> None:
    """A chi-square test."""
    counts = torch.stack([(values == value).sum() for value in support]).double()
    assert counts.sum() == len(values), "values outside the support"
    expected = len(values) / len(support)
    assert (counts - expected).square().sum() / expected < CHI_SQUARE[len(support) - 1]


def unshift(sigma: Tensor, shift: Tensor) -> Tensor:
    sigma, shift = sigma.double(), shift.double()
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.parametrize(
    ("teacher", "flow"), [(0.4, 0.0), (0.4, 0.25), (0.4, 0.6), (0.0, 0.0), (1.0, 0.0), (0.0, 0.75), (0.0, 1.0)]
)
def test_slices_have_their_fractions(teacher, flow):
    plan = draw(PlanConfig(teacher_fraction=teacher, flow_fraction=flow))
    assert_share(plan.is_teacher, teacher)
    assert_share(plan.is_flow, flow)
    assert not (plan.is_teacher & plan.is_flow).any()
    assert plan.pair_rows == (~plan.is_flow).nonzero().flatten().tolist()
    assert plan.teacher_rows == plan.is_teacher.nonzero().flatten().tolist()
    assert torch.equal(plan.slice_number, torch.where(plan.is_flow, 2, torch.where(plan.is_teacher, 0, 1)))


@pytest.mark.parametrize("flow", [0.0, 0.25])
def test_self_slice_grids_are_drawn_uniformly(flow):
    plan = draw(PlanConfig(flow_fraction=flow))
    assert_uniform(plan.grid[~plan.is_teacher & ~plan.is_flow], [16, 8, 4])
    assert set(plan.grid[plan.is_teacher].tolist()) == {32}
    assert set(plan.grid[plan.is_flow].tolist()) <= {0}


def test_pairs_start_at_even_points_drawn_uniformly():
    plan = draw()
    for grid in (32, 16, 8, 4):
        rows = plan.grid == grid
        points = [
            grid * (1 - unshift(sigma[rows], plan.shift[rows]))
            for sigma in (plan.sigma_start, plan.sigma_mid, plan.sigma_end)
        ]
        k = points[0].round()
        # The clamp of the first point moves it by up to 32 * 4.5 * 1e-5 of an interval.
        torch.testing.assert_close(points[0], k, atol=2e-3, rtol=0)
        torch.testing.assert_close(points[1], k + 1, atol=1e-4, rtol=0)
        torch.testing.assert_close(points[2], k + 2, atol=1e-4, rtol=0)
        assert_uniform(k, list(range(0, grid, 2)))


@pytest.mark.parametrize("grid", [2, 12, 32])
def test_pairs_are_on_the_grid_of_samplers(grid):
    plan = draw(PlanConfig(teacher_fraction=0, self_grids=(grid,), shift=(3.0, 3.0), sigma_max=1.0))
    points = sigma_grid(grid, 3.0)
    for offset, sigma in enumerate((plan.sigma_start, plan.sigma_mid, plan.sigma_end)):
        expected = points[offset : grid - 1 + offset : 2].flip(0)
        torch.testing.assert_close(sigma.unique(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("flow", [0.0, 0.25])
def test_sigmas_decrease_on_pairs_and_are_equal_on_flow_rows(flow):
    plan = draw(PlanConfig(flow_fraction=flow))
    assert torch.equal(plan.sigma_start > plan.sigma_mid, ~plan.is_flow)
    assert torch.equal(plan.sigma_mid > plan.sigma_end, ~plan.is_flow)
    assert torch.equal(plan.sigma_start == plan.sigma_end, plan.is_flow)
    assert plan.sigma_end.min() >= 0


def test_the_first_point_is_clamped():
    plan = draw()
    clamped = plan.sigma_start == torch.tensor(1 - 1e-5)
    assert plan.sigma_start[clamped].max() == plan.sigma_start.max() < 1
    assert torch.equal(clamped, unshift(plan.sigma_start, plan.shift) > 1 - 1e-4)
    assert clamped.any()
    assert draw(PlanConfig(sigma_max=1.0)).sigma_start.max() == 1


def test_flow_rows_have_a_uniform_sigma_before_the_shift():
    plan = draw(PlanConfig(teacher_fraction=0, flow_fraction=1))
    u = unshift(plan.sigma_start, plan.shift)
    assert_uniform((u * 8).long(), list(range(8)))


@pytest.mark.parametrize("name", ["shift", "guidance"])
@pytest.mark.parametrize("limits", [None, (1.0, 3.0)], ids=["default", "given"])
def test_ranges_are_drawn_uniformly(name, limits):
    plan = draw(PlanConfig(**({name: limits} if limits else {})))
    low, high = limits or {"shift": (2.5, 4.5), "guidance": (0.0, 8.0)}[name]
    values = getattr(plan, name)
    assert values.min() >= low
    assert values.max() <= high
    assert_uniform(((values - low) / (high - low) * 16).long().clamp(max=15), list(range(16)))


@pytest.mark.parametrize("name", ["shift", "guidance"])
def test_equal_ends_fix_a_range(name):
    assert set(getattr(draw(PlanConfig(**{name: (3.5, 3.5)})), name).tolist()) == {3.5}


def test_some_samples_use_the_dynamic_shift():
    plan = draw(PlanConfig(dynamic_shift_fraction=0.1))
    dynamic = plan.shift == torch.tensor(dynamic_shift(256, ((256, 0.5), (4096, 1.15))))  # 1.65, outside of the range
    assert_share(dynamic, 0.1)
    assert_share(dynamic[plan.is_teacher], 0.1)
    assert plan.shift[~dynamic].min() >= 2.5


def test_a_dynamic_shift_is_that_of_the_rows_own_step_count():
    config = PlanConfig(
        dynamic_shift_fraction=1.0, teacher_fraction=0.3, flow_fraction=0.2, trajectory_fraction=0.2, teacher_grid=32
    )
    plan = sample_plan(config, torch.arange(N), seed=0, dynamic_shift=lambda num_steps: 2 + num_steps / 64)
    steps = torch.where(plan.is_flow, 32, plan.grid)  # of a sampler with the teacher's steps
    assert set(steps.tolist()) == {32, 16, 8, 4, *config.trajectory_grids}
    assert torch.equal(plan.shift, 2 + steps / 64)


def test_a_dynamic_shift_changes_no_other_draw():
    fixed, some = (tensors(draw(PlanConfig(flow_fraction=0.2, dynamic_shift_fraction=share))) for share in (0, 0.5))
    rows = some["shift"] == fixed["shift"]
    assert_share(rows, 0.5)
    of_shift = ("shift", "sigma_start", "sigma_mid", "sigma_end", "level", "fake_level")
    for name, values in some.items():
        rows_of = slice(None) if name not in of_shift else rows
        assert torch.equal(values[rows_of], fixed[name][rows_of]), name


def test_dynamic_shift_needs_a_function():
    with pytest.raises(ValueError, match="needs dynamic_shift"):
        sample_plan(PlanConfig(dynamic_shift_fraction=0.1), torch.arange(2), 0)


def test_every_dynamic_shift_must_leave_pairs_a_length():
    with pytest.raises(ValueError, match=r"at shift 10000 .* reaches sigma_max"):
        sample_plan(
            PlanConfig(dynamic_shift_fraction=0.1), torch.arange(2), 0, dynamic_shift=lambda n: 1e4 if n == 4 else 3.0
        )


FLOW_ONLY = {"teacher_fraction": 0.0, "flow_fraction": 1.0, "shift": (1.0, 1.0), "sigma_max": 1.0}


def test_the_uniform_density_is_the_draw_itself():
    plan, draws = draw(PlanConfig(**FLOW_ONLY)), uniform(0, torch.arange(N), Stream.PLAN, 7)
    assert torch.equal(plan.sigma_start, draws[:, 6].float())


@pytest.mark.parametrize("density", [FlowSigma(), FlowSigma(density="logit_normal"), FlowSigma(density="mode")])
def test_densities_of_sigma_by_their_quantiles(density):
    """The share of rows below the quantile of p is p, and shift acts after the density."""
    plan = draw(PlanConfig(**FLOW_ONLY | {"shift": (3.0, 3.0)}, flow_sigma=density))
    for p in (0.02, 0.25, 0.5, 0.9):
        u = density.quantile(torch.tensor(p, dtype=torch.float64))
        assert_share(plan.sigma_start.double() < 3 * u / (1 + 2 * u), p)


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 2.0)])
def test_the_logit_of_a_logit_normal_sigma_is_normal(location, scale):
    density = FlowSigma(density="logit_normal", location=location, scale=scale)
    logits = torch.logit(draw(PlanConfig(**FLOW_ONLY, flow_sigma=density)).sigma_start.double())
    assert abs(logits.mean().item() - location) < 4 * scale / N**0.5
    assert abs(logits.std().item() - scale) < 4 * scale / (2 * N) ** 0.5
    within = torch.special.erf(torch.tensor(1 / math.sqrt(2))).item()  # one standard deviation: 68.3 %
    assert_share((logits - location).abs() < scale, within)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29, MODE_LIMIT])
def test_mode_density_is_the_papers_function(scale):
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)
    quantile = FlowSigma(density="mode", mode_scale=scale).quantile(p)
    u = 1 - p
    paper = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(quantile, paper, rtol=0, atol=1e-14)
    assert (quantile.diff() > -1e-15).all() and quantile[0] == 0 and abs(quantile[-1].item() - 1) < 1e-15
    # d(sigma)/dp is 1 / density: at 1/2 and at the ends it is known.
    slope = quantile.diff() / p.diff()
    assert slope[500].item() == pytest.approx(1 + scale - scale * math.pi / 2, abs=1e-5)
    assert slope[0].item() == pytest.approx(1 + scale, abs=0.01)


@pytest.mark.parametrize("density", [FlowSigma(density="logit_normal", scale=0.7), FlowSigma(density="mode")])
def test_densities_are_symmetric_and_prefer_the_middle(density):
    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(density.quantile(p), 1 - density.quantile(1 - p), rtol=0, atol=1e-14)
    low, high = density.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    assert 0.25 < low < 0.5 < high < 0.75


def test_the_density_of_sigma_changes_flow_rows_only():
    uniform_plan = tensors(draw(PlanConfig(flow_fraction=0.3)))
    plan = tensors(draw(PlanConfig(flow_fraction=0.3, flow_sigma=FlowSigma(density="mode"))))
    pairs = ~plan["is_flow"]
    for name, values in plan.items():
        rows = pairs if name.startswith("sigma_") else slice(None)
        assert torch.equal(values[rows], uniform_plan[name][rows]), name
    assert not torch.equal(plan["sigma_start"][~pairs], uniform_plan["sigma_start"][~pairs])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"location": 0.5}, "flow_sigma.location has no effect with method.flow_sigma.density=uniform"),
        ({"density": "mode", "scale": 2.0}, "flow_sigma.scale has no effect with method.flow_sigma.density=mode"),
        ({"density": "logit_normal", "mode_scale": 0.5}, "flow_sigma.mode_scale has no effect"),
        ({"density": "logit_normal", "scale": 0.0}, "flow_sigma.scale must be positive and finite, got 0.0"),
        ({"density": "logit_normal", "location": math.inf}, "flow_sigma.location must be finite, got inf"),
        ({"density": "mode", "mode_scale": 1.76}, r"flow_sigma.mode_scale must be in \[-1, 1.7519\], got 1.76"),
        ({"density": "mode", "mode_scale": -1.1}, r"flow_sigma.mode_scale must be in \[-1, 1.7519\], got -1.1"),
    ],
    ids=str,
)
def test_invalid_densities_are_errors(keys, message):
    with pytest.raises(ValueError, match=message):
        FlowSigma(**keys)


def test_a_density_without_flow_rows_is_an_error():
    with pytest.raises(ValueError, match=r"method.flow_sigma.density=mode has no effect without flow-matching rows"):
        PlanConfig(flow_sigma=FlowSigma(density="mode"))


def test_draws_are_independent():
    # If one column of draws was used twice, two of these would be correlated. The middle of a pair is 1/2 on average on any grid.
    for config, names in [
        (PlanConfig(), ["u_mid", "shift", "guidance", "is_teacher"]),
        (PlanConfig(teacher_fraction=0), ["u_mid", "shift", "guidance", "grid"]),
        (PlanConfig(dynamic_shift_fraction=0.5), ["u_mid", "shift", "guidance", "is_teacher"]),
        (PlanConfig(teacher_fraction=0, flow_fraction=1), ["u_mid", "shift", "guidance"]),
    ]:
        plan = draw(config)
        values = {**tensors(plan), "u_mid": unshift(plan.sigma_mid, plan.shift)}
        correlation = torch.corrcoef(torch.stack([values[name].double() for name in names]))
        assert (correlation - torch.eye(len(names))).abs().max() < 4 / N**0.5, names


def test_columns_of_draws_keep_their_order():
    # Another order would change the plans of all runs that resume.
    plan, draws = draw(), uniform(0, torch.arange(N), Stream.PLAN, 7)
    assert torch.equal(plan.is_teacher, draws[:, 0] < 0.4)
    assert torch.equal(plan.shift, (2.5 + 2 * draws[:, 3]).float())
    assert torch.equal(plan.guidance, (8 * draws[:, 5]).float())


def test_strengths_are_1_and_that_of_the_teacher_is_0():
    plan = draw(PlanConfig(flow_fraction=0.25))
    assert torch.equal(plan.near_strength, (~plan.is_teacher).float())
    assert set(plan.student_strength.tolist()) == set(plan.far_strength.tolist()) == {1.0}


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_step_gain_scales_strengths_with_the_jump(gamma):
    plan = draw(PlanConfig(flow_fraction=0.25, step_gain=StepGain(gamma=gamma)))
    for grid in (32, 16, 8, 4):
        rows = plan.grid == grid
        assert set(plan.student_strength[rows].tolist()) == {torch.tensor((2 / grid) ** gamma).item()}
        assert set(plan.far_strength[rows].tolist()) == {torch.tensor((1 / grid) ** gamma).item()}
        near = {0.0} if grid == 32 else {torch.tensor((1 / grid) ** gamma).item()}
        assert set(plan.near_strength[rows].tolist()) == near
    # Flow-matching rows have the strength of a sampler with the teacher's 32 steps.
    assert set(plan.student_strength[plan.is_flow].tolist()) == {torch.tensor((1 / 32) ** gamma).item()}


@pytest.mark.parametrize(
    ("num_steps", "strength"), [(1, 1.0), (3, 1 / math.sqrt(3)), (4, 0.5), (8, 1 / math.sqrt(8)), (16, 0.25)]
)
def test_sampling_strength(num_steps, strength):
    assert sampling_strength(StepGain(), num_steps) == pytest.approx(strength, rel=1e-12)
    assert sampling_strength(None, num_steps) == 1


@pytest.mark.parametrize("num_steps", [2, 4, 8])
def test_samplers_use_the_trained_strength(num_steps):
    plan = draw(PlanConfig(step_gain=StepGain()))
    trained = plan.student_strength[plan.grid == 2 * num_steps]
    torch.testing.assert_close(trained, torch.full_like(trained, sampling_strength(StepGain(), num_steps)))


ALL_FEATURES = PlanConfig(flow_fraction=0.25, dynamic_shift_fraction=0.2, step_gain=StepGain())


def test_a_row_is_independent_of_the_other_rows():
    whole = tensors(draw(ALL_FEATURES))
    ids = torch.cat([torch.arange(N - 1, 40, -7), torch.arange(3), torch.tensor([N - 1])])
    for part in ids.split([1, 1000, len(ids) - 1001]):
        plan = tensors(sample_plan(ALL_FEATURES, part, seed=0, dynamic_shift=flux_shift))
        for name, values in plan.items():
            assert torch.equal(values, whole[name][part]), name


def test_another_seed_draws_another_plan():
    ids = torch.arange(64)
    one, other = (sample_plan(PlanConfig(), ids, seed) for seed in (0, 1))
    assert not (one.shift == other.shift).any()


def test_a_plan_is_1d_and_its_floats_are_fp32():
    plan = draw(ALL_FEATURES)
    assert len(plan) == N
    for name, values in tensors(plan).items():
        assert values.shape == (N,), name
        assert values.dtype == dict.fromkeys(("sample_ids", "grid", "interval", "slice_number"), torch.int64).get(
            name, torch.bool if name.startswith("is_") else torch.float32
        ), name


def test_a_plan_moves_to_a_device_in_one_copy(monkeypatch):
    plan, copied = draw(ALL_FEATURES), []
    monkeypatch.setattr(plan_module, "to_device", lambda tensor, device: copied.append(tensor) or tensor.clone())
    moved = plan.to("cpu")
    assert len(copied) == 1
    for name, values in tensors(plan).items():
        assert torch.equal(tensors(moved)[name], values), name
        assert tensors(moved)[name].dtype == values.dtype
    assert (moved.config, moved.pair_rows) == (plan.config, plan.pair_rows)


def test_strengths_may_stay_on_the_host():
    moved = draw(ALL_FEATURES).to("meta", with_strengths=False)
    places = {name: values.device.type for name, values in tensors(moved).items()}
    on_host = {"student_strength", "near_strength", "far_strength"}
    assert places == {name: "cpu" if name in on_host else "meta" for name in places}


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_fraction": 1.0},
        {"teacher_fraction": 0.4, "flow_fraction": 0.6},
        {"teacher_fraction": 0.0, "flow_fraction": 1.0},
        {"teacher_grid": 2, "self_grids": (2,)},
        {"shift": (1.0, 1.0), "guidance": (0.0, 0.0)},
        {"sigma_max": 1.0},
    ],
    ids=str,
)
def test_limits_are_valid(change):
    PlanConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_fraction": -0.1}, r"method.teacher_fraction must be in \[0, 1\], got -0.1"),
        ({"teacher_fraction": math.nan}, r"method.teacher_fraction must be in \[0, 1\], got nan"),
        ({"flow_fraction": 1.1}, r"method.flow_fraction must be in \[0, 1\], got 1.1"),
        ({"dynamic_shift_fraction": 2}, r"method.dynamic_shift_fraction must be in \[0, 1\], got 2"),
        ({"flow_fraction": 0.7}, r"at most 1, got 0.4 \+ 0.7"),
        ({"teacher_grid": 31}, r"method.teacher_grid needs even step counts .* got \(31,\)"),
        ({"teacher_grid": 0}, r"method.teacher_grid needs even"),
        ({"self_grids": ()}, r"method.self_grids needs even"),
        ({"self_grids": (8, 3)}, r"method.self_grids needs even step counts .* got \(8, 3\)"),
        ({"self_grids": (8, -2)}, r"method.self_grids needs even"),
        ({"shift": (4.5, 2.5)}, r"method.shift must be \[low, high\].* got \[4.5, 2.5\]"),
        ({"shift": (0.0, 2.5)}, r"method.shift must be"),
        ({"shift": (math.nan, 2.5)}, r"method.shift must be"),
        ({"guidance": (-1.0, 2.0)}, r"method.guidance must be"),
        ({"guidance": (2.0, 1.0)}, r"method.guidance must be"),
        ({"sigma_max": 1.1}, r"method.sigma_max must be in \(0.9, 1\], got 1.1"),
        ({"sigma_max": 0.9}, r"method.sigma_max must be"),
        ({"sigma_max": 0.95}, r"second point, 0.99\d+, reaches sigma_max 0.95"),  # 0/0 in the target
        ({"shift": (1e4, 1e4)}, r"at shift 10000 .* reaches sigma_max"),
        ({"shift": (2.5, math.inf)}, r"method.shift must be"),
        ({"guidance": (0.0, math.inf)}, r"method.guidance must be"),
        (
            {"near": "student", "step_gain": StepGain()},
            r"method.near=student .* with method.step_gain a near pass jumps half",
        ),
        ({"near": "student", "step_embedding": True, "teacher_fraction": 0}, r"with method.step_embedding a near pass"),
        ({"near": "student", "flow_fraction": 0.6}, r"method.near=student has no effect: there are no self rows"),
    ],
    ids=str,
)
def test_invalid_configurations_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**change)


@pytest.mark.parametrize("gamma", [0.0, -1.0, 4.1, math.nan])
def test_invalid_gammas_are_errors(gamma):
    with pytest.raises(ValueError, match=r"step_gain.gamma must be in \(0, 4\]"):
        StepGain(gamma=gamma)


def test_the_step_size_is_the_fraction_of_the_grid_that_the_student_jumps():
    plan = draw(PlanConfig(step_embedding=True, teacher_fraction=0.0, flow_fraction=0.3, teacher_grid=64))
    torch.testing.assert_close(plan.step_size[plan.is_flow], torch.full((int(plan.is_flow.sum()),), 1 / 64))
    pairs = ~plan.is_flow
    torch.testing.assert_close(plan.step_size[pairs], 2 / plan.grid[pairs].float())
    assert torch.equal(plan.student_strength, torch.ones(N))


def test_captions_are_dropped_independently_except_on_trajectory_rows():
    config = PlanConfig(teacher_fraction=0.3, flow_fraction=0.3, trajectory_fraction=0.2, caption_dropout=0.1)
    plan = draw(config)
    assert not (plan.is_dropped & plan.is_trajectory).any()
    for rows in (plan.is_flow, plan.is_teacher):
        assert_share(plan.is_dropped[rows], 0.1)
    without = draw(dataclasses.replace(config, caption_dropout=0.0))
    assert not without.is_dropped.any()
    others = {name: value for name, value in tensors(without).items() if name != "is_dropped"}
    assert len(others) == 22 and all(torch.equal(value, tensors(plan)[name]) for name, value in others.items())


@pytest.mark.parametrize(
    ("change", "student", "target"),
    [
        ({}, 2, 4),  # near and far, guided
        ({"near": "student"}, 2, 2.8),  # no near pass on 60 % of the rows
        ({"teacher_fraction": 0.0, "flow_fraction": 0.75, "near": "student"}, 2, 0.5),
        ({"teacher_fraction": 0.0, "flow_fraction": 0.75}, 2, 1),
        ({"teacher_fraction": 0.0, "flow_fraction": 1.0}, 1, 0),  # the data's velocity is not guided
        ({"teacher_fraction": 0.0, "trajectory_fraction": 1.0}, 2, 0),
        ({"teacher_fraction": 0.0, "trajectory_fraction": 0.25, "trajectory_steps": 12, "flow_fraction": 0.75}, 2, 6),
        ({"teacher_fraction": 0.0, "flow_fraction": 1.0, "distil_guidance": True, "guidance": (4, 4)}, 1, 2),
    ],
)
def test_passes_of_a_network_with_classifier_free_guidance(change, student, target):
    assert PlanConfig(**change).passes(2) == (student, target)
