"""Mistral 3: a Pixtral tower, whose images have any size, and merged patches."""

from sts.architectures._base import Architecture, sized_grids

ARCHITECTURES = {
    "mistral3": Architecture(grids=sized_grids(lambda config: config.spatial_merge_size)),
}
