"""The same run written in YAML, without any Python."""

import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_cwrf.weights.vanilla import save_vanilla
from tests.helpers import QUIET_TRAINER, DigitsReference, HardenedClassifier, trained

CONFIG = (
    """
seed_everything: 0
model:
  class_path: tests.helpers.HardenedClassifier
  init_args: {width: 4, alpha: 0.5}
data:
  class_path: tests.helpers.DigitsData
"""
    + QUIET_TRAINER
    + """  callbacks:
    - {class_path: lightning_cwrf.FinishedWeightsCallback, init_args: {path: FINISHED}}
    - class_path: lightning_cwrf.PrivacyScoringCallback
      init_args: {nonmembers: {class_path: tests.helpers.DigitsReference}, vanilla: VANILLA, steps: 2, lam: 0.9}
    - class_path: lightning_cwrf.CriticalRewindCallback
      init_args: {rate: 0.05}
    - class_path: lightning_cwrf.GradientMaskCallback
    - class_path: lightning_cwrf.MIAAuditCallback
      init_args: {nonmembers: {class_path: tests.helpers.DigitsReference, init_args: {begin: 200}}}
"""
)


def test_a_hardening_run_from_yaml(tmp_path, monkeypatch):
    model, vanilla = trained(epochs=5, width=4)
    vanilla = save_vanilla(vanilla, tmp_path / "vanilla.safetensors")
    finished = tmp_path / "finished.pt"
    torch.save(model.state_dict(), finished)
    config = yaml.safe_load(CONFIG.replace("VANILLA", str(vanilla)).replace("FINISHED", str(finished)))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(args=["fit", "--config", str(tmp_path / "run.yaml")], save_config_callback=None)
    _, scoring, rewind, *_, audit = [c for c in cli.trainer.callbacks if "lightning_cwrf" in type(c).__module__]
    assert type(cli.model) is HardenedClassifier
    assert cli.model.defense_settings["alpha"] == 0.5
    assert isinstance(scoring.nonmembers, DigitsReference)
    assert scoring.lam == 0.9
    assert rewind.mask.count == round(0.05 * rewind.mask.total)
    assert audit.result is not None
