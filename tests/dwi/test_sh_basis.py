"""Coefficients in turned axes are the same function, in every basis that DIPY has."""

from itertools import permutations, product

import numpy as np
import pytest
from dipy.core.sphere import Sphere
from dipy.reconst.shm import sh_to_sf

from tractkit.dwi.sh_basis import SH_BASES, ShBasis, sh_turn

pytestmark = pytest.mark.filterwarnings("ignore:The legacy:PendingDeprecationWarning")
SIGNED = [np.diag(signs)[list(axes)] for axes in permutations(range(3)) for signs in product((1.0, -1.0), repeat=3)]


def values(sh, points, basis: ShBasis, order: int):
    return sh_to_sf(sh, Sphere(xyz=points), sh_order_max=order, basis_type=basis.basis, full_basis=basis.full,
                    legacy=basis.legacy)


@pytest.mark.parametrize("name", SH_BASES)
def test_the_function_is_the_same_in_turned_axes(name):
    rng, basis = np.random.default_rng(0), ShBasis.parse(name)
    points = rng.normal(size=(40, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    n = 25 if basis.full else 15
    sh, oblique = rng.normal(size=n), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for axes in [*SIGNED[::5], oblique]:
        turned = sh_turn(basis, n, axes) @ sh
        np.testing.assert_allclose(values(turned, points @ axes.T, basis, 4), values(sh, points, basis, 4), atol=1e-6)


@pytest.mark.parametrize("name", ["descoteaux07_legacy", "tournier07", "descoteaux07_full"])
def test_flips_and_the_way_back_are_exact(name):
    basis = ShBasis.parse(name)
    n = 49 if basis.full else 28
    for axes in SIGNED:
        turn = sh_turn(basis, n, axes)
        np.testing.assert_allclose(sh_turn(basis, n, axes.T) @ turn, np.eye(n), atol=1e-9)
        if np.count_nonzero(np.diag(axes)) == 3:  # only flips
            assert np.array_equal(np.abs(turn), np.eye(n))
