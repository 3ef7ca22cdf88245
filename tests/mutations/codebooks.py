"""Wrong lines in what keeps codebooks alive, and in what large ones take."""

from __future__ import annotations

from mutant import Mutant

IBQ, SIMVQ, ENTROPY, BASE = (f"models/quantizers/{name}.py" for name in ("ibq", "simvq", "entropy", "base"))
CODEBOOKS = [
    Mutant(IBQ, "(block @ codebook.T).argmax(1)", "(block @ codebook.T).argmin(1)", "the smallest product is chosen"),
    Mutant(
        IBQ, "p = (some @ codebook.T).softmax(1)", "p = (some @ codebook.T).softmax(0)", "the softmax is over tokens"
    ),
    Mutant(
        IBQ,
        "slope.sub_((p * slope).sum(1, keepdim=True)).mul_(p)",
        "slope.mul_(p)",
        "the softmax's gradient lacks its mean",
    ),
    Mutant(
        IBQ, "of_codebook.addmm_(slope.T, some)", "of_codebook.addmm_(slope.T, theirs)", "codes get another gradient"
    ),
    Mutant(
        IBQ, "of_tokens.append(slope @ codebook)", "of_tokens.append(-slope @ codebook)", "latents flee their codes"
    ),
    Mutant(IBQ, "return gradient, torch", "return 0 * gradient, torch", "the chosen code has no gradient of its own"),
    Mutant(IBQ, "with without_autocast(gradient):", "if True:", "the backward pass may be in half precision"),
    Mutant(
        IBQ,
        "F.mse_loss(latents, quantized) + commitment_loss",
        "F.mse_loss(latents, quantized.detach()) + commitment_loss",
        "no double quantization",
    ),
    Mutant(
        IBQ,
        "F.mse_loss(vectors, latents.detach())",
        "F.mse_loss(vectors, latents)",
        "the codebook loss pulls latents",
    ),
    Mutant(
        IBQ,
        "commitment_loss = F.mse_loss(latents, vectors.detach())",
        "commitment_loss = F.mse_loss(latents, vectors)",
        "the commitment loss pulls codes",
    ),
    Mutant(IBQ, "some @ self.codebook.T / self.temperature", "some @ self.codebook.T", "no temperature"),
    Mutant(IBQ, "self.codebook[codes] = vectors", "self.codebook[codes] += vectors", "new vectors are added"),
    Mutant(IBQ, "max(1, BLOCK // len(codebook))", "len(tokens)", "all tokens are one block of the backward pass"),
    Mutant(SIMVQ, '"normal") * embedding_dim**-0.5', '"normal")', "frozen vectors as long as sqrt(D)"),
    Mutant(
        SIMVQ,
        "F.linear(self.frozen.double(), weight, bias)",
        "F.linear(self.frozen.double(), weight)",
        "the map has no bias",
    ),
    Mutant(SIMVQ, "F.linear(self.frozen.double(), weight, bias).float()", "self.frozen", "the map is not there"),
    Mutant(SIMVQ, 'self.register_buffer("frozen", ', "self.frozen = nn.Parameter(", "the frozen codebook learns"),
    Mutant(
        SIMVQ,
        "nearest_with_losses(latents, self.codebook_vectors(), self.commitment_cost)",
        "nearest_with_losses(latents, self.codebook_vectors().detach(), self.commitment_cost)",
        "the map does not learn",
    ),
    Mutant(SIMVQ, "return iter(())", "return super().lookups(latents)", "codes are asked to take vectors they cannot"),
    Mutant(ENTROPY, "whole = len(tokens) * num_codes <= MAX_LOGITS", "whole = True", "always one block"),
    Mutant(
        ENTROPY,
        "checkpoint(of_block, block, use_reentrant=False, preserve_rng_state=False)",
        "of_block(block)",
        "every block is kept",
    ),
    Mutant(
        ENTROPY,
        "shares = [len(block) / len(tokens) for block in blocks]",
        "shares = [1 / len(blocks) for block in blocks]",
        "a short last block counts as a whole one",
    ),
    Mutant(ENTROPY, "(share * mean, share * entropy)", "(share * mean, entropy)", "entropies of blocks are summed"),
    Mutant(
        ENTROPY,
        "mean = mean_over_processes_with_gradient(distribution)",
        "mean = distribution",
        "the mean distribution is a process's own",
    ),
    Mutant(ENTROPY, "sum(some[1:], some[0])", "some[0]", "the first block is all"),
    Mutant(
        ENTROPY,
        "one_hot + (distribution - distribution.detach())",
        "one_hot + distribution",
        "the argmax target is not one-hot in value",
    ),
    Mutant(BASE, "turned = latents - 2 * along", "turned = latents + 2 * along", "no reflection in the middle"),
    Mutant(BASE, "+ 2 * along(z_hat) * q_hat", "+ along(z_hat) * q_hat", "half of what turns to the code"),
    Mutant(
        BASE,
        "moved = turned * (q.norm(dim=1, keepdim=True) / z.norm(dim=1, keepdim=True).clamp_min(1e-12))",
        "moved = turned",
        "the rotation keeps the latent's length",
    ),
    Mutant(BASE, "z, q = latents.detach(), quantized.detach()", "z, q = latents, quantized", "the rotation learns"),
    Mutant(BASE, "keepdim=True).clamp_min(1e-12))", "keepdim=True))", "a latent of zeros has a gradient of no number"),
    Mutant(BASE, "moved + (quantized - moved).detach()", "moved", "the value is the rotated latent"),
    Mutant(BASE, "codes.unbind(1) if len(sizes) > 1", "codes.unbind(0) if len(sizes) > 1", "samples are codebooks"),
    Mutant(
        BASE,
        "nn.functional.normalize(normal, dim=1) if",
        "nn.functional.normalize(normal, dim=0) if",
        "the sphere is one of codes",
    ),
    Mutant(
        "models/quantizers/ema.py",
        "torch.where(rests, 0.0, 1 - self.decay)",
        "torch.full_like(self.counts, 1 - self.decay)",
        "no code rests",
    ),
    Mutant("models/quantizers/ema.py", "rests = (new_counts == 0) & ", "rests = ", "a rested code never comes back"),
    Mutant(
        "models/quantizers/ema.py",
        "(new_counts == 0) & (self.counts < RESTS_BELOW)",
        "(self.new_counts == 0) & (self.counts < RESTS_BELOW)",
        "a process's own uses decide who rests",
    ),
    Mutant(
        "training/codebook.py",
        "centres = codebook.comparable(lloyd_step(compared, centres))",
        "centres = lloyd_step(compared, centres)",
        "centres of unit vectors are shorter than they",
    ),
    Mutant(
        "training/codebook.py",
        "compared = [codebook.comparable(part.latents) for part in rounds]",
        "compared = [part.latents for part in rounds]",
        "k-means of other latents than are compared",
    ),
    Mutant("training/codebook.py", "KMEANS_STEPS = 10", "KMEANS_STEPS = 1", "one step of k-means"),
    Mutant("training/codebook.py", "    sums = sum_over_processes(sums)\n", "", "centres of a process's own latents"),
    Mutant(
        "training/codebook.py",
        "torch.where(counts > 0, totals / counts.clamp_min(1), centres.double())",
        "totals / counts.clamp_min(1)",
        "a centre without latents goes to the origin",
    ),
    Mutant(
        "training/codebook.py", "sums[:, 0] += count_codes", "sums[:, 0] = count_codes", "only the last round counts"
    ),
    Mutant("training/codebook.py", ".clamp_min(0.5)", "", "codes that nobody uses stay where the bound is 0"),
    Mutant(
        "training/codebook.py", "counts.double() < (below", "counts.double() <= (below", "a code at the bound is rare"
    ),
    Mutant(
        "training/codebook.py",
        "below * counts.double().mean()",
        "below * counts.double().sum()",
        "the bound is of all uses",
    ),
    Mutant("training/codebook.py", "kept = counts.index_fill(0, codes, 0)", "kept = counts", "rare codes are copied"),
    Mutant(
        "training/codebook.py",
        "for place in lookup.places",
        "for place in lookup.places[:1]",
        "one place of a codebook counts",
    ),
    Mutant("training/upkeep.py", " or config.training.init_from is not None", "", "k-means replaces a loaded codebook"),
    Mutant(
        "training/upkeep.py",
        "if plan.usage_every == plan.steps_per_epoch",
        "if True",
        "every window is called an epoch",
    ),
    Mutant(
        "training/upkeep.py",
        "position_seed(CODE_INIT, config.seed)",
        "position_seed(CODE_INIT, 0)",
        "k-means begins alike for all seeds",
    ),
    Mutant("training/upkeep.py", "if rounds and (reinit", "if (reinit", "codes are replaced where a step was skipped"),
    Mutant(
        "training/plan.py", "reinit_every % epoch == 0", "reinit_every == epoch", "uses of several epochs are one count"
    ),
    Mutant(
        "training/plan.py",
        "        return epoch\n    return reinit_every",
        "        return epoch\n    return epoch",
        "uses are counted over epochs only",
    ),
    Mutant(
        "training/plan.py",
        "usage_window(reinit_every, epoch) or validate_every",
        "usage_window(reinit_every, epoch) or 1",
        "a stream reports uses at each step",
    ),
    Mutant(
        "training/plan.py",
        "max(1, reinit.every.steps(epoch)) if reinit",
        "reinit.every.steps(epoch) if reinit",
        "a replacement every 0 steps",
    ),
]
