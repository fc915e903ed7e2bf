"""The HTML page's sections about single members and about the rewound weights."""

import base64
import io
import math
import re

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from lightning_cwrf import WeightMask
from lightning_cwrf.report import write_report
from tests.report.cases import audited, page_of, random_audit

pytestmark = pytest.mark.slow


def test_the_layers_of_the_rewound_weights(tmp_path):
    mask = WeightMask(
        {
            "net.0.weight": torch.tensor([True, True, False, False]),
            "net.0.bias": torch.tensor([True]),
            "net.2.weight": torch.zeros(10, dtype=torch.bool),
            "scale": torch.tensor([True]),
        }
    )
    path = mask.save(tmp_path / "mask.safetensors")
    for given in (mask, path, str(path)):
        page, _ = page_of(audited(), tmp_path, mask=given, overwrite=True)
        assert ["net.0", "3 of 5", "60.0%", "75.0%"] in page.cells
        assert ["net.2", "0 of 10", "0.0%", "0.0%"] in page.cells
        assert ["scale", "1 of 1", "100.0%", "25.0%"] in page.cells
        assert "4 of 16 weights (25.00%) were rewound and held." in page.text
    many = WeightMask({f"layer{i}.weight": torch.tensor([i % 2 == 0, False]) for i in range(90)})
    page, _ = page_of(audited(), tmp_path, mask=many, overwrite=True)
    assert "Not listed: 50 further layers with 5 rewound weights." in page.text
    assert "Rewound weights" not in page_of(audited(), tmp_path, overwrite=True)[0].text


@pytest.mark.parametrize(
    ("settings", "title", "said"),
    [
        ({"rewind": {"values": "fresh", "hold": False}}, "Rewound weights", "rewound to fresh values and not held"),
        ({"values": "initial", "hold": "False"}, "Rewound weights", "were rewound and not held"),  # of cwrf harden
        ({"values": "zero", "hold": "True"}, "Rewound weights", "were rewound to zero and held"),
        ({"values": "trained", "hold": "True"}, "Held weights", "were held at their trained values"),
        ({"rewind": "CWRF"}, "Rewound weights", "were rewound and held"),
        ({"values": 3}, "Rewound weights", "were rewound and held"),
    ],
    ids=str,
)
def test_the_page_says_what_was_done_to_the_chosen_weights(settings, title, said, tmp_path):
    mask = WeightMask({"net.0.weight": torch.tensor([True, False])})
    page, _ = page_of(audited(), tmp_path, mask=mask, settings=settings)
    assert f"1 of 2 weights (50.00%) {said}." in page.text
    assert title in page.text


def test_the_most_exposed_members_by_the_strongest_attack(tmp_path):
    result = random_audit(shift=2.0, attacks=["loss", "entropy"])
    aucs = {attack: found["auroc"].value for attack, found in result.estimates.items()}
    strongest = max(aucs, key=aucs.get)
    page, text = page_of({"it": result}, tmp_path, exposed=4, class_names=["cat", "dog", "owl"])
    for each in result.exposed(strongest, 4):
        above = round(60 * each.false_positive_rate)
        row = [str(each.member), ["cat", "dog", "owl"][each.target], f"{each.score:.4g}", f"{above} of 60"]
        assert row in page.cells
    assert "treat the page as you treat the data" in page.text
    assert "<img" not in text  # pictures only when asked
    assert "Most exposed" not in page_of(result, tmp_path, exposed=0, overwrite=True)[0].text


def test_a_list_of_exposed_members_says_when_its_attack_found_none(tmp_path):
    results = {"leaks": random_audit(shift=2.0, attacks=["loss"]), "does not": random_audit(attacks=["loss"])}
    doubt = "could not be told from guessing on this model, so the list means nothing"
    page, _ = page_of(results, tmp_path)
    assert page.text.count(doubt) == 1
    assert (
        page.text.index("leaks, by loss attack") < page.text.index("does not, by loss attack") < page.text.index(doubt)
    )


def test_pictures_of_members_are_their_own(tmp_path):
    """The picture beside a member's index is that member's, stretched to the full range."""
    result = audited(attacks=["loss"])
    images = torch.zeros(6, 1, 3, 5)
    for i in range(6):
        images[i, 0, 0, :i] = 0.25
    for given in (images, list(images), TensorDataset(images, torch.arange(6)), images[:, 0]):
        _, text = page_of(result, tmp_path, images=given, exposed=3, overwrite=True)
        found = re.findall(r'alt="member (\d)" src="data:image/png;base64,([^"]+)"', text)
        assert [int(i) for i, _ in found] == [each.member for each in result.exposed("loss", 3)]
        for i, content in found:
            pixels = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(content))).getdata())).view(3, 5)
            assert torch.equal(pixels, (images[int(i), 0] * 4 * 255).long())
    assert "It shows their pictures" in text


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(5, 1, 2, 2), ValueError, "images has 5 elements, and 'the model' was audited with 6 members"),
        (
            torch.rand(6, 2, 2, 2),
            ValueError,
            r"the shape \(1 or 3, height, width\) or \(height, width\), not \(2, 2, 2\)",
        ),
        (torch.full((6, 2, 2), math.nan), ValueError, "NaN or infinite"),
        (["a"] * 6, TypeError, r"must be a tensor, or \(tensor, label\), not a str"),
        (iter(range(6)), TypeError, "images must be the members in the order of the audit"),
    ],
)
def test_wrong_pictures_raise_and_leave_no_page(images, error, message, tmp_path):
    with pytest.raises(error, match=message):
        write_report(audited(), tmp_path / "x.html", images=images)
    assert not list(tmp_path.iterdir())
