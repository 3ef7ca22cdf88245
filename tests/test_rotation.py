"""The rotation trick (Fifty et al. 2024, arXiv 2410.06424): its Jacobian, and what it leaves of the forward pass."""

from __future__ import annotations

import pytest
import torch
from tiny import NEAREST, tiny_quantizer
from torch import Tensor

from vqgan_accel.models.quantizers import CodebookQuantizer
from vqgan_accel.models.quantizers.base import rotated, straight_through

D = 5


def vectors(number: int, seed: int) -> Tensor:
    """(number, D) float64"""
    return torch.randn(number, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def jacobian(z: Tensor, q: Tensor) -> Tensor:
    """(D, D): of the rotated q in z"""
    return torch.autograd.functional.jacobian(lambda x: rotated(x[None], q[None])[0], z)


def angle(a: Tensor, b: Tensor) -> float:
    return torch.acos((a @ b / a.norm() / b.norm()).clamp(-1, 1)).item()


@pytest.mark.parametrize("seed", range(4))
def test_the_jacobian_is_the_rotation_in_the_plane_of_both_times_the_ratio_of_their_lengths(seed: int) -> None:
    z, q, g, elsewhere = vectors(4, seed) * torch.tensor([[1.0], [3.0], [1.0], [1.0]])
    of_z, ratio = jacobian(z, q), q.norm() / z.norm()
    torch.testing.assert_close(of_z.T @ of_z, ratio**2 * torch.eye(D, dtype=torch.float64))
    assert torch.linalg.det(of_z) > 0  # no reflection
    torch.testing.assert_close(of_z @ z, q)
    # what is orthogonal to both stays, but for its length
    plane = torch.linalg.qr(torch.stack([z, q], 1)).Q
    beside = elsewhere - plane @ (plane.T @ elsewhere)
    torch.testing.assert_close(of_z @ beside, ratio * beside)
    # a gradient lies to z as it lay to q, and is |q| / |z| times as long
    assert angle(of_z.T @ g, z) == pytest.approx(angle(g, q), abs=1e-7)
    assert (of_z.T @ g).norm() == pytest.approx(ratio * g.norm())


def test_the_jacobian_is_the_identity_where_code_and_latent_are_equally_long_and_parallel() -> None:
    (z,) = vectors(1, 0)
    torch.testing.assert_close(jacobian(z, z), torch.eye(D, dtype=torch.float64))
    torch.testing.assert_close(jacobian(z, 2 * z), 2 * torch.eye(D, dtype=torch.float64))
    torch.testing.assert_close(jacobian(z, -z) @ z, -z)
    through = torch.autograd.functional.jacobian(lambda x: straight_through(x[None], z[None])[0], z)
    assert torch.equal(through, torch.eye(D, dtype=torch.float64))


def test_every_position_is_turned_by_itself_and_the_value_is_the_code() -> None:
    z, q = vectors(12, 1).view(2, D, 3, 2), vectors(12, 2).view(2, D, 3, 2)
    z.requires_grad_()
    weights = vectors(12, 3).view(2, D, 3, 2)
    turned = rotated(z, q)
    torch.testing.assert_close(turned, q, rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad((turned * weights).sum(), z)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                expected = jacobian(z[b, :, i, j].detach(), q[b, :, i, j]).T @ weights[b, :, i, j]
                torch.testing.assert_close(gradient[b, :, i, j], expected)


@pytest.mark.parametrize(("z_scale", "q_scale"), [(0, 1), (1, 0), (0, 0), (1e-30, 1)])
def test_no_latent_or_code_makes_a_gradient_that_is_no_number(z_scale: float, q_scale: float) -> None:
    z = (z_scale * vectors(2, 0)).float().T[None, :, :, None].requires_grad_()
    q = (q_scale * vectors(2, 1)).float().T[None, :, :, None]
    turned = rotated(z, q)
    turned.sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()
    torch.testing.assert_close(turned.detach(), q)


@pytest.mark.parametrize("name", NEAREST)
def test_a_quantizer_with_it_gives_the_same_codes_loss_and_values_and_another_gradient(name: str) -> None:
    found = []
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(0)
        quantizer = tiny_quantizer(name, gradient=gradient).build()
        assert isinstance(quantizer, CodebookQuantizer)
        for key in ("codebook", "sums"):
            if hasattr(quantizer, key):
                getattr(quantizer, key).data.normal_()
        latents = torch.randn(2, 8, 3, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = quantizer(latents)
        (of_decoder,) = torch.autograd.grad(output.quantized.sum(), latents, retain_graph=True)
        found.append((output, of_decoder))
    (plain, through), (turned, rotation) = found
    assert torch.equal(plain.codes, turned.codes) and torch.equal(plain.loss, turned.loss)
    torch.testing.assert_close(plain.quantized, turned.quantized, rtol=0, atol=1e-5)
    assert torch.equal(through, torch.ones_like(through))
    ratio = turned.quantized.norm(dim=1) / latents.norm(dim=1)
    torch.testing.assert_close(rotation.norm(dim=1), ratio * 8**0.5, rtol=1e-4, atol=0)


def test_gradients_are_those_of_vector_quantize_pytorch() -> None:
    module = pytest.importorskip("vector_quantize_pytorch.vector_quantize_pytorch")
    z, q, weights = vectors(9, 1).requires_grad_(), vectors(9, 2), vectors(9, 3)
    (ours,) = torch.autograd.grad((rotated(z, q) * weights).sum(), z)
    (theirs,) = torch.autograd.grad((module.rotate_to(z, q) * weights).sum(), z)
    torch.testing.assert_close(ours, theirs)
