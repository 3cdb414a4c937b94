import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from wsl_d2 import add_wsl_config
from wsl_d2.modeling import HashtagClassifier, hashtag_cross_entropy, make_resnext


def classifier_cfg(num_classes=5):
    cfg = get_cfg()
    add_wsl_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "HashtagClassifier"
    cfg.MODEL.BACKBONE.NAME = "build_resnext26_8x4d_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = num_classes
    return cfg


def batch(num_images=3):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (num_images, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "labels": torch.tensor([0, 4, 2, 1]),
        "image_index": torch.tensor([0, 0, 1, 2]),
        "keys": ["a", "b", "c"],
    }


def test_training_and_evaluation():
    model = build_model(classifier_cfg())
    losses = model.train()(batch())
    assert list(losses) == ["loss_hashtag"]
    losses["loss_hashtag"].backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        outputs = model(batch())
        logits = model.logits(batch())
        as_list = model([{"image": image, "file_name": "x.jpg"} for image in batch()["image"]])
    assert len(outputs) == 3 and outputs[0]["scores"].shape == (5,)
    torch.testing.assert_close(torch.stack([x["scores"] for x in outputs]), logits.softmax(dim=1))
    torch.testing.assert_close(as_list[2]["scores"], outputs[2]["scores"])


def test_loss_starts_near_the_logarithm_of_the_number_of_classes():
    torch.manual_seed(0)
    model = HashtagClassifier(backbone=make_resnext("resnext26_8x4d"), num_classes=1000)
    assert model.head.bias.eq(0).all()
    assert model.head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert model(batch())["loss_hashtag"].item() == pytest.approx(6.908, abs=0.3)


def test_normalizes_as_the_config_says():
    model = build_model(classifier_cfg()).eval()
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    expected = torch.tensor([(255 - 123.675) / 58.395, (255 - 116.280) / 57.120, (255 - 103.530) / 57.375])
    normalized = model._preprocess({"image": images.contiguous(memory_format=torch.channels_last)})
    torch.testing.assert_close(normalized[0, :, 3, 3], expected)
    assert normalized.is_contiguous(memory_format=torch.channels_last)


def test_state_dict_names():
    model = HashtagClassifier(backbone=make_resnext("resnext26_8x4d"), num_classes=5)
    names = set(model.state_dict())
    assert {"head.weight", "head.bias", "backbone.stem.conv1.weight"} <= names
    assert all(name.startswith(("backbone.", "head.")) for name in names)


def test_head_and_loss_stay_in_float32_under_autocast():
    model = build_model(classifier_cfg()).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        res5 = model.backbone(model._preprocess(batch()))["res5"]
        logits = model.logits(batch())
    assert res5.dtype == torch.bfloat16
    pooled = torch.nn.functional.adaptive_avg_pool2d(res5, 1).flatten(1).float()
    torch.testing.assert_close(logits, model.head(pooled).detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.train()(batch())["loss_hashtag"].dtype == torch.float32


def test_sigmoid_loss_gives_one_probability_per_class():
    cfg = classifier_cfg()
    cfg.MODEL.HASHTAG_CLASSIFIER.LOSS = "sigmoid"
    model = build_model(cfg)
    assert model(batch())["loss_hashtag"].item() == pytest.approx(5 * 0.6931, rel=0.2)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch())[0]["scores"], model.logits(batch())[0].sigmoid())


def test_loss_is_that_of_the_logits():
    model = build_model(classifier_cfg()).train()
    data = batch()
    for module in model.modules():  # batch statistics would differ between two calls only in the buffers
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    expected = hashtag_cross_entropy(model.logits(data), data["labels"], data["image_index"])
    torch.testing.assert_close(model(data)["loss_hashtag"], expected)


def test_errors():
    cfg = classifier_cfg(num_classes=0)
    with pytest.raises(ValueError, match="NUM_CLASSES is 0; it must be the size"):
        build_model(cfg)
    cfg = classifier_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnext26_8x4d_fpn_backbone"
    with pytest.raises(ValueError, match='emits "res5", got an FPN'):
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        build_model(cfg)
    cfg = classifier_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    with pytest.raises(ValueError, match="got \\['res4'\\]; set MODEL.RESNETS.OUT_FEATURES"):
        build_model(cfg)
    cfg = classifier_cfg()
    cfg.MODEL.HASHTAG_CLASSIFIER.LOSS = "hinge"
    with pytest.raises(ValueError, match="LOSS must be one of softmax, sigmoid, got 'hinge'"):
        build_model(cfg)
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "HashtagClassifier"
    with pytest.raises(ValueError, match="call wsl_d2.add_wsl_config"):
        build_model(cfg)


def test_batch_errors():
    model = build_model(classifier_cfg())
    with pytest.raises(ValueError, match="with image, labels and image_index, got keys \\['image'\\]"):
        model({"image": batch()["image"]})
    with pytest.raises(ValueError, match="trains on a collated dict .* got list"):
        model([{"image": batch()["image"][0]}])
    model.eval()
    with pytest.raises(ValueError, match="must have one size .*\\(3, 32, 48\\), \\(3, 64, 64\\)"):
        model([{"image": torch.zeros(3, 64, 64)}, {"image": torch.zeros(3, 32, 48)}])
    with pytest.raises(ValueError, match="must have shape \\(N, 3, H, W\\), got \\(3, 64, 64\\)"):
        model({"image": torch.zeros(3, 64, 64)})
