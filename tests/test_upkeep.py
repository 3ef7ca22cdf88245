"""How the codebook is looked after in a run: what is said of it, and to whom."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import metrics
from tiny import QUANTIZERS, tiny_config, tiny_quantizer

from vqgan_accel import evaluate, load_tokenizer
from vqgan_accel.evaluation.measures.codes import error_sums, quantization_error
from vqgan_accel.training import upkeep
from vqgan_accel.training.codebook import CodebookUsage
from vqgan_accel.training.loop import train
from vqgan_accel.training.round import Round
from vqgan_accel.training.upkeep import health, remedies, warn_of_collapse

# ---- norms and the error of quantization


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_the_error_is_the_mean_square_between_latents_and_their_codes_vectors(kind: str) -> None:
    torch.manual_seed(0)
    quantizer = tiny_quantizer(kind).build().eval()
    latents = torch.randn(3, quantizer.input_channels, 4, 2)
    output = quantizer(latents)
    sums = error_sums(quantizer, latents, output.codes)
    if kind == "gumbel":
        assert sums is None
        return
    z = quantizer.compared(latents)
    assert sums is not None and z is not None
    expected = (z - output.quantized).square().sum() / z.square().sum()
    assert quantization_error(sums) == pytest.approx(expected.item(), rel=1e-5)
    assert quantization_error(error_sums(quantizer, 0 * latents, 0 * output.codes) * 0) == 0


def test_health_is_that_of_all_rounds_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    quantizer = tiny_quantizer("standard").build()
    quantizer.codebook.data.normal_()
    latents = torch.randn(4, 8, 4, 2)
    codes = quantizer.choose(latents)
    rounds = [Round(codes[part], latents[part], {}, None) for part in (slice(0, 1), slice(1, 3), slice(3, 4))]
    whole = (latents - quantizer.codes_to_latents(codes)).square().sum() / latents.square().sum()
    found = health(quantizer, rounds)
    assert found["quantization_error"] == pytest.approx(whole.item(), rel=1e-5)
    assert found["codebook_norm"] == pytest.approx(quantizer.codebook.norm(dim=1).mean().item(), rel=1e-6)
    other = error_sums(quantizer, latents[3:], codes[3:])
    monkeypatch.setattr(upkeep, "sum_over_processes", lambda mine: mine + other)
    assert health(quantizer, rounds[:2])["quantization_error"] == pytest.approx(whole.item(), rel=1e-5)
    assert health(quantizer, []).keys() == {"codebook_norm"}  # of a step that was skipped


@pytest.mark.seconds
def test_a_run_logs_them_for_each_epoch_and_each_validation(tmp_path: Path) -> None:
    training = {"max_steps": 4, "validation_metrics": ["codebook"], "best_metric": "quantization_error"}
    run = train(tiny_config(tmp_path, training=training))
    lines = metrics(run)
    epochs = [line for line in lines if "codebook_norm" in line]
    assert [line["step"] for line in epochs] == [2, 4] and all(line["quantization_error"] > 0 for line in epochs)
    [*_, last] = [line for line in lines if "validation/quantization_error" in line]
    result = evaluate(run, output=tmp_path / "results", overrides=["evaluation.metrics=[codebook]"])["results"]
    assert result["quantization_error"] == pytest.approx(last["validation/quantization_error"], rel=1e-6)
    tokenizer = load_tokenizer(run)
    assert epochs[-1]["codebook_norm"] == pytest.approx(
        tokenizer.quantizer.codebook.norm(dim=1).mean().item(), rel=1e-6
    )
    assert (run / "codebook.png").stat().st_size > 1000


# ---- a warning


def told(kind: str, counts: list[int], step: int = 9, warmup: int = 5, sizes: tuple[int, ...] | None = None) -> Any:
    said: list[str] = []
    usage = CodebookUsage(sizes or (len(counts),), torch.device("cpu"))
    usage.counts += torch.tensor(counts)
    run: Any = SimpleNamespace(
        usage=usage,
        plan=SimpleNamespace(warmup_steps=warmup, usage_every=4),
        config=SimpleNamespace(quantizer=tiny_quantizer(kind)),
        progress=SimpleNamespace(step=step),
        tracking=SimpleNamespace(say=said.append),
    )
    return run, said


@pytest.mark.parametrize(
    ("counts", "step", "warned"),
    [
        ([500] + 99 * [0], 9, True),
        (10 * [50] + 90 * [0], 9, False),  # a tenth
        (9 * [50] + 91 * [0], 9, True),
        (9 * [50] + 91 * [0], 5, False),  # still warming up
        (9 * [1] + 91 * [0], 9, False),  # nine tokens cannot use more than nine codes
    ],
)
def test_few_codes_in_use_are_told_after_the_warm_up(counts: list[int], step: int, warned: bool) -> None:
    run, said = told("standard", counts, step)
    warn_of_collapse(run)
    assert bool(said) == warned


def test_the_warning_names_what_helps_and_comes_once_until_the_codes_recover() -> None:
    run, said = told("standard", [500] + 99 * [0])
    for _ in range(3):
        warn_of_collapse(run)
    assert said == [
        "step 9: 1.0% of the codes were in use in the last 4 steps; what helps: quantizer.reinit_every='1 epoch', or "
        "in steps; quantizer.init=kmeans; quantizer.l2_normalize=true with quantizer.embedding_dim=8; another "
        "quantizer.type: ema, simvq, or fsq, whose codes need no care (docs/quantizers.md)"
    ]
    run.usage.counts += 5
    warn_of_collapse(run)
    run.usage.counts[1:] = 0
    warn_of_collapse(run)
    assert len(said) == 2


def test_of_several_codebooks_each_can_use_as_many_codes_as_it_has_tokens() -> None:
    run, said = told("residual", [40] + 39 * [0] + [40] + 39 * [0], sizes=(40, 40))
    warn_of_collapse(run)
    assert len(said) == 1 and "2.5% of the codes" in said[0] and "quantizer.inner.init=kmeans" in said[0]


def test_what_is_set_already_is_no_remedy() -> None:
    section = tiny_quantizer("entropy", reinit_every="5 steps", init="sphere", l2_normalize=True)
    assert remedies(section) == ["another quantizer.type: ema, simvq, or fsq, whose codes need no care"]
    assert "quantizer.entropy_ratio=0.1" in remedies(tiny_quantizer("entropy", entropy_ratio=0.0))
