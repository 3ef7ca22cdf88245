"""What rFID does not tell of a tokenizer: how well its codes can be predicted, and what can be read off them.

A small autoregressive transformer is trained on the codes of a data set for some minutes, and a linear classifier where
the images have classes. It ranks tokenizers of the same data and grid; it is no second stage and becomes none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from vqgan_accel.accelerator import start_accelerator
from vqgan_accel.config import Config, Metric
from vqgan_accel.evaluation.figures import image_grid
from vqgan_accel.evaluation.metrics import Metrics
from vqgan_accel.files import require_absent, write_json, written_as_a_whole
from vqgan_accel.models.opening import open_tokenizer
from vqgan_accel.models.quantizers import count_codes
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.models.weights import state_hash
from vqgan_accel.tokens.read import load_tokens, read_manifest

WIDTH, LAYERS, HEADS, RANK = 192, 6, 6, 32  # 2.7 million parameters and 33 for each code
BATCH = 64  # images
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
HELD_OUT = 10  # every tenth image
# of these the first that evaluation.metrics has
FRECHET: tuple[Metric, ...] = ("rfid", "fd_dinov2", "fd_efficientnet", "fd_mobilenet")


class Codes(NamedTuple):
    """Of a data set's images, those that are learnt from and those that are held out."""

    learnt: Tensor  # (N, L) int64
    held_out: Tensor  # (M, L)
    learnt_labels: Tensor | None  # (N,) int64
    held_out_labels: Tensor | None


def probe(
    model: str | Path,
    *,
    tokens: str | Path,
    output: str | Path,
    steps: int = 2000,
    samples: int = 64,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, float]:
    """Write output/probe.json and output/samples.png, and return what the first holds.

    model: what `load_tokenizer` takes; tokens: what `tokenize` wrote with it; steps: of training, with 64 images each;
    samples: images that are drawn and decoded. Results, of every tenth image, which is held out: `bits_per_token`, the
    model's cross-entropy, beside `entropy`, that of the codes' frequencies, which it has without any context;
    `bits_per_pixel`, what an image takes when it is coded by the model; a Frechet distance between decoded samples and
    decoded held-out codes, of the network that evaluation.metrics names (sample_rfid, sample_rfid_std, ...), from 2
    samples on; with labels `label_accuracy` (%) of a linear classifier on the mean code vector, beside
    `most_frequent_label` (%). ValueError or FileNotFoundError where the tokens are not this tokenizer's, or too few.
    """
    output = Path(output)
    require_absent(output)
    opened = open_tokenizer(model)
    tokenizer, config = opened.tokenizer, opened.config(overrides)
    manifest = read_manifest(Path(tokens))
    if manifest.get("tokenizer_sha256") != state_hash(tokenizer):
        raise ValueError(f"{tokens} holds codes of another tokenizer than {opened.folder}; tokenize with this one")
    codes = read_codes(Path(tokens))
    device = start_accelerator("no", config.training.timeout_minutes).device
    tokenizer.to(device)
    num_codes, grid = tokenizer.quantizer.num_codes, manifest["code_grid"]
    learner = fit(codes.learnt, num_codes, steps, seed, device)
    bits = bits_per_token(learner, codes.held_out)
    pixels = grid[-2] * grid[-1] * tokenizer.stride**2
    results = {
        "bits_per_token": bits,
        "entropy": entropy(codes.held_out, num_codes),
        "bits_per_pixel": bits * math.prod(grid) / pixels,
        **label_results(tokenizer, codes, grid),
    }
    drawn = draw(learner, samples, codes.learnt.shape[1], seed)
    images = torch.cat([decoded(tokenizer, part, grid) for part in drawn.split(BATCH)])
    results |= sample_distance(tokenizer, config, images, codes.held_out, grid)
    settings = {"steps": steps, "seed": seed, "samples": samples, "tokens": manifest, "images": len(codes.learnt)}
    with written_as_a_whole(output) as partial:
        write_json(partial / "probe.json", results | {"settings": settings})
        image_grid(images[:64]).save(partial / "samples.png")
    return results


def read_codes(folder: Path) -> Codes:
    """ValueError where there are too few."""
    rows = load_tokens(folder).with_format("numpy")
    if len(rows) < 2 * HELD_OUT:
        raise ValueError(f"{folder} holds codes of {len(rows)} images; a probe needs at least {2 * HELD_OUT}")
    held_out = np.asarray(rows["index"][:]) % HELD_OUT == 0
    parts = [_part(np.asarray(rows["codes"][:]), chosen) for chosen in (~held_out, held_out)]
    if "label" not in rows.column_names:
        return Codes(parts[0], parts[1], None, None)
    labels = [_part(np.asarray(rows["label"][:]), chosen) for chosen in (~held_out, held_out)]
    return Codes(parts[0], parts[1], labels[0], labels[1])


