"""The bucket of every image: the size, of those of a recipe, that is nearest to its own."""

import numpy as np
from numpy.typing import NDArray

from scfm_core.data.index import ShardIndex
from scfm_core.data.schema import Size

BUCKETS_VERSION = 1
"""Of the files with the buckets of a corpus."""
_ROWS = 1 << 13
"""Sizes that are compared at a time with all buckets, in some megabytes."""


def nearest_size(size: Size, sizes: tuple[Size, ...]) -> int:
    """The size with the nearest aspect ratio (by its logarithm); of equally near ones, that with the nearest area.

    Returns:
        its place in `sizes`.
    """
    if size in sizes:
        return sizes.index(size)
    ratio, area = np.log(size[0] / size[1]), np.log(size[0] * size[1])
    return min(
        range(len(sizes)),
        key=lambda i: (
            round(abs(float(np.log(sizes[i][0] / sizes[i][1]) - ratio)), 6),
            abs(float(np.log(sizes[i][0] * sizes[i][1]) - area)),
        ),
    )


def nearest_sizes(found: NDArray[np.int32] | NDArray[np.int64], sizes: tuple[Size, ...]) -> NDArray[np.int16]:
    """`nearest_size` of many sizes.

    Args:
        found: height and width in pixels, integers [n, 2].
        sizes: different ones.

    Returns:
        places in `sizes`, int16 [n]; equal to those of `nearest_size`.
    """
    targets = np.array(sizes, np.float64)
    target_ratios, target_areas = np.log(targets[:, 0] / targets[:, 1]), np.log(targets[:, 0] * targets[:, 1])
    result = np.empty(len(found), np.int16)
    for at in range(0, len(found), _ROWS):
        height, width = found[at : at + _ROWS].astype(np.float64).T
        millionths = np.abs(target_ratios - np.log(height / width)[:, None]) * 1e6
        rounded = np.rint(millionths)
        nearest = rounded.min(1, keepdims=True)
        areas = np.abs(target_areas - np.log(height * width)[:, None])
        areas[rounded > nearest] = np.inf
        result[at : at + _ROWS] = areas.argmin(1)
        # Where a rounding or a comparison of areas is so close that the last bit of a logarithm decides.
        close = (np.abs(millionths - np.floor(millionths) - 0.5) < 1e-3) & (rounded <= nearest + 1)
        if len(sizes) > 1:
            two = np.partition(areas, 1, axis=1)
            close[:, 0] |= (two[:, 1] < np.inf) & (two[:, 1] - two[:, 0] < 1e-9)
        for row in np.flatnonzero(close.any(1)).tolist():
            result[at + row] = nearest_size((int(height[row]), int(width[row])), sizes)
    return result


def buckets_of(index: ShardIndex, sizes: tuple[Size, ...]) -> NDArray[np.int16]:
    """The bucket of every sample of a data set whose sizes are known: places in `sizes`, int16 [samples]."""
    places = nearest_sizes(index.arrays["sizes"], sizes)
    return np.repeat(places[index.arrays["run_size"]], index.arrays["run_samples"])
