"""What surrounds a job and changes no result: provenance, tracking, devices, progress."""
