"""Every config of Detectron2's model zoo on a ResNet, with a ResNeXt in its place: it builds, gets every tensor of a
weight file, and computes what torchvision computes. The outcome is the table of configs/README.md, which

    WSL_D2_WRITE_TABLES=1 pytest -n0 tests/modeling/test_compatibility.py

writes between its marks; without it the test compares."""

import copy
import os
from pathlib import Path

import detectron2
import pytest
import torch
import torchvision
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from toy_backbones import RGB_STATISTICS, randomise
from write_tables import replace_table

from wsl_d2.checkpoint import IncompleteLoadError, WeightFile, convert_state_dict, find_bottom_up, load_backbone
from wsl_d2.checkpoint.backbone import _res5_of_heads
from wsl_d2.modeling import ArchitectureError, make_resnext

README = Path(__file__).parents[2] / "configs" / "README.md"
ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
ARCHITECTURE = "resnext50_32x4d"
BUILDERS = {
    "build_resnet_backbone": f"build_{ARCHITECTURE}_backbone",
    "build_resnet_fpn_backbone": f"build_{ARCHITECTURE}_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone": f"build_{ARCHITECTURE}_fpn_backbone",
}
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
TENSORS = 265  # of ResNeXt-50: 53 convolutions, and 4 of norm for each


@pytest.fixture(scope="module")
def reference():
    """torchvision's network, its file as torchvision and WSL name the tensors, and as a converted one."""
    torch.manual_seed(0)
    network = randomise(torchvision.models.resnext50_32x4d(num_classes=1))
    provenance = RGB_STATISTICS | {"stride_in_1x1": False, "num_classes": None}
    d2 = convert_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}, "d2")
    files = [
        WeightFile("torchvision.pth", {"": network.state_dict()}),
        WeightFile("wsl.pth", {"model": {k: v for k, v in d2.items() if "num_batches" not in k}}, provenance),
    ]
    with torch.no_grad():
        features = [network.maxpool(network.relu(network.bn1(network.conv1(IMAGE))))]
        for layer in (network.layer1, network.layer2, network.layer3, network.layer4):
            features.append(layer(features[-1]))
        features.append(dilated(network.layer4)(features[3]))
    return files, features


def dilated(layer):
    """torchvision's last layer with stride 1 and dilation 2, as Detectron2 makes it for DC5."""
    layer = copy.deepcopy(layer)
    for block in layer:
        block.conv2.stride, block.conv2.dilation, block.conv2.padding = (1, 1), (2, 2), (2, 2)
    layer[0].downsample[0].stride = (1, 1)
    return layer


def largest_difference(model, features):
    """Of res2 to res5, also that of a head, relative to each stage's largest feature; and the number of stages."""
    bottom_up = find_bottom_up(model).eval()
    stages = [*bottom_up.stages, *(head.eval() for head in heads_of(model, bottom_up))]
    worst = 0.0
    with torch.no_grad():
        x = bottom_up.stem(IMAGE)
        for i, stage in enumerate(stages, 1):
            x = stage(x)
            expected = features[5] if i == 4 and stage[0].stride == 1 else features[i]
            worst = max(worst, float((x - expected).abs().max() / expected.abs().max()))
    return worst, len(stages)


def heads_of(model, bottom_up):
    name = next(name for name, module in model.named_modules() if module is bottom_up)
    return _res5_of_heads(model, name) if "res5" not in bottom_up.stage_names else []


def load_and_compare(model, cfg, reference):
    files, features = reference
    bottom_up = find_bottom_up(model)
    parts = [bottom_up, *heads_of(model, bottom_up)]
    loaded, unused, states = set(), set(), []
    for file in files:
        for part in parts:
            part.to_empty(device="cpu")  # the rest stays on the meta device, without memory
            for tensor in part.state_dict().values():
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        report = load_backbone(model, file, cfg)
        states.append([tensor.clone() for part in parts for tensor in part.state_dict().values()])
        loaded.add(report.num_tensors)
        unused.add(len(report.unused))
        assert report.num_tensors + len(report.unused) == TENSORS
    assert all(torch.equal(*tensors) for tensors in zip(*states, strict=True))
    worst, num_stages = largest_difference(model, features)
    assert worst <= 1e-5 and num_stages == (3 if max(unused) else 4)
    return max(loaded), max(unused), worst


def kind_of(cfg):
    model = cfg.MODEL
    level = "FPN" if "fpn" in model.BACKBONE.NAME else "DC5" if model.RESNETS.RES5_DILATION == 2 else "C4"
    detector = {
        "ProposalNetwork": "RPN",
        "RetinaNet": "RetinaNet",
        "SemanticSegmentor": "Semantic segmentation",
        "PanopticFPN": "Panoptic",
    }.get(model.META_ARCHITECTURE)
    if detector is None:
        detector = "Mask R-CNN" if model.MASK_ON else "Keypoint R-CNN" if model.KEYPOINT_ON else "Faster R-CNN"
        detector = "Fast R-CNN" if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" else detector
    detector = (
        f"Cascade {detector}" if model.ROI_HEADS.NAME == "CascadeROIHeads" and detector != "Panoptic" else detector
    )
    if any(model.RESNETS.DEFORM_ON_PER_STAGE):
        return "any, with deformable convolutions"
    return "any, with group norm in the backbone" if model.RESNETS.NORM == "GN" else f"{detector}, {level}"


