"""Teacher trajectories: paths, jumps on them, and the trajectory rows of a plan."""

import dataclasses
import itertools

import pytest
import torch

from scfm_core.flow.sampler import euler_sample, roll_out
from scfm_core.flow.schedule import sigma_grid
from scfm_core.scfm.method import PlanConfig, StepGain
from scfm_core.scfm.plan import sample_plan
from scfm_core.scfm.target import scfm_target
from scfm_core.scfm.trajectory import Trajectory, on_trajectories, take_paths

K, B = 12, 6


def field(x, sigma):
    """A velocity with a known path: dx/dsigma = sigma + x / 2."""
    return sigma.view(-1, *[1] * (x.ndim - 1)) + x / 2


def exact_end(noise):
    """x(sigma) = c exp(sigma / 2) - 2 sigma - 4, with x(1) = noise, at sigma = 0."""
    return (noise.double() + 6) * torch.exp(torch.tensor(-0.5, dtype=torch.float64)) - 4


def sampled_paths(dtype=torch.float32, shift=3.0):
    noise = torch.randn(B, 2, 3, generator=torch.Generator().manual_seed(0)).double()
    sigmas = sigma_grid(K, shift)
    latents, velocities = roll_out(field, noise, sigmas, intervals=K)
    trajectory = Trajectory(
        velocities=velocities.to(dtype), sigmas=sigmas.expand(B, -1), guidance=torch.linspace(1, 2, B)
    )
    return noise, latents, trajectory


def test_convergence_orders():
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    errors, euler = [], []
    for steps in (12, 24, 48):
        sigmas = sigma_grid(steps, 3.0)
        end, _ = roll_out(field, noise, sigmas, intervals=12, second_order=True)
        errors.append((end - exact_end(noise)).abs().max())
        euler.append((roll_out(field, noise, sigmas, intervals=12)[0] - exact_end(noise)).abs().max())
    for order, found in ((2, errors), (1, euler)):
        for coarse, fine in itertools.pairwise(found):
            assert coarse / fine == pytest.approx(2**order, rel=0.15)
    assert errors[0] < euler[0] / 5


def test_an_euler_path_ends_at_the_samplers_result():
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    sigmas = sigma_grid(24, 3.0)
    assert torch.equal(roll_out(field, noise, sigmas, intervals=12)[0], euler_sample(field, noise, sigmas))


