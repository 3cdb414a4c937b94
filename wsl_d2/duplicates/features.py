"""Features of a backbone, which bring candidates beside those of the perceptual hash."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

from wsl_d2.duplicates.finder import Extractor
from wsl_d2.duplicates.search import Features
from wsl_d2.errors import UserError
from wsl_d2.files import sha256_of


def backbone_features(config_file: str, weights: str) -> Features:
    """Returns features of a hashtag classifier's backbone.

    Args:
        config_file: of the HashtagClassifier.
        weights: path or name of its backbone's weights.

    Raises:
        UserError: the config is of another model.
    """
    from detectron2.utils.file_io import PathManager

    import wsl_d2.checkpoint  # noqa: F401  (knows wsl://)
    from wsl_d2.config import load_config
    from wsl_d2.modeling import is_hashtag_classifier

    cfg = load_config(config_file, [])
    if not is_hashtag_classifier(cfg):
        raise UserError(f"{config_file} is of a {cfg.MODEL.META_ARCHITECTURE}; features need a HashtagClassifier.")
    path = PathManager.get_local_path(weights)
    config = f"{cfg.MODEL.dump()}{cfg.INPUT.dump()}"
    facts = {"config": hashlib.sha256(config.encode()).hexdigest(), "weights": sha256_of(path)}
    return Features(facts, functools.partial(_load, cfg, path))


def _load(cfg, path: str) -> Extractor:
    """An extractor of features like R-MAC's: maxima of res5 over the image and its halves, each of norm 1."""
    import torch
    from detectron2.modeling import build_model

    from wsl_d2.checkpoint import check_pixel_statistics, load_backbone

    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.HASHTAG_CLASSIFIER.NUM_CLASSES = 1
    model = build_model(cfg).eval()
    load_backbone(model, path)
    check_pixel_statistics(cfg, path)
    size = cfg.INPUT.RANDOM_RESIZED_CROP.SIZE
    step = -1 if cfg.INPUT.FORMAT == "BGR" else 1

    def extract(pictures):
        batch = np.stack(
            [np.asarray(picture.convert("RGB").resize((size, size)))[:, :, ::step] for picture in pictures]
        )
        with torch.inference_mode():
            images = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))
            maps = model.backbone(model._preprocess({"image": images}))["res5"]
            middle_r, middle_c = max(1, maps.shape[2] // 2), max(1, maps.shape[3] // 2)
            regions = [maps, maps[:, :, :middle_r], maps[:, :, -middle_r:], maps[..., :middle_c], maps[..., -middle_c:]]
            pooled = [torch.nn.functional.normalize(region.amax(dim=(2, 3))) for region in regions]
            return sum(pooled).cpu().numpy()

    return extract
