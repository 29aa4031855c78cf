"""What several tests of the pipeline start from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_results import make_results
from project import ABLATIONS, BOTH, SMOKE, make_project, run

from sts.pipeline.kept_tokens import kept_tokens
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
