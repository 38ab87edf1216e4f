"""Values between host and device."""

import torch

from scfm_core.readback import read_back, to_device


def test_values_and_their_shapes_arrive() -> None:
    single = torch.tensor(0.1)  # fp32: its value must not be rounded again
    assert read_back(torch.arange(4).view(2, 2), single, torch.tensor([float("inf")], dtype=torch.float64)) == [
        [0, 1, 2, 3], [single.item()], [float("inf")],
    ]  # fmt: skip
    assert read_back() == []


def test_a_tensor_for_the_cpu_is_not_copied() -> None:
    tensor = torch.arange(3)
    assert to_device(tensor, "cpu") is tensor
