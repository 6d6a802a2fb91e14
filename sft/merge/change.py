"""What an adapter does to one parameter of the base, applied in float32 to some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Rows = Callable[[int, int], torch.Tensor]  # rows of the base, from one to another

# Whether adding a product while it is formed gives the bits of adding it afterwards, as PEFT does,
# by (rows, rank, columns, device). One pass over memory less is a fifth of a merge's own time. It
# depends on the BLAS, the processor and the shape (MKL: not of one row, of rank 1 on Intel, of
# rank 256), so the first tile of each shape is computed in both ways; where the sums are made in
# another order, a fifth of the numbers or more differ.
CERTAIN = 1 << 12  # numbers; so many are not equal by chance, and fewer cost little anyway
_one_pass: dict[tuple[int | str, ...], bool] = {}


def _tells(tile: torch.Tensor) -> bool:
    """Say whether a tile has enough numbers, of which few are zero, to compare roundings on."""
    return int(tile.count_nonzero()) >= max(CERTAIN, tile.numel() // 2)


@dataclass
class LowRank:
    """A product that is added: ``scale * left @ right``.

    A power of two, as alpha / r mostly is, is taken into ``left``, where it changes no digit.

    Attributes:
        left: Shape (matrices, rows, rank), float32.
        right: Shape (matrices, rank, columns), float32.
        scale: Of the adapter, times its weight in the merge.
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
        replaced: The adapter's own tensor, which stands instead of the base's.
        restart: Turns the whole base matrix into what it was at the first step of training
            (PiSSA and OLoRA take their first product out of it).
        products: What is added; of several adapters, one after the other.
        magnitude: DoRA's length of each output, float32.
        by_row: DoRA's outputs are rows of the matrix (Linear), not columns (Conv1D, Embedding).
        added: A vector that is added to a bias.
        tokens: Rows, and the values that they get instead.
    """

    replaced: torch.Tensor | None = None
    restart: Callable[[torch.Tensor], torch.Tensor] | None = None
    products: list[LowRank] = field(default_factory=list)
    magnitude: torch.Tensor | None = None
    by_row: bool = True
    added: torch.Tensor | None = None
    tokens: tuple[torch.Tensor, torch.Tensor] | None = None

    def column_factor(self, rows: Rows, count: int, numbers: int) -> torch.Tensor | None:
        """Find what DoRA multiplies columns by; needs all rows, a pass of its own.

        Args:
            rows: Reads the base's.
            count: Of them.
            numbers: That are in memory at once.
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
            matrix: Which matrix of the parameter the rows are of.
            start: The first of them in that matrix.
            column_factor: From ``column_factor``.
            scratch: Room for at least as many rows.
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
        """Move what is added and multiplied to where the sums are made."""
        for product in self.products:
            product.left, product.right = product.left.to(device), product.right.to(device)
        if self.magnitude is not None:
            self.magnitude = self.magnitude.to(device)
        if self.added is not None:
            self.added = self.added.to(device)
        if self.tokens is not None:
            self.tokens = (self.tokens[0].to(device), self.tokens[1].to(device))

    def tensors(self) -> Iterator[torch.Tensor]:
        """Give all the numbers that it is made of."""
        for product in self.products:
            yield from (product.left, product.right)
            yield torch.tensor(product.scale)
        for tensor in (self.replaced, self.magnitude, self.added, *(self.tokens or ())):
            if tensor is not None:
                yield tensor

    def same_as(self, other: Change) -> bool:
        """Say whether both do the same, as on two parameters that are tied."""
        mine, others = list(self.tensors()), list(other.tensors())
        return len(mine) == len(others) and all(map(torch.equal, mine, others))
