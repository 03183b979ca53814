"""Lesson 1 against reference_numpy and diffusers; its pictures, its command line, and the claims it prints."""

import importlib
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D

from reference_numpy import embedding as reference

matplotlib.use("Agg")
lesson = importlib.import_module("01_time_embedding")
timestep_embedding = lesson.timestep_embedding
SCRIPT = Path(lesson.__file__)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.mps.is_available() else [])]


def random_cases(n, min_dim=2):
    """Times of any size and sign (float64), dims odd and even, periods from 1 to a million."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        times = rng.choice([-1, 1], 40) * 10 ** rng.uniform(-4, rng.uniform(-3, 6), 40)
        yield torch.from_numpy(times), int(rng.integers(min_dim, 130)), float(10 ** rng.uniform(0, 6))


# The embedding against the references


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-7)])
def test_equals_numpy(device, dtype, tolerance):
    if device == "mps" and dtype == torch.float64:
        pytest.skip("MPS has no float64")
    for times, dim, max_period in random_cases(400):
        times = times.to(dtype)
        ours = timestep_embedding(times.to(device), dim, max_period)
        assert ours.dtype == dtype and ours.shape == (40, dim) and ours.device.type == device
        expected = reference.timestep_embedding(times.double().numpy(), dim, max_period)
        error = np.abs(ours.double().cpu().numpy() - expected) / times.abs().clamp(min=1).double().numpy()[:, None]
        assert error.max() <= tolerance


def test_equals_diffusers():
    """diffusers always computes in float32."""
    for times, dim, max_period in random_cases(400, min_dim=4):
        times = times.float()
        theirs = get_timestep_embedding(times, dim, False, 1, max_period=max_period)
        error = (timestep_embedding(times, dim, max_period) - theirs).abs() / times.abs().clamp(min=1)[:, None]
        assert error.max() <= 2e-7


def test_step_by_step_is_the_same():
    for times, dim, max_period in random_cases(50):
        dim -= dim % 2
        exponents, angles, embedding = lesson.embed_in_steps(times.float(), dim, max_period)
        assert exponents.shape == (dim // 2,) and angles.shape == (40, dim // 2)
        assert torch.equal(embedding, timestep_embedding(times.float(), dim, max_period))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_the_result(dtype):
    times = torch.tensor([0, 0.1, 1, 3.14, -17, 370, 999, 1000.5, 6e4]).to(dtype)  # the last ones would be lost in half
    ours = timestep_embedding(times, 64)
    assert ours.dtype == dtype
    assert torch.equal(ours, timestep_embedding(times.float(), 64).to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_give_float32(dtype):
    times = torch.tensor([0, 1, 100, -100]).to(dtype)  # in the unsigned types the last is another number
    torch.set_default_dtype(torch.float64)
    try:
        ours = timestep_embedding(times, 17)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, timestep_embedding(times.float(), 17))


def test_small_dims_and_odd_dims():
    times = torch.tensor([-2.5, 0, 0.3, 40])
    assert torch.equal(timestep_embedding(times, 2), torch.stack([times.sin(), times.cos()], dim=1))
    for dim in (3, 5, 33):
        odd = timestep_embedding(times, dim)
        assert torch.equal(odd[:, :-1], timestep_embedding(times, dim - 1))
        assert torch.equal(odd[:, -1], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int64])
def test_no_times(dtype):
    ours = timestep_embedding(torch.empty(0, dtype=dtype), 7)
    assert ours.shape == (0, 7)
    assert ours.dtype == (dtype if dtype.is_floating_point else torch.float32)


@pytest.mark.parametrize(
    "times, dim, max_period, told",
    [
        (torch.tensor(3.0), 16, 10_000, r"\(\)"),
        (torch.zeros(4, 1), 16, 10_000, r"\(4, 1\)"),
        (torch.zeros(0, 16), 16, 10_000, r"\(0, 16\)"),
        (torch.zeros(4, dtype=torch.complex64), 16, 10_000, "complex64"),
        *((torch.zeros(4), dim, 10_000, f"{dim} and") for dim in (1, 0, -2)),
        *((torch.zeros(4), 16, period, f"and {period}$") for period in (0.99, 0, -10, math.inf, math.nan)),
    ],
)
def test_bad_arguments_are_named(times, dim, max_period, told):
    with pytest.raises(ValueError, match=told):
        timestep_embedding(times, dim, max_period)


def test_each_time_stands_alone():
    times = torch.tensor([3.0, math.nan, -50.0, math.inf, 1e6])
    together = timestep_embedding(times, 12)
    for time, row in zip(times, together, strict=True):
        assert torch.equal(row.isnan(), torch.full((12,), not time.isfinite()))
        torch.testing.assert_close(timestep_embedding(time[None], 12)[0], row, equal_nan=True)
    torch.testing.assert_close(timestep_embedding(times[::2], 12), together[::2])  # not contiguous
    torch.testing.assert_close(timestep_embedding(times[:1].expand(3), 12), together[:1].expand(3, 12))


def test_has_the_right_gradient():
    times = torch.tensor([-3.0, 0.2, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: timestep_embedding(t, 9, 50), times)


# What the sections claim


def test_distances():
    rows = torch.tensor([[1.0, 1.0], [4.0, 5.0], [7.0, 9.0]])
    torch.testing.assert_close(lesson.distances(rows, origin=1), torch.tensor([0.5, 0.0, 0.5]))


@pytest.mark.parametrize("name", lesson.RANGES)
def test_columns_that_stand_still(name):
    low, high = lesson.RANGES[name].double().numpy()
    expected = reference.timestep_embedding(np.linspace(low, high, 20_001), 64)
    count = (np.ptp(expected, axis=0) < 0.02).sum()
    assert lesson.count_still(timestep_embedding(torch.linspace(low, high, 2001), 64)) == count


@pytest.mark.parametrize("name", lesson.RANGES)
def test_directions_hold_99_percent(name):
    low, high = lesson.RANGES[name].double().numpy()
    columns = reference.timestep_embedding(np.linspace(low, high, 2001), 64)
    variances = np.sort(np.linalg.eigvalsh(np.cov(columns.T)))[::-1]
    held = np.cumsum(variances) / variances.sum()
    n = lesson.count_directions(torch.from_numpy(columns))
    assert held[n - 1] >= 0.99 and (n == 1 or held[n - 2] < 0.99)


def test_ranges():
    low, high = lesson.RANGES["lesson 3, 1000 ln(sigma) / 4"].tolist()
    assert low == pytest.approx(1000 * math.log(0.01) / 4) and high == pytest.approx(1000 * math.log(80) / 4)
    assert (high - low) / 20 > 2 * math.pi  # section 3 says: between two of 20 steps the fastest hand goes round
    low, high = lesson.RANGES["notebook 26, sigma in 95 % of training"].tolist()
    sigma = np.exp(np.random.default_rng(0).normal(-1.2, 1.2, 100_000))
    assert ((low < sigma) & (sigma < high)).mean() == pytest.approx(0.95, abs=0.003)  # 4 standard errors


def test_count_directions():
    waves = timestep_embedding(torch.linspace(0, 2 * math.pi, 1001)[:-1], 2)  # a sine and a cosine, uncorrelated
    assert lesson.count_directions(waves) == 2
    assert lesson.count_directions(torch.cat([waves, -3 * waves[:, :1], waves.sum(dim=1, keepdim=True)], dim=1)) == 2
    assert lesson.count_directions(waves[:, :1] * torch.tensor([1.0, 5.0, -2.0])) == 1


def test_a_small_max_period_tells_far_from_near_no_more():
    def expected(max_period):
        embedding = reference.timestep_embedding(np.arange(601), 64, max_period)
        distance = np.linalg.norm(embedding - embedding[0], axis=1)
        return np.mean([distance[d] for d in range(10, 101)]) / np.mean([distance[d] for d in range(400, 601)])

    for max_period in (10, 1000, 10_000):
        assert lesson.near_to_far(max_period) == pytest.approx(expected(max_period), abs=1e-5)
    assert abs(lesson.near_to_far(10) - 1) < 0.05
    assert max(lesson.near_to_far(1000), lesson.near_to_far(10_000)) < 0.9


def test_batch_norm_stretches_but_leaves_two_directions():
    """Section 3 says: on a short range the columns are a line and a parabola, and the norm can't change that."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    columns = timestep_embedding(t, 64)
    slow = torch.cat([columns[:, 14:32], columns[:, 46:]], dim=1)  # the hands slower than 1 / 60
    lines = torch.stack([torch.ones_like(t), t, t**2], dim=1)
    normed = (slow - slow.mean(dim=0)) / slow.std(dim=0)
    left = normed - lines @ torch.linalg.lstsq(lines, normed).solution
    assert left.abs().max() < 1e-4


