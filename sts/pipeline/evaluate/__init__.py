"""Evaluation: a trained run on every benchmark."""
