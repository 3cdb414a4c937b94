"""Losses of hashtag pretraining (arXiv 1805.00932). They read the sparse labels of a batch as they come from
the loader; no (N, C) target matrix is ever built.

Shapes: N images, C classes (canonical hashtags), K (image, label) pairs of the batch, K >= N.
"""

import torch
import torch.nn.functional as F


def hashtag_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    """Softmax cross-entropy with a target of 1/k on each of the k hashtags of an image.

    For an image with logits z and labels y_1 ... y_k this is ``logsumexp(z) - mean(z[y_1], ..., z[y_k])``;
    with k = 1 it is ``F.cross_entropy``. Computed in float32, whatever the dtype of ``logits``, but for
    float64, which stays.

    Args:
        logits: (N, C), floating point.
        labels: (K,) int64 in [0, C); the labels of one image are distinct.
        image_index: (K,) int64 in [0, N), the image each label belongs to; each image at least once, any
            order.

    Returns:
        Scalar, float32 or float64: the mean over images, in nats.

    Raises:
        ValueError: for wrong shapes or dtypes. Values are checked for tensors on the CPU only, because
            reading them back would stall an accelerator; there, an image without labels counts with a loss
            of 0.
    """
    _check_labels(logits, labels, image_index)
    num_images = logits.shape[0]
    # log_softmax subtracts the row maximum before anything else, so large logits keep their precision.
    log_probabilities = F.log_softmax(_at_least_float32(logits), dim=1)
    per_label = log_probabilities[image_index, labels]
    # index_add_, not bincount: bincount reads its output's size back from the device.
    num_labels = per_label.new_zeros(num_images).index_add_(
        0, image_index, torch.ones_like(per_label, requires_grad=False)
    )
    return -(per_label / num_labels[image_index]).sum() / num_images


def hashtag_binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
    """One logistic loss per class, the study's alternative to softmax (clearly worse in the paper).

    For an image with logits z and labels y_1 ... y_k this is ``sum_c softplus(z[c]) - sum_j z[y_j]``, the
    negative log-likelihood of its 0/1 target vector. Mind that the sum runs over all C classes: its scale,
    and with it the learning rate, differs from the softmax loss.

    Args:
        logits: (N, C), floating point.
        labels: (K,) int64 in [0, C); the labels of one image are distinct.
        image_index: (K,) int64 in [0, N), the image each label belongs to; each image at least once, any
            order.

    Returns:
        Scalar, float32 or float64: summed over classes, mean over images, in nats.

    Raises:
        ValueError: as in :func:`hashtag_cross_entropy`.
    """
    _check_labels(logits, labels, image_index)
    logits = _at_least_float32(logits)
    return (F.softplus(logits).sum() - logits[image_index, labels].sum()) / logits.shape[0]


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_labels(logits: torch.Tensor, labels: torch.Tensor, image_index: torch.Tensor) -> None:
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a non-empty floating-point (N, C) tensor, got {logits.dtype} {tuple(logits.shape)}"
        )
    for name, tensor in (("labels", labels), ("image_index", image_index)):
        if tensor.dim() != 1 or tensor.dtype != torch.int64:
            raise ValueError(f"{name} must be a (K,) int64 tensor, got {tensor.dtype} {tuple(tensor.shape)}")
    num_images, num_classes = logits.shape
    if labels.shape != image_index.shape:
        raise ValueError(f"labels and image_index must have the same length, got {len(labels)} and {len(image_index)}")
    if len(labels) < num_images:
        raise ValueError(
            f"{len(labels)} labels cannot cover {num_images} images: each image needs at least one label; "
            "drop images without a label before batching"
        )
    if labels.device.type != "cpu" or image_index.device.type != "cpu":
        return
    for name, tensor, limit in (("labels", labels, num_classes), ("image_index", image_index, num_images)):
        low, high = int(tensor.min()), int(tensor.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must lie in [0, {limit}), got values from {low} to {high}")
    num_labels = torch.bincount(image_index, minlength=num_images)
    if int(num_labels.min()) == 0:
        unlabeled = torch.nonzero(num_labels == 0).flatten().tolist()
        raise ValueError(
            f"image(s) {unlabeled[:10]} of the batch have no label; drop images without a label before batching"
        )
