"""Trained networks in diffusers: the same outputs, the export as a command, and README's lines that draw from it."""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import export_diffusers
import pytest
import torch
from diffusers import UNet2DModel

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "tests" / "export_diffusers.py"
TOLERANCE = 1e-4  # float32


@pytest.fixture
def write_checkpoint(lesson3, lesson4, redraw, tmp_path):
    """write_checkpoint(network's class, preset): a denoiser with random weights, and its checkpoint's path."""

    def write(name, preset, size=(28, 28), sigma_data=0.7):
        run = lesson3.Run(name, preset, 1.0, 8, 0, "noise", 8, tuple("0123456789"), size, sigma_data)
        model = lesson4.MODEL if name == "CondUNet" else lesson3.make_model(getattr(lesson3, name))
        network = redraw(model.build(lesson3.PRESETS[preset], 10))
        denoiser = lesson3.Denoiser(network, sigma_data, lesson3.PRESETS[preset].patch).requires_grad_(False)
        content = {"run": run._asdict(), "step": 1, "losses": torch.zeros(1), "ema": denoiser.state_dict()}
        lesson3.save_checkpoint(tmp_path / "checkpoint.pt", content)
        return denoiser, tmp_path / "checkpoint.pt"

    return write


def make_inputs(lesson3, denoiser, n=3):
    """Activations, times, and labels, of which the first is "no label"."""
    time = lesson3.TIME_SCALE * torch.empty(n).uniform_(-1, 1.1)  # more than ln(sigma) / 4 ever is
    unit = 2 ** (len(denoiser.network.widths) - 1)  # the lowest level has 2 × 3 pixels
    return torch.randn(n, denoiser.patch**2, 2 * unit, 3 * unit), time, torch.tensor([10, 0, 9])[:n]


@pytest.mark.parametrize("name, preset", [("CondUNet", "small"), ("CondUNet", "lecture"), ("TimeUNet", "lecture")])
def test_the_export_computes_the_same(lesson3, write_checkpoint, compare, tmp_path, name, preset):
    denoiser, path = write_checkpoint(name, preset)
    export_diffusers.export(path, tmp_path / "export")
    unet = UNet2DModel.from_pretrained(tmp_path / "export")
    inputs = make_inputs(lesson3, denoiser)[: 3 if name == "CondUNet" else 2]  # a TimeUNet isn't told the label
    with torch.no_grad():
        result = unet(*inputs).sample
    compare(f"export, {name}, preset {preset}", result, denoiser.network(*inputs), TOLERANCE)
    unit = 2 ** (len(denoiser.network.widths) - 1)
    side = math.ceil(28 / denoiser.patch / unit) * unit
    assert tuple(unet.config.sample_size) == (side, side)


def test_a_change_of_any_parameter_is_noticed(lesson3, write_checkpoint, tmp_path, monkeypatch):
    """In a narrow network, because there are hundreds of them to change."""
    narrow = lesson3.PRESETS["lecture"]._replace(widths=(8, 16, 24), attention_levels=(0, 2), head_dim=4)
    monkeypatch.setitem(lesson3.PRESETS, "narrow", narrow)
    denoiser, path = write_checkpoint("CondUNet", "narrow")
    export_diffusers.export(path, tmp_path / "export")
    unet = UNet2DModel.from_pretrained(tmp_path / "export").requires_grad_(False)
    inputs = make_inputs(lesson3, denoiser, n=1)
    expected = denoiser.network(*inputs)
    for name, parameter in unet.named_parameters():
        kept = parameter.clone()
        parameter += torch.randn_like(parameter) * kept.square().mean().sqrt()
        difference = (unet(*inputs).sample - expected).abs().max().item()
        if name.endswith("to_k.bias"):  # adds the same to all scores of a query, which a softmax doesn't notice
            assert difference < TOLERANCE, name
        else:
            assert difference > 3 * TOLERANCE, name
        parameter.copy_(kept)


# The command


def test_a_trained_network_is_exported_by_one_command(lesson4, tmp_path):
    command = [sys.executable, COMMAND, lesson4.PRETRAINED, "some/export"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    written = [Path(line.removeprefix("wrote ")) for line in result.stdout.splitlines()]
    assert sorted(written) == sorted(path.relative_to(tmp_path) for path in (tmp_path / "some" / "export").iterdir())
    unet = UNet2DModel.from_pretrained(tmp_path / "some" / "export")
    checkpoint = torch.load(lesson4.PRETRAINED, weights_only=True)
    weight = checkpoint["ema"]["network.embed_label.weight"].float()
    torch.testing.assert_close(unet.class_embedding.weight.detach(), weight, rtol=0, atol=0)
    scheduler = json.loads((tmp_path / "some" / "export" / "scheduler_config.json").read_text())
    assert scheduler["sigma_data"] == checkpoint["run"]["sigma_data"]


def changed(*path):
    """A checkpoint without the entry that is found along the path."""

    def make(write_checkpoint):
        _, checkpoint = write_checkpoint("TimeUNet", "small")
        content = torch.load(checkpoint)
        *places, name = path
        del functools.reduce(dict.__getitem__, places, content)[name]
        torch.save(content, checkpoint)
        return checkpoint

    return make


@pytest.mark.parametrize(
    ("make_checkpoint", "folder", "told"),
    [
        (lambda _: "nothing.pt", "export", "nothing.pt: no checkpoint there"),
        (lambda _: ".", "export", "damaged, or not a checkpoint"),
        (changed("ema"), "export", "damaged, or not a checkpoint"),
        (changed("ema", "network.conv_in.bias"), "export", "not a network of these lessons"),
        (lambda write: write("UntimedUNet", "small")[1], "export", "network without time"),
        (lambda write: write("TimeUNet", "small")[1], __file__, "DIR must be a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    make_checkpoint, folder, told, write_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(COMMAND), str(make_checkpoint(write_checkpoint)), folder])
    with pytest.raises(SystemExit) as exit:
        export_diffusers.main()
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export_diffusers.py: ")
    assert told in line
    assert not (tmp_path / "export").exists()


# README


@pytest.mark.parametrize("patch", [1, 2])
def test_the_lines_in_readme_draw_what_lesson_4_draws(
    lesson3, lesson4, write_checkpoint, compare, tmp_path, monkeypatch, patch
):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert f" {lesson3.TIME_SCALE} * time" in lines
    tiny = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, patch=patch)
    monkeypatch.setitem(lesson3.PRESETS, "tiny", tiny)
    denoiser, path = write_checkpoint("CondUNet", "tiny", size=(8, 12))
    export_diffusers.export(path, tmp_path / "export")
    monkeypatch.chdir(tmp_path)

    torch.manual_seed(1)
    names = {}
    exec(compile(lines, "README.md", "exec"), names)
    torch.manual_seed(1)
    noise = torch.nn.functional.pixel_shuffle(torch.randn(16, patch**2, 8 // patch, 12 // patch), patch)
    denoise = lesson4.guide(denoiser, torch.full((16,), 9), lesson4.GUIDANCE)
    *_, (_, images, _) = lesson3.sample(denoise, noise, lesson3.noise_levels(18))
    compare("README's lines, 18 guided steps", names["x"], images, TOLERANCE)
