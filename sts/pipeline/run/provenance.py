"""What ran where: hashes of code, data and configuration; commit, packages, hardware.

Standard library only, so that every part of the package and of the workflow may use it. Two kinds
of facts are kept apart: hashes are the same wherever they are taken and may enter a result file;
`collect` gives volatile facts (host, time, commit), which belong into `provenance.json` beside it.
"""

import ast
import contextlib
import hashlib
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import defaultdict
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

CODE = Path(__file__).resolve().parents[2]


def fingerprint(*files: str | Path) -> str:
    """Hash of what files compute: 16 hex digits.

    Of Python files their top-level definitions count, as a set: not in which file one stands, nor
    where in it, nor imports, comments, docstrings, formatting or the Python version. So a formula
    that moves between the files changes nothing. Statements that bind the same name count in their
    order, and so do those of a file that bind none (`register(x)`). Where files define a name
    differently, a definition counts together with the one of its own file that it mentions. Other
    files (YAML tasks, weights) count byte by byte, and by name.

    Raises:
        FileNotFoundError: A file is missing.
        SyntaxError: A file is no Python; names it.
    """
    definitions_of = [_definitions(Path(file)) for file in files]
    versions = defaultdict(set)
    for definition in chain(*definitions_of):
        for name in definition.binds:
            versions[name].add(definition.digest)
    digests = set()
    for definitions in definitions_of:
        ambiguous = {
            name: definition.digest
            for definition in definitions
            for name in definition.binds
            if len(versions[name]) > 1
        }
        for definition in definitions:
            names = sorted(definition.mentions & ambiguous.keys())
            digests.add(_hash(definition.digest + "".join(ambiguous[name] for name in names)))
    return _hash("".join(sorted(digests)))[:16]


class _Definition(NamedTuple):
    """What binds a name at the top level of a file: one statement, or all that bind it in turn."""

    binds: set[str]
    mentions: set[str]
    digest: str


def _definitions(path: Path) -> list[_Definition]:
    source = path.read_bytes()
    if path.suffix == ".py":
        return _definitions_in(source, str(path))
    return [_Definition(set(), set(), _hash(path.name + hashlib.sha256(source).hexdigest()))]


@cache
def _definitions_in(source: bytes, filename: str) -> list[_Definition]:
    """Many jobs follow the same files, and to parse them is most of what a dry run would take."""
    groups: dict[str, list[ast.stmt]] = {}
    group_of: dict[str, str] = {}
    for statement in _bare(ast.parse(source, filename=filename)).body:
        names = _bound(statement)
        group = next((group_of[name] for name in names if name in group_of), next(iter(names), ""))
        group_of |= dict.fromkeys(names, group)
        groups.setdefault(group, []).append(statement)
    return [
        _Definition(
            binds=set().union(*map(_bound, statements)),
            mentions={n.id for s in statements for n in ast.walk(s) if isinstance(n, ast.Name)},
            digest=_hash(_canonical(statements)),
        )
        for statements in groups.values()
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bound(statement: ast.stmt) -> list[str]:
    """Names that a definition or an assignment binds; none of any other statement."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = getattr(statement, "targets", None) or [statement.target]
        nodes = (node for target in targets for node in ast.walk(target))
        return [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    return []


def _bare(tree: ast.Module) -> ast.Module:
    """The tree without statements that compute nothing."""
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if isinstance(body, list):
                kept = [statement for statement in body if not _computes_nothing(statement)]
                # a function of which nothing is left needs a body to be valid
                needs_body = body and not isinstance(node, ast.Module)
                setattr(node, name, kept or ([ast.Pass()] if needs_body else []))
    return tree


def _computes_nothing(statement: ast.stmt) -> bool:
    """Whether a statement is a docstring, an import, or serves imports alone."""
    if isinstance(statement, ast.If):
        return getattr(statement.test, "id", "") == "TYPE_CHECKING" and not statement.orelse
    if isinstance(statement, ast.Expr):
        return isinstance(getattr(statement.value, "value", None), str)
    return isinstance(statement, ast.Import | ast.ImportFrom) or _bound(statement) == ["__all__"]


def _canonical(node: Any) -> str:
    """Text of a syntax tree, the same on every Python: each version adds fields of its own, which
    are empty in older code. Left out is also what repeats the place (ctx) or the spelling (kind).
    """
    if isinstance(node, ast.JoinedStr):  # Python 3.12 puts an empty text after `{x:{y}}`
        node.values = [part for part in node.values if getattr(part, "value", None) != ""]
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # repr depends on the version's Unicode tables
    fields = [
        f"{name}={_canonical(value)}"
        for name, value in sorted(ast.iter_fields(node))
        if name not in ("ctx", "kind") and value is not None and value != []
    ]
    return f"{type(node).__name__}({', '.join(fields)})"


def missing_packages(folder: str | Path = CODE) -> list[str]:
    """Packages that the modules in `folder` import when they are loaded and that are not here.

    Nothing is imported. What a function imports when it needs it doesn't count: tracking can do
    without, and DeepSpeed is never installed. Raises SyntaxError naming the file.
    """
    needed = {name for file in Path(folder).rglob("*.py") for name in _imports(file)}
    needed -= {*sys.stdlib_module_names, Path(folder).name}
    return sorted(name for name in needed if find_spec(name) is None)


def _imports(file: Path) -> set[str]:
    statements = ast.parse(file.read_bytes(), filename=str(file)).body
    modules = [n.module for n in statements if isinstance(n, ast.ImportFrom) and not n.level]
    modules += [name.name for n in statements if isinstance(n, ast.Import) for name in n.names]
    return {module.partition(".")[0] for module in modules}


def collect(config_hash: str | None = None, command: str | None = None) -> dict[str, Any]:
    """Facts about this process, ready for JSON: commit, packages, hardware, host, start, command.

    GPUs are named only if torch is already imported: asking must not initialise CUDA elsewhere.
    """
    return {
        "config_hash": config_hash,
        "command": command or command_line(),
        "git": git(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": packages(),
        "hardware": hardware(),
        "host": socket.gethostname(),
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def command_line() -> str:
    """The command of this process as one would type it."""
    program, *arguments = sys.orig_argv
    return shlex.join([Path(program).name, *arguments])


def git(folder: str | Path = CODE) -> dict[str, Any]:
    """Commit of the code and whether tracked files differ from it.

    `results/` doesn't count: a run changes the results that are committed for reference. Outside
    a checkout, commit and dirty are None and `note` says why.
    """
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        diff = _git(folder, "diff", "HEAD", "--binary", "--", ":/", ":(top,exclude)results")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        return {"commit": None, "dirty": None, "diff_sha256": None, "note": reason}
    diff_hash = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    return {"commit": commit.strip(), "dirty": bool(diff), "diff_sha256": diff_hash, "note": None}


def _git(folder: str | Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True)
    return result.stdout


def packages() -> dict[str, str]:
    """Installed distributions and their versions, by name."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package leaves a nameless folder behind
            versions.setdefault(name.lower(), distribution.version)
    return dict(sorted(versions.items()))


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, GPU names if torch is imported."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "gpus": _gpu_names(),
    }


def _cpu_model() -> str:
    with contextlib.suppress(OSError):  # only Linux has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int | None:
    # a container or a scheduler may give fewer cores than the machine has; macOS can't tell
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count()


def _gpu_names() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
