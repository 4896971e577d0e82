"""A run's folder, written and read again; lists, reports, alerts.

`runs.plot_loss(runs.load_metrics(folder))`
"""

from gpt_jax.runs.load import RunData, find_runs, last_samples, load_metrics, load_run, load_samples
from gpt_jax.runs.plots import (
    compare,
    plot_attention,
    plot_errors,
    plot_grad_norm,
    plot_heads,
    plot_layer_grad_norms,
    plot_learning_rate,
    plot_loss,
    plot_validation_gap,
    smooth,
    smooth_around,
    spikes,
    validation_gap,
)

__all__ = [
    "RunData",
    "compare",
    "find_runs",
    "last_samples",
    "load_metrics",
    "load_run",
    "load_samples",
    "plot_attention",
    "plot_errors",
    "plot_grad_norm",
    "plot_heads",
    "plot_layer_grad_norms",
    "plot_learning_rate",
    "plot_loss",
    "plot_validation_gap",
    "smooth",
    "smooth_around",
    "spikes",
    "validation_gap",
]
