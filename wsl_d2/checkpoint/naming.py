"""Names of ResNet and ResNeXt tensors and their conversion, among detectron2 ("d2"), torchvision, timm and Caffe2.

One table of name templates, a row per tensor. Inside a model of detectron2, its names have a prefix: ``backbone.`` in a
HashtagClassifier, ``backbone.bottom_up.`` in an FPN detector. timm gives its plain ResNets and ResNeXts torchvision's
names, so the two cannot be told apart. "caffe2" are the names in .pkl files of Detectron2's model zoo; most of those
hold affine layers in place of batch norms, without statistics (:func:`fill_affine_statistics`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FORMATS = ("d2", "torchvision", "timm", "caffe2")

_PREFIXES = ("backbone.bottom_up.", "backbone.", "bottom_up.")
_COUNTER = "num_batches_tracked"  # of a batch norm; no forward pass reads it, and Caffe2 has none
_BN_PARTS = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv", _COUNTER: None}
_FROZEN_BN_EPS = 1e-5

# (d2, torchvision, caffe2); {s} is the stage, res2 = layer1, and {b} the block; None: no such tensor.
_TEMPLATES: list[tuple[str, str, str | None]] = [
    ("stem.conv1.weight", "conv1.weight", "conv1_w"),
    *[(f"stem.conv1.norm.{p}", f"bn1.{p}", c and f"res_conv1_bn_{c}") for p, c in _BN_PARTS.items()],
    *[
        row
        for convolution, norm, name, branch in (
            ("conv1", "bn1", "conv1", "branch2a"),
            ("conv2", "bn2", "conv2", "branch2b"),
            ("conv3", "bn3", "conv3", "branch2c"),
            ("downsample.0", "downsample.1", "shortcut", "branch1"),
        )
        for row in [
            (f"res{{s}}.{{b}}.{name}.weight", f"layer{{s}}.{{b}}.{convolution}.weight", f"res{{s}}_{{b}}_{branch}_w"),
            *[
                (
                    f"res{{s}}.{{b}}.{name}.norm.{p}",
                    f"layer{{s}}.{{b}}.{norm}.{p}",
                    c and f"res{{s}}_{{b}}_{branch}_bn_{c}",
                )
                for p, c in _BN_PARTS.items()
            ],
        ]
    ],
    ("head.weight", "fc.weight", "pred_w"),
    ("head.bias", "fc.bias", "pred_b"),
]
_COLUMN = {"d2": 0, "torchvision": 1, "timm": 1, "caffe2": 2}
_STAGE_OFFSET = {"d2": 0, "torchvision": -1, "timm": -1, "caffe2": 0}
_ALIASES = {  # other spellings within a scheme
    "d2": [(r"^linear\.", "head.")],
    "caffe2": [
        (r"^fc1000_", "pred_"),
        (r"_bn_gamma$", "_bn_s"),
        (r"_bn_beta$", "_bn_b"),
        (r"_bn_running_mean$", "_bn_rm"),
        (r"_bn_running_var$", "_bn_riv"),
    ],
}
_BACKBONE = {
    "d2": re.compile(r"(stem|res[2-5])\."),
    "torchvision": re.compile(r"(conv1|bn1|layer[1-4])\."),
    "caffe2": re.compile(r"conv1_w$|res_conv1_bn_|res[2-5]_\d+_branch"),
}
_TIMM_ONLY = re.compile(r"conv1\.\d+\.|layer\d\.\d+\.(se|aa)\.|layer\d\.\d+\.downsample\.2\.")
_CAFFE2_DETECTOR = r"(conv_)?rpn_|cls_score_|bbox_pred_|fc[67]_|fpn_|(_\[mask\]|mask|conv5_mask)_"
_DETECTOR = re.compile(rf"(proposal_generator|roi_heads|sem_seg_head)\.|{_CAFFE2_DETECTOR}")
_OUTSIDE_BACKBONE = {
    "d2": r"(head|linear|proposal_generator|roi_heads|sem_seg_head|top_block)\.|fpn_(lateral|output)\d\."
    r"|pixel_(mean|std)$",
    "torchvision": r"fc\.",
    "timm": r"fc\.",
    # conv1_b and the momenta: Caffe2's own networks do not read them either.
    "caffe2": rf"(pred|fc1000)_[wb]$|conv1_b$|.*_momentum$|lr$|model_iter$|weight_order$|{_CAFFE2_DETECTOR}",
}


def strip_prefix(key: str) -> str:
    """The name without "module." (DataParallel) and without the model's path to its bottom-up backbone."""
    while key.startswith("module."):
        key = key[len("module.") :]
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def is_ignored(key: str, file_format: str = "d2") -> bool:
    """True for a stripped name that is known not to belong to a backbone: the scheme's own heads and FPN, pixel
    statistics, and batch-norm counters (``num_batches_tracked``, which no forward pass reads)."""
    return key.endswith(f".{_COUNTER}") or re.match(_OUTSIDE_BACKBONE[file_format], key) is not None


def holds_detector(state_dict: Iterable[str]) -> bool:
    """Whether these are the weights of a whole detector, and not just of a backbone or a classifier."""
    return any(_DETECTOR.match(strip_prefix(key)) for key in state_dict)


