"""The undocumented attributes of DeepSpeed that the engine reads: a version that lacks one is refused by name."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scfm_core.distributed import deepspeed_internals as internals
from scfm_core.distributed.deepspeed_internals import Partition, ZeroOptimizer
from scfm_core.errors import UserError


def parameter(**attributes: object) -> torch.nn.Parameter:
    value = torch.nn.Parameter(torch.zeros(2))
    for name, attribute in attributes.items():
        setattr(value, name, attribute)
    return value


def with_all(names: tuple[str, ...], without: str) -> dict[str, object]:
    return {name: None for name in names if name != without}


@pytest.mark.parametrize(
    ("stage", "missing"),
    [(stage, name) for stage in (1, 2, 3) for name in internals.OPTIMIZER]
    + [(2, name) for name in internals.OPTIMIZER_STAGE_1_AND_2]
    + [(3, name) for name in internals.OPTIMIZER_STAGE_3],
)
def test_a_missing_attribute_of_the_optimizer_is_named(stage, missing):
    own = internals.OPTIMIZER_STAGE_3 if stage == 3 else internals.OPTIMIZER_STAGE_1_AND_2
    optimizer = SimpleNamespace(**with_all((*internals.OPTIMIZER, *own), missing))
    with pytest.raises(UserError, match=rf"lacks {missing}, .*deepspeed{re.escape(internals.SUPPORTED)}"):
        ZeroOptimizer(optimizer, stage, [])


@pytest.mark.parametrize("missing", internals.MAPPING)
def test_a_missing_attribute_of_the_link_to_the_master_is_named(missing):
    optimizer = SimpleNamespace(**with_all((*internals.OPTIMIZER, *internals.OPTIMIZER_STAGE_1_AND_2), ""))
    mapped = parameter(_hp_mapping=SimpleNamespace(**with_all(internals.MAPPING, missing)))
    with pytest.raises(UserError, match=f"lacks {missing}, "):
        ZeroOptimizer(optimizer, 2, [mapped, parameter(_hp_mapping=None)])
    with pytest.raises(UserError, match="lacks _hp_mapping, "):
        ZeroOptimizer(optimizer, 2, [parameter()])


@pytest.mark.parametrize("missing", internals.PARTITIONED)
def test_a_missing_attribute_of_a_partitioned_parameter_is_named(missing):
    with pytest.raises(UserError, match=f"lacks {missing}, "):
        Partition(parameter(**with_all(internals.PARTITIONED, missing)))


@pytest.mark.parametrize(("rank", "start", "numel"), [(0, 0, 3), (1, 3, 2), (2, 6, 0)])
def test_a_slice_ends_where_the_parameter_ends(rank, start, numel):
    """Five elements on three ranks: slices of three, the rest is padding."""
    slice_ = torch.full((3,), torch.nan)
    partition = Partition(
        parameter(
            ds_numel=5, ds_tensor=slice_, ds_zero_partition_rank=rank, ds_persist=True, ds_status=None, partition=None
        )
    )
    assert (partition.start, partition.numel, partition.whole_numel) == (start, numel, 5)
    partition.clear_padding()
    assert slice_.isnan().tolist() == [True] * numel + [False] * (3 - numel)
    slot = partition.slot()
    assert slot.start == start
    assert slot.local.shape == (numel,)


def test_the_supported_versions_are_those_of_the_package():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'deepspeed = ["deepspeed{internals.SUPPORTED}"]' in project
