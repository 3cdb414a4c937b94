"""Several processes, gradient accumulation and the ways to spread or compress what they exchange."""

import re

import pytest
import torch
from processes import in_processes
from torch import nn
from training_runs import losses, solver_config, start_processes, train, train_together, weights

from wsl_d2.engine.parallel import build_sgd, data_parallel, ghost_batch_size
from wsl_d2.errors import ConfigError


@pytest.mark.parametrize(
    ("batch", "micro_batch", "saved", "size"), [(8, 0, None, 8), (8, 4, None, 4), (8, 0, 2, 2), (8, 4, 2, 4)]
)
def test_the_ghost_batch_is_what_is_asked_for_then_what_was_saved_then_all(batch, micro_batch, saved, size):
    assert ghost_batch_size(solver_config(IMS_PER_BATCH=batch, IMS_PER_MICRO_BATCH=micro_batch), saved) == size


@pytest.mark.parametrize(
    ("micro_batch", "saved", "message"),
    [
        (3, None, "not a multiple of SOLVER.IMS_PER_MICRO_BATCH (3). Use a number of processes that divides 2.66667"),
        (0, 16, "not a multiple of the ghost batch size of this run (16)"),
        (-4, None, "not a multiple of SOLVER.IMS_PER_MICRO_BATCH (-4)"),
    ],
)
def test_a_ghost_batch_that_does_not_divide_the_batch_is_refused(micro_batch, saved, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        ghost_batch_size(solver_config(IMS_PER_BATCH=8, IMS_PER_MICRO_BATCH=micro_batch), saved)


def sizes_of_two():
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH \(7\) must be a multiple of the number of processes \(2\)"):
        ghost_batch_size(solver_config(IMS_PER_BATCH=7))
    return ghost_batch_size(solver_config(IMS_PER_BATCH=8))


def test_a_process_of_two_has_half_of_the_batch():
    assert in_processes(2, sizes_of_two) == [4, 4]


def test_weight_decay_of_norms_and_biases_is_their_own():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    cfg = solver_config(BASE_LR=0.5, MOMENTUM=0.8, NESTEROV=True, WEIGHT_DECAY=0.1, WEIGHT_DECAY_NORM=0.0)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.2
    optimizer = build_sgd(cfg, model)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0.2, 0.0, 0.2]  # a norm's bias is a bias
    assert {(group["lr"], group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {
        (0.5, 0.8, True)
    }


def test_alone_a_model_is_not_wrapped_and_its_momentum_not_sharded():
    model = nn.Linear(2, 2)
    assert data_parallel(model, "bfloat16") is model
    assert type(build_sgd(solver_config(ZERO_STAGE_1=True), model)) is torch.optim.SGD
    with pytest.raises(ConfigError, match="GRADIENT_COMPRESSION is 'int8'; it may be '', 'bfloat16', 'float16'"):
        data_parallel(model, "int8")


def shards():
    """How many momentum buffers each of two processes keeps after a step; and buffers are not copied from rank 0."""
    from detectron2.utils import comm

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    cfg = solver_config(ZERO_STAGE_1=True, MOMENTUM=0.9)
    optimizer = build_sgd(cfg, model)
    parallel = data_parallel(model)
    for _ in range(2):
        parallel(torch.full((3, 4), comm.get_rank() + 1.0) * torch.arange(3.0)[:, None]).sum().backward()
        optimizer.step()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    with pytest.raises(ConfigError, match="ZERO_STAGE_1 and SOLVER.CLIP_GRADIENTS.ENABLED cannot be used together"):
        build_sgd(cfg, model)
    return len(optimizer.optim.state), model[2].running_mean.tolist(), model[0].weight.tolist()


def test_two_processes_share_the_momentum_and_keep_their_own_statistics():
    (kept, mean, weight), (other_kept, other_mean, other_weight) = in_processes(2, shards)
    assert kept + other_kept == 6 and min(kept, other_kept) > 0
    assert mean != other_mean and weight == other_weight


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
    """Groups are normalized apart: their size is part of what is computed, and must not be ignored."""
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
