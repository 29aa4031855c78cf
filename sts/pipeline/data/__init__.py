"""Data: fetched, prepared as Arrow files, tokenised and put into batches."""
