"""Mask R-CNN on ResNeXt-101 32x8d, initialized with the WSL weights: Detectron2's own LazyConfig, another bottom-up.

For Detectron2's tools/lazyconfig_train_net.py with the line that configs/README.md shows. Not yet run at this size.
"""

from pathlib import Path

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from wsl_d2.modeling import make_resnext

common = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common"
model = LazyConfig.load(str(common / "models" / "mask_rcnn_fpn.py"), "model")
dataloader = LazyConfig.load(str(common / "data" / "coco.py"), "dataloader")
lr_multiplier = LazyConfig.load(str(common / "coco_schedule.py"), "lr_multiplier_1x")
optimizer = LazyConfig.load(str(common / "optim.py"), "SGD")
train = LazyConfig.load(str(common / "train.py"), "train")

model.backbone.bottom_up = L(make_resnext)(
    architecture="resnext101_32x8d",
    norm="FrozenBN",
    freeze_at=2,
    out_features=["res2", "res3", "res4", "res5"],
)
train.init_checkpoint = "wsl://resnext101_32x8d"
train.output_dir = "output/mask_rcnn_X_101_32x8d_FPN_wsl"

# What the weights were trained on; load_pretrained compares.
model.pixel_mean = [123.675, 116.280, 103.530]
model.pixel_std = [58.395, 57.120, 57.375]
model.input_format = "RGB"
dataloader.train.mapper.image_format = "RGB"
dataloader.test.mapper.image_format = "RGB"
optimizer.lr = 0.02
