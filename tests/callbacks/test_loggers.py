"""What the Trainer's loggers receive: bounds of intervals, figures, and the settings of scoring and rewinding."""

import csv
import math

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger

from lightning_cwrf import CriticalRewindCallback, GradientMaskCallback, MIAAuditCallback, PrivacyScoringCallback
from tests.helpers import loader, trained, trainer


def hardened(logger, folder=None, ckpt_path=None, **more):
    model, vanilla = trained(epochs=5)
    callbacks = [
        PrivacyScoringCallback(loader(100, 140), vanilla, lam=0.9, steps=1),
        CriticalRewindCallback(rate=0.05),
        GradientMaskCallback(),
        MIAAuditCallback(loader(200, 240), every_n_epochs=0),
    ]
    run = trainer(folder, callbacks=callbacks, logger=logger, **{"max_epochs": 1, **more})
    run.fit(model, loader(0, 32), ckpt_path=ckpt_path)
    return run, callbacks


def csv_of(folder, version=0):
    with open(folder / f"lightning_logs/version_{version}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return {name: float(value) for row in rows for name, value in row.items() if value and name != "step"}


def hparams_of(folder, version=0):
    return yaml.safe_load((folder / f"lightning_logs/version_{version}/hparams.yaml").read_text())


def test_bounds_are_logged_beside_the_values(tmp_path):
    _, callbacks = hardened(CSVLogger(tmp_path))
    logged = csv_of(tmp_path)
    result = callbacks[-1].result
    for name in ("auroc", "tpr_at_fpr_0.001", "advantage"):
        interval = result.estimates["loss"][name].interval
        assert logged[f"mia/loss/{name}_low"] == pytest.approx(interval.low, abs=1e-6)
        assert logged[f"mia/loss/{name}_high"] == pytest.approx(interval.high, abs=1e-6)
        assert logged[f"mia/loss/{name}_low"] <= logged[f"mia/loss/{name}"] <= logged[f"mia/loss/{name}_high"]
    assert logged["mia/test_accuracy_low"] < logged["mia/test_accuracy_high"]
    assert all(map(math.isfinite, logged.values()))
    assert not [name for name in logged if name.startswith("mia/loss/epsilon_lower_bound_")]  # a bound itself


def test_settings_are_hyper_parameters_of_the_loggers_alone(tmp_path):
    run, callbacks = hardened(CSVLogger(tmp_path))
    logged = hparams_of(tmp_path)
    mask = callbacks[1].mask
    assert (logged["cwrf/scoring/lam"], logged["cwrf/scoring/steps"], logged["cwrf/scoring/kind"]) == (
        0.9,
        1,
        "privacy",
    )
    assert (logged["cwrf/rewind/rate"], logged["cwrf/rewind/values"]) == (0.05, "initial")
    assert (logged["cwrf/rewind/hold"], logged["cwrf/rewind/batchnorm"]) == (True, "keep")
    assert (logged["cwrf/rewind/weights"], logged["cwrf/rewind/of_weights"]) == (mask.count, mask.total)
    assert logged["width"] == 8  # the module's own are kept
    assert not [name for name in run.lightning_module.hparams if "cwrf" in name]


def test_a_resumed_run_logs_the_settings_of_the_work_that_it_keeps(tmp_path):
    run, callbacks = hardened(CSVLogger(tmp_path))
    run.save_checkpoint(tmp_path / "half.ckpt")
    hardened(CSVLogger(tmp_path), ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    own = [{k: v for k, v in hparams_of(tmp_path, n).items() if k.startswith("cwrf/")} for n in (0, 1)]
    assert own[0]["cwrf/rewind/weights"] == callbacks[1].mask.count
    assert own[0]["cwrf/rewind/rate"] == own[1]["cwrf/rewind/rate"] == 0.05
    assert own[0]["cwrf/scoring/lam"] == own[1]["cwrf/scoring/lam"] == 0.9


@pytest.mark.slow
def test_tensorboard_receives_bounds_figures_and_settings(tmp_path):
    pytest.importorskip("tensorboard", reason="needs TensorBoard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hardened(TensorBoardLogger(tmp_path, name="run", version=0))
    events = EventAccumulator(str(tmp_path / "run/version_0"))
    events.Reload()
    assert {"mia/loss/auroc", "mia/loss/auroc_low", "mia/loss/auroc_high"} <= set(events.Tags()["scalars"])
    (figure,) = events.Images("mia/roc/loss")
    assert figure.encoded_image_string[:8] == b"\x89PNG\r\n\x1a\n"
    assert (figure.width, figure.height, figure.step) == (500, 500, 2)
    (text,) = events.Tensors("cwrf/rewind/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "| cwrf/rewind/rate | 0.05 |" in shown
    (text,) = events.Tensors("cwrf/scoring/text_summary")
    assert "| cwrf/scoring/lam | 0.9 |" in text.tensor_proto.string_val[0].decode()


class Fake(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.given, self.images, self.figures = {}, [], []

    name, version = "fake", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        self.given.update(params)


class LikeWandb(Fake):
    def log_image(self, key, images, step=None, **kwargs):
        self.images.append((key, images, step))


class LikeMLflow(Fake):
    run_id = "7"

    @property
    def experiment(self):
        return self

    def log_figure(self, run_id, figure, artifact_file):
        self.figures.append((run_id, type(figure).__name__, artifact_file))


class Failing(LikeMLflow):
    def log_figure(self, *args):
        raise OSError("no space")

    def log_hyperparams(self, params, *args, **kwargs):
        if any(name.startswith("cwrf/") for name in params):
            raise ValueError("changing a parameter is not allowed")


def test_loggers_that_take_images_or_figures_receive_the_roc():
    wandb, mlflow, plain = LikeWandb(), LikeMLflow(), Fake()
    hardened([wandb, mlflow, plain])
    ((key, (image,), step),) = wandb.images
    assert (key, image.shape[2], step) == ("mia/roc/loss", 3, 2)
    assert image.min() < 100 < image.max()  # lines on a ground
    assert mlflow.figures == [("7", "Figure", "mia/roc/loss-2.png")]
    for each in (wandb, mlflow, plain):
        assert each.given["cwrf/rewind/rate"] == 0.05


def test_a_logger_that_fails_is_a_warning_and_the_fit_continues():
    with pytest.warns(UserWarning, match="did not take") as told:
        _, callbacks = hardened([Failing(), wandb := LikeWandb()])
    said = [str(each.message) for each in told]
    assert "Failing did not take the figure: OSError: no space" in said
    assert "Failing did not take the settings: ValueError: changing a parameter is not allowed" in said
    assert callbacks[-1].result is not None
    assert len(wandb.images) == 1


@pytest.mark.slow
def test_weights_and_biases_receives_bounds_figures_and_settings(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    try:
        hardened(logger)
        summary, config = dict(logger.experiment.summary), dict(logger.experiment.config)
    finally:
        logger.experiment.finish()
    assert {"mia/loss/auroc", "mia/loss/auroc_low", "mia/loss/auroc_high"} <= set(summary)
    assert config["cwrf/rewind/rate"] == 0.05
    (figure,) = tmp_path.rglob("*.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_mlflow_receives_bounds_figures_and_settings(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("hardening", tracking_uri=f"file:{tmp_path}")
    hardened(logger)
    data = logger.experiment.get_run(logger.run_id).data
    assert {"mia/loss/auroc", "mia/loss/auroc_low", "mia/loss/auroc_high"} <= set(data.metrics)
    assert data.params["cwrf/rewind/rate"] == "0.05"
    (figure,) = tmp_path.rglob("*.png")
    assert figure.name == "loss-2.png"
