"""Optimizers, mixed precision, gradient clipping and learning-rate schedules."""
