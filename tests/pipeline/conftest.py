"""What several tests of the pipeline start from."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from made_results import make_results
from project import ABLATIONS, BOTH, SMOKE, make_project, run

from sts.pipeline.measure.kept_tokens import kept_tokens
from sts.vtc import KINDS


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the project with stand-ins for the long work (project.py)."""
    return make_project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("finished") / "project", ABLATIONS)
    run(folder, SMOKE, *BOTH)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A copy of the project in which the main job and `table_components` have been made."""
    return shutil.copytree(finished_once, tmp_path / "project", symlinks=True)


@pytest.fixture
def results(tmp_path) -> Path:
    """A small folder of results (made_results.py)."""
    return make_results(tmp_path / "results" / "mini")


CONDA = """#!/bin/sh
base=$(dirname "$(dirname "$0")")
case "$*" in
  *info*)
    printf '{"conda_prefix": "%s", "root_prefix": "%s", "platform": "linux-64"}' "$base" "$base";;
  *--version*) echo "conda 26.7.0";;
  *config*) echo '{"get": {"channel_priority": "strict"}}';;
  *create*)
    while [ "$1" != --prefix ]; do shift; done
    mkdir -p "$2/bin"
    printf '%s\\n' '#!/bin/sh' 'echo "$@" >> "${0%/bin/python}/asked"' 'exec PYTHON "$@"' \\
      > "$2/bin/python"
    chmod +x "$2/bin/python";;
esac
"""


@pytest.fixture
def conda(tmp_path) -> dict[str, str]:
    """Variables with which there is a conda. What it makes runs the interpreter of the tests, and
    keeps in the file `asked` what it was called with."""
    folder = tmp_path / "conda/bin"
    folder.mkdir(parents=True)
    (folder / "conda").write_text(CONDA.replace("PYTHON", sys.executable))
    (folder / "conda").chmod(0o755)
    (folder / "activate").write_text('export PATH="$1/bin:$PATH"\n')
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


class Learned(torch.nn.Module):
    """A kind with weights of its own."""

    def __init__(self, dim):
        super().__init__()

    def forward(self, tokens, keep): ...


@pytest.fixture(scope="session")
def kept(backbone, prepared, tmp_path_factory):
    """The result over the tiny tower's 4 x 4 patches, with a kind that nothing has trained."""
    out = tmp_path_factory.mktemp("kept") / "new" / "tokens.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "learned", Learned)
        result = kept_tokens(backbone, prepared, out)
        text = out.read_text()
        kept_tokens(backbone, prepared, out)
    assert out.read_text() == text  # the same every time
    assert json.loads(text) == json.loads(json.dumps(result))
    return json.loads(text)
