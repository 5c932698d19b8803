"""The signatures that users come with: parameters, their order and their defaults."""

from __future__ import annotations

import inspect

import pytest

import sparseprune
from sparseprune import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, View

SIGNATURES = {
    (ScopeSpec, "__init__"): "block, shape, name=None",
    (ScopeCoupling, "__init__"): "scopes, orders, name=None",
    (BlockSpec, "__init__"): "view, shape, name=None",
    (BlockCoupling, "__init__"): "specs, orders, name=None",
    (View, "__init__"): "param, shape, stride",
    (ScopeSpec, "block_to_scope"): "b, reorder=True, merge=False",
    (ScopeSpec, "block_norms"): "values=None",
    (ScopeSpec, "kth_largest"): "element_values, nnz",
    (ScopeCoupling, "kth_largest"): "k, values=None",
    (ScopeSpec, "kth_mid"): "element_values, nnz, k_weight=1.0",
    (ScopeSpec, "hard_threshold"): "thresholds=None, nnz=None, values=None",
    (ScopeSpec, "get_masks"): "nnz, values=None, block_scores=None, block_mask=None",
    (
        ScopeSpec,
        "soft_threshold",
    ): "thresholds, conditioners=None, scale=False, max_iter=20, atol=1e-08, eps=None",
    (ScopeSpec, "nnz"): "eps=1e-08",
    (ScopeSpec, "sparsity_to_nnz"): "sparsity",
    (BlockSpec, "norms"): "values=None, p=2",
    (BlockSpec, "block_view"): "values=None, reorder=True, merge=False",
    (BlockSpec, "get_masks"): "block_mask",
    (BlockSpec, "hard_threshold"): "thresholds, values=None",
    (BlockSpec, "reduce"): "values, fn",
    (BlockSpec, "apply_multiplier"): "grid",
    (View, "from_existing"): "tensor",
}


@pytest.mark.parametrize(("of", "name"), SIGNATURES, ids=lambda one: getattr(one, "__name__", one))
def test_what_users_call_has_its_parameters_and_defaults(of: type, name: str) -> None:
    found = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in inspect.signature(getattr(of, name)).parameters.values()
        if each.name != "self" and each.kind is not each.KEYWORD_ONLY
    ]
    wanted = SIGNATURES[of, name].split(", ")
    assert found[: len(wanted)] == wanted
    # What was added since stands behind and may be left out.
    assert all("=" in one for one in found[len(wanted) :])


def test_what_users_import_is_there() -> None:
    for name in ("SparseBlock", "SparseScope", "View", "load_masks", "__version__"):
        assert hasattr(sparseprune, name)