def detect_format(state_dict: Mapping[str, Any]) -> str:
    """The naming scheme of a state dict, with or without prefixes.

    "timm" is answered only for names that torchvision does not have (deep stems, squeeze-and-excitation,
    average-pooled shortcuts); a plain ResNeXt of timm has torchvision's names and is answered "torchvision".

    Returns:
        "d2", "torchvision", "timm" or "caffe2".

    Raises:
        ValueError: if no name, or names of two schemes, are recognised.
    """
    names = [strip_prefix(key) for key in state_dict]
    first = {
        scheme: next((name for name in names if pattern.match(name)), None) for scheme, pattern in _BACKBONE.items()
    }
    found = {scheme: name for scheme, name in first.items() if name is not None}
    if len(found) > 1:
        shown = " and ".join(f"{scheme}'s {name!r}" for scheme, name in found.items())
        raise ValueError(f"names of two schemes in one state dict: {shown}")
    if not found:
        raise ValueError(
            "not the state dict of a ResNet or ResNeXt: none of its "
            f"{len(names)} names{f', such as {list(state_dict)[0]!r},' if names else ''} is like "
            "'res2.0.conv1.weight' (detectron2), 'layer1.0.conv1.weight' (torchvision, timm) or 'res2_0_branch2a_w' "
            "(Caffe2)"
        )
    scheme = next(iter(found))
    return "timm" if scheme == "torchvision" and any(_TIMM_ONLY.match(name) for name in names) else scheme


def convert_name(key: str, source: str, to: str) -> str | None:
    """A stripped name in another scheme; None if it has no counterpart there."""
    for pattern, replacement in _ALIASES.get(source, ()):
        key = re.sub(pattern, replacement, key)
    for templates in _TEMPLATES:
        template, target = templates[_COLUMN[source]], templates[_COLUMN[to]]
        match = template and _pattern(template).fullmatch(key)
        if not match:
            continue
        if target is None or "{s}" not in target:
            return target
        stage = int(match["s"]) - _STAGE_OFFSET[source]
        return target.format(s=stage + _STAGE_OFFSET[to], b=match["b"]) if 2 <= stage <= 5 else None
    return None


def _pattern(template: str) -> re.Pattern:
    pattern = re.escape(template).replace(r"\{s\}", r"(?P<s>\d)").replace(r"\{b\}", r"(?P<b>\d+)")
    return re.compile(pattern)  # re keeps the compiled ones


def fill_affine_statistics(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the statistics that a Caffe2 state dict with affine layers lacks: mean 0 and variance 1 - 1e-5, with which
    ``FrozenBatchNorm2d`` is that affine layer. Returns others, and those with any statistics, as they are."""
    filled = dict(state_dict)
    if not is_affine_only(state_dict):
        return filled
    for key, scale in state_dict.items():
        if re.search(r"_bn_(s|gamma)$", key):
            base = key.rpartition("_")[0]
            filled[f"{base}_rm"] = scale.new_zeros(scale.shape)
            filled[f"{base}_riv"] = scale.new_full(scale.shape, 1.0 - _FROZEN_BN_EPS)
    return filled


def is_affine_only(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are Caffe2's tensors without any batch-norm statistics."""
    bn = [key for key in state_dict if re.search(r"^res(\d_\d+_branch\w+|_conv1)_bn_", key)]
    return bool(bn) and not any(re.search(r"_(rm|riv|running_mean|running_var)$", key) for key in bn)


def strides_in_1x1(state_dict: Mapping[str, Any]) -> bool | None:
    """Whether the weights were trained with the strides in the 1x1 convolutions; None where names cannot tell.

    torchvision and timm stride in the 3x3 ones, as do all public ResNeXts; Caffe2's plain ResNets may do either.
    """
    file_format = detect_format(state_dict)
    if file_format == "caffe2":
        weight = next((v for k, v in state_dict.items() if k.endswith("_branch2b_w")), None)
        return False if weight is not None and weight.shape[0] != weight.shape[1] else None
    return None if file_format == "d2" else False


def convert_state_dict(state_dict: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Renames the tensors of a ResNet or ResNeXt, its classification head included.

    The prefixes "module.", "backbone.", "backbone.bottom_up." are removed. Tensors are passed on, not copied;
    statistics that Caffe2's affine layers lack are added (:func:`fill_affine_statistics`).

    Args:
        state_dict: in any of the schemes.
        to: "d2", "torchvision", "timm" (these two give the same names) or "caffe2" (which has no batch-norm counters).

    Returns:
        The same tensors in the same order under new names.

    Raises:
        ValueError: for an unknown scheme, names without a counterpart, or two tensors that get one name.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown naming scheme to={to!r}; known: {', '.join(FORMATS)}")
    source = detect_format(state_dict)
    if source == "caffe2":
        state_dict = fill_affine_statistics(state_dict)
    converted: dict[str, Any] = {}
    unknown = []
    for key, tensor in state_dict.items():
        stripped = strip_prefix(key)
        name = convert_name(stripped, source, to)
        if name is None:
            unread = source == "caffe2" and is_ignored(stripped, source) and not holds_detector([stripped])
            if not unread and not (to == "caffe2" and stripped.endswith(f".{_COUNTER}")):
                unknown.append(key)
        elif name in converted:
            raise ValueError(f"two tensors of the state dict become {name!r}, one of them {key!r}")
        else:
            converted[name] = tensor
    if unknown:
        hint = " It holds a whole detector: only backbones can be converted." * holds_detector(state_dict)
        raise ValueError(
            f"{len(unknown)} name(s) of this {source} state dict have no counterpart in {to}: {shorten(unknown)}.{hint}"
        )
    return converted


def shorten(keys: Iterable[str], limit: int = 10) -> str:
    """The first keys and how many more there are, for messages."""
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
