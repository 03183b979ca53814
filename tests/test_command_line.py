"""03 and 04 as their users run them: in this process with tiny networks, or in a separate one if that matters."""

import functools
import importlib
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_01_time_embedding import DEVICES, section_titles
from test_data import idx, write_pictures

import lesson_tools as tools
from data import Dataset, fashion_mnist, garments, load

ROOT = Path(__file__).parent.parent
TINY = ["--data", "garments", "--epochs", "0.012", "--batch-size", "10", "--steps", "2", "--n", "2", "--device", "cpu"]
QUICK = {"widths": (8, 16), "groups": 4, "head_dim": 8, "max_lr": 2e-3}  # instead of the preset's
FILES = ["checkpoint.pt", "denoising.png", "loss.png", "progress.png", "samples.npy", "samples.png"]
draw_once = functools.cache(garments.draw)


@pytest.fixture
def run_untouched(monkeypatch, capsys):
    """run_untouched(lesson, arguments, status=0) -> output, errors: run its main in this process. It has to end with
    that status (None: 0 or 2); if it is 2, the last line of the errors begins with the script's name."""
    for name in ("FASHION_MNIST_DIR", "LESSON_RUN"):  # --show sets them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(garments, "draw", draw_once)

    def run(lesson, *arguments, status=0):
        monkeypatch.setattr(sys, "argv", [lesson.__file__, *map(str, arguments)])
        ended = 0
        try:
            tools.run_command(lesson.main)
        except SystemExit as stopped:
            ended = stopped.code or 0
        output, errors = capsys.readouterr()
        assert ended in ((0, 2) if status is None else (status,)), errors
        assert ended != 2 or errors.splitlines()[-1].startswith(f"{Path(lesson.__file__).name}: ")
        return output, errors

    return run


@pytest.fixture
def nothing_loaded(lesson4):
    """The sections cache data and network; here they load them again, and leave nothing cached for other tests."""
    cached = tools.load_data, lesson4.load_demo_model
    for load_once in cached:
        load_once.cache_clear()
    yield
    for load_once in cached:
        load_once.cache_clear()


@pytest.fixture
def run(lesson3, run_untouched, monkeypatch):
    """`run_untouched` with a quick network, in float32, and with a single preview, at the end."""
    quick = lesson3.PRESETS["small"]._replace(**QUICK)
    monkeypatch.setitem(lesson3.PRESETS, "small", quick)
    monkeypatch.setitem(lesson3.PRESETS, "lecture", quick._replace(patch=1, widths=(8, 16, 16, 16)))
    monkeypatch.setattr(tools, "choose_precision", lambda device: None)
    monkeypatch.setattr(tools, "PREVIEW_AT", (1,))
    monkeypatch.setattr(lesson3, "PREVIEW_IMAGES", 10)
    return run_untouched


def squares(folder, seen):
    """Options like `TINY`, for training on that many images, from 90 small pictures in the folder. (A new process would
    spend seconds on drawing garments.)"""
    return [*TINY[4:], "--epochs", str(seen / 90), "--data-dir", str(write_pictures(folder / "squares"))]


