"""Names of ResNet and ResNeXt tensors in detectron2 ("d2"), torchvision and timm, and their conversion.

    torchvision, timm          d2                          d2, inside a model
    conv1.weight               stem.conv1.weight           backbone.stem...            (HashtagClassifier)
    bn1.*                      stem.conv1.norm.*           backbone.bottom_up.stem...  (FPN detector)
    layer1.0.conv2.weight      res2.0.conv2.weight
    layer1.0.bn2.*             res2.0.conv2.norm.*
    layer1.0.downsample.0.*    res2.0.shortcut.*
    layer1.0.downsample.1.*    res2.0.shortcut.norm.*
    fc.*                       head.* (read also: linear.*, the head of detectron2's ResNet)

timm gives its plain ResNets and ResNeXts torchvision's names, so the two cannot be told apart.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FORMATS = ("d2", "torchvision", "timm")

_PREFIXES = ("backbone.bottom_up.", "backbone.", "bottom_up.")
_BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_TORCHVISION_TO_D2 = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"conv1\.weight", r"stem.conv1.weight"),
        (rf"bn1\.{_BN}", r"stem.conv1.norm.\1"),
        (r"layer(\d)\.(\d+)\.conv(\d)\.weight", r"res{}.\2.conv\3.weight"),
        (rf"layer(\d)\.(\d+)\.bn(\d)\.{_BN}", r"res{}.\2.conv\3.norm.\4"),
        (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"res{}.\2.shortcut.weight"),
        (rf"layer(\d)\.(\d+)\.downsample\.1\.{_BN}", r"res{}.\2.shortcut.norm.\3"),
        (r"fc\.(weight|bias)", r"head.\1"),
    ]
]
_D2_TO_TORCHVISION = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"stem\.conv1\.weight", r"conv1.weight"),
        (rf"stem\.conv1\.norm\.{_BN}", r"bn1.\1"),
        (r"res(\d)\.(\d+)\.conv(\d)\.weight", r"layer{}.\2.conv\3.weight"),
        (rf"res(\d)\.(\d+)\.conv(\d)\.norm\.{_BN}", r"layer{}.\2.bn\3.\4"),
        (r"res(\d)\.(\d+)\.shortcut\.weight", r"layer{}.\2.downsample.0.weight"),
        (rf"res(\d)\.(\d+)\.shortcut\.norm\.{_BN}", r"layer{}.\2.downsample.1.\3"),
        (r"(?:head|linear)\.(weight|bias)", r"fc.\1"),
    ]
]
_D2_BACKBONE = re.compile(r"(stem|res[2-5])\.")
_TORCHVISION_BACKBONE = re.compile(r"(conv1|bn1|layer[1-4])\.")
_TIMM_ONLY = re.compile(r"conv1\.\d+\.|layer\d\.\d+\.(se|aa)\.|layer\d\.\d+\.downsample\.2\.")
_DETECTOR = re.compile(r"(proposal_generator|roi_heads|sem_seg_head)\.")
_NOT_BACKBONE = re.compile(
    r"(head|fc|linear|proposal_generator|roi_heads|sem_seg_head|top_block)\.|fpn_(lateral|output)\d\."
    r"|pixel_(mean|std)$|.*\.num_batches_tracked$"
)


def strip_prefix(key: str) -> str:
    """The name without "module." (DataParallel) and without the model's path to its bottom-up backbone."""
    while key.startswith("module."):
        key = key[len("module.") :]
    for prefix in _PREFIXES:
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def is_ignored(key: str) -> bool:
    """True for a stripped name that is known not to belong to a backbone: heads, FPN, pixel statistics,
    batch-norm counters (``num_batches_tracked``, which no forward pass reads)."""
    return _NOT_BACKBONE.match(key) is not None


def holds_detector(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are the weights of a whole detector, and not just of a backbone or a classifier."""
    return any(_DETECTOR.match(strip_prefix(key)) for key in state_dict)


def detect_format(state_dict: Mapping[str, Any]) -> str:
    """The naming scheme of a state dict, with or without prefixes.

    "timm" is answered only for names that torchvision does not have (deep stems, squeeze-and-excitation,
    average-pooled shortcuts); a plain ResNeXt of timm has torchvision's names and is answered "torchvision".

    Returns:
        "d2", "torchvision" or "timm".

    Raises:
        ValueError: if no name, or names of two schemes, are recognised.
    """
    names = [strip_prefix(key) for key in state_dict]
    d2 = [name for name in names if _D2_BACKBONE.match(name)]
    torchvision = [name for name in names if _TORCHVISION_BACKBONE.match(name)]
    if d2 and torchvision:
        raise ValueError(
            f"names of two schemes in one state dict: detectron2's {d2[0]!r} and torchvision's {torchvision[0]!r}"
        )
    if d2:
        return "d2"
    if torchvision:
        return "timm" if any(_TIMM_ONLY.match(name) for name in names) else "torchvision"
    raise ValueError(
        "not the state dict of a ResNet or ResNeXt: none of its "
        f"{len(names)} names{f', such as {list(state_dict)[0]!r},' if names else ''} is like "
        "'res2.0.conv1.weight' (detectron2) or 'layer1.0.conv1.weight' (torchvision, timm)"
    )


def convert_name(key: str, source: str, to: str) -> str | None:
    """A stripped name in another scheme; None if it has no counterpart there."""
    if source == "d2" and to == "d2":
        rules, shift = _D2_TO_TORCHVISION, None
    elif source != "d2" and to != "d2":
        rules, shift = _TORCHVISION_TO_D2, None
    elif to == "d2":
        rules, shift = _TORCHVISION_TO_D2, 1
    else:
        rules, shift = _D2_TO_TORCHVISION, -1
    for pattern, replacement in rules:
        match = pattern.fullmatch(key)
        if match is None:
            continue
        if shift is None:  # a name of the scheme asked for
            return key.replace("linear.", "head.", 1) if key.startswith("linear.") else key
        if "{}" in replacement:
            replacement = replacement.format(int(match.group(1)) + shift)
        return match.expand(replacement)
    return None


def convert_state_dict(state_dict: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Renames the tensors of a ResNet or ResNeXt, its classification head included.

    The prefixes "module.", "backbone.", "backbone.bottom_up." are removed. Tensors are passed on, not copied.

    Args:
        state_dict: in any of the three schemes.
        to: "d2", "torchvision" or "timm" (the last two give the same names).

    Returns:
        The same tensors in the same order under new names.

    Raises:
        ValueError: for an unknown scheme, names without a counterpart, or two tensors that get one name.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown naming scheme to={to!r}; known: {', '.join(FORMATS)}")
    source = detect_format(state_dict)
    converted: dict[str, Any] = {}
    unknown = []
    for key, tensor in state_dict.items():
        name = convert_name(strip_prefix(key), source, to)
        if name is None:
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
