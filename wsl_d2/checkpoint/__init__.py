"""Weight files: naming schemes and conversion, complete-or-error loading of backbones, pixel statistics."""

from .backbone import LoadReport, export_backbone, find_bottom_up, load_backbone
from .catalog import WSL_WEIGHTS
from .convert import compare_files, convert_file
from .download import DownloadError
from .files import IncompleteLoadError, read_checkpoint, read_pkl, read_provenance, write_weights
from .naming import FORMATS, convert_state_dict, detect_format, holds_detector
from .pixel_statistics import PixelStatisticsError, check_pixel_statistics

__all__ = [
    "FORMATS",
    "WSL_WEIGHTS",
    "DownloadError",
    "IncompleteLoadError",
    "LoadReport",
    "PixelStatisticsError",
    "check_pixel_statistics",
    "compare_files",
    "convert_file",
    "convert_state_dict",
    "detect_format",
    "export_backbone",
    "find_bottom_up",
    "holds_detector",
    "load_backbone",
    "read_checkpoint",
    "read_pkl",
    "read_provenance",
    "write_weights",
]
