"""Wrong uses of the commands and of their YAML keys: each has one plain message, exit code 2, and writes nothing."""

import json
import re

import pytest
import torch
import yaml

from lightning_cwrf.commands import main
from tests.commands.conftest import NAME as M

pytestmark = pytest.mark.slow

GOOD = {"model": f"{M}.Net", "data": f"{M}.Data", "checkpoint": "finished.ckpt", "accelerator": "cpu"}
HARDEN = {**GOOD, "vanilla": "init.safetensors", "max_epochs": 1}


def words(command, settings, *more):
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [command, *flags, *more]


def audit(*more, **settings):
    return words("audit", {**GOOD, **settings}, *more)


def harden(*more, **settings):
    return words("harden", {**HARDEN, **settings}, *more)


def export(*more, **settings):
    return words("export", {"model": f"{M}.Net", "checkpoint": "finished.ckpt", **settings}, *more)


def without(command, settings, name):
    return words(command, {key: value for key, value in settings.items() if key != name})


# What is written on the command line, and what is said about it.
WRONG = {
    "unknown command": (["hardn"], "no command 'hardn'; there are check, harden, audit, search, report, export"),
    "unknown option": (audit("--attack", "loss"), "--attack"),
    "unknown option of report": (["report", "a.json", "--output", "x.html"], "--output"),
    "seed is no number": (audit(seed="one"), "seed: Expected an int. Got value: one"),
    "steps is no number": (harden(steps="many"), "steps: Expected an int"),
    "rate is no number": (harden(rate="high"), "rate: Expected a float"),
    "rate above 1": (harden(rate="1.5"), r"rate must be a number in \[0, 1\], not 1.5"),
    "unknown values": (harden(values="vanilla"), "values must be 'initial' or 'fresh' or 'trained' or 'zero'"),
    "nothing changed or held": (harden("--hold", "false", values="trained"), "changes nothing and holds nothing"),
    "hold is no flag": (harden(hold="maybe"), "hold: Expected a bool"),
    "unknown way of statistics": (harden(batchnorm="new"), "batchnorm must be 'keep' or 'reset' or 'estimate'"),
    "lam above 1": (harden(lam="2"), r"lam must be a number in \[0, 1\], not 2"),
    "no step": (harden(steps="0"), "steps must be an integer of at least 1"),
    "no epoch": (harden(max_epochs="0"), "--max_epochs must be at least 1, not 0"),
    "model is missing": (without("audit", GOOD, "model"), "--model is missing: pass the import path"),
    "data is missing": (without("audit", GOOD, "data"), "--data is missing: pass the import path"),
    "checkpoint is missing": (without("audit", GOOD, "checkpoint"), "--checkpoint is missing"),
    "checkpoint of harden is missing": (without("harden", HARDEN, "checkpoint"), "--checkpoint is missing"),
    "vanilla is missing": (without("harden", HARDEN, "vanilla"), "--vanilla is missing: .* 'redraw'"),
    "model is no path": (audit(model="Net"), "--model must be an import path such as mine.Name, not 'Net'"),
    "no such module": (audit(model="nowhere.Net"), "--model: there is no module 'nowhere'"),
    "no such class": (audit(model=f"{M}.Nett"), f"{M} has no 'Nett'; it has .*Net, Normed"),
    "model is no class": (audit(model=f"{M}.number"), "--model must name a class, and .* is none .it is of type int"),
    "model is a DataModule": (audit(model=f"{M}.Data"), f"--model must name a LightningModule, and {M}.Data is none"),
    "data is a model": (audit(data=f"{M}.Net"), "--data must name a LightningDataModule"),
    "model is a plain module": (audit(model="torch.nn.Linear"), "--model must name a LightningModule"),
    "unknown argument of the model": (
        audit("--model.widht", "3"),
        "Net has no argument widht; it has width, lr",
    ),
    "argument of the model of a wrong type": (audit("--model.width", "wide"), "--model: width: Expected an int"),
    "unknown argument of the data": (audit("--data.size", "3"), "--data: Data has no argument size"),
    "the model raises": (audit(model=f"{M}.Breaks"), "RuntimeError: no such disk|cannot be built|does not fit"),
    "no such checkpoint": (audit(checkpoint="nowhere.ckpt"), "--checkpoint: there is no file nowhere.ckpt"),
    "checkpoint of another class": (audit(model=f"{M}.Normed"), f"does not fit {M}.Normed: .*Missing key"),
    "checkpoint of another width": (audit("--model.width", "4"), f"does not fit {M}.Net: .*size mismatch"),
    "checkpoint is text": (audit(checkpoint=f"{M}.py"), "--checkpoint: cannot read finished weights"),
    "no hyper-parameters": (audit(model=f"{M}.Needs", checkpoint="weights.pt"), "--model.*width"),
    "no such split": (audit(members="training"), "--members: there is no split 'training'; write a split of --data"),
    "split without a loader": (audit(nonmembers="predict"), "--nonmembers predict: there is no 'predict' split"),
    "reference without a loader": (harden(data=f"{M}.NoVal"), "--reference val: there is no 'val' split: NoVal"),
    "members are non-members": (audit(nonmembers="train"), "--members and --nonmembers are both 'train'"),
    "reference is what is audited": (harden(reference="test"), "--reference and --nonmembers are both 'test'"),
    "members are no data": (audit(members=f"{M}.number"), "--members .*: expected a DataLoader, a Dataset"),
    "no such data set": (audit(members=f"{M}.trainset"), f"--members: {M} has no 'trainset'"),
    "unknown argument of a function": (audit("--members.size", "3", members=f"{M}.members"), "has no argument size"),
    "transfer hook": (audit(data=f"{M}.Hooked"), "Hooked has on_after_batch_transfer"),
    "transfer hook of the model": (audit(model=f"{M}.HookedNet"), "--model: .*HookedNet has on_after_batch_transfer"),
    "random split": (
        audit(data=f"{M}.RandomSplit"),
        "splits its data at random.* a generator",
    ),
    "random split of augmented data": (harden(data=f"{M}.NoisySplit"), "splits its data at random"),
    "plain is not the members": (audit(plain=f"{M}.population"), "--plain are not the members"),
    "plain has fewer examples": (
        audit("--plain.count", "100", data=f"{M}.Augmented", plain=f"{M}.members"),
        "--plain are not the members",
    ),
    "arguments of a split": (audit("--members.count", "100"), "--members train is a split .* no argument count"),
    "vanilla weights as the finished ones": (
        audit(checkpoint="init.safetensors"),
        "init.safetensors holds lightning_cwrf.* instead of finished weights",
    ),
    "vanilla file is missing": (harden(vanilla="lost.safetensors"), "--vanilla: there is no file lost.safetensors"),
    "vanilla function is missing": (harden(vanilla=f"{M}.untrained"), f"--vanilla: {M} has no 'untrained'"),
    "unknown defense": (
        harden(defense="relax"),
        "there is no defense 'relax'; available: .*relaxloss",
    ),
    "unknown setting of a defense": (
        harden("--defense.alfa", "1"),
        "RelaxLoss has no setting alfa",
    ),
    "setting of a wrong type": (
        harden("--defense.alpha", "big"),
        "--defense relaxloss: RelaxLoss: alpha must be",
    ),
    "setting out of range": (
        harden("--defense.alpha", "-1"),
        "--defense relaxloss: alpha must be a number",
    ),
    "unknown argument of the Trainer": (harden("--trainer.epochs", "3"), "--trainer: Trainer has no argument epochs"),
    "argument of the Trainer of a wrong type": (
        harden("--trainer.gradient_clip_val", "no"),
        "--trainer: gradient_clip_val: ",
    ),
    "callbacks of the Trainer": (harden("--trainer.callbacks", "[]"), "--trainer: callbacks cannot be set here"),
    "devices of the Trainer": (harden("--trainer.devices", "2"), "--trainer: devices cannot be set here"),
    "epochs twice": (harden("--trainer.max_epochs", "2"), "--trainer.max_epochs: pass --max_epochs instead"),
    "no such accelerator": (audit(accelerator="abacus"), "--accelerator abacus: "),
    "odd number of shadow models": (audit(shadows="5"), "--shadows must be an even number of at least 4"),
    "shadow models without the training": (audit(shadows="4"), "--training.max_epochs"),
    "unknown attack": (audit(attacks="[lyra]"), "there is no attack 'lyra'; available: "),
    "confidence of 1": (audit(confidence="1"), r"confidence must be a number in \(0, 1\)"),
    "threshold without a value": (audit("--fail-above", "loss/auroc"), "--fail-above must be METRIC=VALUE"),
    "threshold that is no number": (audit("--fail-above", "loss/auroc=e"), "'e' is not a number"),
    "threshold without an attack": (audit("--fail-above", "auroc=0.6"), "name an attack too, such as loss/auroc"),
    "threshold on no attack": (audit("--fail-above", "lyra/auroc=0.6"), "there is no attack 'lyra'"),
    "threshold on an attack that does not run": (
        audit("--fail-above", "lira/auroc=0.6"),
        "this audit runs loss, not lira, and what was not measured cannot pass. It needs shadow models",
    ),
    "threshold on no metric": (audit("--fail-above", "loss/auc=0.6"), "there is no metric 'auc'; available: .*auroc"),
    "infinite threshold": (audit("--fail-above", "test_loss=1e999"), "the limit must be finite"),
    "threshold that is inf": (audit("--fail-above", "loss_gap=inf"), "the limit must be finite"),
    "threshold that is nan": (audit("--fail-above", "loss_gap=nan"), "the limit must be finite"),
    "AUC in percent": (audit("--fail-above", "loss/auroc=60"), "auroc is between 0 and 1"),
    "TPR in percent": (audit("--fail-above", "loss/tpr_at_fpr_0.001=5"), "tpr_at_fpr_0.001 is between 0 and 1"),
    "negative advantage": (audit("--fail-above", "loss/advantage=-1"), "advantage is between 0 and 1"),
    "accuracy with fail-above": (audit("--fail-above", "test_accuracy=0.9"), "more of .* better; pass --fail-below"),
    "P1 with fail-above": (audit("--fail-above", "loss/p1=0.9"), "more of .* is better; pass --fail-below"),
    "AUC with fail-below": (audit("--fail-below", "loss/auroc=0.9"), "less of .* is better; pass --fail-above"),
    "empty list of thresholds": (audit("--fail-above", "[]"), "--fail-above is empty"),
    "empty list of thresholds, joined": (audit("--fail-above=[]"), "--fail-above is empty"),
    "empty threshold": (audit("--fail-below", ""), "--fail-below is empty"),
    "shortened option": (harden("--fail-above", "loss/auroc=0.6", "--conf", "a.yaml"), "--conf"),
    "two files of options": (audit("--config", "a.yaml", "--config=b.yaml"), "--config is given twice"),
    "attacks are no list": (audit(attacks="loss"), r"must be a list, such as --attacks \[loss,entropy\]"),
    "no attack": (audit(attacks="[]"), "--attacks is empty"),
    "attack without shadow models": (audit(attacks="[lira]"), "lira needs shadow models: pass --shadows"),
    "attack without a population": (
        audit("--training.max_epochs", "1", shadows="4", attacks="[rmia]"),
        "rmia needs a population: pass --population",
    ),
    "threshold without a population": (
        harden("--training.max_epochs", "1", "--fail-above", "rmia/auroc=0.6", shadows="4"),
        "not rmia, and what was not measured cannot pass. It needs --shadows and --population",
    ),
    "population without shadow models": (audit(population=f"{M}.population"), "--population has no effect without"),
    "training without shadow models": (harden("--training.max_epochs", "1"), "--training has no effect without"),
    "arguments without an object": (audit("--plain.count", "3"), "--plain.count is given without --plain"),
    "unknown way to judge": (audit("--judge", "mean"), "--judge must be 'bound' or 'value', not 'mean'"),
    "audit file of another format": (audit(out="init.safetensors"), "--out init.safetensors: .* must end in .json"),
    "report of another format": (audit(report="a.json"), "--report a.json: its name must end in .html"),
    "report of saved audits of another format": (["report", "a.json", "--out", "a.json"], "must end in .html"),
    "audit file is read": (
        audit("--overwrite", checkpoint="a.json", out="./a.json"),
        "a.json is an input, which would be replaced",
    ),
    "audit file in a file": (audit(out="finished.ckpt/a.json"), "finished.ckpt is a file"),
    "out is a file": (harden(out="finished.ckpt"), "--out finished.ckpt is a file; name a folder"),
    "no audit to report": (["report"], "name one or more saved audits"),
    "no such audit": (["report", "lost.json"], "there is no saved audit at lost.json"),
    "no audit in the file": (["report", f"{M}.py"], "is damaged or is not JSON"),
    "store without shadow models": (audit(store="there"), "--store has no effect without --shadows"),
    "pool without shadow models": (audit(pool=f"{M}.members"), "--pool has no effect without --shadows"),
    "pool without the non-members": (
        audit("--training.max_epochs", "1", shadows="4", pool=f"{M}.members"),
        "--pool lacks 200 of the 200 examples of --nonmembers",
    ),
    "mask is missing": (["report", "a.json", "--mask", "lost.safetensors"], "there is no"),
    "mask is a checkpoint": (["report", "a.json", "--mask", "a.json", "--out", "a.html"], "a.json"),
    "export without a file": (export(), "--out is missing: name the file to write"),
    "export without a model": (["export", "--out", "m.ckpt", "--checkpoint", "finished.ckpt"], "--model is missing"),
    "export without weights": (["export", "--out", "m.ckpt", "--model", f"{M}.Net"], "--checkpoint is missing"),
    "export of another format": (export(out="m.pt"), "--out m.pt: its name must end in .safetensors or .ckpt"),
    "export over its input": (export("--overwrite", out="finished.ckpt"), "finished.ckpt is an input"),
    "export to what exists": (export(out="init.safetensors"), "init.safetensors exists already; pass --overwrite"),
    "export of no such audit": (export(out="m.ckpt", audit="lost.json"), "there is no saved audit at lost.json"),
    "export with no such settings": (
        export(out="m.ckpt", settings="lost.json"),
        "there is no record of a hardening at lost.json",
    ),
    "export of another class": (export(out="m.ckpt", model=f"{M}.Normed"), f"does not fit {M}.Normed"),
    "export with data": (export("--data", f"{M}.Data", out="m.ckpt"), "--data"),
    "no such configuration": (["audit", "--config", "lost.yaml"], "config: File does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_message(case, user, capsys):
    given, message = WRONG[case]
    before = sorted(user.iterdir())
    assert main(given) == 2
    said = capsys.readouterr()
    assert re.search(message, said.err), said.err
    assert said.err.startswith("cwrf")
    assert "Traceback" not in said.err
    assert len(said.err.splitlines()) <= 2, said.err
    assert [path for path in sorted(user.iterdir()) if path.name != "__pycache__"] == before


# The same mistakes in a YAML file.
WRONG_YAML = {
    "unknown key": ({"modle": "mine.Net"}, "modle"),
    "rate is text": ({"rate": "high"}, "rate: Expected a float"),
    "model has other keys": ({"model": {"class": f"{M}.Net"}}, "--model must be an import path .*; it has class"),
    "model is a list": ({"model": [f"{M}.Net"]}, "model"),
    "init_args is a list": ({"model": {"class_path": f"{M}.Net", "init_args": [3]}}, "--model must be an import path"),
    "unknown init_args": ({"model": {"class_path": f"{M}.Net", "init_args": {"widht": 3}}}, "no argument widht"),
    "init_args of a wrong type": (
        {"data": {"class_path": f"{M}.Data", "init_args": {"members": "all"}}},
        "Expected an int",
    ),
    "setting of a defense": ({"defense": {"class_path": "hamp", "init_args": {"gama": 1}}}, "HAMP has no setting gama"),
    "trainer is text": ({"trainer": "fast"}, "trainer: "),
    "trainer has an unknown key": ({"trainer": {"precison": 16}}, "Trainer has no argument precison"),
    "gate is no list": ({"fail_above": "loss/auroc=0.6"}, "fail_above: Expected a list"),
    "rate above 1": ({"rate": 3}, r"rate must be a number in \[0, 1\], not 3"),
}


@pytest.mark.parametrize("case", WRONG_YAML)
def test_wrong_yaml_is_one_message(case, user, capsys):
    given, message = WRONG_YAML[case]
    (user / "harden.yaml").write_text(yaml.safe_dump({**HARDEN, **given}))
    assert main(["harden", "--config", "harden.yaml"]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, said


def test_yaml_that_is_none_is_one_message(user, capsys):
    (user / "harden.yaml").write_text("model: [mine.Net\n")
    assert main(["harden", "--config", "harden.yaml"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= 2, said


def test_a_split_with_a_fixed_seed_is_accepted(user):
    assert main(audit("--data.seed", "3", "--dry-run", data=f"{M}.RandomSplit")) == 0
    assert main(audit("--data.seed", "3", "--dry-run", data=f"{M}.NoisySplit")) == 0
    assert main(audit("--dry-run", data=f"{M}.Augmented", plain=f"{M}.members")) == 0


def spoilt(state, how):
    if how == "nan":
        state["net.1.bias"][0] = torch.nan
    elif how == "infinite":
        state["net.3.weight"][0, 0] = torch.inf
    elif how == "integers":
        state = {name: (100 * value).to(torch.int8) for name, value in state.items()}
    else:
        state = {name: 0.01 * torch.randn_like(value) for name, value in state.items()}
    return state


SPOILT = {
    "nan": "has NaN or infinite values in 'net.1.bias'",
    "infinite": "has NaN or infinite values in 'net.3.weight'",
    "integers": "as torch.int8, and the model has torch.float32",
    "untrained": "It looks untrained",
}


@pytest.mark.parametrize("how", SPOILT)
def test_weights_of_no_finished_model_are_not_audited(how, user, capsys):
    state = spoilt(torch.load("weights.pt", weights_only=True), how)
    torch.save(state, "spoilt.pt")
    assert main(audit(checkpoint="spoilt.pt")) == 2
    assert SPOILT[how] in capsys.readouterr().err
    assert main(harden(checkpoint="spoilt.pt")) != 0
    said = capsys.readouterr()
    assert SPOILT[how] in " ".join((said.out + said.err).split())
    assert not (user / "hardened").exists()


def test_what_exists_is_not_replaced(user, capsys):
    (user / "a.json").write_text("mine")
    assert main(audit(out="a.json")) == 2
    assert "a.json exists already; pass --overwrite" in capsys.readouterr().err
    assert (user / "a.json").read_text() == "mine"


def test_debug_shows_where(user, capsys):
    assert main(audit("--debug", model="nowhere.Net")) == 2
    assert "Traceback" in capsys.readouterr().err


def test_audits_of_two_confidences_are_not_reported_together(user, capsys):
    for name, confidence in (("a", "0.95"), ("b", "0.9")):
        assert main(audit(out=f"{name}.json", confidence=confidence)) == 0
    capsys.readouterr()
    assert main(["report", "a.json", "b.json"]) == 2
    assert "different confidence" in capsys.readouterr().err
    content = json.loads((user / "a.json").read_text())
    content["confidence"] = 0.5
    (user / "a.json").write_text(json.dumps(content))
    assert main(["report", "a.json"]) == 2
    assert "was changed after it was saved" in capsys.readouterr().err
