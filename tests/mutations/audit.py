"""The mutants of the audit of November 2026: the first sixteen were seen by no test then."""

from __future__ import annotations

from mutant import Mutant

AUDIT = [
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
        "config/quantizers/gumbel.py",
        "cosine(step, 0.0, self.kl_cost, warmup)",
        "cosine(step, self.kl_cost, 0.0, warmup)",
        "Gumbel's KL cost runs backwards",
    ),
    Mutant(
        "config/quantizers/nearest.py",
        "self.reinit_below, self.reinit_from)",
        'self.reinit_below, "used_codes" if self.reinit_from == "latents" else "latents")',
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
        "self.source, self.decay = tokenizer, decay",
        "self.source, self.decay = tokenizer, 0.1",
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
        "mean_over_processes_with_gradient(distribution)",
        "distribution.detach()",
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
    Mutant(
        "evaluation/networks.py",
        "file, antialias=False",
        "file, antialias=True",
        "FID with another resize than everybody's",
    ),
    Mutant(
        "training/codebook.py", "vectors + PERTURBATION * spread * noise", "vectors", "revived codes are exact copies"
    ),
    Mutant(
        "training/state.py",
        'self.updates = notes["averaged_steps"]',
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
        "(step + 1) % self.reinit_every",
        "step % self.reinit_every",
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
]
