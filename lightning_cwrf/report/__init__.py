"""Tables, plots and a page of audit results."""

from lightning_cwrf.report.html import write_report
from lightning_cwrf.report.plots import plot_losses, plot_roc, plot_tradeoff
from lightning_cwrf.report.table import comparison_table, tradeoff_table

__all__ = ["comparison_table", "plot_losses", "plot_roc", "plot_tradeoff", "tradeoff_table", "write_report"]
