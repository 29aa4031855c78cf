"""What is measured or foreseen of a run: time, and what a call will cost."""
