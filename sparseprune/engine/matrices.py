"""Matrices to reconstruct: dense weights, and second moments of inputs and gradients.

Owns `Matrix`, how its moments are checked, damped and scaled, and the units that matrices share. Called by
reconstruction, by what counts its losses, and by users.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from msgspec import Struct
from torch import Tensor

from sparseprune.engine.scoring import round_to
from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence

Metric = Literal["outputs", "loss"]
_UNSEEN = 1e-18  # the scale of weights without known inputs; its square is still a float32
_UNMOVED = 1e-9  # the scale of rows to which the loss does not answer: a product with `_UNSEEN` is a float32
_GRADIENT_DAMP = 0.1  # of the gradients, of which few are seen; measured in tests/benchmarks/README.md
_FAINT = 64  # units of rounding below which an input says nothing beside the loudest one
_USUAL = 30  # weights between 2^-30 and 2^30 are not scaled
_ROUNDED = 1e-4  # the error of sums of products in float32, with a unit diagonal
SAFETY = 4  # smallest eigenvalue of a system, in units of the rounding of its entries
_ROWS = 1 << 18  # elements to sum at one time


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Weights (out, in), or (matrices, out, in) such as experts, and the second moment of what they multiply.

    `moment` is E[x x^T] up to a factor: (in, in), for experts (matrices, in, in); `input_dim` says which
    dimension of `dense` the inputs lie along, so that (in, out) is as good. Where `fixed` (bool, of the shape
    of `dense`) is True weights stay as they are, whatever becomes of the others.

    `gradients` is E[g g^T] up to a factor, g the gradient of a loss at the outputs: (out, out), for experts
    (matrices, out, out). With them what a change D of the weights costs is tr(G D H D^T), to second order
    what the loss becomes worse by (the Fisher information, as a Kronecker product: Martens & Grosse 2015,
    arXiv 1503.05671); without them it is tr(D H D^T), what outputs change by. Where (out, out) is too large,
    (groups, size, size) holds its diagonal blocks, for experts (matrices, groups, size, size): those of
    consecutive groups of `size` outputs, between which G counts as zero.

    >>> import torch
    >>> Matrix(torch.ones(2, 3), torch.eye(3), gradients=torch.eye(2)).metric
    'loss'
    >>> Matrix(torch.ones(4, 3), torch.eye(3), gradients=torch.eye(2).expand(2, 2, 2)).gradient_moments.shape
    torch.Size([1, 2, 2, 2])
    >>> Matrix(torch.ones(2, 3), torch.eye(3)).metric
    'outputs'

    Raises:
        ShapeMismatchError: shapes that do not go together.
        SparsityError: weights that are no floats or not finite; a moment with NaN or infinity, or one that is
            asymmetric or has directions of negative energy, by more than rounding.
    """

    dense: Tensor
    moment: Tensor
    input_dim: int = -1
    fixed: Tensor | None = None
    gradients: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)
        if not self.dense.dtype.is_floating_point:
            raise SparsityError(f"weights of {self.dense.dtype} cannot be reconstructed: wanted floats")
        if not bool(self.dense.to(self.work_dtype).isfinite().all()):
            raise SparsityError("the weights hold NaN or infinity: nothing can make up for these")
        _refuse_no_moments(self.moments, "inputs")
        if self.gradient_moments is not None:
            _refuse_no_moments(self.gradient_moments.flatten(0, 1), "gradients")

    @property
    def moments(self) -> Tensor:
        """The moments as (matrices, in, in), sharing their storage."""
        return self.moment if self.moment.ndim == 3 else self.moment.unsqueeze(0)

    @property
    def gradient_moments(self) -> Tensor | None:
        """The moments of the gradients as (matrices, groups, size, size), sharing their storage."""
        if self.gradients is None:
            return None
        grouped = self.gradients if self.gradients.ndim > self.dense.ndim else self.gradients.unsqueeze(-3)
        return grouped if grouped.ndim == 4 else grouped.unsqueeze(0)

    @property
    def metric(self) -> Metric:
        """In what a change of the weights is measured."""
        return "outputs" if self.gradients is None else "loss"

    @property
    def unseen(self) -> list[int]:
        """The indices of matrices whose moment is zero: nothing is known of their inputs."""
        seen = (self.moment.diagonal(dim1=-2, dim2=-1) > 0).any(-1).reshape(-1)
        return [int(number) for number in (~seen).nonzero()]

    @property
    def features(self) -> int:
        """How many inputs a row has."""
        return int(self.dense.shape[self.input_dim])

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of the computation: float32, for float64 weights float64."""
        return torch.float64 if self.dense.dtype == torch.float64 else torch.float32

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the weights' shape as (matrices, out, in), sharing its storage."""
        moved = tensor.movedim(self.input_dim, -1)
        return moved if moved.ndim == 3 else moved.unsqueeze(0)

    def unrows(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`."""
        return (rows if self.dense.ndim == 3 else rows.squeeze(0)).movedim(-1, self.input_dim)

    def rounded(self, rows: Tensor) -> Tensor:
        """(matrices, out, in) in the weights' shape and dtype; its largest number where one is too large."""
        dtype = self.dense.dtype
        most = torch.finfo(dtype).max
        return round_to(self.unrows(rows).clamp(-most, most), dtype).contiguous()


class Units(Struct, frozen=True):
    """Weights count in units of 2^`weight`, moments of inputs and of gradients in units of 2^ an even number.

    In these no square or product of theirs leaves the range of a float, and powers of two round nothing.
    """

    weight: int = 0
    moment: int = 0
    gradients: int = 0

    @property
    def energy(self) -> int:
        """The power of two that energies of outputs count in."""
        return 2 * self.weight + self.moment

    @property
    def loss(self) -> int:
        """The power of two that changes of the loss count in."""
        return self.energy + self.gradients


def units_of(matrices: Sequence[Matrix]) -> Units:
    """Units for matrices that are compared with each other: the largest moment is about 1.

    Raises:
        SparsityError: some have gradients, and others have none.
    """
    gradients = [matrix.gradients for matrix in matrices if matrix.gradients is not None]
    if gradients and len(gradients) < len(matrices):
        raise SparsityError(
            f"{len(gradients)} of {len(matrices)} matrices that compete have gradients: wanted all or none, "
            "since changes of outputs and of the loss cannot be compared"
        )
    weight = _exponent([matrix.dense.to(matrix.work_dtype) for matrix in matrices])
    moment, gradient = (
        _exponent([one.diagonal(dim1=-2, dim2=-1) for one in moments])
        for moments in ([matrix.moment for matrix in matrices], gradients)
    )
    return Units(weight if abs(weight) > _USUAL else 0, moment + moment % 2, gradient + gradient % 2)


class ScaledGradients(Struct, frozen=True, eq=False):
    """What `Scaled` has of the gradients.

    `hessian` (matrices, groups, size, size) has a diagonal of 1 or a little more and is positive definite,
    `scale` is (matrices, out, 1), `damping` (matrices, 1) in float64.
    """

    hessian: Tensor
    scale: Tensor
    damping: Tensor

    def pushed(self, rows: Tensor) -> Tensor:
        """G D of some D (matrices, out, in)."""
        return by_blocks(self.hessian, rows)


def by_blocks(blocks: Tensor, rows: Tensor) -> Tensor:
    """The product of diagonal blocks (matrices, groups, size, size) with (matrices, groups * size, in)."""
    return (blocks @ rows.reshape(*blocks.shape[:3], rows.shape[-1])).flatten(1, 2)


class Scaled(Struct, frozen=True, eq=False):
    """A damped problem in coordinates in which the diagonal of its Hessian is 1, or a little more.

    `hessian` (matrices, in, in) is positive definite in the precision of the work; `dense`
    (matrices, out, in) is the weights, in `units`, times `scale` (matrices, 1, in). What was added to each
    diagonal of the moments, in `units`, is `damping` (matrices, 1), float64. Where all matrices have one and
    the same moment, these have it once, (1, in, in) and so on. `gradients` is None where a change is measured
    by the outputs alone.
    """

    hessian: Tensor
    dense: Tensor
    scale: Tensor
    units: Units
    damping: Tensor
    gradients: ScaledGradients | None = None

    @property
    def is_uncorrelated(self) -> bool:
        """Whether inputs and gradients are uncorrelated, so that no weight can make up for another."""
        sides = [self.hessian, *([] if self.gradients is None else [self.gradients.hessian])]
        return not any(bool((one - torch.diag_embed(diagonal_of(one))).any()) for one in sides)

    @property
    def unheard(self) -> Tensor:
        """Whether inputs say nothing, (matrices, 1, in), where rows make up for each other.

        With gradients weights of all inputs are mixed, and what is rounded of the others would move these.
        """
        if self.gradients is None:
            return torch.zeros_like(self.scale, dtype=torch.bool)
        loudest = self.scale.amax(-1, keepdim=True) if self.scale.numel() else 1.0
        return self.scale <= _FAINT * torch.finfo(self.scale.dtype).eps * loudest

    @property
    def summed(self) -> int | tuple[int, int]:
        """Dimensions of what is one problem: rows by themselves, with gradients all of a matrix."""
        return -1 if self.gradients is None else (-2, -1)

    def pushed(self, rows: Tensor) -> Tensor:
        """D H of some D in these coordinates, or G D H."""
        pushed = rows @ self.hessian
        return pushed if self.gradients is None else self.gradients.pushed(pushed)

    def scaled(self, rows: Tensor) -> Tensor:
        """Weights, (matrices, out, in) in the dtype of the work, in these coordinates."""
        found = times_power(rows, -self.units.weight) * self.scale
        return found if self.gradients is None else found * self.gradients.scale

    def unscaled(self, rows: Tensor) -> Tensor:
        """The inverse of `scaled`; infinite where a number is too large."""
        found = rows if self.gradients is None else rows / self.gradients.scale
        return times_power(found / self.scale, self.units.weight)


def scaled(matrix: Matrix, damp: float, units: Units | None = None) -> Scaled:
    """The problem of a matrix, its Hessian damped by `damp` times the mean of its diagonal.

    A Hessian that is singular then, as far as the precision of the work can tell, is damped by more, as
    little as it takes: see `_floor`. `units` are the matrix's own, unless it is compared with others.

    Raises:
        SparsityError: a negative damp.
    """
    (problem,) = all_scaled([matrix], damp, units or units_of([matrix]))
    return problem


def all_scaled(matrices: Sequence[Matrix], damp: float, units: Units) -> list[Scaled]:
    """The same of several, in common `units`: those of one and the same moment share one `hessian`."""
    if not damp >= 0:
        raise SparsityError(f"damp {damp}: wanted a number of 0 or more")
    known: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor]] = {}
    found = []
    for matrix in matrices:
        moments = _distinct(matrix.moments)
        place = (moments.data_ptr(), moments.shape, moments.stride(), moments.dtype, matrix.work_dtype)
        if place not in known:
            known[place] = _unit_diagonal(moments.unsqueeze(1), damp, units.moment, matrix.work_dtype)
        hessian, roots, damping = known[place]
        found.append(_scaled_by(matrix, units, hessian.squeeze(1), roots, damping))
    return found


def _distinct(moments: Tensor) -> Tensor:
    """One of the moments where they are all the same memory."""
    return moments[:1] if moments.stride(0) == 0 else moments


def _scaled_by(matrix: Matrix, units: Units, hessian: Tensor, roots: Tensor, damping: Tensor) -> Scaled:
    # Weights without inputs and damping get a tiny scale, so that they count next to nothing.
    scale = roots.unsqueeze(-2)
    dense = times_power(matrix.rows(matrix.dense).to(matrix.work_dtype), -units.weight) * scale
    if matrix.gradient_moments is None:
        return Scaled(hessian, dense, scale, units, damping)
    outer, outer_roots, outer_damping = _unit_diagonal(
        matrix.gradient_moments, _GRADIENT_DAMP, units.gradients, matrix.work_dtype
    )
    seen = (diagonal_of(matrix.moments) > 0).any(-1, keepdim=True)
    row_scale = torch.where(seen, outer_roots.clamp_min(_UNMOVED), 1.0).unsqueeze(-1)
    gradients = ScaledGradients(outer, row_scale, outer_damping)
    return Scaled(hessian, dense * row_scale, scale, units, damping, gradients)


def _unit_diagonal(
    moments: Tensor, damp: float, power: int, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Damped moments over the roots of their diagonal, these roots, and the damping, in units of 2^`power`.

    The first (matrices, groups, size, size) and the second (matrices, groups * size) are of the dtype `work`,
    the third (matrices, 1) is float64.
    """
    diagonal = times_power(diagonal_of(moments).to(torch.float64), -power)
    damping = damp * diagonal.mean((-2, -1), keepdim=True)
    roots = (diagonal + damping).sqrt().clamp(_UNSEEN, 1 / _UNSEEN).to(work)
    stored = times_power(roots.to(torch.promote_types(moments.dtype, work)), power // 2)
    hessian = moments.to(stored.dtype) / stored.unsqueeze(-1)
    hessian /= stored.unsqueeze(-2)
    hessian = (hessian + hessian.mT).mul_(0.5).to(work)
    # Where a square was rounded to zero, products with it are rounding errors.
    if not bool((diagonal > 0).all()):
        hessian.mul_((diagonal > 0).unsqueeze(-1)).mul_((diagonal > 0).unsqueeze(-2))
    hessian.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    exact = work == moments.dtype == torch.float64
    for one in hessian.flatten(0, 1):
        one.diagonal().add_(_floor(one, torch.finfo(torch.float64 if exact else torch.float32).eps))
    return hessian, roots.flatten(1), damping.squeeze(-1)


def diagonal_of(moments: Tensor) -> Tensor:
    """Of matrices (..., n, n), as (..., n) sharing their storage."""
    return moments.diagonal(dim1=-2, dim2=-1)


def times_power(tensor: Tensor, power: int) -> Tensor:
    """Floats times 2^`power`: exact, unless the result is out of their dtype's range."""
    if not power:
        return tensor
    # The whole power may be out of range itself.
    return tensor * 2.0 ** (power // 2) * 2.0 ** (power - power // 2)


def _exponent(tensors: Sequence[Tensor]) -> int:
    """Of the power of two above all magnitudes; 0 where all of them are 0."""
    most = max((float(one.abs().max()) for one in tensors if one.numel()), default=0.0)
    return math.frexp(most)[1]


def _floor(hessian: Tensor, eps: float) -> float:
    """The number to add to the unit diagonal of a Hessian (in, in) so that rounding its entries does no harm.

    0 where the smallest eigenvalue is `SAFETY` times the rounding error of all entries, which grows with the
    root of their number. Else the first of 2, 8, 32... such errors of which half makes it positive definite,
    so that the solution follows rounding errors in no direction.
    """
    margin = SAFETY * eps * math.sqrt(len(hessian))
    if _is_definite(hessian, -margin):
        return 0.0
    floor = 2 * margin
    while not _is_definite(hessian, floor / 2):
        floor *= 4
    return floor


def _is_definite(hessian: Tensor, added: float) -> bool:
    """Whether a symmetric matrix (in, in) is positive definite with something `added` to its unit diagonal.

    What is so in float32 by more than is rounded there needs no look in float64.
    """
    rounded = SAFETY * torch.finfo(torch.float32).eps * math.sqrt(len(hessian))
    for dtype, spare in ((torch.float32, rounded), (torch.float64, 0.0)):
        tried = hessian.to(dtype, copy=True)
        tried.diagonal().add_(added - spare)
        if not bool(cholesky_in_place(tried)[1]):
            return True
    return False


def cholesky_in_place(system: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of symmetric matrices, in their own memory, and where it failed: 0 for nowhere."""
    factor = system.mT  # as LAPACK stores it
    info = torch.empty(system.shape[:-2], dtype=torch.int32, device=system.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info


def _refuse_no_moments(moments: Tensor, what: str) -> None:
    """SparsityError where one of (matrices, size, size) is no sum of x x^T, rounded to its dtype."""
    if not bool(moments.isfinite().all()):
        raise SparsityError(f"the second moment of the {what} holds NaN or infinity")
    if bool((diagonal_of(moments) < 0).any()):
        raise SparsityError(f"the second moment of the {what} has a negative diagonal: it is none")
    for moment in _distinct(moments):
        _refuse_no_moment(moment, what)


def _refuse_no_moment(moment: Tensor, what: str) -> None:
    size = len(moment)
    if not size:
        return
    info = torch.finfo(moment.dtype)
    power = _exponent([moment.diagonal()])
    power += power % 2
    diagonal = times_power(moment.diagonal().to(torch.float64), -power)
    # A square that was rounded to 0 was below the smallest number of the dtype.
    least = math.ldexp(info.smallest_normal * info.eps, -power)
    roots = diagonal.clamp_min(max(least, torch.finfo(torch.float64).smallest_normal)).sqrt()
    near = bool(roots.max() < roots.min() * 2**_USUAL)  # no quotient leaves the range of float32
    work = torch.promote_types(moment.dtype, torch.float32 if near else torch.float64)
    roots = times_power(roots, power // 2).to(work)
    tolerance = max(_ROUNDED, 2 * info.eps)
    unit = moment.to(work, copy=True).div_(roots.unsqueeze(-1)).div_(roots)
    step = max(1, _ROWS // size)
    for begin in range(0, size, step):
        rows, columns = unit[begin : begin + step], unit[:, begin : begin + step].T
        apart = (rows - columns).abs_()
        if bool(apart.amax() <= tolerance):
            continue
        wrong = (apart > tolerance * rows.abs().clamp_min(1.0)).nonzero()
        if len(wrong):
            row, column = int(wrong[0, 0]) + begin, int(wrong[0, 1])
            there, opposite = float(moment[row, column]), float(moment[column, row])
            raise SparsityError(
                f"the second moment of the {what} is none: it is not symmetric, {there:.6g} at "
                f"[{row}, {column}], {opposite:.6g} at [{column}, {row}]; calibrate again"
            )
    unit.diagonal().fill_(1.0)
    if not _is_definite(unit, max(_ROUNDED, 2 * info.eps * math.sqrt(size))):
        raise SparsityError(
            f"the second moment of the {what} is none: it has directions of negative energy; calibrate again"
        )


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
    if matrix.gradients is not None:
        _check_gradients(matrix, tuple(matrix.gradients.shape))
    refuse_unlike(dense, fixed=matrix.fixed)


def _check_gradients(matrix: Matrix, found: tuple[int, ...]) -> None:
    """That they are (out, out) or diagonal blocks of it, with the matrices of a stack in front."""
    dense = matrix.dense
    outputs = matrix.rows(dense).shape[-2]
    stack = tuple(dense.shape[: dense.ndim - 2])
    groups = found[len(stack)] if len(found) == dense.ndim + 1 else 0
    allowed = [(*stack, outputs, outputs)]
    if groups and outputs % groups == 0:
        allowed.append((*stack, groups, outputs // groups, outputs // groups))
    if found not in allowed:
        raise ShapeMismatchError(
            f"a second moment of gradients of shape {list(found)} for weights of shape {list(dense.shape)}, "
            f"wanted {[*stack, outputs, outputs]}, or {[*stack, 'groups', 'size', 'size']} with "
            f"groups * size = {outputs}"
        )


def refuse_unlike(dense: Tensor, **given: Tensor | None) -> None:
    for what, one in given.items():
        if one is not None and one.shape != dense.shape:
            raise ShapeMismatchError(
                f"{what} has shape {list(one.shape)}, the weights have {list(dense.shape)}"
            )
