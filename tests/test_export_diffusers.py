"""Trained networks in diffusers: the same outputs, the export as a command, and README's lines that draw from it."""

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
        network_class = getattr(lesson3, name, None) or getattr(lesson4, name)
        network = redraw(network_class.from_preset(lesson3.PRESETS[preset], 10))
        denoiser = lesson3.Denoiser(network, sigma_data, lesson3.PRESETS[preset].patch).requires_grad_(False)
        content = {"run": run._asdict(), "step": 1, "losses": torch.zeros(1), "average": denoiser.state_dict()}
        lesson3.save_checkpoint(tmp_path / "checkpoint.pt", content)
        return denoiser, tmp_path / "checkpoint.pt"

    return write


def make_inputs(lesson3, denoiser, n=3):
    """Activations, times, and labels, of which the first is "no label"."""
    time = lesson3.lesson1.TIME_SCALE * torch.empty(n).uniform_(-1, 1.1)  # more than ln(sigma) / 4 ever is
    unit = 2 ** (len(denoiser.network.widths) - 1)  # the lowest level has 2 × 3 pixels
    return torch.randn(n, denoiser.patch**2, 2 * unit, 3 * unit), time, torch.tensor([10, 0, 9])[:n]


@pytest.mark.parametrize("preset", ["small", "lecture"])
def test_the_export_computes_the_same(lesson3, write_checkpoint, compare, tmp_path, preset):
    denoiser, path = write_checkpoint("CondUNet", preset)
    export_diffusers.export(path, tmp_path / "export")
    unet = UNet2DModel.from_pretrained(tmp_path / "export")
    inputs = make_inputs(lesson3, denoiser)
    with torch.no_grad():
        result = unet(*inputs).sample
    compare(f"export, preset {preset}", result, denoiser.network(*inputs), TOLERANCE)
    unit = 2 ** (len(denoiser.network.widths) - 1)
    side = math.ceil(28 / denoiser.patch / unit) * unit
    assert tuple(unet.config.sample_size) == (side, side)


def test_lesson_3_can_be_exported_too(lesson3, write_checkpoint, compare, tmp_path):
    denoiser, path = write_checkpoint("TimeUNet", "lecture")
    export_diffusers.export(path, tmp_path / "export")
    unet = UNet2DModel.from_pretrained(tmp_path / "export")
    x, time, _ = make_inputs(lesson3, denoiser)
    with torch.no_grad():
        result = unet(x, time).sample
    compare("export without attention and label", result, denoiser.network(x, time), TOLERANCE)


@pytest.mark.parametrize("preset, shrink", [("small", 1), ("lecture", 4)])
def test_a_change_of_any_parameter_is_noticed(lesson3, write_checkpoint, tmp_path, monkeypatch, preset, shrink):
    """The preset's layers, but the lecture's a quarter as wide, because there are hundreds of them to change."""
    full = lesson3.PRESETS[preset]
    narrow = full._replace(
        widths=tuple(width // shrink for width in full.widths),
        head_dim=full.head_dim // shrink,
    )
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


def test_a_trained_network_is_exported_by_one_command(tmp_path):
    options = "--data garments --preset small --epochs 0.001 --batch-size 5 --n 1 --steps 1 --device cpu --out run"
    subprocess.run([sys.executable, ROOT / "04_unet_cond.py", *options.split()], cwd=tmp_path, check=True)
    command = [sys.executable, COMMAND, "run/checkpoint.pt", "some/export"]
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    written = [Path(line.removeprefix("wrote ")) for line in result.stdout.splitlines()]
    assert sorted(written) == sorted(path.relative_to(tmp_path) for path in (tmp_path / "some" / "export").iterdir())
    unet = UNet2DModel.from_pretrained(tmp_path / "some" / "export")
    run = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    weight = run["average"]["network.embed_label.weight"]
    torch.testing.assert_close(unet.class_embedding.weight.detach(), weight, rtol=0, atol=0)
    scheduler = json.loads((tmp_path / "some" / "export" / "scheduler_config.json").read_text())
    assert scheduler["sigma_data"] == run["run"]["sigma_data"]


def no_time(write_checkpoint, folder):
    return [write_checkpoint("UNet", "small")[1], folder / "export"]


def damaged(write_checkpoint, folder):
    _, path = write_checkpoint("TimeUNet", "small")
    path.write_bytes(path.read_bytes()[:1000])
    return [path, folder / "export"]


def another_version(write_checkpoint, folder):
    _, path = write_checkpoint("TimeUNet", "small")
    content = torch.load(path)
    del content["average"]["network.conv_in.bias"]
    torch.save(content, path)
    return [path, folder / "export"]


def another_preset(write_checkpoint, folder):
    _, path = write_checkpoint("TimeUNet", "small")
    content = torch.load(path)
    content["run"]["preset"] = "large"
    torch.save(content, path)
    return [path, folder / "export"]


def dir_is_a_file(write_checkpoint, folder):
    return [write_checkpoint("TimeUNet", "small")[1], __file__]


@pytest.mark.parametrize(
    ("make_arguments", "told"),
    [
        (lambda *_: [], "CHECKPOINT, DIR"),
        (lambda _, folder: [folder / "nothing.pt", folder / "export"], "nothing.pt: no checkpoint there"),
        (lambda _, folder: [folder, folder / "export"], "damaged, or not a checkpoint"),
        (damaged, "damaged, or not a checkpoint"),
        (another_version, "not a network of these lessons"),
        (another_preset, "not a network of these lessons"),
        (no_time, "network without time"),
        (dir_is_a_file, "DIR must be a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line(make_arguments, told, write_checkpoint, tmp_path, monkeypatch, capsys):
    arguments = make_arguments(write_checkpoint, tmp_path)
    monkeypatch.setattr(sys, "argv", [str(COMMAND), *map(str, arguments)])
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
    assert f" {lesson3.lesson1.TIME_SCALE} * time" in lines
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
