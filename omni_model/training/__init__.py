"""The learning machinery: optimizers, schedules, checkpoints and the one training loop."""
