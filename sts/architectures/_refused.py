"""Image-text-to-text types that can't be carried, and why."""

REFUSED: dict[str, str] = {}
