"""Optimizers: C3O, the schedules, and the trainer's seam (`update.Update`). `schedule` is torch-free."""
