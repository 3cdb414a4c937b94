import numpy as np
import pytest
from detectron2.solver import build_lr_scheduler
from torch import nn, optim
from training_runs import solver_config

from wsl_d2.engine.main import load_config
from wsl_d2.engine.schedule import halving_steps, resolve_schedule
from wsl_d2.errors import ConfigError


def test_the_papers_batch_scales_the_rate_and_warms_up_from_a_256_batchs():
    cfg = solver_config(LR_PER_256_IMAGES=0.1, IMS_PER_BATCH=8064, TOTAL_IMAGES=1_970_000_000, WARMUP_IMAGES=6_000_000)
    resolve_schedule(cfg, images_per_epoch=940_000_000)
    assert cfg.SOLVER.BASE_LR == pytest.approx(3.15)
    assert cfg.SOLVER.MAX_ITER == 244_296
    assert cfg.SOLVER.WARMUP_ITERS == 745
    assert cfg.SOLVER.BASE_LR * cfg.SOLVER.WARMUP_FACTOR == pytest.approx(0.1)


@pytest.mark.parametrize(
    "total_images, halvings, max_iter", [(1_970_000_000, 10, 244_296), (7_000_000_000, 20, 868_056)]
)
def test_the_rate_at_every_iteration_is_the_closed_form(total_images, halvings, max_iter):
    """Warm-up from 0.1 to 3.15, then halved at even distances; all iterations of the recipes at a batch of 8,064."""
    cfg = solver_config(LR_PER_256_IMAGES=0.1, IMS_PER_BATCH=8064, TOTAL_IMAGES=total_images, WARMUP_IMAGES=6_000_000)
    cfg.SOLVER.NUM_LR_HALVINGS = halvings
    resolve_schedule(cfg, images_per_epoch=1)
    assert cfg.SOLVER.MAX_ITER == max_iter
    scheduler = build_lr_scheduler(cfg, optim.SGD(nn.Linear(1, 1).parameters(), lr=cfg.SOLVER.BASE_LR))
    rates = 3.15 * np.array([scheduler._multiplier(i / max_iter) for i in range(max_iter)])
    iteration = np.arange(max_iter)
    steps = np.round(max_iter * np.arange(1, halvings + 1) / (halvings + 1))
    expected = 3.15 * 0.5 ** np.searchsorted(steps, iteration, side="right")
    expected = np.where(iteration < 745, 0.1 + (3.15 - 0.1) * iteration / 745, expected)
    np.testing.assert_allclose(rates, expected, rtol=1e-9)


def test_epochs_count_draws_of_the_resampled_set():
    cfg = solver_config(IMS_PER_BATCH=10, TOTAL_EPOCHS=2.5)
    resolve_schedule(cfg, images_per_epoch=101)
    assert cfg.SOLVER.MAX_ITER == 26  # 252 images (half to even), 10 at a time


def test_halvings_are_evenly_spaced_and_reach_the_optimizer():
    cfg = solver_config(IMS_PER_BATCH=1, TOTAL_IMAGES=100, NUM_LR_HALVINGS=4, BASE_LR=1.0, WARMUP_ITERS=0)
    resolve_schedule(cfg, images_per_epoch=1)
    assert cfg.SOLVER.STEPS == (20, 40, 60, 80)
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rates[i] for i in (0, 19, 20, 45, 65, 99)] == [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


@pytest.mark.parametrize(
    "solver, message",
    [
        ({"TOTAL_IMAGES": 10, "TOTAL_EPOCHS": 1.0}, "both set the length of the run"),
        ({"LOG_PERIOD": 0}, "SOLVER.LOG_PERIOD must be at least 1 iteration, got 0"),
        ({"TOTAL_IMAGES": -1}, "SOLVER.TOTAL_IMAGES must not be negative, got -1"),
        ({"TOTAL_IMAGES": 100, "IMS_PER_BATCH": 10, "WARMUP_IMAGES": 100}, "must be less than the images of the whole"),
        ({"TOTAL_IMAGES": 30, "IMS_PER_BATCH": 10, "NUM_LR_HALVINGS": 5}, "is 5, too many for 3 iterations"),
    ],
)
def test_contradictions_are_errors(solver, message):
    with pytest.raises(ConfigError, match=message):
        resolve_schedule(solver_config(**solver), images_per_epoch=10)


def test_halving_steps_lie_strictly_inside():
    for max_iter in range(12, 200, 7):
        steps = halving_steps(max_iter, 10)
        assert 0 < steps[0] and steps[-1] < max_iter and len(set(steps)) == 10


def test_an_unknown_key_is_named_with_its_nearest_neighbor(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("SOLVER:\n  LR_PER_256_IMAGE: 0.1\n")
    with pytest.raises(
        ConfigError, match=r"c.yaml: unknown config key SOLVER.LR_PER_256_IMAGE. Did you mean SOLVER.LR_PER_256_IMAGES?"
    ):
        load_config(str(path), [])
    with pytest.raises(
        ConfigError, match="command line: unknown config key SOLVER.BASELR. Did you mean SOLVER.BASE_LR?"
    ):
        load_config("", ["SOLVER.BASELR", "1.0"])
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        load_config("nowhere.yaml", [])


def test_a_whole_number_on_the_command_line_may_stand_for_a_float():
    cfg = load_config("", ["SOLVER.BASE_LR", "1", "SOLVER.MAX_ITER", "7", "SOLVER.TOTAL_EPOCHS", "-2"])
    assert cfg.SOLVER.BASE_LR == 1.0 and cfg.SOLVER.MAX_ITER == 7 and cfg.SOLVER.TOTAL_EPOCHS == -2.0
    assert isinstance(cfg.SOLVER.BASE_LR, float) and isinstance(cfg.SOLVER.MAX_ITER, int)
