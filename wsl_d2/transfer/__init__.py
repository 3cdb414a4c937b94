"""What pretrained features are worth for classification: linear probes."""

from wsl_d2.transfer.features import Features, ProbeData, ProbeError, extract_features, open_probe_data
from wsl_d2.transfer.linear_probe import (
    L2_GRID,
    ProbeResult,
    choose_l2,
    few_shot_rows,
    linear_probe,
    probe_features,
    split_held_out,
)
from wsl_d2.transfer.logistic_regression import CenteredFeatures, LogisticRegression, fit_logistic_regression
from wsl_d2.transfer.probe_backbone import probe_backbone

__all__ = [
    "CenteredFeatures",
    "Features",
    "L2_GRID",
    "LogisticRegression",
    "ProbeData",
    "ProbeError",
    "ProbeResult",
    "choose_l2",
    "extract_features",
    "few_shot_rows",
    "fit_logistic_regression",
    "linear_probe",
    "open_probe_data",
    "probe_backbone",
    "probe_features",
    "split_held_out",
]
