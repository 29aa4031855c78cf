"""A user's own data: a LLaVA-style JSON file and a folder of images, or a set of the hub."""

from sts.pipeline.config import CustomConfig, DataConfig
from sts.pipeline.data.hub import hub_rows
from sts.pipeline.data.llava import llava_rows
from sts.pipeline.data.registry import DataSet
from sts.pipeline.data.rows import Rows


def dataset(name: str, spec: CustomConfig) -> DataSet:
    """The entry of `data.custom.<name>`."""

    def load(_: DataConfig, __: None) -> dict[str, Rows]:
        if spec.hub:
            return {spec.split: hub_rows(name, spec.hub, spec.files, spec.revision)}
        return {spec.split: llava_rows(name, spec.json_file, spec.images, f"data.custom.{name}")}

    return DataSet(
        version=spec.revision if spec.hub else "custom",
        licence="not stated",
        homepage=spec.hub or spec.json_file or "",
        citation="",
        load=load,
        embed=bool(spec.hub),
    )
