"""What pretrained features are worth for classification: linear probes."""

from wsl_d2.transfer.features import Features, ProbeError, extract_features
from wsl_d2.transfer.linear_probe import ProbeResult, choose_l2, few_shot_rows, linear_probe, split_held_out
from wsl_d2.transfer.logistic_regression import FeatureBasis, LogisticRegression, fit_logistic_regression

__all__ = [
    "FeatureBasis",
    "Features",
    "LogisticRegression",
    "ProbeError",
    "ProbeResult",
    "choose_l2",
    "extract_features",
    "few_shot_rows",
    "fit_logistic_regression",
    "linear_probe",
    "split_held_out",
]
