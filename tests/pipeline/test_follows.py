"""What a job follows of the code: folders are the rule."""

from pathlib import Path

import pytest
from project import ROOT

from sts.pipeline.config import CODE
from sts.pipeline.plan import load_plan
from sts.pipeline.run import follows

PLAN = load_plan(ROOT / "workflow/config/mini.yaml", ROOT / "workflow/ablations.yaml")


def test_trainings_follow_the_library_data_and_train():
    for config in PLAN.configs.values():
        for block in config.stages.values():
            files = follows.training(block, config.model.family)
            rooms = {file.relative_to(CODE).parts[:2] for file in files}
            of_pipeline = {parts[1] for parts in rooms if parts[0] == "pipeline"}
            assert of_pipeline == {"data", "train"}
            assert {"mini", "__main__.py"}.isdisjoint(parts[0] for parts in rooms)


@pytest.mark.parametrize("path", follows.LOOKS_ON, ids=lambda path: path.name)
def test_what_looks_on_is_there(path):
    assert path.exists(), "moved? Then a training follows it now"


def test_what_looks_on_is_not_followed_though_it_is_imported():
    def looks_on(file: Path) -> bool:
        return any(map(file.is_relative_to, follows.LOOKS_ON))

    files = follows.imported([follows.STORY])
    assert follows.STORY in files and not any(map(looks_on, files))
    assert any(looks_on(other) for file in files for other in follows.imports(file))
