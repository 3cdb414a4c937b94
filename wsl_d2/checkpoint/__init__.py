"""Weight files: naming schemes and conversion, complete-or-error loading of backbones, pixel statistics."""

from .backbone import (
    IncompleteLoadError,
    LoadReport,
    export_backbone,
    find_bottom_up,
    load_backbone,
    read_checkpoint,
    read_provenance,
)
from .naming import convert_state_dict, detect_format, holds_detector
from .pixel_statistics import PixelStatisticsError, check_pixel_statistics

__all__ = [
    "IncompleteLoadError",
    "LoadReport",
    "PixelStatisticsError",
    "check_pixel_statistics",
    "convert_state_dict",
    "detect_format",
    "export_backbone",
    "find_bottom_up",
    "holds_detector",
    "load_backbone",
    "read_checkpoint",
    "read_provenance",
]
