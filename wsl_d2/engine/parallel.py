"""Data parallelism, optimizer-state sharding and ghost batches over processes."""

from __future__ import annotations

import inspect

import torch
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from wsl_d2.errors import ConfigError

# Whether buffers are copied from rank 0 before each forward pass; newer versions of torch have another name for it.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"
_COMPRESSIONS = {"bfloat16": default_hooks.bf16_compress_hook, "float16": default_hooks.fp16_compress_hook}


def data_parallel(model: torch.nn.Module, compression: str = "") -> torch.nn.Module:
    """Wraps the model for several processes; unlike Detectron2's ``create_ddp_model`` also on CPU.

    Args:
        model: on its device.
        compression: "", "bfloat16" or "float16", the type in which gradients are reduced over processes.

    Raises:
        ConfigError: another compression.
    """
    if compression and compression not in _COMPRESSIONS:
        raise ConfigError(
            f"SOLVER.GRADIENT_COMPRESSION is {compression!r}; it may be '', {', '.join(map(repr, _COMPRESSIONS))}."
        )
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    parallel = DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if on_gpu else None,
        gradient_as_bucket_view=True,
        **{_BUFFERS: False},
    )
    if compression:
        parallel.register_comm_hook(None, _COMPRESSIONS[compression])
    return parallel


def build_sgd(cfg, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Builds SGD from Detectron2's SOLVER keys; fused on GPUs. ``SOLVER.ZERO_STAGE_1`` shards the momentum over
    processes (ZeRO-1, arXiv 1910.02054).

    Args:
        cfg: reads SOLVER.
        model: not yet wrapped.
    """
    solver = cfg.SOLVER
    parameters = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    on_gpu = next(model.parameters()).is_cuda
    options = {
        "lr": solver.BASE_LR,
        "momentum": solver.MOMENTUM,
        "nesterov": solver.NESTEROV,
        "weight_decay": solver.WEIGHT_DECAY,
        "fused" if on_gpu else "foreach": True,
    }
    if not (solver.ZERO_STAGE_1 and comm.get_world_size() > 1):
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD(parameters, **options))
    if solver.CLIP_GRADIENTS.ENABLED:
        raise ConfigError("SOLVER.ZERO_STAGE_1 and SOLVER.CLIP_GRADIENTS.ENABLED cannot be used together.")
    return ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, **options)


def ghost_batch_size(cfg, saved: int | None = None) -> int:
    """Returns the number of images that are normalized together, which is a micro-batch of one process.

    Args:
        cfg: reads SOLVER.IMS_PER_MICRO_BATCH, which counts if it is above 0, and IMS_PER_BATCH.
        saved: that of the run that is resumed, which counts otherwise; so a run keeps it on any number of processes.

    Raises:
        ConfigError: the per-process batch size is not a multiple of it.
    """
    world_size, batch_size = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
    if batch_size % world_size:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH ({batch_size}) must be a multiple of the number of processes ({world_size})."
        )
    per_process = batch_size // world_size
    size = cfg.SOLVER.IMS_PER_MICRO_BATCH or saved or per_process
    if size < 0 or per_process % size:
        source = "SOLVER.IMS_PER_MICRO_BATCH" if cfg.SOLVER.IMS_PER_MICRO_BATCH else "the ghost batch size of this run"
        raise ConfigError(
            f"each of {world_size} processes has {per_process} images of a batch of {batch_size}, not a multiple of "
            f"{source} ({size}). Use a number of processes that divides {batch_size / size:g}, the ghost batches of "
            "a batch" + (", or another SOLVER.IMS_PER_MICRO_BATCH." if cfg.SOLVER.IMS_PER_MICRO_BATCH else ".")
        )
    return size
