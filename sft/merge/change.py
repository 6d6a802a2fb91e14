"""The change of one parameter by the adapters, applied in float32 to a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Rows = Callable[[int, int], torch.Tensor]  # reads the base's rows from start to stop

# Whether addmm gives the same bits as mm and add, which is PEFT's way, by (rows, rank, columns,
# device). addmm saves one pass over memory: a fifth of a merge's own time. Equality depends on the
# BLAS, the processor and the shape (MKL differs for one row, for rank 256, and on Intel for rank
# 1), so the first tile of each shape is computed in both ways. If the order of summation differs,
# at least a fifth of the numbers differ.
CERTAIN = 1 << 12  # numbers; so many are not equal by chance, and fewer cost little in any way
_one_pass: dict[tuple[int | str, ...], bool] = {}


def _tells(tile: torch.Tensor) -> bool:
    """Return whether a tile has enough numbers that are not zero to compare roundings."""
    return int(tile.count_nonzero()) >= max(CERTAIN, tile.numel() // 2)


@dataclass
class LowRank:
    """A product that is added: ``scale * left @ right``.

    A scale that is a power of two, as alpha / r mostly is, is multiplied into ``left``, which
    rounds nothing.

    Attributes:
        left: Shape (matrices, rows, rank), float32.
        right: Shape (matrices, rank, columns), float32.
        scale: The adapter's scaling times its factor in the merge.
    """

    left: torch.Tensor
    right: torch.Tensor
    scale: float

    def __post_init__(self) -> None:
        if math.frexp(self.scale)[0] == 0.5:
            self.left, self.scale = self.left * self.scale, 1.0


@dataclass
class Change:
    """How a parameter of the merged model differs from the base's.

    Attributes:
        replaced: The adapter's own tensor, which replaces the base's.
        restart: Computes the base matrix as it was at the first step of training (PiSSA and OLoRA
            subtract the initial product from it).
        products: The products that are added, one per adapter.
        magnitude: DoRA's length of each output, float32.
        by_row: DoRA's outputs are rows of the matrix (Linear), not columns (Conv1D, Embedding).
        added: A vector that is added to a bias.
        tokens: Indices of rows, and the values that replace these rows.
    """

    replaced: torch.Tensor | None = None
    restart: Callable[[torch.Tensor], torch.Tensor] | None = None
    products: list[LowRank] = field(default_factory=list)
    magnitude: torch.Tensor | None = None
    by_row: bool = True
    added: torch.Tensor | None = None
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    def column_factor(self, rows: Rows, count: int, numbers: int) -> torch.Tensor | None:
        """Compute DoRA's factor of each column, which takes a separate pass over all rows.

        Args:
            rows: Reads rows of the base.
            count: The number of rows.
            numbers: How many numbers are in memory at once.

        Returns:
            Shape (columns,); None if there is no DoRA or its outputs are rows.
        """
        if self.magnitude is None or self.by_row:
            return None
        total = torch.zeros_like(self.magnitude, dtype=torch.float64)
        step = max(1, numbers // len(total))
        for start in range(0, count, step):
            tile = rows(start, min(start + step, count)).to(total.device, torch.float32, copy=True)
            self._add_products(tile, 0, start, torch.empty_like(tile))
            total += tile.double().square().sum(0)
        return self.magnitude / total.sqrt().float()

    def apply(
        self,
        tile: torch.Tensor,
        matrix: int,
        start: int,
        column_factor: torch.Tensor | None,
        scratch: torch.Tensor,
    ) -> None:
        """Change rows of the base, in place.

        Args:
            tile: Float32, shape (rows, columns); a vector is one row.
            matrix: The index of the parameter's matrix.
            start: The index of the tile's first row in that matrix.
            column_factor: The result of ``column_factor``.
            scratch: A buffer of at least as many rows.
        """
        self._add_products(tile, matrix, start, scratch)
        if column_factor is not None:
            tile.mul_(column_factor)
        elif self.magnitude is not None:
            lengths = torch.linalg.norm(tile, dim=1)
            tile.mul_((self.magnitude[start : start + len(tile)] / lengths).unsqueeze(1))
        if self.added is not None:
            tile.add_(self.added)
        if self.tokens is not None:
            indices, values = self.tokens
            here = (indices >= start) & (indices < start + len(tile))
            tile[indices[here] - start] = values[here]

    def _add_products(
        self, tile: torch.Tensor, matrix: int, start: int, scratch: torch.Tensor
    ) -> None:
        delta = scratch[: len(tile)]
        for product in self.products:
            left, right = product.left[matrix, start : start + len(tile)], product.right[matrix]
            shape = (*left.shape, right.shape[1], tile.device.type)
            if product.scale == 1 and _one_pass.get(shape, False):
                tile.addmm_(left, right)
                continue
            torch.mm(left, right, out=delta)
            if product.scale != 1:
                delta.mul_(product.scale)
            elif shape not in _one_pass and _tells(delta) and _tells(tile):
                _one_pass[shape] = tile.addmm(left, right).equal(tile + delta)
            tile.add_(delta)

    def to(self, device: torch.device) -> None:
        """Move the tensors to the device that computes the change."""
        for product in self.products:
            product.left, product.right = product.left.to(device), product.right.to(device)
        if self.magnitude is not None:
            self.magnitude = self.magnitude.to(device)
        if self.added is not None:
            self.added = self.added.to(device)
        if self.tokens is not None:
            self.tokens = (self.tokens[0].to(device), self.tokens[1].to(device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors and scales of the change."""
        for product in self.products:
            yield from (product.left, product.right)
            yield torch.tensor(product.scale)
        for tensor in (self.replaced, self.magnitude, self.added, *(self.tokens or ())):
            if tensor is not None:
                yield tensor

    def same_as(self, other: Change) -> bool:
        """Return whether both changes are equal, as they must be for tied parameters."""
        mine, others = list(self.tensors()), list(other.tensors())
        return len(mine) == len(others) and all(map(torch.equal, mine, others))
