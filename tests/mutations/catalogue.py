"""What is planted: file, line, wrong line, and what a user would get. The first part are the mutants of the audit of
November 2026, sixteen of which no test saw then; after them come others, by file.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Mutant(NamedTuple):
    file: str  # below vqgan_accel/
    line: str  # text that occurs once in it
    wrong: str  # what it becomes
    effect: str


ORACLE = ("test_plan.py", "test_plain_trainer.py")
# file -> the fast tests that watch it, the quickest first. The first pattern that fits counts.
TESTS = {
    "training/plan.py": ("test_plan.py", "test_plain_trainer.py"),
    "schedules.py": ("test_schedules.py", "test_plan.py"),
    "training/checkpoint.py": ("test_state.py", "test_training.py"),
    "training/state.py": ("test_state.py", "test_bad_steps.py", "test_plain_trainer.py", "test_training.py"),
    "training/codebook.py": ("test_codebook.py", "test_bad_steps.py", "test_state.py", "test_plain_trainer.py"),
    "training/pace.py": ("test_pace.py",),
    "training/tracking.py": ("test_pace.py", "test_training.py", "test_report.py"),
    "training/adversary.py": (
        "test_losses.py",
        "test_plain_trainer.py",
        "test_mixed_precision.py",
        "test_fine_tuning.py",
    ),
    "training/round.py": ("test_losses.py", "test_plain_trainer.py"),
    "training/networks.py": ("test_plain_trainer.py", "test_fine_tuning.py", "test_training.py"),
    "training/*": ("test_plain_trainer.py", "test_bad_steps.py", "test_training.py", "test_fine_tuning.py"),
    "losses/*": ("test_losses.py", "test_plain_trainer.py"),
    "models/quantizers/*": ("test_quantizers.py", "test_codebook.py", "test_plain_trainer.py"),
    "models/discriminators/*": ("test_stylegan2.py", "test_convolution.py", "test_discriminators.py"),
    "models/tokenizer.py": ("test_tokenizer.py",),
    "data/order.py": ("test_data_order.py", "test_data_loading.py"),
    "data/opening.py": ("test_data_loading.py", "test_data_sources.py"),
    "data/lanes.py": ("test_data_stream.py",),
    "evaluation/reconstruct.py": ("test_reconstruct.py",),
    "evaluation/*": ("test_metrics.py", "test_evaluation.py"),
    "config/metrics.py": ("test_training.py", "test_report.py"),
    "config/*": ("test_config.py", "test_sections.py", "test_plan.py", "test_plain_trainer.py"),
}


def tests_of(mutant: Mutant) -> tuple[str, ...]:
    return next(names for pattern, names in TESTS.items() if fnmatchcase(mutant.file, pattern))


MUTANTS = [
    # ---- what no test saw
    Mutant(
        "training/networks.py",
        "groups[id(parameter) in convolutions]",
        "groups[id(parameter) not in convolutions]",
        "weight decay on norms, biases and the codebook, none on convolutions",
    ),
    Mutant(
        "training/networks.py",
        '"weight_decay": training.weight_decay}]',
        '"weight_decay": 0.0}]',
        "the discriminator's weights do not decay",
    ),
    Mutant("training/networks.py", "betas=training.betas", "betas=training.betas[::-1]", "AdamW's betas swapped"),
    Mutant(
        "training/learner.py",
        "clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm)",
        "clip_grad_norm_(parameters, math.inf)",
        "gradients are measured and not clipped",
    ),
    Mutant(
        "training/loop.py",
        "learner.set_learning_rate(plan.learning_rate_at(step))",
        "learner.set_learning_rate(plan.learning_rate_at(step + 1))",
        "every learning rate a step early",
    ),
    Mutant(
        "training/loop.py",
        "    for learner in networks.learners:\n        learner.set",
        "    for learner in networks.learners[:1]:\n        learner.set",
        "the discriminator's learning rate is not scheduled",
    ),
    Mutant("training/plan.py", "* self.config.training.lr_final_ratio", "* 0.1", "lr_final_ratio is 0.1 for everybody"),
    Mutant(
        "training/plan.py",
        "(step - start) % discriminator.r1_every == 0",
        "(step + 1 - start) % discriminator.r1_every == 0",
        "R1 on the wrong steps, and not on the first",
    ),
    Mutant(
        "config/quantizers.py",
        "cosine(step, 0.0, self.kl_cost, warmup)",
        "cosine(step, self.kl_cost, 0.0, warmup)",
        "Gumbel's KL cost runs backwards",
    ),
    Mutant(
        "config/quantizers.py",
        "Reinit(self.reinit_every_epochs, self.reinit_from)",
        'Reinit(self.reinit_every_epochs, "used_codes" if self.reinit_from == "latents" else "latents")',
        "reinit_from means the other source",
    ),
    Mutant(
        "training/plan.py",
        "round(training.max_epochs * epoch)",
        "int(training.max_epochs * epoch)",
        "max_epochs is rounded down",
    ),
    Mutant(
        "training/state.py",
        "get_ema_multi_avg_fn(decay)",
        "get_ema_multi_avg_fn(0.1)",
        "ema_decay is 0.1 for everybody",
    ),
    Mutant(
        "training/loop.py",
        "    if sound:\n        for learner in learning:\n            learner.optimizer.step()\n",
        "    if sound and networks.average:\n        networks.average.apply_update()\n"
        "    if sound:\n        for learner in learning:\n            learner.optimizer.step()\n",
        "the average sees every step's weights twice, once too early",
    ),
    Mutant(
        "config/metrics.py",
        "return value < than if metric in LOWER_IS_BETTER else value > than",
        "return value > than",
        "with best_metric l2, lpips or rfid the worst checkpoint is `best`",
    ),
    Mutant(
        "training/loop.py",
        "all(math.isfinite(value) for value in values.values())",
        'math.isfinite(values["total"])',
        "a nan of the discriminator alone enters its weights",
    ),
    Mutant(
        "training/codebook.py",
        "    def discard_update(self) -> None:\n        self.new_counts.zero_()",
        "    def discard_update(self) -> None:\n        pass",
        "codes of skipped steps count as used",
    ),
    # ---- what some test saw
    Mutant(
        "models/quantizers/entropy.py",
        "mean_over_processes_with_gradient(target.mean(0))",
        "target.mean(0).detach()",
        "the entropy of the mean has no gradient",
    ),
    Mutant(
        "models/quantizers/entropy.py", "LOG_EPS = 1e-5", "LOG_EPS = 1e-8", "another epsilon in the entropy's logarithm"
    ),
    Mutant(
        "models/quantizers/gumbel.py",
        "(log_q + math.log(self.num_codes))).sum(1).mean()",
        "(log_q + math.log(self.num_codes))).mean(1).mean()",
        "KL as a mean over codes",
    ),
    Mutant(
        "models/quantizers/gumbel.py",
        "((logits + gumbel_noise(logits, sample_seeds)) / self.temperature)",
        "(logits / self.temperature + gumbel_noise(logits, sample_seeds))",
        "the temperature divides the logits and not the noise",
    ),
    Mutant(
        "models/discriminators/stylegan2.py",
        "(variance + 1e-8).sqrt()",
        "(variance + 1e-4).sqrt()",
        "another epsilon in minibatch-stddev",
    ),
    Mutant(
        "models/quantizers/ema.py",
        "sum_over_processes(self.new_counts)",
        "self.new_counts",
        "EMA counts are those of one process",
    ),
    Mutant(
        "losses/adversarial.py",
        "mean_over_processes(torch.stack([g_rec, g_gen]))",
        "torch.stack([g_rec, g_gen])",
        "lambda is that of one process",
    ),
    Mutant("losses/adversarial.py", "(g_gen.norm() + 1e-8)", "(g_gen.norm() + 1e-4)", "another epsilon in lambda"),
    Mutant(
        "losses/adversarial.py",
        "gradient.square().sum((1, 2, 3)).mean()",
        "0.5 * gradient.square().sum((1, 2, 3)).mean()",
        "R1 is halved",
    ),
    Mutant(
        "data/opening.py",
        "range(process_index, len(source), num_processes)",
        "range(0, len(source), num_processes)",
        "every process evaluates the first one's images",
    ),
    Mutant(
        "models/tokenizer.py",
        "self.to_public_range(pixels).clamp(-1, 1)",
        "self.to_public_range(pixels).clamp(0, 1)",
        "decoded pixels are clipped to [0, 1]",
    ),
    Mutant("evaluation/metrics.py", "antialias=False)", "antialias=True)", "FID with another resize than everybody's"),
    Mutant(
        "training/codebook.py", "vectors + PERTURBATION * spread * noise", "vectors", "revived codes are exact copies"
    ),
    Mutant(
        "training/state.py",
        'self.model.n_averaged.fill_(notes["averaged_steps"])',
        "pass",
        "a resumed average begins anew",
    ),
    Mutant(
        "training/codebook.py",
        'self.counts.copy_(torch.tensor(notes["code_counts"]))',
        "pass",
        "a resumed run forgets the epoch's use of codes",
    ),
    Mutant(
        "training/state.py",
        "torch.empty_like(parameters[number]).copy_(value)",
        "value",
        "moments in another memory layout than their weights",
    ),
    Mutant(
        "training/loop.py",
        "    for learner in learning:\n        learner.optimizer.zero_grad()",
        "    networks.tokenizer.optimizer.zero_grad()",
        "the discriminator's gradients pile up",
    ),
    Mutant(
        "training/plan.py",
        "step % self.checkpoint_every == 0",
        "step % self.validate_every == 0",
        "checkpoints come with validations",
    ),
    Mutant(
        "training/networks.py",
        "built.tokenizer.quantizer.requires_grad_(False)",
        "pass",
        "decoder_only trains the codebook",
    ),
    Mutant(
        "training/loop.py",
        "networks.tokenizer.network.quantizer.eval()",
        "pass",
        "decoder_only moves an EMA codebook",
    ),
    Mutant(
        "training/networks.py",
        "self.average.tokenizer if self.average else self.tokenizer.network",
        "self.tokenizer.network",
        "raw weights are validated, not the averaged ones",
    ),
    Mutant(
        "training/plan.py",
        "(step + 1) % (reinit.every_epochs * self.steps_per_epoch)",
        "step % (reinit.every_epochs * self.steps_per_epoch)",
        "codes are replaced a step too late",
    ),
    Mutant("schedules.py", "(step + 1) / warmup_steps", "step / warmup_steps", "the first warm-up step learns nothing"),
    Mutant("config/training.py", '"sqrt": math.sqrt(ratio)', '"sqrt": ratio', "sqrt scaling is linear"),
    Mutant(
        "training/plan.py",
        "step < self.discriminator_start + self.discriminator_warmup",
        "step <= self.discriminator_start + self.discriminator_warmup",
        "the discriminator's warm-up is a step longer",
    ),
    Mutant(
        "training/adversary.py",
        "torch.full((), 0.0, device=pull.device)",
        "torch.full((), self.config.weight, device=pull.device)",
        "while D warms up a weight is reported that nothing has",
    ),
    # ---- training/
    Mutant(
        "training/adversary.py",
        'if self.phase == "teaching":',
        'if self.phase != "absent":',
        "the tokenizer learns while D warms up",
    ),
    Mutant(
        "training/adversary.py",
        "with self.accelerator.no_sync(self.discriminator.wrapped):",
        "if True:",
        "D's gradient crosses the wire twice",
    ),
    Mutant(
        "training/adversary.py",
        "pull + weight * verdict.pull",
        "pull - weight * verdict.pull",
        "the tokenizer learns to be found out",
    ),
    Mutant(
        "training/adversary.py",
        "loss + self.config.r1_weight * penalty",
        "loss + penalty",
        "r1_weight is 1 for everybody",
    ),
    Mutant("training/adversary.py", "if self.config.adaptive_weight:", "if False:", "adaptive_weight does nothing"),
    Mutant("training/adversary.py", "full_precision=self.with_r1", "full_precision=False", "R1 in bfloat16"),
    Mutant(
        "training/adversary.py", "real.detach() + verdict.fake_loss", "real.detach()", "D's reported loss is half of it"
    ),
    Mutant(
        "training/adversary.py",
        "weight * adaptive_weight(tokenizer, last_features, pull, verdict.pull)",
        "weight * adaptive_weight(tokenizer, last_features, verdict.pull, pull)",
        "lambda upside down",
    ),
    Mutant(
        "training/adversary.py",
        '"logits_fake": verdict.logits.mean()',
        '"logits_fake": logits.detach().mean()',
        "logits of images reported as those of reconstructions",
    ),
    Mutant(
        "training/round.py",
        "total + weight * verdict.generator_loss",
        "total + verdict.generator_loss",
        "the reported total ignores the weight",
    ),
    Mutant(
        "training/round.py",
        "accelerator.backward(surrogate + output.quantizer.loss)",
        "accelerator.backward(surrogate)",
        "the quantizer's loss trains nothing",
    ),
    Mutant(
        "training/round.py",
        "loss.detach() + output.quantizer.loss.detach()",
        "loss.detach()",
        "the reported total lacks the quantizer's loss",
    ),
    Mutant(
        "training/round.py",
        "output.reconstruction.detach().requires_grad_()",
        "output.reconstruction.detach().clone().neg().requires_grad_()",
        "losses see the negative image",
    ),
    Mutant(
        "training/loop.py",
        "plan.quantizer_at(step).items()",
        "plan.quantizer_at(0).items()",
        "temperature and KL cost stay where they begin",
    ),
    Mutant("training/loop.py", "sums[2:] / num_processes()", "sums[2:]", "logged losses are sums over processes"),
    Mutant("training/loop.py", "run.usage.reset()", "pass", "use of codes is counted since the run began"),
    Mutant(
        "training/loop.py",
        "position_seed(CODE_REINIT, run.config.seed, step)",
        "position_seed(CODE_REINIT, 0, step)",
        "the same codes are drawn whatever the seed",
    ),
    Mutant(
        "training/loop.py",
        "for parts in losses]).mean(0)",
        "for parts in losses]).sum(0)",
        "logged losses are sums over rounds",
    ),
    Mutant("training/loop.py", "run.usage.add(made.codes)", "pass", "no code is ever used"),
    Mutant(
        "training/loop.py",
        '"learning_rate": plan.learning_rate_at(step - 1)',
        '"learning_rate": plan.learning_rate_at(step)',
        "the logged rate is the next step's",
    ),
    Mutant(
        "training/loop.py",
        "progress.best, progress.best_step = value, progress.step",
        "progress.best = value",
        "`best` points nowhere",
    ),
    Mutant("training/state.py", "self.tokenizer.quantizer.apply_update()", "pass", "an EMA codebook never moves"),
    Mutant(
        "training/state.py", "self.tokenizer.quantizer.discard_update()", "pass", "skipped steps enter an EMA codebook"
    ),
    Mutant("training/state.py", "self.bad_steps_in_a_row = 0", "pass", "bad steps add up over a whole run"),
    Mutant(
        "training/state.py", "self.model.update_parameters(self.source)", "pass", "the average stays the first weights"
    ),
    Mutant(
        "training/codebook.py",
        "unused = unused[: len(vectors)]",
        "unused = unused[-len(vectors) :]",
        "other codes are replaced than were said",
    ),
    Mutant("training/codebook.py", "(self.counts == 0)", "(self.counts <= 1)", "codes used once are replaced"),
    Mutant(
        "training/codebook.py",
        "forget_moments(quantizer, optimizer, unused)",
        "pass",
        "replaced codes keep their old moments",
    ),
    Mutant(
        "training/codebook.py",
        "sample % rounds, sample // rounds",
        "sample // rounds, sample % rounds",
        "latents are drawn from other samples on many processes",
    ),
    Mutant(
        "training/networks.py",
        "built.tokenizer.encoder.requires_grad_(False)",
        "pass",
        "decoder_only trains the encoder",
    ),
    Mutant("training/networks.py", "eps=training.eps", "eps=1e-8", "training.eps does nothing"),
    Mutant(
        "training/networks.py",
        "if config.training.init_from is not None and fresh:",
        "if config.training.init_from is not None:",
        "a resumed run begins with init_from again",
    ),
    Mutant(
        "training/plan.py",
        "max(1, training.validate_every.steps(epoch))",
        "training.validate_every.steps(epoch)",
        "validate_every of less than a step divides by zero",
    ),
    Mutant(
        "training/plan.py",
        "training.lr_decay.steps(epoch) if training.lr_decay else total_steps",
        "total_steps",
        "lr_decay does nothing",
    ),
    Mutant("training/plan.py", "min(limits)", "max(limits)", "training ends at the later of max_epochs and max_steps"),
    # ---- losses/
    Mutant(
        "losses/adversarial.py",
        "F.relu(1 - real_logits)",
        "F.relu(1 + real_logits)",
        "hinge's real half has the fake half's sign",
    ),
    Mutant(
        "losses/adversarial.py",
        "F.relu(1 + fake_logits)",
        "F.relu(1 - fake_logits)",
        "hinge's fake half has the real half's sign",
    ),
    Mutant(
        "losses/adversarial.py",
        "F.softplus(-real_logits)",
        "F.softplus(real_logits)",
        "non-saturating: D learns to be wrong",
    ),
    Mutant(
        "losses/adversarial.py",
        "-fake_logits.mean() if",
        "fake_logits.mean() if",
        "hinge: the tokenizer learns to be found out",
    ),
    Mutant("losses/adversarial.py", ".clamp(0, MAX_ADAPTIVE_WEIGHT)", "", "lambda has no upper bound"),
    Mutant("losses/adversarial.py", "create_graph=True", "create_graph=False", "R1 trains nothing"),
    Mutant(
        "losses/reconstruction.py",
        "self.config.l1_weight * parts",
        "self.config.l2_weight * parts",
        "L1 has L2's weight",
    ),
    Mutant(
        "losses/reconstruction.py",
        "self.config.perceptual_weight * parts",
        "parts",
        "perceptual_weight is 1 for everybody",
    ),
    Mutant(
        "losses/reconstruction.py",
        "F.mse_loss(reconstruction, images)",
        "F.mse_loss(reconstruction, images).sqrt()",
        "L2 is its root",
    ),
    # ---- models/quantizers/
    Mutant(
        "models/quantizers/nearest.py",
        "codebook_loss + self.commitment_cost * commitment_loss",
        "commitment_loss + self.commitment_cost * codebook_loss",
        "the commitment cost weighs the codebook's term",
    ),
    Mutant(
        "models/quantizers/nearest.py",
        "F.mse_loss(quantized, latents.detach())",
        "F.mse_loss(quantized, latents)",
        "the codebook's term pulls the encoder, too",
    ),
    Mutant(
        "models/quantizers/nearest.py",
        "self.codebook[codes] = self.comparable(vectors)",
        "self.codebook[codes] = vectors",
        "replaced codes are no unit vectors",
    ),
    Mutant(
        "models/quantizers/ema.py",
        "self.counts.lerp_(sum_over_processes(self.new_counts), 1 - self.decay)",
        "self.counts.lerp_(sum_over_processes(self.new_counts), self.decay)",
        "decay is 1 - decay",
    ),
    Mutant(
        "models/quantizers/ema.py",
        'self.register_buffer("counts", torch.ones(num_codes))',
        'self.register_buffer("counts", torch.zeros(num_codes))',
        "unused codes explode at the first step",
    ),
    Mutant(
        "models/quantizers/ema.py",
        "if self.training:\n            self.new_counts",
        "if True:\n            self.new_counts",
        "validation moves the codebook",
    ),
    Mutant(
        "models/quantizers/ema.py",
        "(total + len(counts) * epsilon) * total",
        "(total + len(counts) * epsilon)",
        "smoothed counts sum to one",
    ),
    Mutant(
        "models/quantizers/entropy.py",
        "mean_entropy - entropy_of_mean",
        "mean_entropy + entropy_of_mean",
        "the loss wants few codes used",
    ),
    Mutant(
        "models/quantizers/entropy.py",
        "-distances / self.temperature",
        "-distances * self.temperature",
        "the temperature multiplies",
    ),
    Mutant(
        "models/quantizers/gumbel.py",
        "hard + (sample - sample.detach())",
        "hard",
        "straight-through without a gradient",
    ),
    Mutant("models/quantizers/gumbel.py", "self.kl_cost * kl,", "kl,", "kl_cost is 1 for everybody"),
    Mutant(
        "models/quantizers/base.py",
        "latents + (quantized - latents).detach()",
        "quantized",
        "no gradient reaches the encoder",
    ),
    Mutant("models/quantizers/base.py", "alpha=-2)", "alpha=-1)", "the nearest code is not the nearest"),
    # ---- data/order.py
    Mutant(
        "data/order.py",
        "(local * num_processes + process) * num_rounds + round",
        "(local * num_rounds + round) * num_processes + process",
        "what a round holds depends on the number of processes",
    ),
    Mutant(
        "data/order.py",
        "generator(EPOCH_ORDER, seed, epoch)",
        "generator(EPOCH_ORDER, seed, 0)",
        "every epoch has the same order",
    ),
    Mutant(
        "data/order.py",
        "num_images // total_batch_size",
        "-(-num_images // total_batch_size)",
        "the last, incomplete batch is trained on",
    ),
]
