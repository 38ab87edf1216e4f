"""The two averages of the student."""

import pytest
import torch
from torch import Tensor, nn

from scfm_core.scfm.ema import DualEMA, EMAConfig, canonical_name


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layer.a": (3, 4), "layer.b": (4,), "scale": ()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def move(student: dict[str, Tensor], seed: int) -> None:
    for name, step in weights(seed).items():
        student[name].add_(0.1 * step)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def storage(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize(("fast", "slow"), [(0.99, 0.999), (0.5, 0.9), (0.0, 0.0)])
def test_averages_follow_the_formula(fast, slow):
    student = weights()
    emas = DualEMA(student, config=EMAConfig(fast=fast, slow=slow))
    expected = {decay: {name: tensor.double() for name, tensor in student.items()} for decay in (fast, slow)}
    for step in range(50):
        move(student, seed=step)
        emas.update()
        for decay, average in expected.items():
            for name, tensor in average.items():
                average[name] = decay * tensor + (1 - decay) * student[name].double()
    for decay, average in ((fast, emas.fast), (slow, emas.slow)):
        for name, tensor in average.items():
            torch.testing.assert_close(tensor.double(), expected[decay][name], atol=1e-6, rtol=0)


def test_averages_start_from_the_student_and_are_not_the_student():
    student = weights()
    emas = DualEMA(student)
    start = copies(student)
    move(student, seed=1)
    assert_same(emas.fast, start)
    assert_same(emas.slow, start)
    emas.update()
    assert_same(student, {name: tensor + 0.1 * weights(1)[name] for name, tensor in start.items()})
    assert not torch.equal(emas.fast["layer.a"], emas.slow["layer.a"])


def test_given_tensors_hold_the_averages():
    student, fast, slow = weights(0), weights(1), weights(2)
    pointers = storage(fast), storage(slow)
    emas = DualEMA(student, fast, slow)
    assert_same(fast, student)
    assert_same(slow, student)
    move(student, seed=3)
    emas.update()
    assert not torch.equal(fast["layer.a"], slow["layer.a"])
    assert (storage(emas.fast), storage(emas.slow)) == pointers


def test_given_tensors_may_come_in_another_order():
    student = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}
    fast = {"b": torch.zeros(1), "a": torch.zeros(1)}
    emas = DualEMA(student, fast)
    assert_same(emas.fast, student)
    student["a"].fill_(11.0)
    emas.update()
    assert emas.fast["a"].item() == pytest.approx(1.1)
    assert emas.fast["b"].item() == 2


def test_parameters_that_train_are_averaged_without_a_graph():
    student = {"weight": nn.Parameter(torch.zeros(3))}
    emas = DualEMA(student, {"weight": nn.Parameter(torch.ones(3))})
    student["weight"].data.fill_(1.0)
    emas.update()
    torch.testing.assert_close(emas.fast["weight"].data, torch.full((3,), 0.01))
    assert emas.fast["weight"].grad_fn is None
    assert not emas.slow["weight"].requires_grad


def test_restart_sets_both_averages_to_the_student():
    student = weights()
    emas = DualEMA(student)
    pointers = storage(emas.fast), storage(emas.slow)
    move(student, seed=1)
    emas.restart()
    assert_same(emas.fast, student)
    assert_same(emas.slow, student)
    assert (storage(emas.fast), storage(emas.slow)) == pointers


def test_a_saved_state_comes_back_in_place():
    student = weights()
    emas = DualEMA(student)
    move(student, seed=1)
    emas.update()
    saved = {which: copies(average) for which, average in emas.state_dict().items()}

    resumed = DualEMA(weights(5), weights(6), weights(7))
    pointers = storage(resumed.fast), storage(resumed.slow)
    resumed.load_state_dict(saved)
    assert_same(resumed.fast, emas.fast)
    assert_same(resumed.slow, emas.slow)
    assert (storage(resumed.fast), storage(resumed.slow)) == pointers
    assert not torch.equal(resumed.fast["layer.a"], resumed.slow["layer.a"])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("slow"), r"holds 'fast' and 'slow', got \['fast'\]"),
        (lambda state: state.update(other={}), r"got \['fast', 'other', 'slow'\]"),
        (lambda state: state["slow"].pop("scale"), r"saved slow EMA differ: \['scale'\]"),
        (lambda state: state["fast"].update(new=torch.zeros(1)), r"saved fast EMA differ: \['new'\]"),
    ],
    ids=["average missing", "average unknown", "name missing", "name unknown"],
)
def test_an_incomplete_state_is_an_error(spoil, message):
    emas = DualEMA(weights())
    state = emas.state_dict()
    spoil(state)
    with pytest.raises(ValueError, match=message):
        emas.load_state_dict(state)


