"""Training: a stage of a run, from weights to weights; the story is train.py."""