@pytest.mark.parametrize("dim", [2, 6, 64])
def test_dot_product_depends_on_distance_only(dim):
    for times, _, max_period in random_cases(30):
        times = times[times.abs() < 1e4]
        embedding = timestep_embedding(times, dim, max_period)
        moved = timestep_embedding(times + 123.456, dim, max_period)
        torch.testing.assert_close(embedding @ embedding.T, moved @ moved.T, rtol=0, atol=1e-12 * 1e4 * dim)
        torch.testing.assert_close((embedding**2).sum(dim=1), torch.full_like(times, dim / 2))


@pytest.mark.parametrize("shift", [0, 3, -7, 0.25, 1000])
def test_a_shift_is_a_rotation(shift):
    for times, dim, max_period in random_cases(50):
        dim += dim % 2
        matrix = lesson.rotation(shift, dim, max_period)
        assert matrix.dtype == torch.float64
        np.testing.assert_allclose(matrix, reference.rotation(shift, dim, max_period), rtol=0, atol=1e-12 * 1000)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))
        times = times[times.abs() < 1e4]
        turned = timestep_embedding(times, dim, max_period) @ matrix.T
        expected = timestep_embedding(times + shift, dim, max_period)
        torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12 * 1e4)


def test_no_rotation_for_an_odd_dim():
    with pytest.raises(ValueError, match="even dim, got 7"):
        lesson.rotation(3, 7)


