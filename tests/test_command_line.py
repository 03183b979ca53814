"""03 and 04 as their user runs them: in a subprocess, on the drawn garments, from another folder."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import idx

from data import load

ROOT = Path(__file__).parent.parent
TINY = ["--data", "garments", "--epochs", "0.02", "--batch-size", "8", "--steps", "3", "--n", "2", "--device", "cpu"]


def run(script, *arguments, folder=None, **environment):
    environment = {name: value for name, value in os.environ.items() if name != "FASHION_MNIST_DIR"} | environment
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def one_line(result):
    """The single line that a refused command prints."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which 04 has run."""
    out = tmp_path_factory.mktemp("cond")
    result = run("04_unet_cond.py", *TINY, "--out", out, folder=out)
    assert result.returncode == 0, result.stderr
    return out, result


def test_a_run_says_what_it_does_and_lists_what_it_wrote(trained):
    out, result = trained
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["data", "network", "device", "training"]
    assert "garments: 10,000 images" in lines[0]
    assert "25 steps of 8 images" in lines[3]
    assert "images/s" in result.stderr
    assert "loss=" in result.stderr
    written = [Path(line.removeprefix("wrote ")) for line in lines[4:]]
    names = ["checkpoint.pt", "denoising.png", "loss.png", "samples.npy", "samples.png"]
    assert sorted(path.name for path in written) == names
    assert sorted(path.name for path in out.iterdir()) == names


def test_the_weights_that_come_with_it_draw_at_once(tmp_path):
    """Without data or a checkpoint, and from a file that is small and harmless."""
    weights = ROOT / "data" / "pretrained" / "cond.pt"
    assert weights.stat().st_size < 6e6
    content = torch.load(weights, weights_only=True)
    assert {weight.dtype for weight in content["average"].values()} == {torch.float16}
    arguments = ["--pretrained", "--class", "Ankle boot", "--n", "3", "--device", "cpu", "--out", tmp_path]
    result = run("04_unet_cond.py", *arguments, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.npy", "samples.png"]
    boots = np.load(tmp_path / "samples.npy")
    assert boots.shape == (3, 1, 28, 28)
    drawn = load("garments", "test")
    means = np.stack([drawn.images[drawn.labels == label].mean(axis=0) for label in range(10)]).reshape(10, -1)
    for boot in boots.reshape(3, -1):  # more like a drawn sandal, sneaker or ankle boot than like any clothes
        alike = [np.corrcoef(boot, mean)[0, 1] for mean in means]
        assert max(alike[label] for label in (5, 7, 9)) > max(alike[label] for label in (0, 1, 2, 3, 4, 6, 8))
    for guidance, same in (("0.8", True), ("1.4", False)):  # what suits 24 epochs, and what suits 3
        assert run("04_unet_cond.py", *arguments, "--guidance", guidance).returncode == 0
        assert np.array_equal(np.load(tmp_path / "samples.npy"), boots) == same
    assert "leave out --restart" in one_line(run("04_unet_cond.py", *arguments, "--restart"))


def test_a_finished_run_only_samples_again(trained):
    out, _ = trained
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    images = np.load(out / "samples.npy")
    result = run("04_unet_cond.py", *TINY, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "finished" in result.stdout
    changed = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {"samples.npy", "samples.png", "denoising.png"}
    np.testing.assert_array_equal(np.load(out / "samples.npy"), images)


def test_a_class_is_drawn_by_name_and_by_number(trained):
    out, _ = trained
    sheets = []
    for name, n in (("Ankle boot", 4), ("9", 6)):
        result = run("04_unet_cond.py", "--sample-only", "--class", name, "--n", n, "--steps", 3, "--out", out)
        assert result.returncode == 0, result.stderr
        sheets.append(np.load(out / "samples.npy"))
    assert sheets[0].shape == (4, 1, 28, 28)
    assert sheets[0].dtype == np.float32
    assert np.abs(sheets[0]).max() <= 1
    np.testing.assert_allclose(sheets[1][:4], sheets[0], atol=0.1)  # more images change none (bfloat16 rounds, though)


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        (["--epochs", "0"], "above 0"),
        (["--epochs", "many"], "above 0"),
        (["--epochs", "nan"], "above 0"),
        (["--epochs", "inf"], "above 0"),
        (["--batch-size", "0"], "whole number from 1"),
        (["--batch-size", "2.5"], "whole number from 1"),
        (["--n", "-3"], "whole number from 1"),
        (["--steps", "0"], "whole number from 1"),
        (["--seed", "-1"], "whole number from 0"),
        (["--guidance", "much"], "a number"),
        (["--data", "cifar"], "fashion-mnist"),
        (["--preset", "huge"], "lecture"),
        (["--device", "abacus"], "cpu"),
        (["--class", "Hat", "--data", "garments"], "Ankle boot"),
        (["--no-such-option"], "unrecognized"),
        (["--out", __file__], "folder"),
        (["--data", "garments", "--data-dir", "."], "leave --data-dir out"),
        (["--data-dir", "/nonexistent"], "train-images-idx3-ubyte"),
        (["--sample-only"], "no checkpoint"),
    ],
)
def test_a_bad_value_is_one_line(arguments, accepted, tmp_path, monkeypatch, capfd):
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    script = str(ROOT / "04_unet_cond.py")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as stopped:  # in this process, because importing torch nineteen times takes a minute
        runpy.run_path(script, run_name="__main__")
    output, errors = capfd.readouterr()
    assert accepted in one_line(subprocess.CompletedProcess([], stopped.value.code, output, errors))
    assert list(tmp_path.iterdir()) == []


