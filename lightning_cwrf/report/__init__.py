"""Tables and plots of audit results."""

from lightning_cwrf.report.plots import plot_losses, plot_roc, plot_tradeoff
from lightning_cwrf.report.table import comparison_table, tradeoff_table

__all__ = ["comparison_table", "plot_losses", "plot_roc", "plot_tradeoff", "tradeoff_table"]