def _part(values: NDArray[Any], chosen: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(values[chosen].astype(np.int64))


# ---- the sequence model


class TokenModel(nn.Module):
    """A decoder-only transformer over L codes in raster order, of several codebooks one grid after another (Esser et
    al. 2021's second stage, small)."""

    def __init__(self, num_codes: int, length: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.codes = nn.Embedding(num_codes + 1, RANK)  # the last one begins a sequence
        self.read = nn.Linear(RANK, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.write = nn.Linear(WIDTH, RANK)
        self.bias = nn.Parameter(torch.zeros(num_codes))
        nn.init.normal_(self.codes.weight, std=RANK**-0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, n) int64, the first n of L codes -> logits (B, n + 1, K) of each and of the next, where there is one"""
        begin = codes.new_full((len(codes), 1), self.num_codes)
        sequence = torch.cat([begin, codes], 1)[:, : len(self.places)]
        mask = nn.Transformer.generate_square_subsequent_mask(sequence.shape[1], device=codes.device)
        x = self.read(self.codes(sequence)) + self.places[: sequence.shape[1]]
        x = self.write(self.layers(x, mask=mask, is_causal=True))
        return F.linear(x, self.codes.weight[: self.num_codes], self.bias)


def fit(codes: Tensor, num_codes: int, steps: int, seed: int, device: torch.device) -> TokenModel:
    """codes (N, L) int64; everything random comes from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TokenModel(num_codes, codes.shape[1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    warmup = max(1, steps // 20)
    bar = tqdm(batches_of(codes, steps, seed), total=steps, desc="probe", unit="step", dynamic_ncols=True)
    for step, batch in enumerate(bar):
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = LEARNING_RATE * min((step + 1) / warmup, decay)
        loss = code_losses(model, batch.to(device)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def batches_of(codes: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """`steps` times min(N, BATCH) rows, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield codes[torch.randint(len(codes), (min(len(codes), BATCH),), generator=generator)]


def code_losses(model: TokenModel, codes: Tensor) -> Tensor:
    """(B, L) -> (B, L) nats"""
    logits = model(codes[:, :-1])  # (B, L, K)
    return F.cross_entropy(logits.transpose(1, 2), codes, reduction="none")


@torch.no_grad()
def bits_per_token(model: TokenModel, codes: Tensor) -> float:
    """codes (N, L): the mean of -log2 of each one's probability, given those before it"""
    total = sum(float(code_losses(model, part.to(model.bias.device)).double().sum()) for part in codes.split(BATCH))
    return total / codes.numel() / math.log(2)


@torch.no_grad()
def draw(model: TokenModel, number: int, length: int, seed: int) -> Tensor:
    """(number, L) codes from the model's own distribution; on the CPU, where a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    device, parts = model.bias.device, []
    for start in range(0, number, BATCH):
        codes = torch.empty(min(BATCH, number - start), 0, dtype=torch.int64, device=device)
        for _ in range(length):
            chances = model(codes)[:, -1].softmax(-1).cpu()
            codes = torch.cat([codes, torch.multinomial(chances, 1, generator=generator).to(device)], 1)
        parts.append(codes.cpu())
    return torch.cat(parts)


# ---- results


def entropy(codes: Tensor, num_codes: int) -> float:
    """Bits a code, of how often each occurs."""
    shares = count_codes(codes, num_codes).double() / codes.numel()
    return float(torch.special.entr(shares).sum()) / math.log(2)


@torch.no_grad()
def decoded(tokenizer: ImageTokenizer, codes: Tensor, grid: list[int]) -> Tensor:
    """(B, L) -> (B, 3, H, W) in [-1, 1]"""
    return tokenizer.decode(codes.view(-1, *grid).to(tokenizer.device)).clamp(-1, 1)


def sample_distance(
    tokenizer: ImageTokenizer, config: Config, samples: Tensor, held_out: Tensor, grid: list[int]
) -> dict[str, float]:
    """Between as many decoded samples as decoded held-out codes; nothing where no Frechet distance is asked for."""
    names = [name for name in FRECHET if name in config.evaluation.metrics][:1]
    number = min(len(samples), len(held_out))
    if not names or number < 2:
        return {}
    sizes, device = tokenizer.quantizer.codebook_sizes, samples.device
    metrics = Metrics(names, sizes, config.evaluation, config.weights, device)
    for start in range(0, number, BATCH):
        codes = held_out[start : min(start + BATCH, number)]
        real = decoded(tokenizer, codes, grid)
        positions = torch.arange(start, start + len(codes))
        grids = codes.view(-1, *grid).to(device)
        metrics.update(real, samples[start : start + len(codes)], grids, positions)
    return {f"sample_{name}": value for name, value in metrics.compute().items()}


def label_results(tokenizer: ImageTokenizer, codes: Codes, grid: list[int]) -> dict[str, float]:
    """Nothing where there are no labels."""
    if codes.learnt_labels is None or codes.held_out_labels is None:
        return {}
    features, others = (mean_vectors(tokenizer, part, grid) for part in (codes.learnt, codes.held_out))
    guesses = linear_classifier(features, others, codes.learnt_labels)
    common = codes.learnt_labels.mode().values
    return {
        "label_accuracy": 100 * float((guesses == codes.held_out_labels).double().mean()),
        "most_frequent_label": 100 * float((codes.held_out_labels == common).double().mean()),
    }


@torch.no_grad()
def mean_vectors(tokenizer: ImageTokenizer, codes: Tensor, grid: list[int]) -> Tensor:
    """(N, L) -> (N, D), the mean of an image's code vectors"""
    quantizer, device = tokenizer.quantizer, tokenizer.device
    grids = [part.view(-1, *grid).to(device) for part in codes.split(BATCH)]
    return torch.cat([quantizer.codes_to_latents(part).mean((2, 3)).cpu() for part in grids]).double()


def linear_classifier(features: Tensor, others: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression on standardised features (N, D) of `labels` (N,): its guesses (M,) for `others` (M, D)."""
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-6)
    x, y = (features - mean) / scale, (others - mean) / scale
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(weight), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, weight, bias), labels) + 1e-3 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return F.linear(y, weight, bias).argmax(1).detach()