@pytest.mark.parametrize("second_order", [False, True])
def test_an_interval_has_the_mean_velocity_of_its_steps(second_order):
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    sigmas = sigma_grid(24, 3.0)
    end, each = roll_out(field, noise, sigmas, intervals=24, second_order=second_order)
    same_end, pairs = roll_out(field, noise, sigmas, intervals=12, second_order=second_order)
    assert torch.equal(end, same_end)
    lengths = -sigmas.diff().double()
    moved = (each * lengths[:, None]).unflatten(1, (12, 2)).sum(2)
    torch.testing.assert_close(pairs, moved / lengths.view(12, 2).sum(1)[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noise - (pairs * -sigmas[::2].diff()[:, None]).sum(1), end, rtol=0, atol=1e-5)


def test_steps_must_be_a_multiple_of_the_intervals():
    with pytest.raises(ValueError, match="8 steps are not a multiple of 12 intervals"):
        roll_out(field, torch.zeros(1, 3), sigma_grid(8), intervals=12)


def test_mean_velocities_lead_back_to_the_noise():
    noise, latents, trajectory = sampled_paths()
    first, last = torch.zeros(B, dtype=torch.int64), torch.full((B,), K)
    state, velocity = trajectory.jump(latents, first, last)
    torch.testing.assert_close(state.double(), noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity.double(), noise - latents, rtol=0, atol=1e-5)  # over sigma 1 to 0


def test_a_jump_is_in_fp32_under_autocast_too():
    """DeepSpeed puts the whole step under autocast; products in bf16 would have errors of 0.1 %."""
    _, latents, trajectory = sampled_paths()
    first, last = torch.full((B,), 2), torch.full((B,), 5)
    expected = trajectory.jump(latents, first, last)
    with torch.autocast("cpu", torch.bfloat16):
        found = trajectory.jump(latents, first, last)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_jump_is_the_chord_between_its_nodes():
    _, latents, trajectory = sampled_paths()
    first, last = torch.tensor([0, 3, 6, 8, 10, 11]), torch.tensor([12, 6, 12, 10, 11, 12])
    state, velocity = trajectory.jump(latents, first, last)
    end, _ = trajectory.jump(latents, last.clamp(max=K - 1), torch.full((B,), K))
    end = torch.where((last == K)[:, None, None], latents.float(), end)
    length = trajectory.sigmas[0][first] - trajectory.sigmas[0][last]
    torch.testing.assert_close(state - length[:, None, None] * velocity, end, rtol=0, atol=1e-5)


def test_bf16_velocities_give_jumps_of_bf16_accuracy():
    """From states in bf16, the velocity over a short interval would have an error of 2^-9 of a state."""
    _, latents, exact = sampled_paths()
    _, _, rounded = sampled_paths(torch.bfloat16)
    for first in range(K):
        jump = torch.full((B,), first), torch.full((B,), first + 1)
        (_, one), (_, other) = (path.jump(latents, *jump) for path in (exact, rounded))
        assert ((one - other).abs() <= 2**-8 * one.abs() + 1e-6).all()


CONFIG = PlanConfig(
    trajectory_fraction=0.5, flow_fraction=0.2, teacher_fraction=0.1, step_gain=StepGain(), trajectory_grids=(1, 3, 4)
)


def make_plan(config=CONFIG, rows=B, seed=3):
    return sample_plan(config, torch.arange(rows), seed)


def test_rows_have_their_fraction_grids_and_intervals():
    plan = make_plan(rows=20_000)
    rows = plan.is_trajectory
    assert rows.double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert not (rows & (plan.is_flow | plan.is_teacher)).any()
    for grid in (1, 3, 4):
        taken = rows & (plan.grid == grid)
        assert taken.sum() / rows.sum() == pytest.approx(1 / 3, abs=0.02)
        assert set(plan.interval[taken].tolist()) == set(range(grid))
        assert set(plan.student_strength[taken].tolist()) == {torch.tensor(grid**-0.5).item()}
    assert not plan.interval[~rows].any()


def test_other_rows_are_the_same_as_without_trajectories():
    without = make_plan(PlanConfig(flow_fraction=0.2, teacher_fraction=0.1), rows=400)
    plan = make_plan(dataclasses.replace(CONFIG, trajectory_fraction=0.0, step_gain=None), rows=400)
    for name in ("sigma_start", "sigma_mid", "sigma_end", "guidance", "is_teacher", "is_flow", "grid"):
        assert torch.equal(getattr(plan, name), getattr(without, name))


def test_only_trajectory_rows_are_put_onto_their_paths():
    noise, latents, trajectory = sampled_paths()
    plan = make_plan(seed=28)
    rows = plan.is_trajectory
    assert 0 < rows.sum() < B
    noised, flow = torch.full((B, 2, 3), 7.0), torch.full((B, 2, 3), 9.0)
    moved, start, velocity = on_trajectories(plan, trajectory, latents, noised, flow)
    first, last = rows & (plan.interval == 0), rows & (plan.interval == plan.grid - 1)
    assert first.any() and last.any() and (rows & ~first & ~last).any()
    for row in range(B):
        if not rows[row]:
            assert (start[row] == 7).all() and (velocity[row] == 9).all()
            assert moved.sigma_start[row] == plan.sigma_start[row] and moved.guidance[row] == plan.guidance[row]
            continue
        grid, interval = int(plan.grid[row]), int(plan.interval[row])
        nodes = sigma_grid(grid, 3.0)
        assert moved.sigma_start[row] == pytest.approx(nodes[interval].item(), abs=1e-6)
        assert moved.sigma_end[row] == pytest.approx(nodes[interval + 1].item(), abs=1e-6)
        assert moved.guidance[row] == trajectory.guidance[row]
        # One Euler step of the target over the jump leads from node to node, and at last to the latents.
        end = start[row] - (moved.sigma_start[row] - moved.sigma_end[row]) * velocity[row]
        if last[row]:
            torch.testing.assert_close(end.double(), latents[row], rtol=0, atol=1e-5)
        if first[row]:
            torch.testing.assert_close(start[row].double(), noise[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("second_order", [False, True])
def test_samples_may_have_different_shifts(second_order):
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    grids = torch.stack([sigma_grid(8, 1.5), sigma_grid(8, 4.0)])
    end, velocities = roll_out(field, noise, grids, intervals=4, second_order=second_order)
    for row in range(2):
        alone = roll_out(field, noise[row : row + 1], grids[row], intervals=4, second_order=second_order)
        assert torch.equal(end[row], alone[0][0]) and torch.equal(velocities[row], alone[1][0])


class Rows(list):
    """A conditioning: the numbers of its rows."""

    def __getitem__(self, rows):
        return Rows(rows)


def test_paths_computed_in_training_equal_stored_paths():
    """From the same noise and at the same shift. Rows of other slices do not run through the network."""
    config = dataclasses.replace(CONFIG, shift=(3.0, 3.0), trajectory_steps=12)
    plan, (noise, latents, stored) = make_plan(config), sampled_paths()
    rows, entered = plan.is_trajectory, []
    assert 0 < rows.sum() < B

    def teacher(x, sigma, cond, strength):
        assert not strength.any()
        entered.append(cond)
        return field(x, sigma)

    taken, ends = take_paths(plan, torch.full((B, 2, 3), 5.0), noise.float(), Rows(range(B)), teacher, 12)
    assert entered == [rows.nonzero()[:, 0].tolist()] * 12
    assert (ends[~rows] == 5).all()
    torch.testing.assert_close(ends[rows].double(), latents[rows], rtol=0, atol=1e-5)
    noised = torch.zeros(B, 2, 3)
    moved, start, velocity = on_trajectories(plan, taken, ends, noised, noised)
    other, other_start, other_velocity = on_trajectories(plan, stored, latents, noised, noised)
    assert torch.equal(moved.sigma_start, other.sigma_start) and torch.equal(moved.guidance, plan.guidance)
    torch.testing.assert_close(start, other_start, rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity, other_velocity, rtol=0, atol=1e-5)


def test_paths_are_computed_at_each_rows_own_shift():
    config = PlanConfig(trajectory_fraction=1.0, teacher_fraction=0.0, trajectory_grids=(1, 2, 4), trajectory_steps=4)
    plan, noise = make_plan(config), torch.randn(B, 3)
    taken, ends = take_paths(plan, noise, noise, Rows(range(B)), lambda x, sigma, cond, strength: field(x, sigma), 4)
    for row in range(B):
        nodes = sigma_grid(4, plan.shift[row].item())
        torch.testing.assert_close(taken.sigmas[row], nodes)
        torch.testing.assert_close(ends[row : row + 1], roll_out(field, noise[row : row + 1], nodes, intervals=4)[0])


def test_a_batch_without_trajectory_rows_still_enters_the_network():
    """In a sharded run every process must; the result is not used."""
    plan, seen = make_plan(PlanConfig()), []
    latents = torch.randn(B, 3)

    def teacher(x, sigma, cond, strength):
        seen.append(len(x))
        return field(x, sigma)

    take_paths(plan, latents, torch.randn(B, 3), Rows(range(B)), teacher, 4)
    assert seen == [1] * 4
    _, ends = take_paths(plan, latents, torch.randn(B, 3), Rows(range(B)), teacher, 4, is_sharded=False)
    assert seen == [1] * 4
    assert torch.equal(ends, latents)


def test_trajectory_rows_have_a_known_target_and_only_pairs_run():
    _, latents, trajectory = sampled_paths()
    plan, start, velocity = on_trajectories(
        make_plan(), trajectory, latents, torch.randn(B, 2, 3), torch.zeros(B, 2, 3)
    )
    entered = []

    def near(x, sigma, cond, strength):
        entered.append(len(x))
        return x

    target = scfm_target(plan, start, None, near, near, flow_velocity=velocity)
    known = plan.is_flow | plan.is_trajectory
    pairs = int((~known).sum())
    assert entered == [pairs, pairs]
    assert torch.equal(target[known], velocity[known])
    assert target.isfinite().all()


def test_only_trajectory_rows_need_no_pass():
    config = PlanConfig(trajectory_fraction=1.0, teacher_fraction=0.0)
    assert not config.has_pairs and not config.has_flow and config.has_trajectory
    _, latents, trajectory = sampled_paths()
    plan, start, velocity = on_trajectories(make_plan(config), trajectory, latents, torch.zeros(B, 2, 3), None)
    assert torch.equal(scfm_target(plan, start, None, None, None, flow_velocity=velocity), velocity)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory_fraction": 0.7, "teacher_fraction": 0.4}, "must be at most 1"),
        ({"trajectory_fraction": -0.1}, r"method\.trajectory_fraction must be in"),
        ({"trajectory_grids": ()}, "step counts of at least 1"),
        ({"trajectory_grids": (0, 2)}, "step counts of at least 1"),
    ],
)
def test_invalid_configurations_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        PlanConfig(**changes)
