"""Several processes, gradient accumulation and the ways to spread or compress what they exchange."""

import pytest
import torch
from training_runs import losses, start_processes, train, train_together, weights


@pytest.fixture(scope="module")
def two_processes(datasets, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    train_together(datasets, output, 2)
    return output


def momenta(output) -> list[torch.Tensor]:
    state = torch.load(output / "model_final.pth", weights_only=True)["trainer"]["_trainer"]["optimizer"]["state"]
    return [state[number]["momentum_buffer"] for number in sorted(state)]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_two_processes_compute_the_gradients_weights_and_statistics_of_one(datasets, tmp_path, accumulation):
    """After one step the momentum is the gradient; the batch-norm groups are the same images on both sides."""
    options = {"SOLVER__IMS_PER_BATCH": 16, "SOLVER__TOTAL_IMAGES": 16, "SOLVER__WARMUP_IMAGES": 0}
    options |= {"SOLVER__IMS_PER_MICRO_BATCH": 8 // accumulation, "DATASETS__TEST": "()"}
    train(datasets, tmp_path / "one", **options)
    train_together(datasets, tmp_path / "two", 2, **options)
    one, two = momenta(tmp_path / "one"), momenta(tmp_path / "two")
    assert len(one) == len(two) > 80
    for ours, theirs in zip(one, two, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * ours.norm() + 1e-7
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_accumulation_is_not_one_large_batch(datasets, tmp_path):
    """Groups are normalised apart: their size is part of what is computed, and must not be ignored."""
    options = {"SOLVER__TOTAL_IMAGES": 8, "SOLVER__WARMUP_IMAGES": 0, "DATASETS__TEST": "()"}
    train(datasets, tmp_path / "one", **options)
    train(datasets, tmp_path / "two", SOLVER__IMS_PER_MICRO_BATCH=4, **options)
    assert losses(tmp_path / "one")[0] != losses(tmp_path / "two")[0]


def test_spreading_the_momentum_changes_nothing(datasets, two_processes, tmp_path):
    train_together(datasets, tmp_path, 2, SOLVER__ZERO_STAGE_1=True)
    assert losses(tmp_path) == losses(two_processes)
    for name, tensor in weights(two_processes).items():
        assert torch.equal(weights(tmp_path)[name], tensor), name
    ours, theirs = momenta(tmp_path), momenta(two_processes)
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def test_a_spread_momentum_resumes_without_spreading(datasets, two_processes, tmp_path):
    stopped = {"SOLVER__ZERO_STAGE_1": True, "SOLVER__CHECKPOINT_MILESTONES": "(11,)"}
    train_together(datasets, tmp_path, 2, **stopped)
    for path in tmp_path.glob("model_*"):
        if "0000010" not in path.name:
            path.unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000010.pth")
    runs = train_together(datasets, tmp_path, 2, flags=["--resume"])
    assert "Starting training from iteration 11" in runs[0].output
    assert losses(tmp_path) == losses(two_processes)


def test_compressed_gradients_train_nearly_the_same(datasets, two_processes, tmp_path):
    train_together(datasets, tmp_path, 2, SOLVER__GRADIENT_COMPRESSION="bfloat16", SOLVER__TOTAL_IMAGES=80)
    ours, theirs = losses(tmp_path), losses(two_processes)
    assert ours[0] == theirs[0] and ours[9] != theirs[9]
    assert [ours[i] for i in range(4)] == pytest.approx([theirs[i] for i in range(4)], rel=0.05)


def test_an_unknown_compression_is_one_clear_error(datasets, tmp_path):
    for run in start_processes(datasets, tmp_path, 2, SOLVER__GRADIENT_COMPRESSION="int8"):
        assert run.wait() == 2
        assert "SOLVER.GRADIENT_COMPRESSION is 'int8'; it may be '', 'bfloat16', 'float16'" in run.stderr
