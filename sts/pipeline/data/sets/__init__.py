"""Public data sets: every file here is one, by its name, and holds its `DATASET`."""
