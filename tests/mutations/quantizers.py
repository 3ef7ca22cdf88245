"""Of quantizers without a codebook, of those made of several, and of what is said of the codebook's health."""

from __future__ import annotations

from mutant import Mutant

QUANTIZERS = [
    # ---- FSQ
    Mutant("models/quantizers/fsq.py", '"sigmoid": 0.8', '"sigmoid": 1.6', "the sigmoid bound is twice as steep"),
    Mutant("models/quantizers/fsq.py", "(1 + MARGIN) / 2", "(1 + MARGIN)", "the bound is twice as wide"),
    Mutant("models/quantizers/fsq.py", "== 0, 0.5, 0.0)", "== 1, 0.5, 0.0)", "odd numbers of levels are shifted"),
    Mutant("models/quantizers/fsq.py", "+ torch.atanh(offset / half)", "", "0 lies where two levels meet"),
    Mutant("models/quantizers/fsq.py", "* half - offset", "* half + offset", "the half step goes the other way"),
    Mutant("models/quantizers/fsq.py", ".round().long() + middle", ".long() + middle", "numbers are cut, not rounded"),
    Mutant("models/quantizers/fsq.py", ".minimum(self.levels - 1)", "", "a residual may be above the last level"),
    Mutant("models/quantizers/fsq.py", "math.prod(levels[:place])", "math.prod(levels[: place + 1])", "codes overlap"),
    Mutant(
        "models/quantizers/fsq.py", "(digits - middle) / middle.float()", "digits / middle.float()", "vectors from 0 on"
    ),
    Mutant(
        "models/quantizers/fsq.py", "return 1 / self.levels", "return 2 / self.levels", "coarser levels of a residual"
    ),
    # ---- LFQ and BSQ
    Mutant(
        "models/quantizers/lfq.py", "arange(bits - 1, -1, -1)", "arange(bits)", "the first bit is the least significant"
    ),
    Mutant("models/quantizers/lfq.py", "(latents > 0) * self.places", "(latents >= 0) * self.places", "0 is positive"),
    Mutant("models/quantizers/lfq.py", "% 2) * 2.0 - 1)", "% 2) * 1.0)", "vectors of 0 and 1"),
    Mutant("models/quantizers/lfq.py", "4 * self.scale *", "2 * self.scale *", "half of the logits"),
    Mutant(
        "models/quantizers/lfq.py",
        "flatten(latents) / self.temperature",
        "flatten(latents) * self.temperature",
        "temperature upside down",
    ),
    Mutant(
        "models/quantizers/lfq.py", "self.commitment_cost * commitment_loss", "commitment_loss", "a commitment of 1"
    ),
    Mutant(
        "models/quantizers/lfq.py",
        "+ self.ratio * entropy_loss",
        "- self.ratio * entropy_loss",
        "the entropy loss turned round",
    ),
    Mutant(
        "models/quantizers/lfq.py",
        "mean_entropy + self.gamma *",
        "mean_entropy - self.gamma *",
        "all tokens are to take one code",
    ),
    Mutant(
        "models/quantizers/lfq.py",
        "bit_entropies(logits).sum(1).mean()",
        "bit_entropies(logits).mean()",
        "the entropy of a bit for that of a token",
    ),
    Mutant(
        "models/quantizers/lfq.py",
        "mean_over_processes_with_gradient(torch.cat(means))",
        "torch.cat(means)",
        "the mean distribution of one process",
    ),
    Mutant(
        "models/quantizers/lfq.py", "F.softplus(-size) + size", "F.softplus(-size) - size", "another entropy of a bit"
    ),
    Mutant(
        "models/quantizers/lfq.py", ".flatten() / len(logits)", ".flatten()", "a distribution that does not sum to 1"
    ),
    Mutant(
        "models/quantizers/lfq.py",
        "[torch.sigmoid(-logit), torch.sigmoid(logit)]",
        "[torch.sigmoid(logit), torch.sigmoid(-logit)]",
        "signs and distributions disagree",
    ),
    Mutant(
        "models/quantizers/bsq.py", "bits, bits**-0.5, 0.0", "bits, 1.0, 0.0", "vectors of another length than latents"
    ),
    Mutant(
        "models/quantizers/bsq.py",
        "normalize(latents, dim=1)",
        "normalize(latents, dim=2)",
        "unit vectors along the rows",
    ),
    Mutant(
        "models/quantizers/bsq.py",
        "bits**-0.5, 0.0, ratio",
        "bits**-0.5, 0.25, ratio",
        "a commitment that nobody asked for",
    ),
    # ---- residual
    Mutant(
        "models/quantizers/residual.py",
        "left = left - vectors",
        "left = left - 0 * vectors",
        "every level sees the latents",
    ),
    Mutant("models/quantizers/residual.py", "* scale).detach()", "* scale)", "later levels teach earlier codebooks"),
    Mutant("models/quantizers/residual.py", "layer.look_up(left / scale)", "layer.look_up(left)", "no finer grids"),
    Mutant("models/quantizers/residual.py", "found]).sum(),", "found]).mean(),", "losses of levels are averaged"),
    Mutant("models/quantizers/residual.py", "(place < levels)", "(place <= levels)", "one level too many is read"),
    Mutant("models/quantizers/residual.py", ".floor() + 1", ".floor()", "an image is decoded from nothing"),
    Mutant(
        "models/quantizers/residual.py", "drops < self.dropout", "drops > self.dropout", "the other share is dropped"
    ),
    Mutant(
        "models/quantizers/residual.py",
        "if self.training and self.dropout",
        "if self.dropout",
        "levels are dropped in evaluation",
    ),
    Mutant(
        "models/quantizers/residual.py",
        "left = left - layer.codes_to_latents(codes) * scale",
        "left = left - layer.codes_to_latents(codes)",
        "encode and forward differ",
    ),
    Mutant(
        "models/quantizers/residual.py", "one._replace(places=(place,)) for", "one for", "all levels count as the first"
    ),
    Mutant(
        "models/quantizers/residual.py",
        "layer.codes_to_latents(layer.find(left))  #",
        "0 * left  #",
        "new vectors of later levels from whole latents",
    ),
    # ---- product
    Mutant("models/quantizers/product.py", "found]).mean(),", "found]).sum(),", "losses of groups are added up"),
    Mutant("models/quantizers/product.py", "value / self.places", "value", "metrics of groups are added up"),
    Mutant("models/quantizers/product.py", "places=(place,)) for", "places=(0,)) for", "all groups count as the first"),
    Mutant(
        "models/quantizers/product.py",
        "return self.part(place).code_vectors()",
        "return self.part(0).code_vectors()",
        "the first group's vectors for all",
    ),
    Mutant(
        "models/quantizers/several.py",
        "            part.apply_update()",
        "            pass",
        "inner averages do not move",
    ),
    Mutant(
        "models/quantizers/several.py",
        "            part.discard_update()",
        "            part.apply_update()",
        "a skipped step counts",
    ),
    # ---- health
    Mutant(
        "evaluation/measures/codes.py",
        "math.prod(value ** (1 / len(parts)) for value in perplexities)",
        "math.prod(perplexities)",
        "perplexities of codebooks are multiplied",
    ),
    Mutant(
        "evaluation/measures/codes.py",
        "enumerate(perplexities, 1)",
        "enumerate(perplexities)",
        "codebooks are counted from 0",
    ),
    Mutant(
        "evaluation/measures/codes.py",
        "return apart / whole if whole",
        "return whole / apart if whole",
        "the error upside down",
    ),
    Mutant(
        "evaluation/measures/codes.py",
        "sums = self.counts(), sum_over_processes(self.sums)",
        "sums = self.counts(), self.sums",
        "the error of one process",
    ),
    Mutant("training/upkeep.py", "share < COLLAPSED and", "share > COLLAPSED and", "whoever is well is warned"),
    Mutant("training/upkeep.py", "run.progress.step > plan.warmup_steps", "True", "a warning while the rate warms up"),
    Mutant("training/upkeep.py", "min(len(part), int(part.sum()))", "len(part)", "few tokens are to use all codes"),
    Mutant("training/upkeep.py", "if low and not usage.low:", "if low:", "the same warning again and again"),
    Mutant(
        "training/upkeep.py",
        "quantization_error(sum_over_processes(torch.stack(known).sum(0)))",
        "quantization_error(torch.stack(known).sum(0))",
        "the error of one process in training",
    ),
    Mutant("models/quantizers/lfq.py", "(joint + TINY).log()", "joint.log()", "a code that no token may be gives nan"),
]
