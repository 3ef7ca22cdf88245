"""Training written out in plain torch: what `train()` must compute, by simple formulas of its own.

No Accelerate, and none of our loop, schedules, losses or quantizers. Given are the networks (encoder, decoder,
discriminator) and the weights they start with, the order of the images, their views, and the seeds of positions, all
of which have tests of their own. One process, and images in a folder.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW

from vqgan_accel.config import Config
from vqgan_accel.data.order import epoch_order
from vqgan_accel.data.transforms import training_view
from vqgan_accel.models.build import build_discriminator
from vqgan_accel.models.tokenizer import ImageTokenizer
from vqgan_accel.randomness import CODE_INIT, CODE_REINIT, QUANTIZER_NOISE, position_seed


def half_cosine(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at `steps`, and on."""
    done = min(step / steps, 1.0) if steps else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


class PlainTrainer:
    """Trains `start`/tokenizer and `start`/discriminator.safetensors as `config` says.

    `lines` are then what metrics.jsonl says of each step, `tensors()` what the last checkpoint holds.
    """

    def __init__(self, config: Config, start: Path) -> None:
        self.config, training = config, config.training
        self.files = sorted(Path(str(config.data.path), "train").iterdir())
        self.steps_per_epoch = len(self.files) // training.total_batch_size
        self.tokenizer = ImageTokenizer.from_pretrained(start / "tokenizer").train()
        kinds: dict[str, Any] = {
            "gumbel": Gumbel,
            "ibq": IndexBackpropagation,
            "residual": Several,
            "product": Several,
            "fsq": Levels,
            "lfq": Signs,
            "bsq": Signs,
        }
        kind = kinds.get(config.quantizer.type, NearestCode)
        self.quantizer: Any = kind(self.tokenizer.quantizer, self, config.quantizer)

        only = "decoder." if training.decoder_only else ""
        trained = {name: p for name, p in self.tokenizer.named_parameters() if name.startswith(only)}
        kernels = [p for name, p in trained.items() if p.ndim > 1 and not name.endswith(".codebook")]
        others = [p for name, p in trained.items() if p.ndim == 1 or name.endswith(".codebook")]
        adamw: dict[str, Any] = {"betas": training.betas, "eps": training.eps}
        groups = [
            {"params": kernels, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizers = {"tokenizer": AdamW(groups, **adamw)}
        self.discriminator = build_discriminator(config)
        if self.discriminator is not None:
            self.discriminator.load_state_dict(load_file(start / "discriminator.safetensors"))
            parameters = self.discriminator.parameters()
            self.optimizers["discriminator"] = AdamW(parameters, **adamw, weight_decay=training.weight_decay)

        self.average: dict[str, Tensor] = {}
        self.use = torch.zeros(
            len(config.quantizer.codebook_sizes), config.quantizer.num_codes
        )  # since the epoch began
        self.lines: list[dict[str, float]] = []
        for step in range(training.max_steps or 0):
            self.step(step)

    def steps_in(self, duration: Any) -> int:
        return round(duration.value * (self.steps_per_epoch if duration.unit == "epochs" else 1))

    def learning_rate(self, step: int) -> float:
        training = self.config.training
        ratio = training.total_batch_size / training.base_batch_size
        peak = training.base_lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[training.lr_scaling]
        decay = self.steps_in(training.lr_decay) if training.lr_decay else training.max_steps or 0
        warmed = min(1.0, (step + 1) / max(1, self.steps_in(training.lr_warmup)))
        return warmed * half_cosine(peak, peak * training.lr_final_ratio, step, decay)

    def images(self, step: int, samples: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1]: those samples of the step's global batch"""
        epoch, place = divmod(step, self.steps_per_epoch)
        data, seed, first = self.config.data, self.config.seed, place * self.config.training.total_batch_size
        order = epoch_order(seed, epoch, len(self.files))
        views = []
        for index in (int(order[first + sample]) for sample in samples):
            crop = (data.image_size, data.crop_scale, data.horizontal_flip)
            views.append(training_view(Image.open(self.files[index]), *crop, seed, epoch, index))
        return torch.stack(views) / 127.5 - 1

    def step(self, step: int) -> None:
        training, adversarial = self.config.training, self.config.discriminator
        since = step - self.steps_in(adversarial.start) if adversarial else -1  # steps since the game began
        rounds = training.gradient_accumulation_steps
        if step == 0 and getattr(self.config.quantizer, "init", "") == "kmeans" and training.init_from is None:
            self.find_centres(self.images(step, range(training.total_batch_size)))
        parts: list[dict[str, Tensor]] = []
        latents, codes = [], []
        for index in range(rounds):
            samples = range(index, training.total_batch_size, rounds)
            images = self.images(step, samples)
            latents.append(self.tokenizer.encoder(images))
            seeds = [position_seed(QUANTIZER_NOISE, self.config.seed, step, sample) for sample in samples]
            quantized = self.quantizer.quantize(latents[-1], step, seeds)
            codes.append(quantized.codes)
            reconstruction, _ = self.tokenizer.decoder(quantized.latents)
            parts.append(self.teach_tokenizer(images, reconstruction, quantized, since, rounds))
            if since >= 0:
                parts[-1] |= self.teach_discriminator(images, reconstruction.detach(), since, rounds)

        line = {name: torch.stack([part[name] for part in parts]).mean().item() for name in parts[0]}
        for name, optimizer in self.optimizers.items():
            if name == "tokenizer" or since >= 0:
                line[f"grad_norm_{name}"] = clip(optimizer, training.max_grad_norm)
                for group in optimizer.param_groups:
                    group["lr"] = self.learning_rate(step)
                optimizer.step()
                optimizer.zero_grad()
        self.quantizer.update()
        if training.ema_decay is not None:
            self.update_average(training.ema_decay)
        for use, chosen in zip(self.use, by_place(torch.cat(codes)), strict=True):
            use += torch.bincount(chosen.flatten(), minlength=len(use))
        window = self.usage_window()
        if (step + 1) % window == 0:
            both = (torch.stack(some, 1).flatten(0, 1) for some in (latents, codes))  # sample b k + r: b-th of round r
            line |= self.end_window(step, window, *both)
        line |= {"step": step + 1, "epoch": (step + 1) / self.steps_per_epoch, "bad_steps": 0, "skipped_images": 0}
        self.lines.append(line | {"learning_rate": self.learning_rate(step)})

    def teach_tokenizer(
        self, images: Tensor, reconstruction: Tensor, quantized: Quantized, since: int, rounds: int
    ) -> dict[str, Tensor]:
        losses, adversarial = self.config.losses, self.config.discriminator
        l1, l2 = (reconstruction - images).abs().mean(), ((reconstruction - images) ** 2).mean()
        rec = losses.l1_weight * l1 + losses.l2_weight * l2
        total, parts = rec + quantized.loss, {"l1": l1, "l2": l2, **quantized.parts}
        if adversarial and self.discriminator and since >= 0:
            logits = self.discriminator(reconstruction)
            gen = -logits.mean() if adversarial.loss == "hinge" else F.softplus(-logits).mean()
            weight = torch.tensor(adversarial.weight if since >= self.steps_in(adversarial.warmup) else 0.0)
            if adversarial.adaptive_weight:
                last = self.tokenizer.decoder.conv_out.weight
                (of_rec,) = torch.autograd.grad(rec, last, retain_graph=True)
                (of_gen,) = torch.autograd.grad(gen, last, retain_graph=True)
                weight *= (of_rec.norm() / (of_gen.norm() + 1e-8)).clamp(max=1e4)
            total = total + weight * gen
            parts |= {"generator": gen, "adversarial_weight": weight}
        learning = [p for group in self.optimizers["tokenizer"].param_groups for p in group["params"]]
        (total / rounds).backward(inputs=learning)
        return {"total": total, **parts}

    def teach_discriminator(self, images: Tensor, fakes: Tensor, since: int, rounds: int) -> dict[str, Tensor]:
        adversarial = self.config.discriminator
        assert adversarial and self.discriminator
        images.requires_grad_()
        real, fake = self.discriminator(images), self.discriminator(fakes)
        if adversarial.loss == "hinge":
            loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        else:
            loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        parts = {"discriminator": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        if adversarial.r1_weight and since % adversarial.r1_every == 0:
            (slope,) = torch.autograd.grad(real.sum(), images, create_graph=True)
            parts["r1"] = (slope**2).sum((1, 2, 3)).mean()
            loss = loss + adversarial.r1_weight * parts["r1"]
        (loss / rounds).backward(inputs=list(self.discriminator.parameters()))
        return parts

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Begins as the weights after the first step; an EMA codebook, an average already, is copied."""
        if not self.average:
            self.average = {name: value.clone() for name, value in self.tokenizer.state_dict().items()}
        for name, value in self.tokenizer.named_parameters():
            self.average[name] = decay * self.average[name] + (1 - decay) * value
        for name in self.average.keys() - dict(self.tokenizer.named_parameters()).keys():
            self.average[name] = self.tokenizer.state_dict()[name].clone()

    @torch.no_grad()
    def find_centres(self, images: Tensor) -> None:
        """Ten steps of k-means from K of the first batch's latents."""
        assert isinstance(self.quantizer, NearestCode)
        tokens = self.tokenizer.encoder(images).permute(0, 2, 3, 1).flatten(0, 2)
        draw = torch.Generator().manual_seed(position_seed(CODE_INIT, self.config.seed))
        centres = tokens[torch.randperm(len(tokens), generator=draw)[: self.config.quantizer.num_codes]]
        for _ in range(10):
            owner = ((tokens[:, None] - centres) ** 2).sum(2).argmin(1)
            centres = torch.stack(
                [tokens[owner == k].mean(0) if (owner == k).any() else centre for k, centre in enumerate(centres)]
            )
        self.quantizer.network.codebook.copy_(centres)

    def usage_window(self) -> int:
        """Steps over which uses are counted."""
        every = self.replaced_every()
        in_epochs = every is None or every % self.steps_per_epoch == 0
        return self.steps_per_epoch if every is None or in_epochs else every

    def replaced_every(self) -> int | None:
        """Steps between two replacements of codes."""
        section: Any = self.config.quantizer
        every = getattr(getattr(section, "inner", section), "reinit_every", None)
        return None if every is None else self.steps_in(every)

    def end_window(self, step: int, window: int, latents: Tensor, codes: Tensor) -> dict[str, float]:
        """latents (B, D, h, w) and codes (B, h, w) or (B, q, h, w): of the step's whole batch"""
        name = "epoch" if window == self.steps_per_epoch else "recent"
        shares = [use[use > 0] / use.sum() for use in self.use]
        each = [math.exp(-(share * share.log()).sum()) for share in shares]
        values = {f"{name}_perplexity": math.exp(sum(map(math.log, each)) / len(each))}
        values[f"{name}_codebook_usage"] = 100 * sum(map(len, shares)) / self.use.numel()
        for place, share in enumerate(shares if len(shares) > 1 else [], 1):
            values[f"{name}_perplexity_{place}"] = each[place - 1]
            values[f"{name}_codebook_usage_{place}"] = 100 * len(share) / self.use.shape[1]
        if not isinstance(self.quantizer, Levels | Signs):
            values["codebook_norm"] = (self.quantizer.vectors() ** 2).sum(1).sqrt().mean().item()
        if not isinstance(self.quantizer, Gumbel):
            z, e = self.quantizer.compared(latents), self.quantizer.decoded(codes)
            values["quantization_error"] = ((z - e) ** 2).sum().item() / (z**2).sum().item()
        every = self.replaced_every()
        if every and (step + 1) % every == 0:
            draw = torch.Generator().manual_seed(position_seed(CODE_REINIT, self.config.seed, step))
            values["reinitialised_codes"] = self.quantizer.replace_unused(self.use, latents, draw)
        self.use.zero_()
        return values

    def tensors(self) -> dict[str, Tensor]:
        """By the names of runs.tensors."""
        weights = "diffusion_pytorch_model.safetensors"
        found = {f"tokenizer/{weights}:{name}": value for name, value in self.tokenizer.state_dict().items()}
        found |= {f"tokenizer_ema/{weights}:{name}": value for name, value in self.average.items()}
        if self.discriminator:
            found |= {f"discriminator.safetensors:{n}": value for n, value in self.discriminator.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                found |= {f"optimizers.safetensors:{name}/{index}/{key}": value for key, value in state.items()}
        return found


@torch.no_grad()
def clip(optimizer: AdamW, largest: float | None) -> float:
    """The norm that the gradient had."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack([(gradient**2).sum() for gradient in gradients]).sum().sqrt()
    for gradient in gradients:
        gradient *= 1.0 if largest is None else min(1.0, largest / (norm.item() + 1e-6))
    return norm.item()


# ---- quantizers


class Quantized(NamedTuple):
    latents: Tensor  # (B, D, h, w), as the decoder takes them
    codes: Tensor  # (B, h, w)
    loss: Tensor
    parts: dict[str, Tensor]


class NearestCode:
    """standard: |sg[z] - e|^2 + beta |z - sg[e]|^2; ema: the second term alone; entropy: all that and a third term;
    simvq: e = W c + b."""

    def __init__(self, network: Any, trainer: PlainTrainer, config: Any) -> None:
        self.network, self.trainer, self.config = network, trainer, config
        self.seen: list[tuple[Tensor, Tensor]] = []  # tokens and their codes since the last update

    def unit(self, vectors: Tensor) -> Tensor:
        """(N, D)"""
        return vectors / vectors.norm(dim=1, keepdim=True) if self.config.l2_normalize else vectors

    def vectors(self) -> Tensor:
        """(K, D) as they are compared"""
        if self.config.type == "ema":
            return self.unit(self.network.sums / self.smoothed_counts()[:, None])
        if self.config.type == "simvq":
            return self.unit(self.network.frozen @ self.network.projection.weight.T + self.network.projection.bias)
        return self.unit(self.network.codebook)

    def smoothed_counts(self) -> Tensor:
        """(K,), by Laplace"""
        counts, epsilon = self.network.counts, self.config.epsilon
        return (counts + epsilon) * counts.sum() / (counts.sum() + len(counts) * epsilon)

    def compared(self, latents: Tensor) -> Tensor:
        return self.unit(latents)

    def decoded(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> (B, D, h, w)"""
        return self.vectors()[codes].permute(0, 3, 1, 2)

    def nearest(self, latents: Tensor) -> Tensor:
        tokens = self.unit(latents.permute(0, 2, 3, 1))
        return ((tokens[..., None, :] - self.vectors()) ** 2).sum(-1).argmin(-1)

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        config, vectors = self.config, self.vectors()
        batch, dim, height, width = latents.shape
        tokens = self.unit(latents.permute(0, 2, 3, 1).reshape(-1, dim))  # (M, D)
        distances = ((tokens[:, None] - vectors) ** 2).sum(2)  # (M, K)
        codes = distances.argmin(1)
        chosen = vectors[codes]
        parts = {"commitment_loss": ((tokens - chosen.detach()) ** 2).mean()}
        loss = config.commitment_cost * parts["commitment_loss"]
        if config.type == "ema":
            self.seen.append((tokens.detach(), codes))
        else:
            parts["codebook_loss"] = ((tokens.detach() - chosen) ** 2).mean()
            loss = loss + parts["codebook_loss"]
        if config.type == "entropy":
            log_p = (-distances / config.entropy_temperature).log_softmax(1)
            p = log_p.exp()
            if config.entropy_target == "argmax":
                p = F.one_hot(codes, len(vectors)) + p - p.detach()
            of_mean = -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
            parts["entropy_loss"] = -(p * log_p).sum(1).mean() - of_mean
            loss = loss + config.entropy_ratio * parts["entropy_loss"]
        passed = turned(tokens, chosen) if config.gradient == "rotation" else tokens + (chosen - tokens).detach()
        grid = passed.view(batch, height, width, dim).permute(0, 3, 1, 2)
        return Quantized(grid, codes.view(batch, height, width), loss, parts)

    def update(self) -> None:
        if self.config.type == "ema" and not self.trainer.config.training.decoder_only:
            tokens, codes = (torch.cat(both) for both in zip(*self.seen, strict=True))
            chose = F.one_hot(codes, self.config.num_codes).float()  # (M, K)
            decay, counts, sums = self.config.decay, self.network.counts, self.network.sums
            counts.copy_(decay * counts + (1 - decay) * chose.sum(0))
            sums.copy_(decay * sums + (1 - decay) * chose.T @ tokens)
        self.seen.clear()

    @torch.no_grad()
    def replace_unused(self, use: Tensor, latents: Tensor, draw: torch.Generator) -> int:
        """use: (1, K). Returns how many."""
        use = use[0]
        unused = ((use == 0) | (use < self.config.reinit_below * use.mean())).nonzero().flatten()
        if self.config.reinit_from == "latents":
            tokens = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
            new = tokens[torch.randperm(len(tokens), generator=draw)[: len(unused)]]
        else:
            vectors = self.vectors()
            use = use.index_fill(0, unused, 0)
            new = vectors[torch.multinomial(use.double(), len(unused), replacement=True, generator=draw)]
            new = new + 0.01 * vectors[use > 0].std(0, correction=0) * torch.randn(new.shape, generator=draw)
        if self.config.type == "ema":
            self.network.counts[unused] = 1.0
            self.network.sums[unused] = self.unit(new) * self.smoothed_counts()[unused, None]
        else:
            self.network.codebook[unused] = self.unit(new)
            moments = self.trainer.optimizers["tokenizer"].state[self.network.codebook]
            moments["exp_avg"][unused] = moments["exp_avg_sq"][unused] = 0.0
        return len(unused)


class Gumbel:
    """softmax((logits + Gumbel noise) / temperature) of the codes; loss: KL(q(code | position) || uniform)."""

    def __init__(self, network: Any, trainer: PlainTrainer, config: Any) -> None:
        self.network, self.trainer, self.config = network, trainer, config

    def vectors(self) -> Tensor:
        return self.network.codebook

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        config, codebook = self.config, self.network.codebook
        logits = F.conv2d(latents, self.network.x_to_logits.weight, self.network.x_to_logits.bias)  # (B, K, h, w)
        log_q = logits.log_softmax(1)
        kl = (log_q.exp() * (log_q + math.log(config.num_codes))).sum(1).mean()
        kl_cost = half_cosine(0.0, config.kl_cost, step, self.trainer.steps_in(config.kl_warmup))
        decay = self.trainer.steps_in(config.temperature_decay)
        temperature = half_cosine(config.temperature_start, config.temperature_end, step, decay)
        if self.trainer.config.training.decoder_only:
            p = F.one_hot(logits.argmax(1), config.num_codes).float().permute(0, 3, 1, 2)
        else:
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            noise = [-torch.empty(logits.shape[1:]).exponential_(generator=draw).log() for draw in draws]
            p = ((logits + torch.stack(noise)) / temperature).softmax(1)
            if config.straight_through:
                p = F.one_hot(p.argmax(1), config.num_codes).permute(0, 3, 1, 2) + p - p.detach()
        mixed = torch.einsum("bkhw,kd->bdhw", p, codebook)
        return Quantized(mixed, logits.argmax(1), kl_cost * kl, {"kl_loss": kl})

    def update(self) -> None:
        pass


class Several:
    """residual: each quantizer of what those before it have left; product: each of channels of its own."""

    def __init__(self, network: Any, trainer: PlainTrainer, config: Any) -> None:
        self.trainer, self.config, self.residual = trainer, config, config.type == "residual"
        self.parts = [NearestCode(part, trainer, config.inner) for part in network.parts]

    def vectors(self) -> Tensor:
        return torch.cat([part.vectors() for part in self.parts])

    def compared(self, latents: Tensor) -> Tensor:
        chunks = [latents] if self.residual else latents.chunk(len(self.parts), 1)
        return torch.cat([part.compared(chunk) for part, chunk in zip(self.parts, chunks, strict=False)], 1)

    def decoded(self, codes: Tensor) -> Tensor:
        """(B, q, h, w) -> (B, D, h, w)"""
        each = [part.decoded(chosen) for part, chosen in zip(self.parts, by_place(codes), strict=True)]
        return torch.stack(each).sum(0) if self.residual else torch.cat(each, 1)

    def inputs(self, latents: Tensor) -> Iterator[tuple[NearestCode, Tensor]]:
        """Each quantizer, and what it is given."""
        left, chunks = latents, latents.chunk(len(self.parts), 1)
        for place, part in enumerate(self.parts):
            yield part, left if self.residual else chunks[place]
            if self.residual:
                left = left - part.decoded(part.nearest(left)).detach()

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        made = [part.quantize(given, step, seeds) for part, given in self.inputs(latents)]
        codes = torch.stack([one.codes for one in made], 1)
        weight = 1 if self.residual else 1 / len(made)
        parts = {name: weight * torch.stack([one.parts[name] for one in made]).sum() for name in made[0].parts}
        loss = weight * torch.stack([one.loss for one in made]).sum()
        if not self.residual:
            return Quantized(torch.cat([one.latents for one in made], 1), codes, loss, parts)
        read = torch.ones(len(latents), len(made), 1, 1, 1)
        for image, seed in enumerate(seeds):
            drops, level = torch.empty(2).uniform_(generator=torch.Generator().manual_seed(seed)).tolist()
            if drops < self.config.dropout and not self.trainer.config.training.decoder_only:
                read[image, math.floor(level * len(made)) + 1 :] = 0.0
        each = torch.stack([part.decoded(one.codes) for part, one in zip(self.parts, made, strict=True)], 1)
        return Quantized(latents + ((each * read).sum(1) - latents).detach(), codes, loss, parts)

    def update(self) -> None:
        for part in self.parts:
            part.update()

    def replace_unused(self, use: Tensor, latents: Tensor, draw: torch.Generator) -> int:
        given = enumerate(self.inputs(latents))
        return sum(part.replace_unused(use[place, None], left, draw) for place, (part, left) in given)


def by_place(codes: Tensor) -> Sequence[Tensor]:
    """(B, h, w) or (B, q, h, w) -> of each of a position's codes (B, h, w)"""
    return codes.unbind(1) if codes.ndim == 4 else [codes]


def turned(tokens: Tensor, chosen: Tensor) -> Tensor:
    """(M, D) both: the chosen vectors, as |q| / |z| R z with the matrix R of the rotation from z to q."""
    moved = []
    for z, q in zip(tokens, chosen, strict=True):
        with torch.no_grad():
            z_hat, q_hat = z / z.norm(), q / q.norm()
            middle = (z_hat + q_hat) / (z_hat + q_hat).norm()
            rotation = torch.eye(len(z)) - 2 * torch.outer(middle, middle) + 2 * torch.outer(q_hat, z_hat)
            rotation = rotation * q.norm() / z.norm()
        moved.append(rotation @ z)
    return torch.stack(moved)


class IndexBackpropagation(NearestCode):
    """|z - e|^2 + |z - sg[e]|^2 + beta |sg[z] - e|^2 and an entropy term, with e = (hard + p - sg[p]) C in the first
    and in what is decoded."""

    def vectors(self) -> Tensor:
        return self.network.codebook

    def unit(self, vectors: Tensor) -> Tensor:
        return vectors

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        config, codebook = self.config, self.network.codebook
        batch, dim, height, width = latents.shape
        tokens = latents.permute(0, 2, 3, 1).reshape(-1, dim)  # (M, D)
        products = tokens @ codebook.T  # (M, K)
        codes, p = products.argmax(1), products.softmax(1)
        hard = F.one_hot(codes, len(codebook)).float()
        soft_vectors, hard_vectors = (hard + p - p.detach()) @ codebook, hard @ codebook
        commitment = ((tokens - hard_vectors.detach()) ** 2).mean()
        loss = ((tokens - soft_vectors) ** 2).mean() + commitment
        loss = loss + config.codebook_cost * ((tokens.detach() - hard_vectors) ** 2).mean()
        log_q = (products / config.entropy_temperature).log_softmax(1)
        mean = log_q.exp().mean(0)
        entropy = -(log_q.exp() * log_q).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
        grid = soft_vectors.view(batch, height, width, dim).permute(0, 3, 1, 2)
        parts = {"commitment_loss": commitment, "entropy_loss": entropy}
        return Quantized(grid, codes.view(batch, height, width), loss + config.entropy_ratio * entropy, parts)


class Levels:
    """FSQ: tanh(z + shift) (L - 1) / 2, rounded; the gradient is as if it were not. No loss."""

    def __init__(self, network: Any, trainer: PlainTrainer, config: Any) -> None:
        self.levels, self.gain = config.levels, {"tanh": 1.0, "sigmoid": 0.8}[config.bound]

    def compared(self, latents: Tensor) -> Tensor:
        channels = []
        for channel, count in zip(latents.unbind(1), self.levels, strict=True):
            half, offset = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0
            channels.append(
                (half * torch.tanh(self.gain * channel + math.atanh(offset / half)) - offset) / (count // 2)
            )
        return torch.stack(channels, 1)

    def decoded(self, codes: Tensor) -> Tensor:
        channels = []
        for count in self.levels:
            channels.append((codes % count - count // 2) / (count // 2))
            codes = codes // count
        return torch.stack(channels, 1)

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        compared, codes, worth = self.compared(latents), torch.zeros_like(latents[:, 0], dtype=torch.int64), 1
        for channel, count in zip(compared.unbind(1), self.levels, strict=True):
            codes = codes + worth * ((channel * (count // 2)).round().long() + count // 2)
            worth *= count
        return Quantized(compared + (self.decoded(codes) - compared).detach(), codes, torch.zeros(()), {})

    def update(self) -> None:
        pass


class Signs:
    """lfq and bsq: the signs, with entropies from the distributions over all codes."""

    def __init__(self, network: Any, trainer: PlainTrainer, config: Any) -> None:
        self.config = config
        self.bits, self.scale = config.bits, config.bits**-0.5 if config.type == "bsq" else 1.0

    def compared(self, latents: Tensor) -> Tensor:
        return latents / latents.norm(dim=1, keepdim=True) if self.config.type == "bsq" else latents

    def decoded(self, codes: Tensor) -> Tensor:
        bits = [codes // 2 ** (self.bits - 1 - place) % 2 for place in range(self.bits)]
        return self.scale * (2.0 * torch.stack(bits, 1) - 1)

    def quantize(self, latents: Tensor, step: int, seeds: list[int]) -> Quantized:
        compared, config = self.compared(latents), self.config
        codes = sum(
            (channel > 0).long() * 2 ** (self.bits - 1 - place) for place, channel in enumerate(compared.unbind(1))
        )
        assert isinstance(codes, Tensor)
        vectors = self.decoded(codes)
        parts = {"commitment_loss": ((compared - vectors) ** 2).mean()}
        tokens = compared.permute(0, 2, 3, 1).reshape(-1, self.bits)
        entropies, of_means = torch.zeros(()), torch.zeros(())
        for start in range(0, self.bits, config.entropy_group):
            some = tokens[:, start : start + config.entropy_group]
            every = self.scale * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=some.shape[1])))
            log_p = (-((some[:, None] - every) ** 2).sum(2) / config.entropy_temperature).log_softmax(1)
            mean = log_p.exp().mean(0)
            entropies, of_means = entropies - (log_p.exp() * log_p).sum(1).mean(), of_means - (mean * mean.log()).sum()
        parts["entropy_loss"] = entropies - config.entropy_gamma * of_means
        cost = getattr(config, "commitment_cost", 0.0)
        loss = cost * parts["commitment_loss"] + config.entropy_ratio * parts["entropy_loss"]
        return Quantized(compared + (vectors - compared).detach(), codes, loss, parts)

    def update(self) -> None:
        pass
