"""Convolutions by tiles, with fewer multiplications (Winograd, 1980; Lavin & Gray, 2016).

``m`` neighbouring outputs of a filter with ``r`` taps are an interpolation at ``n = m + r - 1`` points: with matrices
``A [n, m]``, ``B [n, n]``, ``G [n, r]`` of the points

    y = A^T ((G w) * (B x)),      and, adjoint to it in w,      dw = G^T (sum over tiles of (A d) * (B x)).

In two dimensions every matrix acts on rows and columns. A tile of 4x4 outputs takes 36 instead of 144 multiplications
for a 3x3 kernel, and 64 instead of 400 for a 5x5 one, for each pair of channels; over all tiles these are ``n^2``
ordinary matrix products.

Maps are ``[channels, height, width, batch]`` here; tiles are ``n^2`` matrices ``[channels, rows * columns * batch]``:
whatever runs along the innermost dimension is the same for every tile, so that transforms are sums of long vectors, and
a compiler makes one pass of them.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import cache, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.layer_products import matrix_product

#: Outputs of a tile in one direction.
OUTPUTS = 4
#: Where filters are evaluated besides 0 and infinity: in pairs of signs and of inverses, which keeps rounding small.
POINTS = tuple(Fraction(*ratio) for ratio in ((0, 1), (1, 1), (-1, 1), (1, 2), (-2, 1), (-1, 2), (2, 1)))
#: Taps, in one direction, of the largest kernel that there are points enough for.
MOST_TAPS = len(POINTS) + 2 - OUTPUTS

Matrix = tuple[tuple[float, ...], ...]


class Winograd(NamedTuple):
    """The matrices of one size of tile and kernel.

    Attributes:
        taps: ``r``.
        outputs: ``A^T``, ``[m, n]``.
        inputs: ``B``, ``[n, n]``.
        kernel: ``G``, ``[n, r]``.
        retiled: ``A A^T``, ``[n, n]``.
    """

    taps: int
    outputs: Matrix
    inputs: Matrix
    kernel: Matrix
    retiled: Matrix

    @property
    def side(self) -> int:
        """``n``: inputs of a tile in one direction."""
        return len(self.inputs)


def _times_root(polynomial: Sequence[Fraction], root: Fraction) -> list[Fraction]:
    """Multiply by ``x - root``; coefficients from the constant on."""
    shifted, scaled = [Fraction(0), *polynomial], [*(-root * each for each in polynomial), Fraction(0)]
    return [one + other for one, other in zip(shifted, scaled, strict=True)]


@cache
def winograd(taps: int) -> Winograd:
    """Build the matrices for a kernel.

    Args:
        taps: of the kernel, in one direction.

    Raises:
        ValueError: if there are not points enough for a kernel of that size.
    """
    if taps > MOST_TAPS:
        raise ValueError(f"there are no tiles for a kernel of {taps} taps, {MOST_TAPS} at most")
    points = POINTS[: OUTPUTS + taps - 2]
    outputs, inputs, kernel = [], [], []
    for point in points:
        others = [other for other in points if other != point]
        inputs.append([*reduce(_times_root, others, [Fraction(1)]), Fraction(0)])
        slope = reduce(lambda product, other: product * (point - other), others, Fraction(1))
        kernel.append([point**power / slope for power in range(taps)])
        outputs.append([point**power for power in range(OUTPUTS)])
    # the point at infinity
    inputs.append(reduce(_times_root, points, [Fraction(1)]))
    kernel.append([Fraction(power == taps - 1) for power in range(taps)])
    outputs.append([Fraction(power == OUTPUTS - 1) for power in range(OUTPUTS)])
    retiled = [
        [sum(one * other for one, other in zip(*pair, strict=True)) for pair in ((row, each) for each in outputs)]
        for row in outputs
    ]
    return Winograd(taps, _floats(zip(*outputs, strict=True)), _floats(inputs), _floats(kernel), _floats(retiled))


def _floats(rows: object) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in rows)  # type: ignore[attr-defined]


def transposed(matrix: Matrix) -> Matrix:
    """Transpose a matrix of numbers."""
    return tuple(zip(*matrix, strict=True))


def combine(matrix: Matrix, grid: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Compute ``M X M^T`` for a matrix of numbers and a square grid of tensors; returns its elements row by row."""
    columns = [[_sum(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [_sum(row, column) for column in columns for row in matrix]


def _sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total: Tensor | None = None
    for weight, value in zip(weights, values, strict=True):
        if weight:
            term = value if weight == 1.0 else weight * value
            total = term if total is None else total + term
    assert total is not None
    return total


def grid_of(elements: Sequence[Tensor]) -> list[list[Tensor]]:
    """Arrange ``n^2`` elements in rows of ``n``."""
    side = round(len(elements) ** 0.5)
    return [list(elements[start : start + side]) for start in range(0, len(elements), side)]


def tile_count(size: int) -> int:
    """How many tiles cover so many outputs in one direction."""
    return -(-size // OUTPUTS)


def padded_side(size: int, taps: int) -> int:
    """How many inputs those tiles read in one direction."""
    return OUTPUTS * tile_count(size) + taps - 1


def input_tiles(padded: Tensor, tiling: Winograd) -> list[Tensor]:
    """``B x B^T`` of every tile: ``[channels, height, width, batch] -> n^2 [channels, tiles * batch]``.

    Args:
        padded: maps with all that the tiles read, `padded_side` in each direction.
        tiling: of the kernel.
    """
    rows, columns = ((side - tiling.taps + 1) // OUTPUTS for side in padded.shape[1:3])

    def every(start: int, count: int) -> slice:
        return slice(start, start + OUTPUTS * (count - 1) + 1, OUTPUTS)

    grid = [[padded[:, every(i, rows), every(j, columns)] for j in range(tiling.side)] for i in range(tiling.side)]
    return [each.flatten(1) for each in combine(tiling.inputs, grid)]


def output_tiles(maps: Tensor, tiling: Winograd) -> list[Tensor]:
    """``A d A^T`` of every tile, in the form of `input_tiles`; what a tile has beyond the map is zero."""
    _, height, width, _ = maps.shape
    beyond = [tile_count(side) * OUTPUTS - side for side in (height, width)]
    if any(beyond):
        maps = F.pad(maps, (0, 0, 0, beyond[1], 0, beyond[0]))
    grid = [[maps[:, i::OUTPUTS, j::OUTPUTS] for j in range(OUTPUTS)] for i in range(OUTPUTS)]
    return [each.flatten(1) for each in combine(transposed(tiling.outputs), grid)]


def join_tiles(products: Sequence[Tensor], size: tuple[int, int], tiling: Winograd) -> Tensor:
    """``A^T M A`` of every tile, side by side: ``n^2 [channels, tiles * batch] -> [channels, height, width, batch]``.

    Args:
        products: ``M``.
        size: of the map.
        tiling: of the kernel.
    """
    rows, columns = (tile_count(side) for side in size)
    outputs = combine(tiling.outputs, grid_of([each.view(len(each), rows, columns, -1) for each in products]))
    maps = torch.stack([torch.stack(row, 3) for row in grid_of(outputs)], 2)
    whole = maps.flatten(3, 4).flatten(1, 2)
    return whole[:, : size[0], : size[1]]


def retile(products: Sequence[Tensor], size: tuple[int, int], tiling: Winograd) -> list[Tensor]:
    """`output_tiles` of `join_tiles`, in one step where the map is made of whole tiles."""
    if any(side % OUTPUTS for side in size):
        return output_tiles(join_tiles(products, size, tiling), tiling)
    return combine(tiling.retiled, grid_of(products))


def kernel_tiles(weight: Tensor, tiling: Winograd) -> list[Tensor]:
    """``G w G^T``: ``[out, in, taps, taps] -> n^2 [out, in]``."""
    taps = weight.permute(2, 3, 0, 1)
    return [each.contiguous() for each in combine(tiling.kernel, [list(row.unbind(0)) for row in taps.unbind(0)])]


def join_kernels(products: Sequence[Tensor], tiling: Winograd) -> Tensor:
    """``G^T M G``, the adjoint of `kernel_tiles`: ``n^2 [out, in] -> [out, in, taps, taps]``, channels last."""
    taps = combine(transposed(tiling.kernel), grid_of(products))
    out, in_ = taps[0].shape
    return torch.stack(taps, 1).view(out, tiling.taps, tiling.taps, in_).permute(0, 3, 1, 2)


def tile_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``left_k right_k``: ``n^2 [rows, inner]`` by ``n^2 [inner, columns]``."""
    return [matrix_product(one, other.t()) for one, other in zip(left, right, strict=True)]


def tile_correlations(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``left_k right_k^T``: ``n^2 [rows, inner]`` by ``n^2 [columns, inner]``."""
    return [matrix_product(*pair) for pair in zip(left, right, strict=True)]
