"""The linear probes of a pretraining, at every evaluation."""

from __future__ import annotations

import logging
import time

import numpy as np
import torch
from detectron2.utils import comm

from wsl_d2.data import HashtagDataset
from wsl_d2.engine.plan import RunPlan
from wsl_d2.transfer.features import pooled_features, without_damaged
from wsl_d2.transfer.linear_probe import probe_features

logger = logging.getLogger(__name__)


def run_probes(plan: RunPlan, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """Runs the probes of TEST.PROBE on a classifier's backbone; called by all processes together.

    All of them extract features, in the batches of one process, so that the numbers are those of one; the main
    process fits. A probe that cannot be fitted, as of features that are not finite, is logged and left out.

    Returns:
        On the main process "probe_<training set>" -> metric -> value: "top1", "top5", "top1_5_shots" in percent (of
        few shots the mean over draws), "l2", and "seconds" that it took.
    """
    cfg, results = plan.cfg, {}
    model = getattr(model, "module", model)
    for name, data in plan.probes.items():
        start = time.perf_counter()
        train = _gather_features(cfg, model, data.train)
        test = _gather_features(cfg, model, data.test)
        if train is not None and test is not None:
            try:
                result, few_shot = probe_features(
                    without_damaged(cfg, data.train, train[0], data.train_labels, train[1]),
                    without_damaged(cfg, data.test, test[0], data.test_labels, test[1]),
                    data.num_classes,
                    shots=cfg.TEST.PROBE_SHOTS,
                    device=cfg.MODEL.DEVICE,
                )
            except (ValueError, RuntimeError) as error:
                logger.warning(f"no probe of {name} at this evaluation: {error}")
            else:
                found = {"top1": result.top1, "top5": result.top5, "l2": result.l2}
                found |= {f"top1_{shots}_shots": float(np.mean(top1)) for shots, top1 in few_shot.items()}
                results[f"probe_{name}"] = found | {"seconds": time.perf_counter() - start}
                logger.info(
                    f"probe of {name}: top-1 {result.top1:.2f}, top-5 {result.top5:.2f}, l2 {result.l2:g}, in "
                    f"{results[f'probe_{name}']['seconds']:.1f} s"
                )
        comm.synchronize()
    return results


def _gather_features(cfg, model, dataset: HashtagDataset) -> tuple[np.ndarray, list[int]] | None:
    """On the main process the (N, D) features of a dataset and the numbers of its damaged images."""
    size, rank, world_size = cfg.TEST.IMS_PER_BATCH, comm.get_rank(), comm.get_world_size()
    num_batches = -(-len(dataset) // size)
    first, end = (num_batches * place // world_size * size for place in (rank, rank + 1))
    own = list(pooled_features(cfg, model, dataset, range(first, min(end, len(dataset)))))
    parts = comm.gather(own)
    if not comm.is_main_process():
        return None
    batches = [batch for part in parts for batch in part]
    return np.concatenate([values for values, _ in batches]), [row for _, rows in batches for row in rows]
