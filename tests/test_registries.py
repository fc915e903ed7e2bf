"""A new attack or metric is one file; from then on it is found everywhere without being named again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_cwrf.attacks import available_attacks, create_attack, register_attack
from lightning_cwrf.attacks.base import ATTACKS
from lightning_cwrf.auditing import AuditResult, attack_metrics, audit_outputs
from lightning_cwrf.commands import main
from lightning_cwrf.metrics import MembershipMetric, available_metrics, register_metric
from lightning_cwrf.metrics.base import METRICS
from lightning_cwrf.outputs import ModelOutputs
from tests.attacks.cases import calibration
from tests.metrics.cases import instances, is_calibrated

DOCS = Path(__file__).parents[1] / "docs"


def undocumented(page, names):
    """Names that begin no row of a table of this page, in code."""
    rows = re.findall(r"^\|(.*?)\|", (DOCS / page).read_text(encoding="utf-8"), re.M)
    return sorted(set(names) - {name for row in rows for name in re.findall(r"`(\w+)`", row)})


def audited(**settings):
    sides = []
    for i in range(2):
        logits = torch.randn(30, 4)
        sides.append(ModelOutputs(logits, torch.arange(30) % 4, [bytes([i, j]) for j in range(30)]))
    return audit_outputs(*sides, **settings)


def test_the_docs_list_every_attack_and_metric():
    assert undocumented("audit.md", available_attacks()) == []
    assert undocumented("numbers.md", available_metrics()) == []


def help_of(command, capsys):
    assert main([command, "--help"]) == 0
    return capsys.readouterr().out


def test_a_new_attack_is_found_everywhere(capsys):
    with ATTACKS.temporary():

        @register_attack("noise")
        def noise(evidence):
            return torch.rand(len(evidence.targets), generator=torch.Generator().manual_seed(0))

        assert "noise" in available_attacks()
        with pytest.raises(ValueError, match=r"no attack 'nois'; available: .*, noise, "):
            create_attack("nois")
        assert undocumented("audit.md", available_attacks()) == ["noise"]
        assert re.search(r"^attacks: .*\bnoise\b", help_of("audit", capsys), re.M)
        with_signal, _ = calibration("noise")
        assert with_signal < 0.55  # the table of all attacks would fail
        assert set(audited(attacks=["loss", "noise"]).estimates["noise"]) == set(attack_metrics(0.5))
    assert "noise" not in available_attacks()


def test_a_new_metric_is_found_everywhere(tmp_path, capsys):
    with METRICS.temporary():

        @register_metric("top_half")
        class TopHalf(MembershipMetric):
            """The share of the members whose score is above the median."""

            value_function = staticmethod(lambda s, m: (s > s.median())[m].double().mean())
            interval_function = staticmethod(lambda s, m, confidence: (0.0, 1.0))
            p_value_function = staticmethod(lambda s, m: 0.01)

        assert "top_half" in available_metrics()
        assert "top_half" in instances()
        assert re.search(r"^  top_half$", help_of("audit", capsys), re.M)
        assert undocumented("numbers.md", available_metrics()) == ["top_half"]
        assert not is_calibrated("top_half")  # the table of all metrics would fail
        result = audited(attacks=["loss"])
        scores, is_member = result.scores["loss"], result.is_member
        assert result.estimates["loss"]["top_half"].value == float(
            (scores > scores.median())[is_member].double().mean()
        )
        assert result.estimates["loss"]["top_half"].p_value == 0.01
        assert "top_half" in str(result)
        assert AuditResult.load(result.save(tmp_path / "audit.json")).estimates == result.estimates
        with pytest.raises(ValueError, match="there is already a metric 'top_half'"):
            register_metric("top_half")(MembershipMetric)
        with pytest.raises(TypeError, match=r'write @register_metric\("my_metric"\)'):
            register_metric(TopHalf)(TopHalf)
    assert "top_half" not in available_metrics()


def test_a_metric_that_fails_or_takes_the_name_of_another_raises_with_its_own():
    class Broken(MembershipMetric):
        value_function = staticmethod(lambda s, m: 1 / 0)
        interval_function = staticmethod(lambda s, m, confidence: (0.0, 1.0))

    class Second(Broken):
        @classmethod
        def for_audit(cls, context):
            return {"auroc": cls()}

    with METRICS.temporary():
        register_metric("broken")(Broken)
        with pytest.raises(RuntimeError, match="the metric Broken failed: ZeroDivisionError: division by zero"):
            audited(attacks=["loss"])
    with METRICS.temporary():
        register_metric("second")(Second)
        with pytest.raises(ValueError, match=r"Second\.for_audit gives auroc, a name that another metric has"):
            audited(attacks=["loss"])


CONTRIBUTING = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
NEW = {
    "attacks": re.search(r"```python\n(\"\"\"The margin attack.*?)```", CONTRIBUTING, re.S)[1],
    "metrics": (
        "from lightning_cwrf.metrics.base import MembershipMetric, register_metric\n\n"
        "@register_metric('margin')\nclass Margin(MembershipMetric):\n    pass\n"
    ),
}
LOAD = """
import sys
from importlib.util import find_spec, module_from_spec
for package in ("metrics", "attacks"):
    spec = find_spec(f"lightning_cwrf.{package}")
    spec.submodule_search_locations.append(f"{sys.argv[1]}/{package}")
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "margin" in getattr(module, f"available_{package}")(), package
"""


@pytest.mark.slow
def test_a_new_file_in_the_package_is_registered_on_import(tmp_path):
    for package, code in NEW.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "brand_new.py").write_text(code)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
