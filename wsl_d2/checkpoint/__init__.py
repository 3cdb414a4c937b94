"""Weight files: naming schemes and conversion, complete-or-error loading of backbones, pixel statistics."""

from .backbone import LoadReport, export_backbone, find_bottom_up, load_backbone, load_pretrained, provenance_of
from .catalog import WSL_WEIGHTS
from .convert import TARGET_FORMATS, compare_files, convert_file
from .download import DownloadError
from .naming import FORMATS, convert_state_dict, detect_format
from .pixel_statistics import check_pixel_statistics
from .weight_file import (
    PROVENANCE,
    IncompleteLoadError,
    PixelStatisticsError,
    WeightFile,
    WeightsError,
    check_tensors,
    read_pkl,
    write_weights,
)

__all__ = [
    "FORMATS",
    "PROVENANCE",
    "TARGET_FORMATS",
    "WSL_WEIGHTS",
    "DownloadError",
    "IncompleteLoadError",
    "LoadReport",
    "PixelStatisticsError",
    "WeightFile",
    "WeightsError",
    "check_pixel_statistics",
    "check_tensors",
    "compare_files",
    "convert_file",
    "convert_state_dict",
    "detect_format",
    "export_backbone",
    "find_bottom_up",
    "load_backbone",
    "load_pretrained",
    "provenance_of",
    "read_pkl",
    "write_weights",
]
