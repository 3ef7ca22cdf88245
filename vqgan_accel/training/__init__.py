"""How it learns: the loop, the two halves of a step, schedules, the codebook's upkeep, checkpoints, tracking."""