def yaml_config(path):
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    cfg.MODEL.BACKBONE.NAME = BUILDERS[cfg.MODEL.BACKBONE.NAME]
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = 50, False
    cfg.MODEL.RESNETS.NUM_GROUPS, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32, 4
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = RGB_STATISTICS["pixel_mean"], RGB_STATISTICS["pixel_std"]
    cfg.MODEL.DEVICE = "meta"
    return cfg


def yaml_outcome(cfg, reference):
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except ArchitectureError as error:
        assert any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and "DEFORM_ON_PER_STAGE" in str(error)
        return "refused when it is built"
    try:
        return load_and_compare(model, cfg, reference)
    except IncompleteLoadError as error:
        assert cfg.MODEL.RESNETS.NORM == "GN" and "norms are GroupNorm" in str(error)
        return "refused by `load_backbone`"


def lazy_config(path):
    cfg = LazyConfig.load(str(path))
    bottom_up = OmegaConf.select(cfg, "model.backbone.bottom_up")
    if bottom_up is None or "make_default_stages" not in str(bottom_up.get("stages", "")):
        return None  # a ViT, a RegNet, or C4, whose config spells out its res5
    cfg.model.backbone.bottom_up = L(make_resnext)(
        architecture=ARCHITECTURE, norm="FrozenBN", freeze_at=2, out_features=["res2", "res3", "res4", "res5"]
    )
    cfg.model.pixel_mean, cfg.model.pixel_std = RGB_STATISTICS["pixel_mean"], RGB_STATISTICS["pixel_std"]
    if "input_format" in cfg.model:  # FCOS does not know it
        cfg.model.input_format = "RGB"
    cfg.dataloader.train.mapper.image_format = "RGB"
    kinds = {"fcos": "FCOS", "retinanet": "RetinaNet", "keypoint": "Keypoint R-CNN", "panoptic": "Panoptic"}
    kind = kinds.get(path.stem.split("_")[0], "Mask R-CNN")
    return f"{kind}, FPN, LazyConfig", cfg


def lazy_outcome(cfg, reference):
    with torch.device("meta"):
        model = instantiate(cfg.model)
    return load_and_compare(model, cfg, reference)


@pytest.mark.parametrize("configs_of_a_kind", [1, pytest.param(1000, marks=pytest.mark.long)])
def test_every_config_of_the_model_zoo(reference, configs_of_a_kind):
    kinds: dict[str, list] = {}
    yamls = [path for path in sorted(ZOO.rglob("*.yaml")) if not path.name.startswith("Base-")]
    for cfg in map(yaml_config, yamls):
        kinds.setdefault(kind_of(cfg), []).append((yaml_outcome, cfg))
    assert sum(map(len, kinds.values())) == len(yamls) >= 70
    for path in sorted([*ZOO.glob("COCO-*/*.py"), *ZOO.glob("new_baselines/*R_*.py")]):
        if result := lazy_config(path):
            kinds.setdefault(result[0], []).append((lazy_outcome, result[1]))
    rows = {
        kind: [outcome(cfg, reference) for outcome, cfg in found[:configs_of_a_kind]] for kind, found in kinds.items()
    }
    lines = [
        "| detector | configs | tensors of the backbone loaded | missing, left over | largest relative difference |",
        "|---|---|---|---|---|",
    ]
    for kind, outcomes in sorted(rows.items()):
        if isinstance(outcomes[0], str):
            assert set(outcomes) == {outcomes[0]}
            lines.append(f"| {kind} | {len(kinds[kind])} | {outcomes[0]} | | |")
            continue
        loaded, unused = {o[0] for o in outcomes}, {o[1] for o in outcomes}
        assert len(loaded) == len(unused) == 1
        of_res5 = f" (it has no res5: {max(unused)} not used)" if max(unused) else ""
        bound = "below 1e-5" if max(o[2] for o in outcomes) else "0"
        lines.append(f"| {kind} | {len(kinds[kind])} | all {max(loaded)}{of_res5} | 0, 0 | {bound} |")
    names = " ".join(rows)
    for needed in ("RetinaNet, FPN", "FCOS", "Cascade", "Keypoint", "Panoptic", "C4", "DC5"):
        assert needed in names
    write = os.environ.get("WSL_D2_WRITE_TABLES") == "1"
    text = README.read_text(encoding="utf-8")
    new = replace_table(text, "pytest tests/modeling/test_compatibility.py", "\n".join(lines))
    if write:
        README.write_text(new, encoding="utf-8")
    assert new == text or write, "the table in configs/README.md is another; run this test with WSL_D2_WRITE_TABLES=1"
