"""Files of scores."""

import pytest
import safetensors.torch
import torch

from lightning_cwrf.weights.score_files import load_scores, save_scores


def test_score_files(tmp_path):
    scores = {"weight": torch.rand(3, 4), "bias": torch.rand(3)}
    path = save_scores(scores, tmp_path / "scores.safetensors")
    assert all(torch.equal(load_scores(path)[name], score) for name, score in scores.items())
    safetensors.torch.save_file(scores, tmp_path / "foreign.safetensors")
    assert load_scores(tmp_path / "foreign.safetensors").keys() == scores.keys()
    (tmp_path / "junk").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="junk is no file of scores: it is damaged"):
        load_scores(tmp_path / "junk")
    with pytest.raises(FileNotFoundError, match="no file of scores"):
        load_scores(tmp_path / "none")