def test_a_state_of_another_shape_is_an_error():
    emas = DualEMA({"weight": torch.zeros(3)})
    state = {which: {"weight": torch.ones(1)} for which in ("fast", "slow")}
    with pytest.raises(ValueError, match="shape"):
        emas.load_state_dict(state)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.weight",
        "_orig_mod.blocks.0.attn.weight",
        "module.blocks.0.attn.weight",
        "_orig_mod.module.blocks.0._checkpoint_wrapped_module.attn.weight",
        "_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module._orig_mod.attn.weight",
    ],
)
def test_a_canonical_name_has_no_parts_of_wrappers(name):
    assert canonical_name(name) == "blocks.0.attn.weight"


def test_names_similar_to_a_wrapper_do_not_change():
    assert canonical_name("module_list.submodule.weight") == "module_list.submodule.weight"


def test_a_wrapped_student_feeds_unwrapped_averages():
    network = nn.Linear(2, 2)
    average = nn.Linear(2, 2).requires_grad_(False)
    wrapped = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": network})})  # as compiled DDP names it
    emas = DualEMA(dict(wrapped.named_parameters()), fast=dict(average.named_parameters()))
    assert torch.equal(average.weight, network.weight)

    before = average.weight.clone()
    network.weight.data.add_(1.0)
    emas.update()
    torch.testing.assert_close(average.weight, before + 0.01)
    assert emas.state_dict()["slow"].keys() == {"weight", "bias"}


def test_a_state_saved_under_wrapped_names_loads():
    emas = DualEMA({"weight": torch.zeros(3)})
    emas.load_state_dict({"fast": {"_orig_mod.weight": torch.ones(3)}, "slow": {"module.weight": torch.ones(3)}})
    assert torch.equal(emas.fast["weight"], torch.ones(3))
    assert torch.equal(emas.slow["weight"], torch.ones(3))


def test_two_tensors_with_one_canonical_name_are_an_error():
    with pytest.raises(ValueError, match="weight"):
        DualEMA({"weight": torch.zeros(1), "module.weight": torch.ones(1)})


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["student", "fast", "slow"])
def test_narrow_tensors_are_errors(which, narrow):
    groups = {"student": weights(), "fast": weights(), "slow": weights(), which: weights(dtype=narrow)}
    with pytest.raises(ValueError, match=rf"'layer.a' needs fp32 masters, got {narrow}"):
        DualEMA(**groups)


@pytest.mark.parametrize("which", ["fast", "slow"])
def test_averages_of_another_network_are_errors(which):
    renamed = weights()
    renamed["other"] = renamed.pop("scale")
    with pytest.raises(ValueError, match=f"names of the {which} EMA and the student differ"):
        DualEMA(weights(), **{which: renamed})
    with pytest.raises(ValueError, match=rf"{which} EMA of 'layer.b' has shape \(1,\)"):
        DualEMA(weights(), **{which: {**weights(), "layer.b": torch.zeros(1)}})


def test_the_slow_average_converges_where_one_in_bf16_stalls():
    student = {"weight": torch.zeros(64)}
    emas = DualEMA(student, config=EMAConfig(slow=0.999))
    student["weight"].fill_(1.0)
    in_bf16, one = torch.zeros(64, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16)
    for _ in range(5000):
        emas.update()
        in_bf16.mul_(0.999).add_(one, alpha=0.001)
    torch.testing.assert_close(emas.slow["weight"], torch.full((64,), 1 - 0.999**5000), atol=1e-4, rtol=0)
    assert in_bf16.max() < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fast": 0.9995}, "0 <= fast <= slow < 1, got fast 0.9995, slow 0.999"),
        ({"slow": 1.0}, "0 <= fast <= slow < 1"),
        ({"fast": -0.1}, "0 <= fast <= slow < 1"),
        ({"fast": float("nan")}, "0 <= fast <= slow < 1"),
        ({"restart_every": 0}, "ema.restart_every must be at least 1, auto or none, got 0"),
    ],
    ids=str,
)
def test_invalid_configurations_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        EMAConfig(**change)
