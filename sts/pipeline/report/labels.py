"""Labels are the user's text: as they are written in tables and figures of each format."""

import re
from collections.abc import Mapping, Sequence

from sts.pipeline.config import line

Labels = Mapping[str, str]  # id of an ablation -> its name


def label_by_id(ablations: Sequence[str], labels: Labels | None) -> Labels:
    """The label of each ablation, by default its id. Raises NotAccepted for more than a line."""
    return {id: line((labels or {}).get(id, id), f"labels.{id}") for id in ablations}


def of_csv(text: str) -> str:
    """Text that no spreadsheet takes for a formula, by a leading apostrophe."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def of_markdown(text: str) -> str:
    """Text without meaning in Markdown, its tables, mathematics and HTML."""
    return re.sub(r"([\\`*_{}\[\]<>|~$&#])", r"\\\1", text)


def code(text: str) -> str:
    """Text as code in Markdown."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}"


def of_figure(text: str) -> str:
    """Text that matplotlib draws as it is: not as mathematics, and also in a legend, which leaves
    out what begins with _."""
    return re.sub("^_", " _", text).replace("$", r"\$")


def of_latex_line(line: str) -> str:
    """A line of a LaTeX table that does not begin as an option of the line break before it."""
    return re.sub(r"^\s*([\[*])", r"{\1}", line)
