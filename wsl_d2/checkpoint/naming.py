"""Names of ResNet and ResNeXt tensors among detectron2 ("d2"), torchvision, timm and Caffe2: where in a state dict a
backbone is, and what its tensors are called elsewhere.

One table of name templates, a row per tensor. In a model the names have a prefix: ``backbone.`` in a HashtagClassifier,
``backbone.bottom_up.`` in an FPN detector, ``modelTeacher.backbone.bottom_up.`` in a semi-supervised one. timm gives
its plain ResNets and ResNeXts torchvision's names, so the two cannot be told apart. "caffe2" are the names in .pkl
files of Detectron2's model zoo; most of those hold affine layers in place of batch norms, without statistics.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

FORMATS = ("d2", "torchvision", "timm", "caffe2")

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
_ALIASES = {  # other spellings within a scheme; stem.fc is what Detectron2's converter of torchvision weights makes
    "d2": [(r"^(linear|stem\.fc)\.", "head.")],
    "caffe2": [
        (r"^fc1000_", "pred_"),
        (r"_bn_gamma$", "_bn_s"),
        (r"_bn_beta$", "_bn_b"),
        (r"_bn_running_mean$", "_bn_rm"),
        (r"_bn_running_var$", "_bn_riv"),
    ],
}
_HEAD = {
    "d2": re.compile(r"(head|linear|stem\.fc)\.(weight|bias)$"),
    "torchvision": re.compile(r"fc\.(weight|bias)$"),
    "caffe2": re.compile(r"(pred|fc1000)_[wb]$"),
}
# The first stages say where a backbone is; the last one may be in a detector's head.
_ANCHOR = {
    "d2": re.compile(r"((?:.*\.)?)(?:stem\.conv1|res[2-4]\.\d+)\."),
    "torchvision": re.compile(r"((?:.*\.)?)layer[1-3]\.\d+\."),
    "caffe2": re.compile(r"()(?:conv1_w$|res_conv1_bn_|res[2-5]_\d+_branch)"),
}
_PART = {  # of a backbone, after its prefix
    "d2": re.compile(r"(stem|res\d)\."),
    "torchvision": re.compile(r"(conv1|bn1|layer\d)\."),
    "caffe2": re.compile(r"conv1_w$|res_conv1_bn_|res\d_"),
}
_HEAD["timm"], _PART["timm"] = _HEAD["torchvision"], _PART["torchvision"]
_TIMM_ONLY = re.compile(r"conv1\.\d+\.|layer\d\.\d+\.(se|aa)\.|layer\d\.\d+\.downsample\.2\.")
# No forward pass of the scheme's own networks reads these either, or they are no part of a network.
_UNREAD = {scheme: re.compile(rf".*\.{_COUNTER}$|(.*\.)?pixel_(mean|std)$") for scheme in FORMATS}
_UNREAD["caffe2"] = re.compile(r"conv1_b$|.*_momentum$|lr$|model_iter$|weight_order$")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrap_name(name: str) -> str:
    """The name without the parts that DataParallel, torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def is_counter(name: str) -> bool:
    """Whether it is a batch norm's ``num_batches_tracked``, which no forward pass reads."""
    return name.endswith(f".{_COUNTER}")


def find_backbones(names: Iterable[str]) -> dict[str, str]:
    """Where backbones are in a state dict.

    Returns:
        Prefix, with its dot and without wrappers ("" for none) -> naming scheme.

    Raises:
        ValueError: if names of two schemes have one prefix.
    """
    names = list(names)
    found: dict[str, tuple[str, str]] = {}
    for name in names:
        for scheme, pattern in _ANCHOR.items():
            if match := pattern.match(unwrap_name(name)):
                first_scheme, first = found.setdefault(match[1], (scheme, name))
                if first_scheme != scheme:
                    raise ValueError(
                        f"names of two schemes in one state dict: {first_scheme}'s {first!r} and {scheme}'s {name!r}"
                    )
    schemes = {prefix: scheme for prefix, (scheme, _) in found.items()}
    for prefix, scheme in schemes.items():
        inside = (unwrap_name(name).removeprefix(prefix) for name in names)
        if scheme == "torchvision" and any(_TIMM_ONLY.match(name) for name in inside):
            schemes[prefix] = "timm"
    return schemes


