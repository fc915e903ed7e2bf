"""Audits that are compared as those of two models, and are of one."""

import re
from dataclasses import replace

import pytest
import torch

from lightning_cwrf import audit
from lightning_cwrf.report import comparison_table, tradeoff_table, write_report
from tests.helpers import loader, part, trained, trainer
from tests.report.cases import Page, audited

SIDES = {"members": part(0, 64), "nonmembers": part(64, 128)}


def test_one_model_audited_twice_is_an_error(tmp_path):
    model = trained()[0]
    before = model  # as a user may think: the fit changes the model itself
    trainer(max_epochs=1).fit(model, loader(0, 64))
    results = {"before": audit(before, **SIDES), "after": audit(model, **SIDES)}
    for compare in (
        lambda: comparison_table(results),
        lambda: tradeoff_table({"a": results}),
        lambda: write_report(results, tmp_path / "report.html"),
    ):
        with pytest.raises(ValueError, match=r"'before.* and 'after.* are the same audit: the same weights"):
            compare()
    assert not (tmp_path / "report.html").exists()


def test_other_audits_of_one_model_are_a_remark(tmp_path):
    one = replace(audited(), weights="aa", examples="11")
    others = {
        "other examples": replace(one, examples="22"),
        "other scores": replace(one, scores={name: scores + 1 for name, scores in one.scores.items()}),
        "unknown examples": replace(one, examples=""),
        "other attacks": replace(audited(attacks=("loss",)), weights="aa", examples="11"),
    }
    for name, other in others.items():
        results = {"first": one, name: other}
        remark = f"first and {name} are audits of the same weights"
        assert remark in comparison_table(results)
        page = Page(write_report(results, tmp_path / "a.html", overwrite=True).read_text(encoding="utf-8"))
        assert re.search(rf"first → {name}: .*Both audits are of the same weights\.", page.text)


@pytest.mark.parametrize("weights", [("", ""), ("aa", "bb"), ("aa", "")])
def test_audits_of_other_or_unknown_weights_are_compared(weights, tmp_path):
    one = replace(audited(), examples="11")
    results = {name: replace(one, weights=each) for name, each in zip(("before", "after"), weights, strict=True)}
    assert "same weights" not in comparison_table(results)
    assert "same weights" not in write_report(results, tmp_path / "a.html").read_text(encoding="utf-8")
    assert torch.equal(results["before"].losses, results["after"].losses)
