"What `deqdet.ops.states` does to tensors, tuples and named tuples, and limit cases of the Jacobian's measures"
from typing import NamedTuple
import pytest, torch
from torch import Tensor
from torch.testing import assert_close
from deqdet.ops.states import (by_autograd, by_differences, finite_images, flat, jac_penalty, pack, part_norms, parts, put, rebuild,
                               spectral_radius, take, units, unpack, wide)


class Two(NamedTuple):
    content: Tensor
    place: Tensor


STATES = [torch.randn(3, 4), torch.randn(3), (torch.randn(3, 2), torch.randn(3, 5, 2)),
          Two(torch.randn(3, 2), 300*torch.randn(3, 2))]


@pytest.mark.parametrize('z', STATES, ids=lambda z: type(z).__name__)
def test_packing_is_undone(z):
    again = unpack(pack(z, units(z)), units(z), z)
    assert type(again) is type(z)
    for a, b in zip(parts(again), parts(z)): assert_close(a, b)


def test_packing_keeps_shapes_and_precisions():
    z = Two(torch.randn(2, 5, 16).half(), 300*torch.randn(2, 5, 2).float())
    x = pack(z, units(z))
    assert x.shape == (2, 5*18) and x.dtype == torch.float32
    assert_close(x.norm(dim=1), torch.full((2,), 2**.5), atol=1e-3, rtol=0)
    w = unpack(x, units(z), z)
    assert w.content.dtype == torch.float16 and w.content.shape == (2, 5, 16)
    assert_close(w.place, z.place, atol=1e-3, rtol=0)


@pytest.mark.parametrize('z', STATES, ids=lambda z: type(z).__name__)
def test_put_is_the_inverse_of_take(z):
    rows = torch.tensor([2, 0])
    back = put(rebuild(z, [torch.zeros_like(p) for p in parts(z)]), rows, take(z, rows))
    for a, b in zip(parts(back), parts(z)):
        assert torch.equal(a[rows], b[rows])
        assert not a[1].any()


def test_norms_are_taken_in_single_precision_at_least():
    x = torch.full((1, 4), 200.).half()  # the sum of squares is beyond half precision
    assert part_norms(x).item() == 400 and part_norms(x).dtype == torch.float32
    assert wide(x.double()).dtype == torch.float64
    assert flat(torch.ones(3)).shape == (3, 1) and flat(torch.ones(3, 2, 2), 2).shape == (3, 2, 2)


def test_map_without_a_slope_has_radius_zero():
    assert spectral_radius(lambda z: torch.full_like(z, 2.), torch.ones(2, 3)).tolist() == [0., 0.]


@pytest.mark.parametrize('product', [by_autograd, by_differences])
def test_penalty_of_a_known_map(product):
    "Half the identity: every diagonal entry is a half"
    torch.manual_seed(0)
    z = torch.ones(4, 100, dtype=torch.float64)
    penalty = jac_penalty(lambda z: .5*z, z, draws=50, product=product)
    assert abs(penalty.item() - .25) < .02


def test_finite_images():
    z = Two(torch.ones(4, 1, 1), torch.zeros(4, 1, 1))
    z.content[1] = torch.inf
    z.place[2] = torch.nan
    assert finite_images(z).tolist()==[True, False, False, True]
