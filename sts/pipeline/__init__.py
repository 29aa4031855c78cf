"""The pipeline: data, training, evaluation, tables, each a file; `python -m sts` calls them."""
