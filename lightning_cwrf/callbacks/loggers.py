"""What callbacks tell the Trainer's loggers besides metrics: settings, and figures where a logger takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_cwrf.auditing.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def log_settings(trainer: Trainer, name: str, settings: Mapping[str, Any]) -> None:
    """Log settings as the hyper-parameters ``cwrf/<name>/<setting>``; a logger that fails is a warning.

    They go to the loggers alone, not into ``module.hparams``, from which the module is built again. TensorBoard has
    them as text too, ``cwrf/<name>``.
    """
    own = {f"cwrf/{name}/{key}": value for key, value in settings.items() if value is not None}
    for logger in trainer.loggers if own and trainer.is_global_zero else ():
        _quietly(logger, "the settings", partial(_settings_to, logger, f"cwrf/{name}", own))


def log_figure(trainer: Trainer, name: str, make: Callable[[], Figure]) -> None:
    """Log a figure to the loggers that take one (TensorBoard, MLflow, Weights & Biases); the others are left out.

    Args:
        trainer: whose loggers.
        name: of the figure, such as ``"mia/roc"``.
        make: draws it; called only where a logger takes it. Whatever fails is a warning, never the end of the fit.
    """
    for logger in trainer.loggers if trainer.is_global_zero else ():
        _quietly(logger, "the figure", partial(_figure_to, logger, name, make, trainer.global_step))


def _settings_to(logger: Any, name: str, settings: Mapping[str, Any]) -> None:
    logger.log_hyperparams(settings)
    experiment: Any = getattr(logger, "experiment", None)
    # TensorBoard's page of hyper-parameters and its hparams.yaml keep the first set, which is the module's own.
    if callable(getattr(experiment, "add_text", None)):
        rows = [["setting", "value"], *([key, str(value)] for key, value in settings.items())]
        experiment.add_text(name, "\n".join(markdown_table(rows)))


def _figure_to(logger: Any, name: str, make: Callable[[], Figure], step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if callable(getattr(experiment, "add_figure", None)):  # TensorBoard
        experiment.add_figure(name, make(), global_step=step)
    elif callable(getattr(logger, "log_image", None)):  # Weights & Biases
        logger.log_image(key=name, images=[_pixels(make())], step=step)
    elif callable(getattr(experiment, "log_figure", None)) and hasattr(logger, "run_id"):  # MLflow
        experiment.log_figure(logger.run_id, make(), f"{name}-{step}.png")


def _pixels(figure: Figure) -> Any:
    """The figure as ``(height, width, 3)`` bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _quietly(logger: Logger, what: str, log: Callable[[], Any]) -> None:
    try:
        log()
    except Exception as error:  # of any logger; the training and its audit are worth more than what it shows
        rank_zero_warn(f"{type(logger).__name__} did not take {what}: {type(error).__name__}: {error}")
