import pytest
import torch
import torchvision
from fvcore.nn import FlopCountAnalysis

from wsl_d2.modeling import count_complexity

# Parameters in millions and multiply-adds at 224 pixels in billions, from timm's results tables.
PUBLISHED = {
    "resnext50_32x4d": (25.03, 4.26),
    "resnext101_32x4d": (44.18, 8.01),
    "resnext101_32x8d": (88.79, 16.48),
    "resnext101_32x16d": (194.03, 36.27),
    "resnext101_32x32d": (468.53, 87.29),
    "resnext101_32x48d": (828.41, 153.57),
}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_counts_are_the_published_ones(architecture):
    parameters, multiply_adds = count_complexity(architecture)
    assert (round(parameters / 1e6, 2), round(multiply_adds / 1e9, 2)) == PUBLISHED[architecture]


def test_the_small_trace_gives_what_a_whole_one_gives():
    network = torchvision.models.resnext50_32x4d(num_classes=17).eval()
    network.avgpool = torch.nn.Identity()  # fvcore counts adaptive pooling, and not the mean that takes its place here
    network.fc = torch.nn.Identity()
    whole = FlopCountAnalysis(network, torch.zeros(1, 3, 96, 96)).unsupported_ops_warnings(False).total()
    assert count_complexity("resnext50_32x4d", num_classes=17, image_size=96).multiply_adds == whole + 2048 * 17


def test_image_sizes():
    with pytest.raises(ValueError, match="multiple of 32, got 225"):
        count_complexity("resnext50_32x4d", image_size=225)
