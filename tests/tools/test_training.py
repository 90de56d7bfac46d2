import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cliper.model.backbone import load_backbone
from cliper.model.config import BackboneConfig
from tools import train_clip, training

SMALL = ["--scenes", "6", "--steps", "2", "--batch", "3", "--fused-steps", "2", "--fused-batch", "2"]


def train(monkeypatch: pytest.MonkeyPatch, out: Path, cache: Path) -> dict[str, torch.Tensor]:
    options = [
        "--output",
        str(out),
        "--cache",
        str(cache),
        "--workers",
        "1",
        "--save-every",
        "1",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(sys, "argv", ["train_clip", *options, *SMALL])
    train_clip.main()
    return load_file(out / "open_clip_model.safetensors")


def test_training_resumed_equals_uninterrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = train(monkeypatch, tmp_path / "whole", tmp_path / "cache")
    save, calls = training.save_checkpoint, []

    def save_and_die(*args: object) -> None:
        save(*args)  # type: ignore[arg-type]
        calls.append(args)
        if len(calls) == 3:  # one step into the second phase
            raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(training, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(monkeypatch, tmp_path / "cut", tmp_path / "cache")
    resumed = train(monkeypatch, tmp_path / "cut", tmp_path / "cache")
    assert len(calls) == 3
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    backbone = BackboneConfig(model=f"local-dir:{tmp_path / 'cut'}")
    model, _ = load_backbone(backbone, torch.device("cpu"), torch.float32)
    assert torch.equal(model.visual.proj.half(), whole["visual.proj"])