@pytest.mark.parametrize("channels, dim, groups", [(8, 16, 1), (12, 7, 4), (6, 2, 6)])
def test_block_equals_diffusers(channels, dim, groups):
    torch.manual_seed(0)
    ours = lesson.TimeBlock(channels, dim, groups).double()
    theirs = ResnetBlock2D(
        in_channels=channels, temb_channels=dim, groups=groups, eps=1e-5, time_embedding_norm="scale_shift"
    ).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict({k.replace("scale_shift", "time_emb_proj"): v for k, v in ours.state_dict().items()})
    x, embedding = torch.randn(3, channels, 5, 9).double(), torch.randn(3, dim).double()
    torch.testing.assert_close(ours(x, embedding), theirs(x, embedding), rtol=1e-12, atol=1e-12)


def test_block_without_news_from_the_clock():
    torch.manual_seed(0)
    block = lesson.TimeBlock(4, 16)
    x, embedding = torch.randn(2, 4, 6, 6), timestep_embedding(torch.tensor([1.0, 500.0]), 16)
    assert not torch.equal(block(x, embedding), block(x, embedding.flip(0)))
    torch.nn.init.zeros_(block.scale_shift.weight)
    assert torch.equal(block(x, embedding), block(x, embedding.flip(0)))


# The denoisers of section 6


def reference_ideal(x, sigma):
    return reference.ideal_denoiser(x, sigma, lesson.PEAKS.numpy(), lesson.SHARES.numpy(), lesson.PEAK_WIDTH)


def test_ideal_denoiser_equals_numpy():
    rng = np.random.default_rng(0)
    x, sigma = rng.normal(0, 3, 200), np.exp(rng.normal(0, 1, 200))
    ours = lesson.ideal_denoiser(torch.from_numpy(x), torch.from_numpy(sigma))
    expected = [reference_ideal(*pair) for pair in zip(x, sigma, strict=True)]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_ideal_denoiser_far_out():
    """Where the density of a peak is too small for a float, the other one counts; without noise, nothing is changed."""
    x = torch.tensor([-200.0, 200.0, 0.93], dtype=torch.float64)
    ours = lesson.ideal_denoiser(x, torch.tensor([0.1, 0.1, 1e-9], dtype=torch.float64))
    torch.testing.assert_close(ours, torch.tensor([-100.5, 100.5, 0.93], dtype=torch.float64))


