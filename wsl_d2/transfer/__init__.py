"""What pretrained features are worth for classification: linear probes."""

from wsl_d2.transfer.features import Features, ProbeError, extract_features
from wsl_d2.transfer.linear_probe import (
    L2_GRID,
    ProbeResult,
    choose_l2,
    few_shot_rows,
    linear_probe,
    split_held_out,
)
from wsl_d2.transfer.logistic_regression import CentredFeatures, LogisticRegression, fit_logistic_regression
from wsl_d2.transfer.probe_backbone import probe_backbone

__all__ = [
    "CentredFeatures",
    "Features",
    "L2_GRID",
    "LogisticRegression",
    "ProbeError",
    "ProbeResult",
    "choose_l2",
    "extract_features",
    "few_shot_rows",
    "fit_logistic_regression",
    "linear_probe",
    "probe_backbone",
    "split_held_out",
]
