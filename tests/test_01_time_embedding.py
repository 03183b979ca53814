"""Lesson 1 against reference_numpy and diffusers; its pictures and claims; and all four scripts as commands."""

import importlib
import math
import re
import runpy
import sys
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

import lesson_tools as tools
from reference_numpy import embedding as reference
from reference_numpy import linear, silu

matplotlib.use("Agg")
lesson = importlib.import_module("01_time_embedding")
timestep_embedding = lesson.timestep_embedding
SCRIPT = Path(lesson.__file__)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]
PRECISIONS = [(device, torch.float32, 2e-7) for device in DEVICES]
PRECISIONS += [(device, torch.float64, 1e-12) for device in DEVICES if device != "mps"]  # mps has no float64
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


def random_cases(n):
    """Times of any size and sign (float64), odd and even dims, periods from 1 to a million."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        times = rng.choice([-1, 1], 40) * 10 ** rng.uniform(-4, rng.uniform(-3, 6), 40)
        yield torch.from_numpy(times), int(rng.integers(2, 130)), float(10 ** rng.uniform(0, 6))


# The embedding
@pytest.mark.parametrize("device, dtype, tolerance", PRECISIONS)
def test_equals_numpy_and_diffusers(device, dtype, tolerance):
    for times, dim, max_period in random_cases(400):
        times = times.to(dtype)
        ours = timestep_embedding(times.to(device), dim, max_period)
        assert ours.dtype == dtype and ours.shape == (40, dim) and ours.device.type == device
        references = [reference.timestep_embedding(times.double().numpy(), dim, max_period)]
        if dtype == torch.float32 and dim > 3:  # diffusers always computes in float32, and divides by dim // 2 - 1
            references.append(get_timestep_embedding(times, dim, False, 1, max_period=max_period).numpy())
        for expected in references:
            error = np.abs(ours.double().cpu().numpy() - expected) / times.abs().clamp(min=1).double().numpy()[:, None]
            assert error.max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, *INTEGERS])
def test_types_and_half_precision_that_rounds_only_the_result(request, dtype):
    times = torch.tensor([0, 1, 100, -17] if dtype in INTEGERS else [0.1, 3.14, -17, 370, 999, 1000.5, 6e4]).to(dtype)
    single, result = torch.promote_types(dtype, torch.float32), torch.float32 if dtype in INTEGERS else dtype
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    torch.set_default_dtype(torch.float64)
    ours, nothing = timestep_embedding(times, 17), timestep_embedding(times[:0], 17)
    assert ours.dtype == nothing.dtype == result and nothing.shape == (0, 17)
    assert torch.equal(ours, timestep_embedding(times.to(single), 17).to(result))


@pytest.mark.parametrize(
    "times, dim, max_period, message",
    [
        *((torch.zeros(shape), 16, 10_000, re.escape(f"{shape}")) for shape in ((), (4, 1), (0, 16))),
        *((torch.zeros(4), dim, 10_000, f"{dim} and") for dim in (1, 0, -2)),
        *((torch.zeros(4), 16, period, f"and {period}$") for period in (0.99, 0, -10, math.inf, math.nan)),
    ],
)
def test_bad_arguments_are_named(times, dim, max_period, message):
    with pytest.raises(ValueError, match=message):
        timestep_embedding(times, dim, max_period)


@pytest.mark.parametrize("shift", [0, 3, -7, 0.25, 1000])
def test_a_shift_is_a_rotation_and_dot_products_depend_on_the_distance_only(shift):
    for times, dim, max_period in random_cases(50):
        dim += dim % 2
        matrix = lesson.shift_matrix(shift, dim, max_period)
        np.testing.assert_allclose(matrix, reference.shift_matrix(shift, dim, max_period), rtol=0, atol=1e-12 * 1000)
        times = times[times.abs() < 1e4]
        embedding, moved = (timestep_embedding(t, dim, max_period) for t in (times, times + shift))
        torch.testing.assert_close(embedding @ matrix.T, moved, rtol=0, atol=1e-12 * 1e4)
        torch.testing.assert_close(embedding @ embedding.T, moved @ moved.T, rtol=0, atol=1e-12 * 1e4 * dim)


# The layers
@pytest.mark.parametrize("columns, channels", [(2, 1), (7, 4), (16, 6)])
def test_time_embedding_and_scale_shift_equal_numpy(redraw, compare, columns, channels):
    embed, layer = lesson.TimeEmbedding(columns), lesson.ScaleShift(4 * columns, channels)
    first, first_bias, second, second_bias = (p.detach().numpy() for p in redraw(embed.double()).parameters())
    weight, bias = (p.detach().numpy() for p in redraw(layer.double()).parameters())
    times, x = 100 * torch.randn(5).double(), torch.randn(5, channels, 3, 8).double()
    hidden = linear(reference.timestep_embedding(times.numpy(), columns), first, first_bias)
    embedding = linear(silu(hidden), second, second_bias)
    compare("TimeEmbedding", embed(times), embedding, 1e-12)
    scale_shift = linear(silu(embedding), weight, bias)[:, :, None, None]  # first all scales, then all shifts
    expected = (1 + scale_shift[:, :channels]) * x.numpy() + scale_shift[:, channels:]
    compare("ScaleShift", layer(x, embed(times)), expected, 1e-12)


# The script
def section_titles(script):
    return re.findall(r"^# %% (\d+\. .+)$", Path(script.__file__).read_text(encoding="utf-8"), re.M)


def run_main(script, out, monkeypatch, capsys):
    """What a script prints, and the names of its pictures. Each must be wide and not blank."""
    before = plt.get_fignums()
    monkeypatch.setattr(sys, "argv", [script.__name__, "--out", str(out)])
    script.main()
    printed, pictures = capsys.readouterr().out, sorted(out.iterdir())
    assert re.findall(r"^(\d+\. .+)$", printed, re.M) == section_titles(script)
    assert re.findall(r"^wrote (.+)$", printed, re.M) == [str(picture) for picture in pictures]
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)
        assert 700 < pixels.shape[1] < 1500 and pixels.shape[0] < pixels.shape[1]
        assert pixels[..., :3].std() > 0.05
    assert plt.get_fignums() == before  # every figure is closed
    return printed, [picture.name for picture in pictures]


def test_script_draws_and_prints_what_is_true(tmp_path, monkeypatch, capsys):
    printed, pictures = run_main(lesson, tmp_path / "pictures" / "of lesson 1", monkeypatch, capsys)
    names = ["clock", "steps", "distances", "max_period", "shift", "scale_shift"]
    assert pictures == [f"0{i}_{name}.png" for i, name in enumerate(names, 1)]
    t = np.arange(1001)
    for name, rows in (("as one number", t[:, None]), ("as 64 columns", reference.timestep_embedding(t, 64))):
        values = np.array(re.findall(r"(\d+) is ([\d.]+)", re.search(f"^ *{name}.*$", printed, re.M)[0]), float)
        expected = np.linalg.norm(rows - rows[370], axis=1) / np.linalg.norm(rows[-1] - rows[0])
        assert len(values) >= 3 and np.abs(values[:, 1] - expected[values[:, 0].astype(int)]).max() < 0.00051
    for last, period in ((99, 10), (99, 100), (99, 10_000), (1, 10_000)):
        still = (np.ptp(reference.timestep_embedding(np.linspace(0, last, 100), 16, period), axis=0) < 0.02).sum()
        assert f"t from 0 to {last}, max_period {period}: {still} of 16 columns barely vary" in printed
    fits = [float(number) for number in re.findall(r"with R² (\S+)", printed)]
    assert fits == pytest.approx([0.22, 1, 1, 1], abs=0.01)
    assert "500 is 1.011, 0 is 0.940" in printed  # far times lose their order
    assert float(re.search(r"largest difference (\S+)", printed)[1]) < 1e-12


# All scripts
@pytest.mark.parametrize("script", sorted(SCRIPT.parent.glob("0*.py")), ids=lambda path: path.stem)
def test_import_does_nothing(script, tmp_path, monkeypatch, capsys):
    """Not even at a prompt, where the cells run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--nonsense"])
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    before = plt.get_fignums()
    runpy.run_path(str(script), run_name="imported")
    assert not list(tmp_path.iterdir()) and not any(capsys.readouterr()) and plt.get_fignums() == before


@pytest.mark.parametrize("script", [lesson, importlib.import_module("02_attention")])
@pytest.mark.parametrize(
    "arguments, message",
    [
        *((["--out", path], "argument --out: must be a writable folder") for path in ("file", "file/in", "locked")),
        (["--out"], "argument --out: expected one argument"),
        *((line.split(), f"unrecognized arguments: {line}") for line in ("--o folder", "more")),
    ],
)
def test_typing_errors_are_named_before_anything_is_drawn(script, arguments, message, tmp_path, monkeypatch, capsys):
    if "locked" in arguments:  # root can write to any folder
        monkeypatch.setattr(tools.tempfile, "TemporaryFile", Mock(side_effect=PermissionError(13, "denied")))
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    monkeypatch.setattr(tools, "run_sections", lambda *_: pytest.fail("it began to draw"))
    monkeypatch.setattr(tools, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *arguments])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