def test_ideal_blind_denoiser_averages_over_levels():
    z = np.linspace(-7, 7, 4001)
    sigmas = np.exp(-1.2 + 1.2 * z)
    for x in (-30, -1.3, -0.2, 0.0, 0.5, 1.0, 4.0):
        peaks, shares = lesson.PEAKS.numpy(), lesson.SHARES.numpy()
        variance = lesson.PEAK_WIDTH**2 + sigmas[:, None] ** 2
        density = (shares * np.exp(-((x - peaks) ** 2) / (2 * variance)) / np.sqrt(variance)).sum(axis=1)
        weights = np.exp(-(z**2) / 2) * density
        expected = weights @ [reference_ideal(x, sigma) for sigma in sigmas] / weights.sum()
        ours = lesson.ideal_blind_denoiser(torch.tensor(x, dtype=torch.float64))
        assert float(ours) == pytest.approx(expected, abs=1e-4)  # the lesson's levels end at 5 standard deviations


@pytest.mark.parametrize(
    "denoise",
    [
        lesson.ideal_denoiser,
        lesson.ideal_blind_denoiser,
        lambda x, sigma: x / (1 + sigma**2),
        lambda x, sigma: torch.zeros_like(x * sigma),
    ],
)
def test_expected_loss_equals_the_mean_of_many_draws(denoise):
    torch.manual_seed(0)
    clean, noisy, sigma = (tensor.double() for tensor in lesson.draw_pixels(20_000))
    errors = (denoise(noisy, sigma) - clean) ** 2
    standard_error = float(errors.std()) / math.sqrt(len(errors))
    assert abs(float(errors.mean()) - lesson.expected_loss(denoise)) < 4 * standard_error


def test_expected_loss_of_a_known_case():
    """Always answering 0 loses the clean pixels' mean square, exactly."""
    loss = lesson.expected_loss(lambda x, sigma: torch.zeros_like(x * sigma))
    assert loss == pytest.approx(1 + lesson.PEAK_WIDTH**2, abs=1e-5)


def test_drawn_pixels():
    torch.manual_seed(0)
    n = 100_000
    clean, noisy, sigma = lesson.draw_pixels(n)
    assert all(tensor.shape == (n,) and tensor.dtype == torch.float32 for tensor in (clean, noisy, sigma))
    assert float((clean > 0).float().mean()) == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / n))
    assert float(clean.abs().mean()) == pytest.approx(1, abs=4 * lesson.PEAK_WIDTH / math.sqrt(n))
    standard = torch.stack([(noisy - clean) / sigma, (sigma.log() + 1.2) / 1.2])
    assert standard.mean(dim=1).abs().max() < 4 / math.sqrt(n)
    assert (standard.std(dim=1) - 1).abs().max() < 4 / math.sqrt(2 * n)
    assert abs(float((standard[0] * standard[1]).mean())) < 4 / math.sqrt(n)


