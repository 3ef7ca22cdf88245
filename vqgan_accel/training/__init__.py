"""How it learns: the loop, its two steps, schedules, the codebook's upkeep, checkpoints, tracking."""
