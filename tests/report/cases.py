"""Audits made by hand, and what is read back from a page."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import torch

from lightning_cwrf.auditing import audit_outputs
from lightning_cwrf.outputs import ModelOutputs
from lightning_cwrf.report import write_report
from tests.auditing.cases import estimate, made

_VOID = {"meta", "img", "br"}
_DRAWN = {"path", "line", "rect", "circle"}  # closed in themselves


def audited(auc=0.75, attacks=("loss", "lira"), accuracy=0.8, **changes):
    result = made(auc=auc, **changes)
    model = {
        "train_accuracy": estimate(1.0, 0.9, 1.0),
        "test_accuracy": estimate(accuracy, accuracy - 0.1, accuracy + 0.1),
        "loss_gap": estimate(0.1, -math.inf, math.inf),
    }
    kept = {"scores": {a: result.scores[a] for a in attacks}, "estimates": {a: result.estimates[a] for a in attacks}}
    return replace(result, model_metrics=model, **kept)


class Page(HTMLParser):
    """The text, the cells and the attributes of a page; an element that is not closed in order is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.said, self.cells, self.tags, self.attributes = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert tag in _DRAWN
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.said.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def random_audit(n=60, shift=0.0, seed=0, **more):
    """Of a model that gives members a logit higher by ``shift``."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for i, extra in enumerate((shift, 0.0)):
        targets = torch.randint(3, (n,), generator=generator)
        logits = torch.randn(n, 3, generator=generator) + extra * torch.nn.functional.one_hot(targets, 3)
        ids = [f"{i}-{j}" for j in range(n)]
        sides.append(ModelOutputs(logits, targets, ids))
    return audit_outputs(*sides, **more)


def page_of(results, folder, **more):
    path = write_report(results, folder / "report.html", **more)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


MANY = {"before": audited(0.9, low=0.8, high=0.95), "after": audited(0.6, low=0.5, high=0.7)}
