"""Reads finished runs from their folders: AP gains with their uncertainty, growth with the number of images."""

from wsl_d2.analysis.ap_gain import METRICS, bootstrap_ap, gain_between, paired_bootstrap
from wsl_d2.analysis.compare import compare_runs
from wsl_d2.analysis.gain import BootstrapEstimate, gain_of, verdict, what_would_settle
from wsl_d2.analysis.records import Run, RunError, read_metrics, read_run
from wsl_d2.analysis.scaling import LogLinearFit, fit_log_linear

__all__ = [
    "METRICS",
    "BootstrapEstimate",
    "LogLinearFit",
    "Run",
    "RunError",
    "bootstrap_ap",
    "compare_runs",
    "fit_log_linear",
    "gain_between",
    "gain_of",
    "paired_bootstrap",
    "read_metrics",
    "read_run",
    "verdict",
    "what_would_settle",
]