def test_only_the_clock_differs():
    running, stopped = lesson.train(clock_runs=True, steps=0), lesson.train(clock_runs=False, steps=0)
    for ours, theirs in zip(running.parameters(), stopped.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x, sigma = torch.linspace(-2, 2, 5), torch.tensor([[0.1], [1.0]])
    with torch.no_grad():
        assert running(x, sigma).shape == (2, 5)
        torch.testing.assert_close(*stopped(x, sigma))
        assert not torch.allclose(*running(x, sigma), atol=0.01)
        torch.testing.assert_close(running(x, torch.ones(1)), stopped(x, torch.ones(1)))  # ln(1) is 0: the same time


# The script as its user runs it


PICTURES = ["1_why", "2_steps", "3_max_period", "4_geometry", "5_block", "6_denoisers"]


def table(printed):
    """The numbers at the end of what the script prints, by name."""
    lines = printed.strip().rpartition("\n\n")[2].splitlines()
    return dict(re.fullmatch(r"(.+?) {2,}(\S+)", line).groups() for line in lines)


@pytest.fixture(scope="module")
def script_run(tmp_path_factory):
    """The script run with one command, from another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, str(SCRIPT), "--out", "pictures/of lesson 1"]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return folder / "pictures/of lesson 1", done.stdout


def test_script_draws_every_picture(script_run):
    out, printed = script_run
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in PICTURES]
    for name in PICTURES:
        assert str(Path("pictures/of lesson 1") / f"{name}.png") in printed
        height, width = matplotlib.image.imread(out / f"{name}.png").shape[:2]
        assert 800 <= width <= 1200 and height <= width


def test_script_prints_what_is_so(script_run):
    numbers = table(script_run[1])
    found = {name.partition(": ")[2] or name: value for name, value in numbers.items()}
    assert found["as one number"] == "0.010"
    t = np.array([370, 380, 0, 1000])
    one, other, first, last = reference.timestep_embedding(t, 64)
    ratio = np.linalg.norm(one - other) / np.linalg.norm(first - last)
    assert found["in 64 columns"] == f"{ratio:.3f}"
    assert numbers["step by step or by timestep_embedding, largest difference"] == "0"
    for name, value in numbers.items():
        if "rotation" in name or "dot product" in name:
            assert float(value) < 1e-12
    losses = {name.removeprefix("loss, "): float(value) for name, value in numbers.items() if name.startswith("loss")}
    best, running, stopped, best_stopped = losses.values()
    assert best <= running < best_stopped <= stopped
    assert running - best < 0.05 * (best_stopped - best)  # the clock closes nearly all of the gap,
    assert stopped - best_stopped < 0.05 * (best_stopped - best)  # and without it nothing more could be had


def test_cells_run_one_by_one_and_find_the_same(script_run, tmp_path, monkeypatch, capsys):
    """As an editor runs them: one namespace, no __file__, a command line that isn't ours, the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cells = re.split(r"^(?=# %%)", SCRIPT.read_text(), flags=re.MULTILINE)
    assert len(cells) > 7
    namespace = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), namespace)
    out = tmp_path / "runs" / "01_time_embedding"
    assert sorted(path.name for path in out.iterdir()) == [f"{name}.png" for name in PICTURES]
    assert table(capsys.readouterr().out) == table(script_run[1])


def test_import_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--nonsense"])
    assert "numbers" not in runpy.run_path(str(SCRIPT), run_name="imported")
    assert not list(tmp_path.iterdir()) and not any(capsys.readouterr())


# The parser and the pictures that all scripts share


def test_parser_has_its_folder_beside_the_script(monkeypatch, tmp_path):
    monkeypatch.setattr(lesson, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["an_editor", "--not-ours"])
    assert lesson.Parser("05_next.py", None).parse_args().out == tmp_path / "runs" / "05_next"
    elsewhere = tmp_path / "else" / "06_more.py"
    assert lesson.Parser(str(elsewhere), "More.").parse_args().out == tmp_path / "else" / "runs" / "06_more"
    assert (tmp_path / "runs" / "05_next").is_dir()


def test_parser_takes_its_own_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [f"some/where/{SCRIPT.name}", "--out", str(tmp_path / "a" / "b")])
    assert lesson.Parser(str(SCRIPT), lesson.__doc__).parse_args().out == tmp_path / "a" / "b"
    link = tmp_path / "lesson.py"
    link.symlink_to(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(link), "--out", str(tmp_path / "c")])
    assert lesson.Parser(str(link), lesson.__doc__).parse_args().out == tmp_path / "c"


@pytest.mark.parametrize(
    "arguments", [["--out"], ["--nonsense"], ["--out", "file"], ["--out", "file/folder"], ["more"]]
)
def test_typing_errors_are_one_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        lesson.Parser(str(SCRIPT), lesson.__doc__).parse_args(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(lesson.tempfile, "TemporaryFile", refuse)
    with pytest.raises(SystemExit) as stopped:
        lesson.Parser(str(SCRIPT), lesson.__doc__).parse_args(["--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert re.fullmatch(r".*--out must be a folder .*Permission denied.*\n", capsys.readouterr().err)


def test_pictures_are_closed_and_shown_only_where_somebody_looks(tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(lesson.plt, "show", lambda: shown.append(lesson.plt.get_fignums()))
    before = lesson.plt.get_fignums()
    for interactive in (False, True):
        monkeypatch.setattr(lesson.plt, "isinteractive", lambda interactive=interactive: interactive)
        figure, _ = lesson.plt.subplots()
        lesson.save_picture(figure, tmp_path / f"{interactive}.png")
        assert (tmp_path / f"{interactive}.png").stat().st_size > 0
        assert lesson.plt.get_fignums() == before
        assert len(shown) == interactive
    assert capsys.readouterr().out.count("wrote") == 2