def tails(names: Iterable[str], prefix: str, scheme: str) -> dict[str, tuple[str, str]]:
    """What the names of a state dict are to the backbone at a prefix of :func:`find_backbones`.

    Returns:
        Name -> (kind, name without prefix). The kind is "part", "head" (of classification), "unread" (a counter, for
        example), or "outside".
        The res5 that a C4 detector has in its head is a part.
    """
    root = re.sub(r"(backbone\.)?(bottom_up\.)?$", "", prefix)
    result = {}
    for name in map(str, names):
        plain = unwrap_name(name)
        inside = plain.startswith(prefix)
        tail = plain.removeprefix(prefix if inside else root)
        if _UNREAD[scheme].match(tail):
            kind = "unread"
        elif _HEAD[scheme].match(tail):
            kind = "head"
        else:
            kind = "part" if inside and _PART[scheme].match(tail) else "outside"
        result[name] = (kind, tail)
    if scheme == "d2" and not any(tail.startswith("res5.") for _, tail in result.values()):
        for name, (kind, _) in result.items():
            tail = unwrap_name(name).removeprefix(f"{root}roi_heads.")
            if kind == "outside" and tail.startswith("res5."):
                result[name] = ("part", tail)
    return result


def detect_format(state_dict: Mapping[str, Any]) -> str:
    """The naming scheme of a state dict, with or without prefixes.

    "timm" is answered only for names that torchvision does not have (deep stems, squeeze-and-excitation,
    average-pooled shortcuts); a plain ResNeXt of timm has torchvision's names and is answered "torchvision".

    Returns:
        "d2", "torchvision", "timm" or "caffe2".

    Raises:
        ValueError: if no name, or names of two schemes, are recognized.
    """
    schemes = find_backbones(state_dict)
    if not schemes:
        raise ValueError(describe_unknown(list(state_dict)))
    if len(set(schemes.values())) > 1:
        shown = " and ".join(f"{scheme}'s at {prefix!r}" for prefix, scheme in schemes.items())
        raise ValueError(f"names of two schemes in one state dict: {shown}")
    return next(iter(schemes.values()))


def describe_unknown(names: list[str]) -> str:
    """Says that no backbone is among these names."""
    example = f", such as {names[0]!r}," if names else ""
    return (
        f"not the state dict of a ResNet or ResNeXt: none of its {len(names)} names{example} is like "
        "'res2.0.conv1.weight' (detectron2), 'layer1.0.conv1.weight' (torchvision, timm) or "
        "'res2_0_branch2a_w' (Caffe2)"
    )


def convert_name(key: str, source: str, to: str) -> str | None:
    """A name without prefix in another scheme; None if it has no counterpart there."""
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


def is_affine_only(state_dict: Mapping[str, Any]) -> bool:
    """Whether these are Caffe2's tensors without any batch-norm statistics."""
    bn = [key for key in state_dict if re.search(r"^res(\d_\d+_branch\w+|_conv1)_bn_", key)]
    return bool(bn) and not any(re.search(r"_(rm|riv|running_mean|running_var)$", key) for key in bn)


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


def convert_state_dict(state_dict: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Renames the tensors of a ResNet or ResNeXt, its classification head included; the prefix is removed.

    Tensors are passed on, not copied; statistics that Caffe2's affine layers lack are added
    (:func:`fill_affine_statistics`). A whole detector is refused: :class:`wsl_d2.checkpoint.WeightFile` finds the
    backbone in one.

    Args:
        state_dict: in any of the schemes.
        to: "d2", "torchvision", "timm" (these two give the same names) or "caffe2" (which has no batch-norm counters).

    Returns:
        The same tensors in the same order under new names.

    Raises:
        ValueError: for an unknown scheme, several backbones, or names without a counterpart.
    """
    if to not in FORMATS:
        raise ValueError(f"unknown naming scheme to={to!r}; known: {', '.join(FORMATS)}")
    source = detect_format(state_dict)
    prefixes = find_backbones(state_dict)
    if len(prefixes) > 1:
        raise ValueError(f"{len(prefixes)} backbones in one state dict, at {', '.join(map(repr, prefixes))}")
    if source == "caffe2":
        state_dict = fill_affine_statistics(state_dict)
    kinds = tails(state_dict, next(iter(prefixes)), source)
    converted: dict[str, Any] = {}
    unknown = []
    for key, tensor in state_dict.items():
        kind, tail = kinds[key]
        name = None if kind == "outside" else convert_name(tail, source, to)
        if name is not None:
            converted[name] = tensor
        elif kind != "unread":
            unknown.append(key)
    if unknown:
        raise ValueError(
            f"{len(unknown)} name(s) of this {source} state dict have no counterpart in {to}: {shorten(unknown)}"
        )
    return converted


def shorten(keys: Iterable[str], limit: int = 3) -> str:
    """The first keys and how many more there are, for messages."""
    keys = list(keys)
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