def read(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same(one, other):
    """Two finished runs ended with the same weights and losses, bit for bit."""
    assert torch.equal(one["losses"], other["losses"])
    assert one["ema"].keys() == other["ema"].keys()
    assert all(torch.equal(weight, other["ema"][name]) for name, weight in one["ema"].items())


def interrupt_at(lesson3, monkeypatch, at, number=signal.SIGINT):
    """From now on, this process gets Ctrl-C, or another signal, as the step `at` begins."""
    draw_batches = lesson3.draw_batches

    def draw(*arguments):
        for batch in draw_batches(*arguments):
            if batch[0] == at:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(lesson3, "draw_batches", draw)


# A run from its beginning to its end
def test_two_runs_at_once_from_another_folder(lesson3, tmp_path):
    """Run as scripts, with the real preset, from outside the project's folder; neither disturbs the other. The later
    one may find that the earlier one has finished."""
    command = [sys.executable, ROOT / "04_unet_cond.py", *squares(tmp_path, 20), "--out", "out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for output, _ in said:
        assert "data      squares: 90 images of class 0 (9), class 1 (9), " in output
        assert "network   squares, CondUNet, small, 20 images seen, 2 of 2 steps\n" in output
    output, errors = next(one for one in said if "2 steps of 10 images" in one[0])
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[:6]] == ["data", "note", "network", "device", "watch", "training"]
    assert "will see only 20 images, so expect noisy samples; for 180,000, use --epochs 2000" in lines[1]
    assert Path(lines[4].split()[1]).name == "progress.png"
    assert "images/s" in errors
    assert "loss=" in errors
    wrote = [line for line in lines if line.startswith("wrote ")]
    assert sorted(Path(line.removeprefix("wrote ")).name for line in wrote) == [FILES[0], FILES[1], *FILES[4:]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    assert tools.load_checkpoint(tmp_path / "out" / "checkpoint.pt", lesson3.RunSettings)["step"] == 2
    images = np.load(tmp_path / "out" / "samples.npy")
    assert images.shape == (20, 1, 28, 28)
    assert images.dtype == np.float32
    assert np.abs(images).max() <= 1


def test_a_run_gets_labels_and_sometimes_none(lesson3, lesson4, run, tmp_path, monkeypatch):
    labels, loss = [], lesson3.denoising_loss
    monkeypatch.setattr(lesson3, "preview", lambda *_: (torch.zeros(1, 1, 28, 28), {"none": 1.0}))
    monkeypatch.setattr(lesson3, "denoising_loss", lambda *parts: labels.append(parts[4]) or loss(*parts))
    run(lesson4, *TINY, "--n", "1", "--out", tmp_path)
    counts = torch.cat(labels).bincount(minlength=11)
    assert (len(counts), counts.sum()) == (11, 12 * 10)
    assert 0.02 < counts[10] / counts.sum() < 0.25
    assert counts[:10].count_nonzero() > 5


def test_an_unusable_gpu_is_mentioned_once(lesson4, run, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.shutil, "which", lambda command: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output, _ = run(lesson4, *squares(tmp_path, 10), "--device", "auto", "--out", tmp_path / "out")
    assert output.count("can't use the NVIDIA GPU") == 1


def test_a_finished_run_only_samples_again(lesson3, lesson4, run, tmp_path):
    options = [*TINY, "--out", tmp_path]
    run(lesson4, *options)
    before, images = (tmp_path / "checkpoint.pt").read_bytes(), np.load(tmp_path / "samples.npy")
    output, _ = run(lesson4, *options)
    assert "finished in an earlier run" in output
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), images)

    sheets = []
    for name, n in (("Ankle boot", 4), ("9", 6)):  # asking for more changes none of the first
        run(lesson4, "--sample-only", "--class", name, "--n", n, "--steps", 2, "--out", tmp_path)
        sheets.append(np.load(tmp_path / "samples.npy"))
    assert sheets[0].shape == (4, 1, 28, 28)
    np.testing.assert_allclose(sheets[1][:4], sheets[0], atol=1e-3)
    np.testing.assert_allclose(sheets[0][:2], images[-2:], atol=1e-3)
    run(lesson4, "--sample-only", "--seed", 1, "--batch-size", 64, *TINY[-6:], "--out", tmp_path)
    assert np.abs(np.load(tmp_path / "samples.npy") - images).max() > 0.1

    for lesson, asked, complaint in (
        (lesson4, [*TINY, "--epochs", "0.04"], "steps 12, not 40"),
        (lesson4, [*TINY, "--seed", "7"], "seed 0, not 7"),
        (lesson4, [*TINY, "--preset", "lecture"], "preset small, not lecture"),
        (lesson3, TINY, "network CondUNet, not TimeUNet"),
    ):
        _, errors = run(lesson, *asked, "--out", tmp_path, status=2)
        (line,) = errors.splitlines()
        assert complaint in line
        assert "--restart" in line
        assert (tmp_path / "checkpoint.pt").read_bytes() == before
    losses = read(tmp_path)["losses"]
    run(lesson4, *TINY, "--seed", "7", "--restart", "--out", tmp_path)
    assert not torch.equal(read(tmp_path)["losses"], losses)


def test_show_draws_the_lesson_and_does_not_train(lesson4, nothing_loaded, run, tmp_path):
    """On images that are not square, of classes without names, with the network that was trained on them."""
    folder, out = write_symbols(tmp_path / "symbols", 18, 30), tmp_path / "out"
    options = [*TINY[2:], "--epochs", "1", "--data-dir", folder, "--out", out]
    output, _ = run(lesson4, *options)
    assert "symbols: 40 images of 0 (14), 1 (13), 2 (13)\n" in output
    assert "CondUNet, small, for 18 × 30: " in output
    assert np.load(out / "samples.npy").shape == (6, 1, 18, 30)
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    output, _ = run(lesson4, "--show", "--out", out)
    assert "symbols, CondUNet, small, 40 images seen, 4 of 4 steps" in output
    assert re.findall(r"^(\d+\. .+)$", output, re.M) == section_titles(lesson4)
    assert [path.name[:2] for path in sorted((out / "lesson").iterdir())] == [f"0{i}" for i in range(2, 8)]
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before
    _, errors = run(lesson4, *options, "--class", "3", status=2)
    assert "must be one of 0, 1, 2" in errors


def test_show_of_lesson_3_on_few_pictures(lesson3, nothing_loaded, run, tmp_path, monkeypatch):
    def shortly(train, *arguments):  # two steps, their losses repeated to make a curve
        trained, losses = train(*arguments, steps=2)
        return trained, 50 * losses

    for name in ("train_skips", "train_small"):
        monkeypatch.setattr(lesson3, name, functools.partial(shortly, getattr(lesson3, name)))
    levels = lesson3.noise_levels
    monkeypatch.setattr(lesson3, "noise_levels", lambda steps=lesson3.STEPS: levels(min(steps, 20)))
    folder = write_pictures(tmp_path / "squares", 3, 20)  # six of them are held out
    output, _ = run(lesson3, "--show", "--data-dir", folder, "--out", tmp_path)
    assert tools.load_images("train", 1)[1] == "squares"
    drawn = ["01_order", "05_skips", "06_noise", "07_preconditioning", "10_sampling", "11_few_steps", "13_muon"]
    pictures = sorted((tmp_path / "lesson").iterdir())
    assert [path.stem for path in pictures] == [*drawn, "14_training"]
    assert re.findall(r"^wrote (.+)$", output, re.M) == [str(path) for path in pictures]


@pytest.mark.parametrize("options", [["--no-time"], ["--preset", "lecture"]])
def test_without_time_and_the_other_preset(lesson3, run, tmp_path, options):
    output, _ = run(lesson3, *TINY, *options, "--epochs", "0.002", "--out", tmp_path)
    assert ("network   UntimedUNet," if options == ["--no-time"] else "lecture, for 28 × 28") in output
    assert np.load(tmp_path / "samples.npy").shape == (2, 1, 28, 28)  # the lecture's at 32 × 32, cropped


def write_symbols(folder, height, width):
    """A folder of IDX files with 40 training images, all noise, in 3 classes."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, height, width), np.uint8)
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx((np.arange(40) % 3).astype(np.uint8)))
    return folder


NAMES = ["Cheap $5 to $10", "$5_^$", "\\frac", "100 %", "_a_", "{0}", "été", "<b>&", "名前", "two\nlines", 30 * "long "]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_any_name_can_be_drawn(lesson4, nothing_loaded, run, tmp_path):
    """Names of classes and data sets are drawn literally: nothing in them becomes mathematics or markup."""
    folder = write_pictures(tmp_path / "$a$ {set}", len(NAMES), 1)
    for label, name in enumerate(NAMES):
        (folder / f"class {label}").rename(folder / name)
    output, _ = run(lesson4, *TINY[2:], "--epochs", "1", "--data-dir", folder, "--out", tmp_path)
    assert "not written" not in output and sorted(path.name for path in tmp_path.glob("*.*")) == FILES
    run(lesson4, "--sample-only", "--class", NAMES[0], *TINY[-6:], "--out", tmp_path)
    assert "wrote" in run(lesson4, "--show", "--out", tmp_path)[0]
    assert len(list((tmp_path / "lesson").iterdir())) == 6


def test_a_finished_run_notices_that_its_images_have_changed(lesson4, nothing_loaded, run, tmp_path):
    folder = write_pictures(tmp_path / "squares", 2, 3)
    options = [*TINY[2:], "--epochs", "4", "--data-dir", folder, "--out", tmp_path]
    run(lesson4, *options)
    assert "finished in an earlier run" in run(lesson4, *options)[0]
    (folder / "class 0" / "00.png").unlink()
    assert "images 5, not 4" in run(lesson4, *options, status=2)[1]
    (folder / "class 1" / "02.png").rename(folder / "class 0" / "03.png")
    write_pictures(folder, 1, 1)
    assert "counts (2, 3), not (3, 2)" in run(lesson4, *options, status=2)[1]


def test_a_finished_run_refuses_other_data_of_the_same_name(lesson4, nothing_loaded, run, tmp_path):
    """As with torchvision's MNIST/raw and KMNIST/raw, both called raw."""
    options = [*TINY[2:], "--epochs", "1", "--out", tmp_path / "out"]
    for set_name, height in (("MNIST", 18), ("KMNIST", 20)):
        (tmp_path / set_name).mkdir()
        write_symbols(tmp_path / set_name / "raw", height, 30)
    run(lesson4, *options, "--data-dir", tmp_path / "MNIST" / "raw")
    assert "finished" in run(lesson4, *options, "--data-dir", tmp_path / "MNIST" / "raw")[0]
    assert (
        "size (18, 30), not (20, 30)" in run(lesson4, *options, "--data-dir", tmp_path / "KMNIST" / "raw", status=2)[1]
    )


def test_many_samples_are_kept_and_some_are_drawn(lesson3, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tools, "plot_grid", lambda *given: drawn.append(given))
    monkeypatch.setattr(tools, "save_picture", lambda path, plot, *arguments: plot(*arguments))
    monkeypatch.setattr(lesson3, "plot_denoising", lambda *given: None)
    images = torch.arange(3000.0).view(-1, 1, 1, 1)
    numbers = [str(i) for i in range(1000)]
    for rows, columns in (([], 10), (["a", "b", "c"], 1000), (numbers[:300], 10), (["a"], 3000), (numbers, 3)):
        lesson3.save_samples(tmp_path, "some", (images, []), rows, columns)
        assert np.load(tmp_path / "samples.npy").shape == (3000, 1, 1, 1)
        title, shown, kept, named = drawn[-1]
        assert named == rows[:400]
        assert title == f"some\n{len(shown):,} of 3,000" and 250 <= len(shown) <= 400 and len(shown) % kept == 0
        each = shown.view(-1, kept) - torch.arange(kept)  # the first of each row
        assert (each == torch.arange(len(each))[:, None] * (columns if rows else kept)).all()
    lesson3.save_samples(tmp_path, "some", (images[:30], []), ["a", "b", "c"], 10)
    assert drawn[-1][0] == "some" and len(drawn[-1][1]) == 30


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to", "DefaultCPUAllocator: can't allocate memory: you"])
def test_too_little_memory_is_reported_in_one_line(lesson4, run, tmp_path, monkeypatch, lesson3, message):
    for error in (RuntimeError(message), MemoryError()):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(lesson3, "denoising_loss", fail)
        _, errors = run(lesson4, *TINY, "--out", tmp_path, status=2)
        assert errors.splitlines()[-1] == (
            "04_unet_cond.py: out of memory; try a smaller --batch-size or, when sampling, a smaller --n"
        )
    monkeypatch.setattr(lesson3, "denoising_loss", lambda *_: torch.zeros(2) @ torch.zeros(3))  # another RuntimeError
    with pytest.raises(RuntimeError, match="size"):
        run(lesson4, *TINY, "--out", tmp_path)


def test_where_a_script_is_run_changes_nothing(tmp_path):
    """Neither a matplotlibrc, nor the backend of a notebook that starts it, nor a terminal that lacks characters."""
    (tmp_path / "matplotlibrc").write_text("image.origin: lower\nsavefig.format: svg\nbackend: tkagg\n")
    surroundings = {"MATPLOTLIBRC": tmp_path / "matplotlibrc", "PYTHONIOENCODING": "cp1251"}
    surroundings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # made unusable by the next line
    (tmp_path / "matplotlib_inline.py").write_text("")
    command = [sys.executable, ROOT / "04_unet_cond.py", *squares(tmp_path, 10), "--class", "class 0"]
    pictures = []
    for name, more in (("plain", {}), ("strange", surroundings | {"PYTHONPATH": tmp_path})):
        environment = os.environ | {key: str(value) for key, value in more.items()}
        result = subprocess.run([*command, "--out", tmp_path / name], env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        pictures.append(np.asarray(Image.open(tmp_path / name / "samples.png")))
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == FILES
    assert b"for 28 ? 28: " in result.stdout
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize(("n_classes", "each"), [(10, 10), (1, 1)])
def test_your_own_pictures(lesson4, run, tmp_path, n_classes, each):
    folder = write_pictures(tmp_path / "squares", n_classes, each)
    options = ["--epochs", 20 / (n_classes * each), "--data-dir", folder, "--out", tmp_path / "out"]
    output, _ = run(lesson4, *TINY[2:], *options, "--class", "class 0")
    assert f"squares: {max(1, n_classes * (each - 1))} images of class 0 ({max(1, each - 1)})" in output
    assert np.load(tmp_path / "out" / "samples.npy").shape == (2, 1, 28, 28)


def test_images_that_are_all_one_grey_are_refused(lesson4, run, tmp_path):
    path = tmp_path / "grey" / "one class" / "0.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((28, 28), 128, np.uint8)).save(path)
    _, errors = run(lesson4, *TINY[2:], "--data-dir", tmp_path / "grey", "--out", tmp_path / "out", status=2)
    assert "grey: all images are the same grey" in errors.splitlines()[-1]


def test_the_shipped_weights_sample_at_once(lesson4, run_untouched, tmp_path):
    """Without data or a checkpoint, and from a file that is small and harmless."""
    weights = ROOT / "data" / "pretrained" / "cond.pt"
    assert weights.stat().st_size < 6e6
    assert {weight.dtype for weight in torch.load(weights, weights_only=True)["ema"].values()} == {torch.float16}
    arguments = ["--pretrained", "--class", "Ankle boot", "--n", "3", "--device", "cpu", "--out", tmp_path]
    run_untouched(lesson4, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["denoising.png", "samples.npy", "samples.png"]
    boots = np.load(tmp_path / "samples.npy")
    assert boots.shape == (3, 1, 28, 28)
    drawn = load("garments", "test")
    means = np.stack([drawn.images[drawn.labels == label].mean(axis=0) for label in range(10)]).reshape(10, -1)
    for boot in boots.reshape(3, -1):  # more like a sandal, sneaker or ankle boot than like anything else
        alike = [np.corrcoef(boot, mean)[0, 1] for mean in means]
        assert max(alike[label] for label in (5, 7, 9)) > max(alike[label] for label in (0, 1, 2, 3, 4, 6, 8))


def test_pretrained_has_its_own_folder_and_guidance(lesson3, lesson4, run, tmp_path, monkeypatch):
    def refuse(options, path, *rest):
        raise tools.UserError(f"from {path} to {options.out}")

    monkeypatch.setattr(tools, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(lesson3, "train_or_load", refuse)
    folder = tmp_path / "runs" / "pretrained"
    assert f"from {lesson4.PRETRAINED} to {folder}" in run(lesson4, "--pretrained", status=2)[1]
    assert not list(tmp_path.iterdir())
    assert f"to {tmp_path}\n" in run(lesson4, "--pretrained", "--out", tmp_path, status=2)[1]
    many, few = (lesson4.choose_guidance(epochs * 60_000) for epochs in (24, 3))
    assert many == lesson4.GUIDANCE_LONG < lesson4.GUIDANCE == few


@pytest.mark.parametrize(("name", "images"), [("small", 180_000), ("lecture", 1_500_000)])
def test_a_preset_sees_as_many_images_whatever_the_data(lesson3, monkeypatch, name, images, tmp_path):
    """With Fashion-MNIST's 60,000 images, that is the same as --epochs 3 for `small`, 25 for `lecture`."""
    assert lesson3.PRESETS[name].images_seen == images
    parser, _ = tools.make_run_parser("03.py", "", lesson3.PRESETS)
    for n, arguments in ((40, []), (10_000, []), (60_000, []), (60_000, ["--epochs", str(images / 60_000)])):
        pixels = np.arange(4 * n).astype(np.uint8).reshape(n, 2, 2)
        found = Dataset(pixels, np.zeros(n, np.int64), ("a",), "b")
        monkeypatch.setattr(tools, "load_data", lambda *_: found)  # noqa: B023
        options = parser.parse_args([*arguments, "--preset", name, "--out", str(tmp_path)])
        _, settings, *_ = lesson3.new_run(options, tmp_path / "checkpoint.pt", lesson3.make_network)
        assert settings.steps == round(images / lesson3.PRESETS[name].batch_size)


# An interrupted run resumes as if nothing had happened
@pytest.mark.parametrize(("at", "number", "times"), [(3, signal.SIGTERM, 2), (11, signal.SIGINT, 1)])
def test_ctrl_c_saves_at_any_step_and_the_run_goes_on(lesson3, lesson4, run, tmp_path, monkeypatch, at, number, times):
    """Also if SIGTERM comes twice: `timeout`, for one, sends it to the process, and to its group."""
    whole, parts, before = tmp_path / "whole", tmp_path / "parts", signal.getsignal(signal.SIGINT)
    run(lesson4, *TINY, "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(tools.shutil, "which", lambda name: sys.executable)
        for _ in range(times):
            interrupt_at(lesson3, patch, at, number)
        output, _ = run(lesson4, *TINY, "--restart", "--out", parts, status=130)
    assert f"stopped after step {at + 1} of 12" in output
    assert output.splitlines()[-1].startswith("python ")
    assert "--restart" not in output.splitlines()[-1]
    left = ["checkpoint.pt", *["loss.png", "progress.png"] * (at == 11)]
    assert sorted(path.name for path in parts.iterdir()) == left
    assert signal.getsignal(signal.SIGINT) is before
    output, _ = run(lesson4, "--sample-only", *TINY[-6:], "--out", parts)
    assert f", {10 * (at + 1)} images seen, {at + 1} of 12 steps\n" in output
    output, _ = run(lesson4, *TINY, "--out", parts)
    assert ("finished" if at == 11 else f"from step {at + 1}") in output
    assert_same(read(parts), read(whole))
    assert sorted(path.name for path in parts.iterdir()) == FILES
    np.testing.assert_array_equal(np.load(parts / "samples.npy"), np.load(whole / "samples.npy"))


def test_previews_change_nothing_and_come_back(lesson3, lesson4, run, tmp_path, monkeypatch):
    """Weights, losses and the previews themselves stay the same, even if a run is interrupted between two previews."""
    whole, parts, without = (tmp_path / name for name in ("whole", "parts", "without"))
    run(lesson4, *TINY, "--out", without)
    monkeypatch.setattr(lesson3, "STEPS", 2)
    monkeypatch.setattr(tools, "PREVIEW_AT", (0.01, 0.4, 0.8, 1))
    monkeypatch.setattr(tools, "draw_progress", lambda *given: None)
    run(lesson4, *TINY, "--out", whole)
    with monkeypatch.context() as patch:
        interrupt_at(lesson3, patch, 6)
        run(lesson4, *TINY, "--out", parts, status=130)
    run(lesson4, *TINY, "--out", parts)
    assert_same(read(whole), read(without))
    assert_same(read(parts), read(without))
    previews = read(whole)["previews"]
    assert [step for step, *_ in previews] == [1, 5, 10, 12]
    for (*found, images, losses), (*expected, same, equal) in zip(read(parts)["previews"], previews, strict=True):
        assert found == expected and losses == equal and torch.equal(images, same)
        assert images.shape == (10, 1, 28, 28) and images.dtype == torch.uint8
        assert list(losses) == ["training images", "held-out images"] and np.isfinite([*losses.values()]).all()
    # the last preview shows the final samples; its losses are the averaged network's, with no label dropped
    expected = ((np.load(whole / "samples.npy")[::2] + 1) * 127.5).round()
    assert np.abs(images.numpy() - expected).max() <= 1
    denoiser, _ = lesson3.load_denoiser(whole / "checkpoint.pt", lesson4.make_network, torch.device("cpu"))
    drawn = load("garments", "test")
    pixels, labels = torch.from_numpy(drawn.images)[:, None], torch.from_numpy(drawn.labels)
    ((_, *batch),) = lesson3.draw_batches(pixels, labels, 10, 1, range(1))
    assert losses["held-out images"] == pytest.approx(float(lesson3.denoising_loss(denoiser, *batch).mean()), rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_every_device_goes_on_and_samples_as_the_cpu_does(lesson3, lesson4, run, tmp_path, monkeypatch, device):
    """In float32, as `run` sets it."""
    options, whole, parts = [*TINY, "--device", device, "--out"], tmp_path / "whole", tmp_path / "parts"
    output, _ = run(lesson4, *options, whole)
    assert f"device    1 × {device}, float32" in output
    with monkeypatch.context() as patch:
        interrupt_at(lesson3, patch, 3)
        run(lesson4, *options, parts, status=130)
    assert "from step 4" in run(lesson4, *options, parts)[0]
    torch.testing.assert_close(read(parts)["losses"], read(whole)["losses"], rtol=1e-3, atol=0)
    images = np.load(parts / "samples.npy")
    run(lesson4, "--sample-only", *TINY[-6:], "--out", parts)
    np.testing.assert_allclose(np.load(parts / "samples.npy"), images, atol=0.01)  # a GPU rounds more (TF32)


def test_a_second_ctrl_c_stops_at_once(lesson3, lesson4, run, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        interrupt_at(lesson3, monkeypatch, 3)
    _, errors = run(lesson4, *TINY, "--out", tmp_path, status=130)
    assert errors.splitlines()[-1] == "04_unet_cond.py: interrupted"
    assert signal.getsignal(signal.SIGINT) is handler
    assert not list(tmp_path.iterdir())


KILLED = f"""
import importlib, os, signal, sys

lesson3, tools = (importlib.import_module(name) for name in ("03_unet_uncond", "lesson_tools"))
lesson3.PRESETS["small"] = lesson3.PRESETS["small"]._replace(**{QUICK})
tools.choose_precision, tools.SAVE_EVERY, tools.PREVIEW_AT = lambda device: None, -1, (1,)
lesson3.PREVIEW_IMAGES, draw_batches = 10, lesson3.draw_batches

def draw(*arguments):
    for batch in draw_batches(*arguments):
        if batch[0] == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

lesson3.draw_batches, sys.argv[0] = draw, lesson3.__file__
tools.run_command(lesson3.main)
"""  # 03 in float32 with a quick network; it saves after each step


def test_a_process_that_is_killed_and_resumed(lesson3, run, tmp_path):
    """`kill -9` leaves the last checkpoint; the final weights are those of an uninterrupted run."""
    whole, parts, options = tmp_path / "whole", tmp_path / "parts", squares(tmp_path, 120)
    run(lesson3, *options, "--out", whole)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", *options, "--out", parts]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL and "Traceback" not in result.stderr
    assert [path.name for path in parts.iterdir()] == ["checkpoint.pt"]
    output, _ = run(lesson3, *options, "--out", parts)
    assert "from step 7" in output
    assert_same(read(parts), read(whole))


def test_a_loss_that_is_not_finite_stops_the_run(lesson3, lesson4, run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(lesson3, patch, 4)
        run(lesson4, *TINY, "--out", tmp_path, status=130)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    denoising_loss, handler = lesson3.denoising_loss, signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(lesson3, "denoising_loss", lambda *batch: denoising_loss(*batch) * torch.inf)
    _, errors = run(lesson4, *TINY, "--out", tmp_path, status=2)
    assert "no longer finite by step 6: try" in errors.splitlines()[-1]
    assert signal.getsignal(signal.SIGINT) is handler
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("room", "named", "left"),
    [(20_000, "checkpoint.pt", FILES[:1]), (10**6, "samples.npy", ["checkpoint.pt", "loss.png", "progress.png"])],
)
def test_a_full_disk_leaves_what_was_there(lesson3, lesson4, run, tmp_path, monkeypatch, room, named, left):
    with monkeypatch.context() as patch:
        interrupt_at(lesson3, patch, 4)
        run(lesson4, *TINY, "--out", tmp_path, status=130)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))  # for each file written
    try:
        _, errors = run(lesson4, *TINY, "--out", tmp_path, "--n", "40", status=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert errors.splitlines()[-1].endswith(f"{tmp_path / named}: can't be written (File too large)")
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    assert ((tmp_path / "checkpoint.pt").read_bytes() == before) == (named == "checkpoint.pt")
    run(lesson4, *TINY, "--out", tmp_path)


# Bad options
@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        (["--epochs", "0"], "must be a number from 1e-09"),
        (["--epochs", "nan"], "must be a number from"),
        (["--epochs", "1e7"], "must be a number from 1e-09 to 1e+06"),
        (["--batch-size", "0"], "must be a whole number from 1 to"),
        (["--steps", "0"], "must be a whole number from 1"),
        (["--seed", "-1"], "must be a whole number from 0"),
        (["--seed", str(2**70)], "must be a whole number from 0 to"),
        (["--guidance", "much"], "must be a number from 0 to 100, got 'much'"),
        (["--sample-only", "--epochs", "3"], "--epochs and --preset are for training"),
        (["--pretrained", "--preset", "small"], "--epochs and --preset are for training"),
        (["--show", "--data", "garments"], "--show takes neither --data nor --device"),
        (["--show", "--device", "cpu"], "--show takes neither --data nor --device"),
        (["--guidance", "-1"], "must be a number from 0"),
        (["--data", "cifar"], "fashion-mnist"),
        (["--preset", "huge"], "lecture"),
        (["--device", "abacus"], "cpu"),
        (["--class", "Hat", "--data", "garments"], "Ankle boot"),
        (["--rest"], "unrecognized"),
        (["--out", __file__], "must be a writable folder"),
        (["--out", ""], "must be a writable folder (its name is empty)"),
        (["--out", "/proc/self/fd/nothing/x"], "must be a writable folder"),
        (["--out", "~nobody-here/x"], "~nobody-here/x: Could not determine home directory"),
        (["--data-dir", "~nobody-here/x"], "~nobody-here/x: Could not determine home directory"),
        (
            ["--data-dir", str(ROOT / "tests"), "--out", str(ROOT / "tests")],
            f"--out must not lie in {ROOT / 'tests'}",
        ),
        (["--data", "garments", "--data-dir", "."], "leave --data-dir out"),
        (["--data-dir", "/nonexistent"], "/nonexistent: no such folder"),
        (["--data-dir", __file__], "a file, not a folder"),
        (["--data-dir", ""], "--data-dir is empty"),
        (["--data-dir", "", "--show"], "--data-dir is empty"),
        (["--sample-only"], "no checkpoint to sample from"),
        (["--sample-only", "--restart"], "not allowed with"),
        (["--pretrained", "--restart"], "not allowed with"),
    ],
)
def test_a_bad_value_is_reported_in_one_line(lesson4, run, arguments, accepted, tmp_path):
    _, errors = run(lesson4, *([] if "--out" in arguments else ["--out", tmp_path]), *arguments, status=2)
    assert accepted in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", [False, True])
def test_a_refused_folder_leaves_nothing_among_the_images(lesson4, run, tmp_path, monkeypatch, variable):
    *arguments, _, folder = squares(tmp_path, 10)
    if variable:
        monkeypatch.setenv("FASHION_MNIST_DIR", folder)
    else:
        arguments += ["--data-dir", folder]
    before = sorted(Path(folder).rglob("*"))
    _, errors = run(lesson4, *arguments, "--out", f"{folder}/run/first", status=2)
    assert f"--out must not lie in {folder}" in errors
    assert sorted(Path(folder).rglob("*")) == before


def test_idx_files_may_have_the_output_beside_them(lesson4, run, tmp_path, monkeypatch):
    """A picture there becomes no training data."""
    folder = write_symbols(tmp_path / "symbols", 18, 30)
    monkeypatch.setenv("FASHION_MNIST_DIR", str(folder))
    for _ in range(2):
        output, _ = run(lesson4, *TINY[2:], "--restart", "--out", folder / "run")
        assert "symbols: 40 images of 0 (14), 1 (13), 2 (13)\n" in output


def test_lesson_2_says_in_one_line_that_the_data_is_not_there(nothing_loaded, run_untouched, monkeypatch, tmp_path):
    lesson2 = importlib.import_module("02_attention")
    monkeypatch.setenv("FASHION_MNIST_DIR", "/nonexistent")
    _, errors = run_untouched(lesson2, "--out", tmp_path, status=2)
    assert "/nonexistent: no such folder" in errors


WORDS = st.sampled_from(["", "0", "-1", "3", "nan", "1e9", "9" * 30, "½", "x y", "--", "./", "Ankle boot"])
WORDS |= st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))  # no control characters, no line breaks


GOOD = {"--data": "auto|garments|fashion-mnist", "--data-dir": "symbols|squares|.", "--preset": "small|lecture"}
GOOD |= {"--batch-size": "2|7|50", "--seed": f"0|1|{2**63}", "--device": "auto|cpu|cuda|mps", "--n": "1|3"}
GOOD |= {"--steps": "1|2", "--class": "Bag|2|class 1", "--guidance": "0|0.5|100", "--out": "one|other|symbols"}
OPTIONS = [  # two of three values are good
    st.tuples(st.just(name), st.sampled_from(good.split("|")) | st.sampled_from(good.split("|")) | WORDS)
    for name, good in GOOD.items()
]
# other numbers of epochs could be slow
OPTIONS += [st.tuples(st.just("--epochs"), st.sampled_from(["1e-9", "0.0003", "0", "-1", "nan", "1e9", "many", ""]))]
OPTIONS += [st.tuples(st.sampled_from(["--restart", "--sample-only", "--pretrained", "--no-time"])), st.tuples(WORDS)]
COMMAND_LINE = st.lists(st.one_of(OPTIONS), max_size=4).map(lambda each: [word for option in each for word in option])
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(derandomize=True, database=None, deadline=None, suppress_health_check=QUIET, max_examples=25)
@given(lines=st.lists(st.tuples(st.integers(0, 1), COMMAND_LINE), min_size=1, max_size=2))
def test_any_command_line_is_run_or_refused(lesson3, lesson4, run, tmp_path_factory, monkeypatch, lines):
    """So is a second one, in the folder that the first one wrote to."""
    folder = tmp_path_factory.mktemp("any")
    monkeypatch.chdir(folder)
    write_symbols(folder / "symbols", 18, 30)
    write_pictures(folder / "squares", 3, 2)
    monkeypatch.setattr(fashion_mnist, "CACHES", (folder / "cache",))
    monkeypatch.setattr(fashion_mnist, "HOSTS", ())
    brief = ["--epochs", "0.0003", "--batch-size", "10", "--steps", "1", "--n", "1", "--out", "one"]
    for which, arguments in lines:
        lesson = (lesson3, lesson4)[which]
        run(lesson, *brief, *arguments, status=None)
    assert not list(folder.glob("**/*.part"))


@pytest.mark.parametrize("script", sorted(ROOT.glob("0*.py")), ids=lambda script: script.name)
def test_each_script_is_a_command_and_its_help_says_what_there_is(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(script), run_name="__main__")
    assert exit.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--out DIR" in said
    defaults = {"03_unet_uncond.py": 100, "04_unet_cond.py": 10}
    if script.name in defaults:
        assert f"in lesson 4, per class (default: {defaults[script.name]})" in said
