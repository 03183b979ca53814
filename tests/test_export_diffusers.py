"""Trained networks in diffusers: the same outputs, the export as a command, and the lines that sample from it."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import export_diffusers
import pytest
import torch
from diffusers import UNet2DModel

import lesson_tools as tools

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "tests" / "export_diffusers.py"
TOLERANCE = 1e-4  # float32


@pytest.fixture
def export(lesson3, lesson4, redraw, tmp_path):
    """export(network's class, preset): a denoiser with random weights, and what diffusers reads from export/."""

    def export(name, preset, size=(28, 28)):
        settings = lesson3.RunSettings(name, preset, 1, 8, 0, "noise", 8, tuple("0123456789"), size, 0.7)
        lesson = lesson4 if name == "CondUNet" else lesson3
        network = redraw(lesson.make_network(lesson3.PRESETS[preset], 10))
        denoiser = lesson3.Denoiser(network, 0.7, lesson3.PRESETS[preset].patch).requires_grad_(False)
        content = {"settings": settings._asdict(), "step": 1, "ema": denoiser.state_dict()}
        tools.save_checkpoint(tmp_path / "checkpoint.pt", content)
        export_diffusers.export(tmp_path / "checkpoint.pt", tmp_path / "export")
        return denoiser, UNet2DModel.from_pretrained(tmp_path / "export").requires_grad_(False)

    return export


def make_inputs(lesson3, denoiser, n=3):
    """Activations, times, and labels, of which the first is "no label"."""
    time = lesson3.TIME_SCALE * torch.empty(n).uniform_(-1, 1.1)  # a wider range than that of ln(sigma) / 4
    unit = 2 ** (len(denoiser.network.widths) - 1)  # the lowest level has 2 × 3 pixels
    return torch.randn(n, denoiser.patch**2, 2 * unit, 3 * unit), time, torch.tensor([10, 0, 9])[:n]


@pytest.mark.parametrize(
    ("name", "preset", "side"), [("CondUNet", "small", 14), ("CondUNet", "lecture", 32), ("TimeUNet", "lecture", 32)]
)
def test_the_export_computes_the_same(lesson3, export, compare, name, preset, side):
    denoiser, unet = export(name, preset)
    inputs = make_inputs(lesson3, denoiser)[: 3 if name == "CondUNet" else 2]  # a TimeUNet takes no label
    compare(f"export, {name}, preset {preset}", unet(*inputs).sample, denoiser.network(*inputs), TOLERANCE)
    assert tuple(unet.config.sample_size) == (side, side)


def test_a_trained_network_is_exported_by_one_command(lesson4, tmp_path):
    command = [sys.executable, COMMAND, lesson4.PRETRAINED, "some/export"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    folder, checkpoint = tmp_path / "some" / "export", torch.load(lesson4.PRETRAINED, weights_only=True)
    written = [tmp_path / line.removeprefix("wrote ") for line in result.stdout.splitlines()]
    assert sorted(written) == sorted(folder.iterdir())
    weight = UNet2DModel.from_pretrained(folder).class_embedding.weight.detach()
    assert torch.equal(weight, checkpoint["ema"]["network.embed_label.weight"].float())
    scheduler = json.loads((folder / "scheduler_config.json").read_text())
    assert scheduler["sigma_data"] == checkpoint["settings"]["sigma_data"]


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["nothing.pt", "export"], "nothing.pt: no checkpoint there"),
        ({}, [__file__, "export"], "damaged, or not a checkpoint"),
        ({"settings": {"colour": 1}}, ["checkpoint.pt", "export"], "damaged, or not a checkpoint"),
        ({"settings": {"network": "UntimedUNet"}}, ["checkpoint.pt", "export"], "network without time"),
        ({"settings": {"preset": "huge"}}, ["checkpoint.pt", "export"], "not a network of these"),
        ({"ema": {"network.conv_in.bias": torch.zeros(1)}}, ["checkpoint.pt", "export"], "not a network of these"),
        ({"ema": {"network.colour.bias": torch.zeros(1)}}, ["checkpoint.pt", "export"], "not a network of these"),
        ({}, ["checkpoint.pt", __file__], "DIR must be a writable folder"),
    ],
)
def test_what_cannot_be_done_is_reported(changes, arguments, message, lesson4, tmp_path, monkeypatch, capsys):
    content = torch.load(lesson4.PRETRAINED, weights_only=True)
    content |= {part: content[part] | change for part, change in changes.items()}
    torch.save(content, tmp_path / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *arguments])
    with pytest.raises(SystemExit) as exit:
        tools.run_command(export_diffusers.main)
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export_diffusers.py: ")
    assert message in line
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("patch", [1, 2])
def test_the_lines_for_diffusers_draw_what_lesson_4_draws(
    lesson3, lesson4, export, compare, tmp_path, monkeypatch, patch
):
    (lines,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert f" {lesson3.TIME_SCALE} * time" in lines
    tiny = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, patch=patch)
    monkeypatch.setitem(lesson3.PRESETS, "tiny", tiny)
    denoiser, _ = export("CondUNet", "tiny", size=(8, 12))
    monkeypatch.chdir(tmp_path)

    torch.manual_seed(1)
    names = {}
    exec(compile(lines, "diffusers.md", "exec"), names)
    torch.manual_seed(1)
    noise = torch.nn.functional.pixel_shuffle(torch.randn(16, patch**2, 8 // patch, 12 // patch), patch)
    denoise = functools.partial(lesson4.guide(denoiser, lesson4.GUIDANCE_LONG), label=torch.full((16,), 9))
    *_, (_, images, _) = lesson3.sample_dpm(denoise, noise, lesson3.noise_levels())
    compare("the lines for diffusers, guided steps", names["x"], images, TOLERANCE)
