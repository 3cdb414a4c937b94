import shlex

import pytest
import torch
from detectron2.config import get_cfg

from wsl_d2.checkpoint import (
    IncompleteLoadError,
    PixelStatisticsError,
    check_pixel_statistics,
    convert_state_dict,
    export_backbone,
)
from wsl_d2.modeling import make_resnext

RGB = {
    "input_format": "RGB",
    "pixel_mean": [123.675, 116.280, 103.530],
    "pixel_std": [58.395, 57.120, 57.375],
}
BGR = {"input_format": "BGR", "pixel_mean": RGB["pixel_mean"][::-1], "pixel_std": RGB["pixel_std"][::-1]}


def make_cfg(input_format, pixel_mean, pixel_std):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = input_format
    cfg.MODEL.PIXEL_MEAN = pixel_mean
    cfg.MODEL.PIXEL_STD = pixel_std
    return cfg


@pytest.fixture
def exported(tmp_path):
    path = str(tmp_path / "backbone.pth")
    export_backbone(make_resnext("resnext26_8x4d"), path, **RGB)
    return path


@pytest.fixture
def torchvision_file(tmp_path):
    path = str(tmp_path / "torchvision.pth")
    torch.save(convert_state_dict(make_resnext("resnext26_8x4d").state_dict(), "torchvision"), path)
    return path


@pytest.mark.parametrize("file", ["exported", "torchvision_file"])
def test_agreement(file, request):
    path = request.getfixturevalue(file)
    check_pixel_statistics(make_cfg(**RGB), path)
    check_pixel_statistics(make_cfg("RGB", [123.6751, 116.2801, 103.53], RGB["pixel_std"]), path)


@pytest.mark.parametrize("file", ["exported", "torchvision_file"])
@pytest.mark.parametrize(
    ("changed", "keys"),
    [
        (BGR, ["INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]),
        ({"input_format": "BGR"}, ["INPUT.FORMAT"]),
        ({"pixel_std": [1.0, 1.0, 1.0]}, ["MODEL.PIXEL_STD"]),
        ({"pixel_mean": [123.675, 116.280, 103.630]}, ["MODEL.PIXEL_MEAN"]),
    ],
)
def test_disagreement_prints_what_cures_it(file, changed, keys, request):
    path = request.getfixturevalue(file)
    cfg = make_cfg(**{**RGB, **changed})
    with pytest.raises(PixelStatisticsError) as caught:
        check_pixel_statistics(cfg, path)
    text, cure = str(caught.value).split(" Set, in the config or at the end of the command line: ")
    assert path in text and "\n" not in cure
    for key in ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        assert (f"{key} is " in text) == (key in keys)
    if "pixel_std" in changed and len(keys) == 1:
        assert "MODEL.PIXEL_STD is [1.0, 1.0, 1.0], the weights need [58.395, 57.12, 57.375]" in text
    cfg.merge_from_list(shlex.split(cure))
    check_pixel_statistics(cfg, path)


def test_unknown_origin_only_warns(tmp_path, caplog):
    path = str(tmp_path / "model_final.pth")
    torch.save({"model": make_resnext("resnext26_8x4d").state_dict()}, path)
    check_pixel_statistics(make_cfg(**BGR), path)
    assert f"{path} does not say which pixel statistics it was trained with" in caplog.text


def test_incomplete_provenance(tmp_path, exported):
    payload = torch.load(exported, weights_only=True)
    del payload["wsl_d2"]["pixel_std"]
    path = str(tmp_path / "incomplete.pth")
    torch.save(payload, path)
    with pytest.raises(PixelStatisticsError, match="provenance in .*incomplete.pth lacks pixel_std"):
        check_pixel_statistics(make_cfg(**RGB), path)


def test_no_checkpoint(tmp_path):
    path = tmp_path / "empty.pth"
    path.touch()
    with pytest.raises(IncompleteLoadError, match="empty.pth: the file is empty"):
        check_pixel_statistics(make_cfg(**RGB), path)
