"""Matrices with the second moment of their inputs, and the same scaled so that every input counts alike.

Owns orientation, damping and scaling: what is behind it sees (matrices, rows, inputs) with a unit diagonal.
Called by refitting and alternating.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprune.engine.rounding import round_to
from sparseprune.errors import ShapeMismatchError, SparsityError

_UNSEEN = 1e-18  # the scale of weights that nothing is known of; its square is a float32 yet


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Weights (out, in), or (matrices, out, in) such as experts, and the second moment of what they multiply.

    `moment` is E[x x^T] up to a factor: (in, in), for experts (matrices, in, in); `input_dim` says which
    dimension of `dense` the inputs lie along, so that (in, out) is as good. Where `fixed` (bool, of the shape
    of `dense`) is True weights stay as they are, whatever becomes of the others.

    Raises:
        ShapeMismatchError: shapes that do not go together.
        SparsityError: weights that are no floats or not finite; a moment with NaN or infinity or a negative
            diagonal.
    """

    dense: Tensor
    moment: Tensor
    input_dim: int = -1
    fixed: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        if not self.dense.dtype.is_floating_point:
            raise SparsityError(f"weights of {self.dense.dtype} cannot be reconstructed: wanted floats")
        if not bool(self.dense.to(self.work_dtype).isfinite().all()):
            raise SparsityError("the weights hold NaN or infinity: nothing can make up for these")
        diagonal = self.moment.diagonal(dim1=-2, dim2=-1)
        if not bool(self.moment.isfinite().all()):
            raise SparsityError("the second moment of the inputs holds NaN or infinity")
        if bool((diagonal < 0).any()):
            raise SparsityError("the second moment of the inputs has a negative diagonal: it is none")

    @property
    def unseen(self) -> list[int]:
        """The numbers of the matrices whose moment is zero: nothing is known of their inputs."""
        seen = (self.moment.diagonal(dim1=-2, dim2=-1) > 0).any(-1).reshape(-1)
        return [int(number) for number in (~seen).nonzero()]

    @property
    def features(self) -> int:
        """How many inputs a row has."""
        return int(self.dense.shape[self.input_dim])

    @property
    def work_dtype(self) -> torch.dtype:
        """What is computed in: float32, for float64 weights float64."""
        return torch.float64 if self.dense.dtype == torch.float64 else torch.float32

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weights' shape as (matrices, out, in), sharing its storage."""
        moved = tensor.movedim(self.input_dim, -1)
        return moved if moved.ndim == 3 else moved.unsqueeze(0)

    def unrows(self, rows: Tensor) -> Tensor:
        """What `rows` gives, undone."""
        return (rows if self.dense.ndim == 3 else rows.squeeze(0)).movedim(-1, self.input_dim)

    def rounded(self, rows: Tensor) -> Tensor:
        """(matrices, out, in) in the weights' shape and dtype; its largest number where one is too large."""
        dtype = self.dense.dtype
        most = torch.finfo(dtype).max
        return round_to(self.unrows(rows).clamp(-most, most), dtype).contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """A damped problem in coordinates in which the diagonal of its Hessian is 1.

    `hessian` (matrices, in, in), `dense` (matrices, out, in) is the weights times `scale` (matrices, 1, in).
    """

    hessian: Tensor
    dense: Tensor
    scale: Tensor

    @property
    def is_uncorrelated(self) -> bool:
        """Whether no input tells anything about another one, so that no weight can make up for one."""
        off = self.hessian - torch.diag_embed(self.hessian.diagonal(dim1=-2, dim2=-1))
        return not bool(off.any())


def scaled(matrix: Matrix, damp: float) -> Scaled:
    """The problem of a matrix, its Hessian damped by `damp` times the mean of its diagonal.

    Raises:
        SparsityError: a negative damp.
    """
    if not damp >= 0:
        raise SparsityError(f"damp {damp}: wanted a number of 0 or more")
    moment = matrix.moment if matrix.moment.ndim == 3 else matrix.moment.unsqueeze(0)
    diagonal = moment.diagonal(dim1=-2, dim2=-1).to(torch.float64)
    roots = (diagonal + damp * diagonal.mean(-1, keepdim=True)).sqrt()
    # What no input reaches, and no damping, counts next to nothing, whatever it is compared with.
    roots = roots.clamp_min(_UNSEEN).to(matrix.work_dtype)
    hessian = moment.to(matrix.work_dtype) / roots.unsqueeze(-1)
    hessian /= roots.unsqueeze(-2)
    hessian = (hessian + hessian.mT).mul_(0.5)
    hessian.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    scale = roots.unsqueeze(-2)
    return Scaled(hessian, matrix.rows(matrix.dense).to(matrix.work_dtype) * scale, scale)


def output_energy(weights: Tensor, moment: Tensor, input_dim: int = -1) -> float:
    """tr(W H W^T), summed over the matrices: the mean squared output, in the units of the moment.

    `weights` and `moment` as in Matrix; products in float32 or wider, sums in float64.
    """
    moved = weights.movedim(input_dim, -1)
    wide = moved.to(torch.promote_types(moved.dtype, torch.float32))
    return float(((wide @ moment.to(wide.dtype)).to(torch.float64) * wide).sum())


def _check_shapes(matrix: Matrix) -> None:
    dense, moment = matrix.dense, matrix.moment
    if dense.ndim not in {2, 3} or not -dense.ndim <= matrix.input_dim < dense.ndim:
        raise ShapeMismatchError(
            f"weights of shape {list(dense.shape)} with inputs along dimension {matrix.input_dim}: wanted a "
            "matrix, or a stack of them whose first dimension counts them"
        )
    if dense.ndim == 3 and matrix.input_dim in {0, -3}:
        raise ShapeMismatchError("the first dimension of a stack counts its matrices: it has no inputs")
    wanted = (*dense.shape[: dense.ndim - 2], matrix.features, matrix.features)
    if tuple(moment.shape) != wanted:
        raise ShapeMismatchError(
            f"a second moment of shape {list(moment.shape)} for weights of shape {list(dense.shape)}, wanted "
            f"{list(wanted)}"
        )
    if matrix.fixed is not None and matrix.fixed.shape != dense.shape:
        raise ShapeMismatchError(
            f"fixed has shape {list(matrix.fixed.shape)}, the weights have {list(dense.shape)}"
        )
