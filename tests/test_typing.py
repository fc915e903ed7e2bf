"""A user's own code keeps its types under ``mypy --strict``, and its mistakes are found."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

USER = """
import functools

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from typing_extensions import assert_type

from lightning_cwrf import (
    AuditResult,
    CriticalRewindCallback,
    CWRFConfig,
    GradientMaskCallback,
    MIAAuditCallback,
    PrivacyScoringCallback,
    ShadowRecipe,
    audit,
    train_shadows,
)
from lightning_cwrf.shadows import ShadowOutputs


class Classifier(LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.net = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def harden(model: Classifier, data: TensorDataset) -> AuditResult:
    recipe = ShadowRecipe(functools.partial(Classifier, 3), {"max_epochs": 1}, batch_size=8, cwrf=CWRFConfig(data))
    assert_type(recipe.cwrf, CWRFConfig | None)
    assert_type(recipe(data, 0, base={"net.bias": Tensor()}), LightningModule)
    shadows = train_shadows(recipe, data, 4, base=None, keep_weights=True)
    assert_type(shadows, ShadowOutputs)
    assert_type(shadows.logits, Tensor)
    trainer = Trainer(
        callbacks=[
            PrivacyScoringCallback(data, vanilla="redraw"),
            CriticalRewindCallback(rate=0.1),
            GradientMaskCallback(),
            MIAAuditCallback(data, shadows=shadows),
        ]
    )
    assert_type(ShadowRecipe.like(trainer, model, build_module=Classifier), ShadowRecipe)
    result = audit(model, members=data, nonmembers=data, shadows=shadows)
    assert_type(result, AuditResult)
    assert_type(result.model_metrics["test_accuracy"].value, float)
    return result
"""

MISTAKES = {
    "train_shadows(recipe, data, models=4)": 'Unexpected keyword argument "models" for "train_shadows"',
    "ShadowRecipe(3, {}, batch_size=8)": 'Argument 1 to "ShadowRecipe" has incompatible type "int"',
    "ShadowRecipe.like(trainer, model, modul=None)": 'Unexpected keyword argument "modul"',
    "result.modelmetrics": '"AuditResult" has no attribute "modelmetrics"',
}


@pytest.mark.slow
def test_a_users_code_under_strict_mypy(tmp_path):
    (tmp_path / "user.py").write_text(USER)
    wrong = [f"    {line}\n" for line in MISTAKES]
    (tmp_path / "wrong.py").write_text(USER.replace("    return result\n", "".join(wrong) + "    return result\n"))
    # Only the user's files: the package's own are checked by its own configuration.
    settings = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={ROOT / '.mypy_cache'}"]
    files = [str(tmp_path / name) for name in ("user.py", "wrong.py")]
    done = subprocess.run([sys.executable, "-m", "mypy", *settings, *files], cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert not [line for line in lines if "user.py" in line], done.stdout
    errors = [line for line in lines if "wrong.py" in line and ": error: " in line]
    assert len(errors) == len(MISTAKES), done.stdout
    for error, message in zip(errors, MISTAKES.values(), strict=True):
        assert message in error
