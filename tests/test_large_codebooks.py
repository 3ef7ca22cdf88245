"""SimVQ, IBQ and the entropy loss in blocks: closed forms, and memory that does not grow with tokens x codes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import relative_error
from tiny import tiny_quantizer
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vqgan_accel.models.quantizers import EntropyQuantizer, IBQQuantizer, SimVQQuantizer, base, entropy, ibq
from vqgan_accel.models.quantizers.base import Gradient
from vqgan_accel.models.quantizers.entropy import LOG_EPS
from vqgan_accel.sections import Duration, Reinit
from vqgan_accel.training.codebook import CodebookUsage, initialise_by_kmeans, reinitialise_rare

K, D = 32, 4


def build_simvq(**settings: Any) -> SimVQQuantizer:
    torch.manual_seed(0)
    quantizer = tiny_quantizer("simvq", num_codes=K, embedding_dim=D, **settings).build()
    assert isinstance(quantizer, SimVQQuantizer)
    return quantizer


def build_ibq(num_codes: int = K, **settings: Any) -> IBQQuantizer:
    torch.manual_seed(0)
    quantizer = tiny_quantizer("ibq", num_codes=num_codes, embedding_dim=D, **settings).build()
    assert isinstance(quantizer, IBQQuantizer)
    return quantizer


def build_entropy(**settings: Any) -> EntropyQuantizer:
    torch.manual_seed(0)
    special = {"entropy_temperature": 0.5, "init": "normal"}
    quantizer = tiny_quantizer("entropy", num_codes=K, embedding_dim=D, **special, **settings).build()
    assert isinstance(quantizer, EntropyQuantizer)
    return quantizer


def latents_of(batch: int = 3, seed: int = 5) -> Tensor:
    return torch.randn(batch, D, 5, 4, generator=torch.Generator().manual_seed(seed))


def flat(grid: Tensor) -> Tensor:
    """(B, D, h, w) -> (M, D)"""
    return grid.movedim(1, -1).reshape(-1, grid.shape[1])


# ---- SimVQ


def test_the_codes_of_simvq_are_a_linear_map_of_frozen_vectors_of_variance_one_over_d() -> None:
    torch.manual_seed(0)
    quantizer = SimVQQuantizer(4096, 64, 0.25)
    assert set(quantizer.state_dict()) == {"frozen", "projection.weight", "projection.bias"}
    assert {name for name, _ in quantizer.named_parameters()} == {"projection.weight", "projection.bias"}
    assert quantizer.frozen.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert quantizer.frozen.mean().abs() < 1e-3
    weight, bias = quantizer.projection.weight, quantizer.projection.bias
    expected = torch.stack([weight.double() @ c.double() + bias.double() for c in quantizer.frozen[:9]])
    torch.testing.assert_close(quantizer.codebook_vectors()[:9].double(), expected, rtol=1e-6, atol=1e-7)
    assert not quantizer.codebook_vectors().isclose(quantizer.frozen, atol=1e-3).all()


def test_the_gradient_of_the_map_is_the_sum_over_tokens_of_the_codes_gradient_times_its_frozen_vector() -> None:
    quantizer = build_simvq()
    latents = latents_of()
    output = quantizer(latents)
    output.loss.backward()
    weight, bias = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    vectors = quantizer.codebook_vectors().detach().double()
    for z, k in zip(flat(latents).double(), output.codes.flatten(), strict=True):
        slope = 2 * (vectors[k] - z) / latents.numel()  # of the codebook loss alone, in e
        weight += torch.outer(slope, quantizer.frozen[k].double())
        bias += slope
    assert relative_error(quantizer.projection.weight.grad.double(), weight) < 1e-6
    assert relative_error(quantizer.projection.bias.grad.double(), bias) < 1e-6


def test_a_step_of_simvq_moves_every_code_though_few_are_used() -> None:
    quantizer = build_simvq()
    optimizer = AdamW(quantizer.parameters(), lr=0.01)
    before, frozen = quantizer.codebook_vectors().detach(), quantizer.frozen.clone()
    output = quantizer(latents_of()[:1, :, :1, :1])
    output.loss.backward()
    optimizer.step()
    moved = (quantizer.codebook_vectors().detach() - before).norm(dim=1)
    assert output.codes.numel() == 1 and moved.min() > 1e-3
    assert torch.equal(quantizer.frozen, frozen)


def test_no_code_of_simvq_can_be_given_a_vector() -> None:
    assert list(build_simvq().lookups(latents_of())) == []
    settings = tiny_quantizer("simvq")
    assert settings.reinit is None and not settings.starts_from_latents
    with pytest.raises(ValueError, match="reinit_every"):
        tiny_quantizer("simvq", reinit_every="1 epoch")


@pytest.mark.slow
@pytest.mark.mutations
@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_simvq_learns_to_use_its_codes_and_the_gradient_to_its_latents_stays_bounded(gradient: Gradient) -> None:
    """What is said to explode with the rotation (vector-quantize-pytorch's issue 177) is |q| / |z|: the gradient is
    multiplied by it. The commitment holds it to about 1."""
    quantizer = build_simvq(gradient=gradient)
    encoder = torch.nn.Linear(6, D)
    decoder = torch.nn.Linear(D, 6)
    optimizer = AdamW([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], lr=0.01, weight_decay=0)
    data = torch.randn(512, 6, generator=torch.Generator().manual_seed(1))
    losses, ratios, used = [], [], []
    for _ in range(300):
        latents = encoder(data).T[None, :, :, None]
        output = quantizer(latents)
        loss = (decoder(flat(output.quantized)) - data).square().mean()
        optimizer.zero_grad()
        (loss + output.loss).backward()
        optimizer.step()
        losses.append(loss.item())
        ratios.append((output.quantized.norm(dim=1) / latents.norm(dim=1)).median().item())
        used.append(len(output.codes.unique()))
    assert all(map(math.isfinite, losses)) and losses[-1] < 0.75 * losses[0]
    assert used[-1] >= 0.9 * K
    assert max(ratios) < 3 and 0.8 < ratios[-1] < 1.1


# ---- IBQ


def test_the_code_of_ibq_has_the_largest_product_however_the_tokens_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, latents = build_ibq(), latents_of()
    expected = (flat(latents).double() @ quantizer.codebook.detach().double().T).argmax(1)
    for most in (ibq.MAX_DISTANCES, 7 * K, 1):
        monkeypatch.setattr(ibq, "MAX_DISTANCES", most)
        codes = quantizer.eval().choose(latents)
        assert codes.shape == (3, 5, 4) and torch.equal(codes.flatten(), expected)
    nearest = torch.cdist(flat(latents), quantizer.codebook).argmin(1)
    assert not torch.equal(expected, nearest)


def test_gradients_of_every_code_and_latent_have_their_closed_form_for_three_codes() -> None:
    """p = softmax(z C^T); with a_j = g . C_j the logit of code j has the gradient s_j = p_j (a_j - sum_k p_k a_k)."""
    quantizer = build_ibq(3, entropy_ratio=0.0, codebook_cost=0.3).double()
    latents = latents_of(1).double().requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = quantizer.quantize(latents, None)
    ((output.quantized * weights).sum() + output.loss).backward()
    codebook, codes = quantizer.codebook.detach(), output.codes.flatten()
    assert len(codes.unique()) == 3
    loss, of_codebook, of_latents = 0.0, torch.zeros(3, D, dtype=torch.float64), []
    numbers = latents.numel()
    for z, w, code in zip(flat(latents.detach()), flat(weights), codes, strict=True):
        products = [float(z @ codebook[j]) for j in range(3)]
        assert max(range(3), key=lambda j: products[j]) == code
        exponentials = [math.exp(product) for product in products]
        p = [each / sum(exponentials) for each in exponentials]
        q = codebook[code]
        g = w + 2 * (q - z) / numbers  # of the decoder, and of |z - e|^2
        a = [float(g @ codebook[j]) for j in range(3)]
        s = [p[j] * (a[j] - sum(p[k] * a[k] for k in range(3))) for j in range(3)]
        loss += (2 + 0.3) * float((z - q).square().sum()) / numbers
        of_latents.append(sum(s[j] * codebook[j] for j in range(3)) + 2 * 2 * (z - q) / numbers)
        for j in range(3):
            of_codebook[j] += s[j] * z
        of_codebook[code] += g + 0.3 * 2 * (q - z) / numbers
    assert output.loss.item() == pytest.approx(loss, rel=1e-12)
    assert relative_error(flat(latents.grad), torch.stack(of_latents)) < 1e-12
    assert relative_error(quantizer.codebook.grad, of_codebook) < 1e-12


def test_ibq_is_the_dense_formula_of_its_authors() -> None:
    quantizer = build_ibq(entropy_ratio=0.2, entropy_temperature=0.7).double()
    latents = latents_of().double().requires_grad_()
    weights = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    output = quantizer.quantize(latents, None)
    ours = torch.autograd.grad((output.quantized * weights).sum() + output.loss, [latents, quantizer.codebook])

    tokens, codebook = flat(latents), quantizer.codebook
    soft = (tokens @ codebook.T).softmax(1)
    hard = F.one_hot(soft.argmax(1), K).double()
    one, two = (hard - soft.detach() + soft) @ codebook, hard @ codebook
    loss = ((one - tokens) ** 2).mean() + ((two.detach() - tokens) ** 2).mean()
    loss = loss + 0.25 * ((two - tokens.detach()) ** 2).mean()
    p = (tokens @ codebook.T / 0.7).softmax(1)
    mean = p.mean(0)
    loss = loss + 0.2 * (-(p * p.log()).sum(1).mean() + (mean * (mean + LOG_EPS).log()).sum())
    dense = torch.autograd.grad((one * flat(weights)).sum() + loss, [latents, codebook])
    assert torch.equal(output.codes.flatten(), soft.argmax(1))
    torch.testing.assert_close(flat(output.quantized), two)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    for mine, theirs in zip(ours, dense, strict=True):
        assert relative_error(mine, theirs) < 1e-12
    assert ours[1].abs().sum(1).min() > 0  # every code


def test_a_revived_code_of_ibq_is_a_latent_and_its_moments_are_forgotten() -> None:
    quantizer = build_ibq()
    optimizer = AdamW(quantizer.parameters(), lr=1e-3)
    latents = latents_of()
    output = quantizer(latents)
    output.loss.backward()
    optimizer.step()
    usage = CodebookUsage((K,), torch.device("cpu"))
    usage.add(output.codes)
    usage.apply_update()
    dead = usage.counts == 0
    kept = quantizer.codebook.detach().clone()
    replaced = reinitialise_rare(quantizer, optimizer, usage, [latents], Reinit(Duration(1, "epochs"), 0, "latents"), 3)
    assert 0 < replaced == dead.sum() < K
    among = (quantizer.codebook[dead][:, None] == flat(latents)).all(2).sum(1)
    assert among.tolist() == [1] * replaced
    assert torch.equal(quantizer.codebook[~dead], kept[~dead])
    assert not optimizer.state[quantizer.codebook]["exp_avg"][dead].any()
    initialise_by_kmeans(quantizer, [latents], 0)
    found = (flat(latents)[:, None] - quantizer.codebook).square().sum(2).amin(1).mean()
    assert found < 0.5 * (flat(latents)[:, None] - kept).square().sum(2).amin(1).mean()


def test_new_codes_of_ibq_are_standard_normal() -> None:
    quantizer = IBQQuantizer(4096, 16, 0.25, 0.05, 0.01)
    assert quantizer.codebook.std().item() == pytest.approx(1, rel=0.01)
    assert IBQQuantizer(4096, 16, 0.25, 0.05, 0.01, "uniform").codebook.abs().max() <= 1 / 4096


# ---- blocks of tokens


class LargestTensor(TorchDispatchMode):
    """How many entries the largest tensor has that an operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = (each.numel() for each in tree_leaves(found) if isinstance(each, Tensor))
        self.entries = max(self.entries, *sizes, 0)
        return found


@contextmanager
def blocks_of(entries: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    with patch.context() as changed:
        for module, name in ((base, "MAX_DISTANCES"), (ibq, "MAX_DISTANCES"), (ibq, "BLOCK")):
            changed.setattr(module, name, entries)
        changed.setattr(entropy, "MAX_LOGITS", entries)
        changed.setattr(entropy, "BLOCK", entries)
        yield


CASES = {
    "ibq": lambda: build_ibq(entropy_ratio=0.3, entropy_temperature=0.5),
    "entropy": build_entropy,
    "entropy, argmax": lambda: build_entropy(entropy_target="argmax"),
    "entropy, unit vectors": lambda: build_entropy(l2_normalize=True),
}


def learnt(case: str) -> tuple[dict[str, Tensor], int, int]:
    """Values and gradients; entries of the largest tensor; entries kept from the forward to the backward pass."""
    quantizer = CASES[case]()
    latents = latents_of().requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = quantizer(latents)
            loss = output.quantized.sin().sum() + output.loss
        loss.backward()
    values = {"loss": output.loss.detach(), "codes": output.codes, "quantized": output.quantized.detach()}
    values |= {"latents": latents.grad, "codebook": quantizer.codebook.grad, **output.metrics}
    return values, largest.entries, max(kept)


@pytest.mark.parametrize("tokens", [1, 7, 59])
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_tokens_change_rounding_only_and_no_tensor_is_larger_than_one(
    case: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 tokens; the others of their tensors have 60 x D numbers, and K x D."""
    whole, most, held = learnt(case)
    assert most == 60 * K and held >= (60 * K if case != "ibq" else 0)
    with blocks_of(tokens * K, monkeypatch):
        blocks, largest, kept = learnt(case)
    assert largest <= max(tokens * K, 60 * D, K * D)
    assert kept <= max(60 * D, K * D)
    assert blocks.keys() == whole.keys()
    for name, value in whole.items():
        assert relative_error(blocks[name].double(), value.double()) < 1e-5, name


@pytest.mark.parametrize("case", ["ibq", "entropy"])
def test_the_mean_distribution_is_that_of_all_blocks_and_processes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one of which has the first and one the last of two halves, in blocks of 7 tokens."""
    quantizer = CASES[case]()
    quantizer.ratio = 1.0
    latents = latents_of(4)
    means: list[Tensor] = []
    expected = quantizer(latents).metrics["entropy_loss"]
    with blocks_of(7 * K, monkeypatch):
        place = "vqgan_accel.models.quantizers.entropy.mean_over_processes_with_gradient"
        monkeypatch.setattr(place, lambda mean: means.append(mean.detach()) or mean)
        for half in latents.split(2):
            quantizer(half)
        torch.testing.assert_close(sum(means).sum(), torch.tensor(2.0))
        monkeypatch.setattr(place, lambda mean: sum(means) / 2)
        losses = [quantizer(half).metrics["entropy_loss"] for half in latents.split(2)]
    torch.testing.assert_close(sum(losses) / 2, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["ibq", "entropy"])
def test_what_the_backward_pass_makes_anew_is_made_as_it_was_under_autocast_too(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = []
    for inside in (False, True):
        quantizer, latents = CASES[case](), latents_of().requires_grad_()
        with blocks_of(7 * K, monkeypatch):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                output = quantizer(latents)
                loss = output.quantized.sin().sum() + output.loss
            loss.backward()
        gradients.append((latents.grad, quantizer.codebook.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_the_softmax_is_differentiated_in_float32_whatever_the_autocast_of_the_backward_pass() -> None:
    tokens, codebook = flat(latents_of()).requires_grad_(), torch.randn(K, D, requires_grad=True)
    gradients = []
    for inside in (False, True):
        passed = ibq.ThroughSoftmax.apply(torch.zeros(60, D), tokens, codebook)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(passed, [tokens, codebook], torch.ones_like(passed)))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0.1 and torch.equal(one, other)