def test_show_draws_the_lesson_and_does_not_train(trained):
    out, _ = trained
    before = (out / "checkpoint.pt").stat().st_mtime_ns
    result = run("04_unet_cond.py", "--show", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "left out" not in result.stdout
    assert (out / "lesson" / "05_look.png").exists()
    assert (out / "checkpoint.pt").stat().st_mtime_ns == before
    shutil.rmtree(out / "lesson")


def test_another_run_in_the_same_folder_is_refused(trained):
    out, _ = trained
    before = (out / "checkpoint.pt").read_bytes()
    for options, complaint in (
        (["--epochs", "0.04"], "epochs 0.02 there, 0.04 here"),
        (["--seed", "7"], "seed 0 there, 7 here"),
        (["--epochs", "0.01", "--sample-only"], "epochs 0.02 there, 0.01 here"),
    ):
        line = one_line(run("04_unet_cond.py", *TINY, *options, "--out", out))
        assert complaint in line
        assert "--restart" in line
    line = one_line(run("03_unet_uncond.py", *TINY, "--out", out))
    assert "network CondUNet there, TimeUNet here" in line
    assert (out / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_one_line_and_can_be_replaced(trained, tmp_path):
    out, _ = trained
    whole = (out / "checkpoint.pt").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        assert "--restart replaces it" in one_line(run("04_unet_cond.py", *TINY, "--out", tmp_path))
    torch.save({"something": "else"}, tmp_path / "checkpoint.pt")
    assert "--restart replaces it" in one_line(run("04_unet_cond.py", "--sample-only", "--out", tmp_path))
    assert run("04_unet_cond.py", *TINY, "--restart", "--out", tmp_path).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_happened(number, tmp_path):
    options = [*TINY, "--epochs", "0.1", "--out", tmp_path]
    command = [sys.executable, ROOT / "03_unet_uncond.py", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("training"):
            break
    time.sleep(1.5)  # some of the 125 steps
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    stopped_at = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 0 < stopped_at < 125
    assert f"stopped after step {stopped_at} of 125" in output
    assert output.splitlines()[-1].startswith("python ")
    result = run("03_unet_uncond.py", *options)
    assert result.returncode == 0, result.stderr
    assert f"from step {stopped_at}" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "denoising.png",
        "loss.png",
        "samples.npy",
        "samples.png",
    ]
    losses = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["losses"]
    assert losses.shape == (125,)
    assert losses.isfinite().all()


def test_without_time(tmp_path):
    result = run("03_unet_uncond.py", "--no-time", *TINY, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "network   UNet," in result.stdout
    assert np.load(tmp_path / "samples.npy").shape == (2, 1, 28, 28)


def test_the_lecture_preset(tmp_path):
    result = run("04_unet_cond.py", *TINY, "--epochs", "0.001", "--preset", "lecture", "--n", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert np.load(tmp_path / "samples.npy").shape == (10, 1, 28, 28)  # drawn at 32 × 32, cropped


def write_symbols(folder, height, width):
    """A folder of IDX files with 40 training images, all noise, in 3 classes."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, height, width), np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx((np.arange(40) % 3).astype(np.uint8)))
    return folder


def test_images_of_another_size_and_classes_without_names(tmp_path):
    folder = write_symbols(tmp_path / "symbols", 18, 30)
    out = tmp_path / "out"
    result = run("04_unet_cond.py", *TINY[2:], "--epochs", "1", "--data-dir", folder, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "symbols: 40 images, 18 × 30, 3 classes" in result.stdout
    assert np.load(out / "samples.npy").shape == (6, 1, 18, 30)
    result = run("04_unet_cond.py", *TINY[2:], "--epochs", "1", "--class", "3", "--data-dir", folder, "--out", out)
    assert "must be one of 0, 1, 2" in one_line(result)


@pytest.mark.parametrize("preset", ["small", "lecture"])
def test_larger_images(tmp_path, preset):
    folder, out = write_symbols(tmp_path / "symbols", 64, 64), tmp_path / "out"
    options = [*TINY[2:], "--epochs", "0.1", "--batch-size", "2", "--n", "1", "--preset", preset]
    result = run("04_unet_cond.py", *options, "--data-dir", folder, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "symbols: 40 images, 64 × 64, 3 classes" in result.stdout
    assert "2 steps of 2 images" in result.stdout
    images = np.load(out / "samples.npy")
    assert images.shape == (3, 1, 64, 64)
    assert np.isfinite(images).all()


def test_the_real_files(tmp_path):
    folder = os.environ.get("FASHION_MNIST_DIR")
    if not folder:
        pytest.skip("FASHION_MNIST_DIR is not set")
    options = [*TINY[2:], "--epochs", "0.002", "--out", tmp_path]
    result = run("04_unet_cond.py", *options, FASHION_MNIST_DIR=folder)
    assert result.returncode == 0, result.stderr
    assert "Fashion-MNIST: 60,000 images, 28 × 28, 10 classes" in result.stdout
    assert np.load(tmp_path / "samples.npy").shape == (20, 1, 28, 28)


@pytest.mark.parametrize("script", ["01_time_embedding.py", "02_attention.py", "03_unet_uncond.py", "04_unet_cond.py"])
def test_help(script):
    result = run(script, "--help")
    assert result.returncode == 0
    assert "--out DIR" in result.stdout
