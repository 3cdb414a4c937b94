import math

import pytest
import torch
import torch.nn.functional as F

from wsl_d2.modeling import hashtag_binary_cross_entropy, hashtag_cross_entropy


def random_batch(num_images=7, num_classes=11, seed=0):
    """Logits, labels and image_index with 1 to 4 distinct labels per image, in shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_images, num_classes, generator=generator)
    pairs = []
    for image in range(num_images):
        labels = torch.randperm(num_classes, generator=generator)[: 1 + image % 4]
        pairs += [(image, int(label)) for label in labels]
    order = torch.randperm(len(pairs), generator=generator)
    image_index, labels = torch.tensor(pairs)[order].T
    return logits, labels.contiguous(), image_index.contiguous()


def dense_targets(logits, labels, image_index):
    targets = torch.zeros_like(logits)
    targets[image_index, labels] = 1.0
    return targets


def loss_and_gradient(loss, logits, *args):
    logits = logits.clone().requires_grad_()
    value = loss(logits, *args)
    value.backward()
    return value.detach(), logits.grad


def test_hand_value_for_two_hashtags():
    # z = (ln 1, ln 2, ln 5): softmax (1/8, 2/8, 5/8); tags 0 and 2: -(ln 1/8 + ln 5/8) / 2 = 1.2747...
    logits = torch.tensor([[1.0, 2.0, 5.0]]).log()
    loss = hashtag_cross_entropy(logits, torch.tensor([0, 2]), torch.tensor([0, 0]))
    assert loss.item() == pytest.approx((math.log(8) + math.log(8 / 5)) / 2, rel=1e-6)
    assert loss.item() == pytest.approx(1.27472, abs=1e-5)


def test_images_weigh_the_same_whatever_their_number_of_hashtags():
    logits = torch.tensor([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]).log()
    loss = hashtag_cross_entropy(logits, torch.tensor([0, 2, 2]), torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(((math.log(8) + math.log(8 / 5)) / 2 + math.log(2)) / 2, rel=1e-6)


def test_one_hashtag_is_cross_entropy_with_its_gradient():
    logits, _, _ = random_batch()
    labels = torch.tensor([3, 0, 10, 3, 5, 6, 1])
    value, gradient = loss_and_gradient(hashtag_cross_entropy, logits, labels, torch.arange(7))
    expected, expected_gradient = loss_and_gradient(F.cross_entropy, logits, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("seed", range(3))
def test_equals_dense_targets_with_its_gradient(seed):
    logits, labels, image_index = random_batch(seed=seed)
    targets = dense_targets(logits, labels, image_index)
    targets /= targets.sum(dim=1, keepdim=True)
    value, gradient = loss_and_gradient(hashtag_cross_entropy, logits, labels, image_index)
    expected, expected_gradient = loss_and_gradient(F.cross_entropy, logits, targets)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_large_and_half_precision_logits():
    logits, labels, image_index = random_batch()
    value = hashtag_cross_entropy(logits, labels, image_index)
    torch.testing.assert_close(hashtag_cross_entropy(logits + 1e4, labels, image_index), value, rtol=0, atol=2e-3)
    half = hashtag_cross_entropy(logits.bfloat16(), labels, image_index)
    assert half.dtype == torch.float32
    double = hashtag_cross_entropy(logits.double(), labels, image_index)
    expected = [-logits.double().log_softmax(1)[i, labels[image_index == i]].mean() for i in range(len(logits))]
    torch.testing.assert_close(double, torch.stack(expected).mean(), rtol=1e-14, atol=0)
    torch.testing.assert_close(half, hashtag_cross_entropy(logits.bfloat16().float(), labels, image_index))


def test_binary_equals_dense_reference_with_its_gradient():
    logits, labels, image_index = random_batch()
    targets = dense_targets(logits, labels, image_index)

    def reference(z):
        return F.binary_cross_entropy_with_logits(z, targets, reduction="sum") / len(z)

    value, gradient = loss_and_gradient(hashtag_binary_cross_entropy, logits, labels, image_index)
    expected, expected_gradient = loss_and_gradient(reference, logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("loss", [hashtag_cross_entropy, hashtag_binary_cross_entropy])
@pytest.mark.parametrize(
    ("labels", "image_index", "message"),
    [
        ([0, 1], [0, 0], "image\\(s\\) \\[1\\] of the batch have no label"),
        ([0], [0], "1 labels cannot cover 2 images"),
        ([0, 3], [0, 1], "labels must lie in \\[0, 3\\), got values from 0 to 3"),
        ([0, -1], [0, 1], "labels must lie in \\[0, 3\\), got values from -1 to 0"),
        ([0, 1], [0, 2], "image_index must lie in \\[0, 2\\), got values from 0 to 2"),
        ([0, 1, 2], [0, 1], "same length, got 3 and 2"),
        ([0.0, 1.0], [0, 1], "labels must be a \\(K,\\) int64 tensor, got torch.float32"),
        ([[0], [1]], [0, 1], "labels must be a \\(K,\\) int64 tensor, got torch.int64 \\(2, 1\\)"),
    ],
)
def test_errors(loss, labels, image_index, message):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(2, 3), torch.tensor(labels), torch.tensor(image_index))


def test_error_for_logits_of_wrong_shape():
    with pytest.raises(ValueError, match="non-empty floating-point \\(N, C\\) tensor, got torch.float32 \\(3,\\)"):
        hashtag_cross_entropy(torch.zeros(3), torch.tensor([0]), torch.tensor([0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", [hashtag_cross_entropy, hashtag_binary_cross_entropy])
def test_never_waits_for_the_gpu(loss):
    logits, labels, image_index = random_batch()
    expected = loss(logits, labels, image_index)
    on_gpu = [x.cuda() for x in (logits, labels, image_index)]
    on_gpu[0].requires_grad_()
    loss(*on_gpu).backward()  # warm-up
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(*on_gpu)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.detach().cpu(), expected)
