"""What ran where: hashes of code, data and configuration; commit, packages, hardware.

Standard library only, so that every part of the package and of the workflow may use it. Two kinds
of facts are kept apart: hashes are the same wherever they are taken and may enter a result file;
`collect` gives volatile facts (host, time, commit), which belong into `provenance.json` beside it.
"""

import ast
import hashlib
import os
import platform
import re
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
    groups: dict[str, list[ast.stmt]] = {}
    group_of: dict[str, str] = {}
    for statement in filter(_computes, parsed(source, filename).body):
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


@cache
def parsed(source: bytes, filename: str) -> ast.Module:
    """The syntax tree of a file. To parse is most of what a dry run takes: many jobs follow the
    same files."""
    return ast.parse(source, filename=filename)


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


def _computes(statement: ast.stmt) -> bool:
    """Whether a statement is no docstring and no import, and serves not imports alone."""
    if isinstance(statement, ast.If):
        return getattr(statement.test, "id", "") != "TYPE_CHECKING" or bool(statement.orelse)
    if isinstance(statement, ast.Expr):
        return not isinstance(getattr(statement.value, "value", None), str)
    is_import = isinstance(statement, ast.Import | ast.ImportFrom)
    return not is_import and _bound(statement) != ["__all__"]


def _canonical(node: Any) -> str:
    """Text of a syntax tree, the same on every Python: each version adds fields of its own, which
    are empty in older code. Left out are also statements that compute nothing, and what repeats the
    place (ctx) or the spelling (kind)."""
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)  # repr depends on the version's Unicode tables
    texts = []
    for name, value in sorted(ast.iter_fields(node)):
        if name in ("body", "orelse", "finalbody") and isinstance(value, list):
            value = [*filter(_computes, value)] or [ast.Pass()][: len(value)]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts an empty text after `{x:{y}}`
            value = [part for part in value if getattr(part, "value", None) != ""]
        if name not in ("ctx", "kind") and value is not None and value != []:
            texts.append(f"{name}={_canonical(value)}")
    return f"{type(node).__name__}({', '.join(texts)})"


def missing_packages(folder: str | Path = CODE) -> list[str]:
    """Packages that the modules in `folder` import when they are loaded and that are not here.

    Nothing is imported. What a function imports when it needs it doesn't count: tracking can do
    without, and DeepSpeed is never installed; nor does `hosts`, whose files are for programs that
    no job is. Raises SyntaxError naming the file.
    """
    modules = []
    for file in set(Path(folder).rglob("*.py")) - set(Path(folder).glob("hosts/*")):
        for node in parsed(file.read_bytes(), str(file)).body:
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules.append(node.module)
            elif isinstance(node, ast.Import):
                modules += [alias.name for alias in node.names]
    needed = {module.partition(".")[0] for module in modules}
    needed -= {*sys.stdlib_module_names, Path(folder).name}
    return sorted(name for name in needed if find_spec(name) is None)


def collect(config_hash: str) -> dict[str, Any]:
    """Facts about this process, ready for JSON: commit, packages, hardware, host, start, command.

    GPUs are named only if torch is already imported: asking must not initialise CUDA elsewhere.
    """
    return {
        "config_hash": config_hash,
        "command": command_line(),
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
    here = {"cwd": folder, "capture_output": True, "text": True, "errors": "replace", "check": True}
    changes = ["diff", "HEAD", "--binary", "--", ":/", ":(top,exclude)results"]
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **here).stdout.strip()
        diff = subprocess.run(["git", *changes], **here).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
        return {"commit": None, "dirty": None, "diff_sha256": None, "note": reason}
    diff_hash = hashlib.sha256(diff.encode()).hexdigest() if diff else None
    return {"commit": commit, "dirty": bool(diff), "diff_sha256": diff_hash, "note": None}


def packages() -> dict[str, str]:
    """Installed distributions and their versions, by name."""
    versions: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:  # a half-removed package leaves a nameless folder
            versions.setdefault(name.lower(), distribution.version)
    return dict(sorted(versions.items()))


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB, GPU names if torch is imported."""
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count() if torch and torch.cuda.is_available() else 0)
    # a container or a scheduler may give fewer cores than the machine has; macOS can't tell
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")  # of Linux
    models = re.findall(r"^model name\s*:(.*)$", info.read_text() if info.exists() else "", re.M)
    return models[0].strip() if models else platform.processor() or platform.machine()
