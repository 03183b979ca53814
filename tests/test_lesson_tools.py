"""lesson_tools: figures, files, options, devices, checkpoints, and a resumable run of a three-line training loop."""

import argparse
import copy
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import lesson_tools as tools

ROOT = Path(__file__).parent.parent


# Figures, files, options
def test_a_grid_reads_row_by_row_and_is_filled_with_background():
    images = torch.rand(5, 1, 4, 6)
    figure = tools.plot_grid("Five of six", images, columns=3, rows=["one", "two"], titles=["a", "b", "c"])
    (axes,) = figure.axes
    filled = torch.cat([images, torch.full((1, 1, 4, 6), -1.0)])[:, 0]
    expected = torch.cat([torch.cat(list(row), dim=1) for row in filled.split(3)])
    assert np.array_equal(axes.images[0].get_array(), expected) and axes.images[0].get_clim() == (-1, 1)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.get_xticks().tolist() == [2.5, 8.5, 14.5] and axes.get_yticks().tolist() == [1.5, 5.5]
    tools.plt.close(figure)


def test_the_second_line_of_a_title_is_smaller_and_covers_nothing():
    figure = tools.plot_grid("first\nsecond", torch.zeros(4, 1, 8, 8), 4, titles=["one\nname"] * 4)
    figure.canvas.draw()
    (axes,), (second,) = figure.axes, figure.axes[0].texts
    first, below = figure._suptitle, axes.get_tightbbox(for_layout_only=True)
    assert (first.get_text(), second.get_text()) == ("first\n", "second")
    assert second.get_fontsize() < first.get_fontsize()
    box = second.get_window_extent()
    assert below.y1 <= box.y0 and box.y1 <= first.get_window_extent().y1 - first.get_fontsize()
    tools.plt.close(figure)


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    tools.write_atomically(path, lambda file: file.write(b"old"))

    def interrupted(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tools.write_atomically(path, interrupted)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"file: can't be written \(full\)"):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        tools.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match=r"file/inside: can't be written \((File exists|Not a directory)\)"):
        tools.write_atomically(path / "inside", lambda file: file.write(b"new"))


def test_pictures_go_to_the_project_wherever_a_script_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "RUNS", tmp_path / "runs")
    parser = tools.make_parser("elsewhere/05_next.py", "Lesson 5: what is next.\n\nMore.")
    assert parser.description == "Lesson 5: what is next."
    assert parser.parse_args([]).out == tmp_path / "runs" / "05_next"
    assert list(tmp_path.iterdir()) == []  # the folder comes with the first file
    tools.write_atomically(tmp_path / "runs" / "05_next" / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "runs" / "05_next" / "file").read_bytes() == b"new"


@pytest.mark.parametrize("text", ["", "-1", "2000.5", "nan", "inf", "many", "9" * 400])
def test_a_number_out_of_range_is_named(text):
    for kind, called in ((int, "whole number"), (float, "number")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a {called} from 0 to 2,?000, got '"):
            tools.number(kind, 0, 2000)(text)
    assert tools.number(int, 0, 10)("7") == 7 and tools.number(float, 0, 10)("0.5") == 0.5


def test_a_section_that_warns_does_not_stop_the_lesson(tmp_path, capsys):
    """A warning adds a name to the globals of the script."""
    one = "# %% 1. One\ndef show_one():\n    import warnings\n    warnings.warn('careful')\n"
    code = one + "# %% 2. Two\ndef show_two():\n    print('two')\n"
    (tmp_path / "script.py").write_text(code)
    script = {"__file__": str(tmp_path / "script.py"), "__name__": "script"}
    exec(compile(code, tmp_path / "script.py", "exec"), script)
    with pytest.warns(UserWarning, match="careful"):
        tools.run_sections(script, tmp_path)
    assert capsys.readouterr().out.split("\n") == ["", "1. One", "", "2. Two", "two", ""]


# Devices and processes
@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, None),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, None),  # another manufacturer's
    ],
)
def test_bfloat16_is_for_processors_with_instructions_for_it(monkeypatch, instructions, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert tools.choose_precision(torch.device("cpu")) == expected
    assert tools.choose_precision(torch.device("mps")) is None


@pytest.mark.parametrize(("new", "expected"), [(False, None), (True, torch.bfloat16)])
def test_bfloat16_is_for_gpus_that_do_not_emulate_it(monkeypatch, new, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or new)
    assert tools.choose_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize("cuda", [False, True])
def test_auto_is_a_gpu_from_nvidia_or_the_cpu(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch, "ones", lambda n, device: torch.tensor([1.0]))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert tools.choose_device("auto").type == ("cuda" if cuda else "cpu")
    assert tools.choose_device("mps").type == "mps"  # if you ask for it
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(tools.UserError, match="use cuda or cpu" if cuda else "use cpu"):
        tools.choose_device("mps")


@pytest.mark.parametrize("too_old", ["the driver", "the GPU"])
def test_a_gpu_that_cannot_be_used_is_not_passed_over_in_silence(monkeypatch, capsys, too_old):
    def fail(n, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: too_old == "the GPU")
    monkeypatch.setattr(torch, "ones", fail)
    monkeypatch.setattr(tools.shutil, "which", lambda command: "/usr/bin/nvidia-smi")
    assert tools.choose_device("auto").type == "cpu"
    assert "can't use the NVIDIA GPU" in capsys.readouterr().out
    with pytest.raises(tools.UserError, match="--device cuda: not available here"):
        tools.choose_device("cuda")


def test_shares_make_up_the_batch(monkeypatch):
    batches, shares = [(7, torch.arange(12).view(6, 2), torch.arange(6))], []
    monkeypatch.setattr(tools, "PROCESSES", 3)
    for rank in range(3):
        monkeypatch.setattr(tools, "RANK", rank)
        ((step, *tensors),) = tools.take_share(batches)
        assert step == 7
        shares.append(tensors)
    for whole, parts in zip(batches[0][1:], zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_world_size_without_torchrun_does_no_harm():
    environment = os.environ | {"WORLD_SIZE": "4", "RANK": "3"}
    command = [sys.executable, "-c", "import lesson_tools; print(lesson_tools.PROCESSES, lesson_tools.RANK)"]
    assert subprocess.check_output(command, cwd=ROOT, env=environment, text=True) == "1 0\n"


# Checkpoints
class Settings(NamedTuple):
    steps: int = 12
    batch_size: int = 5
    title: str = "A line"
    pair: tuple = (28, "x")


def write_checkpoint(path, **parts):
    content = {"settings": Settings()._asdict(), "step": 11, "losses": torch.ones(3)}
    tools.save_checkpoint(path, content | {name: part.state_dict() for name, part in parts.items()})


def load(path, content):
    path.write_bytes(content)
    try:
        return tools.load_checkpoint(path, Settings)
    except tools.UserError as error:
        assert str(error).startswith(f"{path}: damaged")
        return None


def test_a_damaged_file_is_refused_or_harmless(tmp_path):
    path, layer = tmp_path / "c.pt", nn.Linear(3, 2)
    assert tools.load_checkpoint(path, Settings) is None
    write_checkpoint(path, ema=layer)
    good, whole = path.read_bytes(), tools.load_checkpoint(path, Settings)
    assert (whole["settings"], whole["step"]) == (Settings(), 11)
    torch.testing.assert_close(whole["ema"], layer.state_dict(), rtol=0, atol=0)
    random, found = np.random.default_rng(0), []
    for at in random.integers(0, len(good), 500).tolist():
        n = int(random.integers(1, 40))
        bit = bytes([good[at] ^ 1 << random.integers(8)])
        ways = [(bit, 1), (bytes(n), n), (random.bytes(n), n), (b"", n), (random.bytes(n), 0), (b"", len(good))]
        content, lost = ways[random.integers(len(ways))]  # flip a bit; zero, replace, lose, add bytes; cut the end
        found.append(load(path, good[:at] + content + good[at + lost :]))
    for read in filter(None, found):
        torch.testing.assert_close(read["ema"], whole["ema"], rtol=0, atol=0)
        assert (read["settings"], read["step"]) == (whole["settings"], whole["step"])
    assert found.count(None) > 300  # many bytes between the entries are never read
    folder = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as source, zipfile.ZipFile(folder, "w") as target:
        for entry in source.infolist():
            entry.external_attr = 0x10 * entry.filename.endswith("data/0")  # claims that the weights are a folder
            target.writestr(entry, source.read(entry))
    assert load(path, folder.getvalue()) is None


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, ("harm",)

    monkeypatch.chdir(tmp_path)
    good = {"settings": Settings()._asdict(), "step": 1}
    bad = [{name: value for name, value in good.items() if name != missing} for missing in good]
    bad += [good | {"settings": good["settings"] | {"colour": 1}}, good | {"settings": None}, [good]]
    for content in (good, *bad, good | {"more": Harmful()}):
        file = io.BytesIO()
        torch.save(content, file)
        assert (load(tmp_path / "c.pt", file.getvalue()) is None) == (content is not good)
    assert not (tmp_path / "harm").exists()


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "c.pt").mkdir()
    with pytest.raises(OSError, match=r"c\.pt"):  # `run_command` prints it in one line, without advice to start over
        tools.load_checkpoint(tmp_path / "c.pt", Settings)


def test_other_settings_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "c.pt"
    write_checkpoint(path)
    assert tools.load_checkpoint(path, Settings, **Settings()._asdict())["step"] == 11
    with pytest.raises(tools.UserError, match=r"steps 12, not 13, pair \(28, 'x'\), not None\);"):
        tools.load_checkpoint(path, Settings, steps=13, title="A line", pair=None)


def test_what_a_command_sets_in_the_environment_ends_with_it(monkeypatch):
    """`%run` and cells share one process."""
    monkeypatch.setenv("FASHION_MNIST_DIR", "before")

    def main():
        os.environ.update(FASHION_MNIST_DIR="during", LESSON_RUN="during")

    monkeypatch.delenv("LESSON_RUN", raising=False)
    tools.run_command(main)
    assert os.environ["FASHION_MNIST_DIR"] == "before" and "LESSON_RUN" not in os.environ


# A resumable run
def preview():
    return torch.zeros(2, 1, 4, 4), {"training": 0.5, "held out": 0.7}


@pytest.fixture
def fit(tmp_path, capfd, monkeypatch):
    """fit(act, factor, preview, **settings): run or resume a loop that calls act(step) before each step, and multiplies
    the loss by factor. Returns the exception that ended it, or None; what it printed; and the checkpoint."""
    path = tmp_path / "checkpoint.pt"
    monkeypatch.setattr(tools, "PREVIEW_AT", (1,))

    def fit(act=lambda step: None, factor=1.0, preview=preview, **settings):
        torch.manual_seed(0)
        line, settings = nn.Linear(1, 1), Settings(**settings)
        optimizer = torch.optim.SGD(line.parameters(), lr=0.1, momentum=0.9)

        def loop(first):
            for step in range(first, settings.steps):
                act(step)
                loss = factor * (line(torch.full((5, 1), step / 12)) - 3).square().mean()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
                yield step, loss.detach()

        checkpoint, ended = tools.load_checkpoint(path, Settings) or {"settings": settings, "step": 0}, None
        try:
            tools.run_resumable(loop, preview, {"line": line, "optimizer": optimizer}, path, checkpoint)
        except (SystemExit, KeyboardInterrupt, tools.UserError, OSError) as error:
            ended = error
        return ended, capfd.readouterr(), tools.load_checkpoint(path, Settings)

    fit.path = path
    return fit


def assert_same(one, other):
    assert torch.equal(one["losses"], other["losses"])
    assert all(torch.equal(weight, other["line"][name]) for name, weight in one["line"].items())


@pytest.fixture
def whole(fit):
    """The checkpoint of an uninterrupted run."""
    ended, said, checkpoint = fit()
    assert ended is None and checkpoint["step"] == 12
    assert checkpoint["losses"].isfinite().all() and len(checkpoint["losses"]) == 12
    assert "12 steps of 5 images" in said.out and f"wrote {fit.path}" in said.out
    assert "images/s" in said.err and f"loss={checkpoint['losses'].mean():.3f}" in said.err
    assert sorted(path.name for path in fit.path.parent.iterdir()) == ["checkpoint.pt", "loss.png", "progress.png"]
    for path in fit.path.parent.iterdir():
        path.unlink()
    return checkpoint


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_stopped_run_resumes_bit_for_bit(fit, whole, monkeypatch, at, number):
    monkeypatch.setattr(sys, "argv", ["05 next.py", "--restart", "--n", "3"])
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    before = signal.getsignal(number)
    ended, said, checkpoint = fit(lambda step: step == at and os.kill(os.getpid(), number))
    assert ended.code == 130 and checkpoint["step"] == at + 1
    assert said.out.endswith(f"stopped after step {at + 1} of 12. To resume:\npython '05 next.py' --n 3\n")
    assert signal.getsignal(number) is before
    ended, said, checkpoint = fit()
    assert ended is None and f"from step {at + 1}" in said.out
    assert_same(checkpoint, whole)


def test_the_first_ctrl_c_answers_at_once_and_the_second_stops_at_once(fit, capfd):
    answers = []

    def interrupt(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            answers.append(capfd.readouterr().err)
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    ended, _, checkpoint = fit(interrupt)
    assert "finishing this step, then saving" in answers[0]
    assert isinstance(ended, KeyboardInterrupt) and checkpoint is None
    assert signal.getsignal(signal.SIGINT) is before


KILLED = """
import os, signal, sys
from pathlib import Path

sys.path[:0] = {paths!r}
import lesson_tools, torch
from test_lesson_tools import Settings, nn, preview

lesson_tools.SAVE_EVERY, lesson_tools.PREVIEW_AT, path, replace = -1, (1,), Path({path!r}), Path.replace
line, written = nn.Linear(1, 1), []

def kill_in_the_fifth(part, target):  # the file is whole, but doesn't have its name yet
    written.append(part)
    if len(written) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(part, target)

def loop(first):
    for step in range(first, 12):
        with torch.no_grad():
            line.weight.fill_(step)
        yield step, torch.tensor(1.0)

Path.replace = kill_in_the_fifth
lesson_tools.run_resumable(loop, preview, {{"line": line}}, path, {{"settings": Settings(), "step": 0}})
"""


def test_kill_leaves_the_previous_checkpoint(tmp_path):
    """`kill -9`, here in the middle of the fifth save."""
    path = tmp_path / "checkpoint.pt"
    code = KILLED.format(paths=[str(ROOT), str(ROOT / "tests")], path=str(path))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL and "Traceback" not in result.stderr
    checkpoint = tools.load_checkpoint(path, Settings)
    assert checkpoint["step"] == 4 and checkpoint["line"]["weight"] == 3
    assert checkpoint["losses"].isfinite().sum() == 4


def test_ctrl_c_saves_even_if_nobody_reads_the_output(fit, monkeypatch):
    """In `python 04_unet_cond.py 2>&1 | tee log`, Ctrl-C ends tee first."""
    write, stopped = os.write, []

    class Bar(tools.tqdm):
        def update(self, n=1):
            if stopped:
                raise BrokenPipeError
            return super().update(n)

    def refuse(descriptor, text):
        if descriptor == 2:
            raise BrokenPipeError
        return write(descriptor, text)

    def interrupt(step):
        if step == 5:
            stopped.append(step)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tools, "tqdm", Bar)
    monkeypatch.setattr(os, "write", refuse)
    _, _, checkpoint = fit(interrupt)
    assert checkpoint["step"] == 6


@pytest.mark.parametrize("active", [True, False])
def test_the_resume_command_names_the_python_that_runs(fit, monkeypatch, active):
    """`.venv/bin/python 04_unet_cond.py` works without an activated environment."""
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if active else "/usr/bin/python")
    _, said, _ = fit(lambda step: step == 5 and os.kill(os.getpid(), signal.SIGINT))
    assert said.out.splitlines()[-1].startswith("python " if active else sys.executable)


def test_saves_come_when_due(fit, monkeypatch):
    saves = []
    monkeypatch.setattr(tools, "save_checkpoint", lambda path, content: saves.append(copy.deepcopy(content)))
    clock = iter(range(0, 10**6, 50))  # each look at the clock is fifty seconds later
    monkeypatch.setattr(tools.time, "monotonic", lambda: next(clock))
    fit()
    steps = [content["step"] for content in saves]
    assert steps[-1] == 12 and 4 <= len(steps) < 12
    for content in saves:
        assert content["losses"].isfinite().sum() == content["step"]


def test_a_process_that_saves_nothing_reads_the_numbers_as_rarely_as_the_first(fit, monkeypatch):
    read, reads = tools.read_numbers, []
    monkeypatch.setattr(tools, "read_numbers", lambda recent, step: reads.append(step) or read(recent, step))
    monkeypatch.setattr(tools, "SAVE_EVERY", -1)
    monkeypatch.setattr(tools, "RANK", 1)
    monkeypatch.setattr(tools.time, "monotonic", lambda: 0)
    fit()
    assert reads == [12]


def test_a_failed_save_is_tried_again_and_only_the_last_ends_the_run(fit, whole, monkeypatch):
    monkeypatch.setattr(tools, "SAVE_EVERY", -1)
    save, fails = tools.save_checkpoint, {3, 4}

    def flaky(path, content):
        if content["step"] in fails:
            raise OSError(f"{path}: can't be written (disk full)")
        save(path, content)

    monkeypatch.setattr(tools, "save_checkpoint", flaky)
    ended, said, checkpoint = fit()
    assert ended is None
    assert (said.out + said.err).count("can't be written (disk full); trying again in two minutes") == 2
    assert_same(checkpoint, whole)
    fit.path.unlink()
    fails |= {12}
    ended, _, checkpoint = fit()
    assert "disk full" in str(ended) and checkpoint["step"] == 11


PREVIEW_AT = tools.PREVIEW_AT  # `fit` leaves only the last one
MILESTONES = [10, *range(100, 1001, 100)], [1, 2, 4, 5, 6, 7, 8, 10, 11, 12], [1]


@pytest.mark.parametrize(("steps", "at"), [*zip((1000, 12, 1), MILESTONES, strict=True)])
def test_previews_come_after_a_hundredth_and_each_tenth(fit, monkeypatch, steps, at):
    drawn = []
    monkeypatch.setattr(tools, "PREVIEW_AT", PREVIEW_AT)
    monkeypatch.setattr(tools, "draw_progress", lambda _, seen, losses, __: drawn.append((seen.steps, len(losses))))
    _, _, checkpoint = fit(steps=steps, factor=0.0)
    assert [step for step, *_ in checkpoint["previews"]] == at
    assert drawn == list(zip(at, at, strict=True))  # the titles say what was seen so far


def test_a_run_that_is_stopped_between_previews_keeps_them(fit, monkeypatch):
    """The checkpoint has them as bytes; the pictures show all of them."""
    calls, rows = [], []

    def counted():
        calls.append(0.1 * len(calls))
        return torch.full((2, 1, 4, 4), calls[-1]), {"training": calls[-1]}

    plot = tools.plot_grid
    monkeypatch.setattr(tools, "PREVIEW_AT", (0.1, 0.5, 0.9, 1))
    monkeypatch.setattr(tools, "plot_grid", lambda *given: rows.append(len(given[3])) or plot(*given))
    ended, _, checkpoint = fit(
        lambda step: step == 46 and os.kill(os.getpid(), signal.SIGINT), preview=counted, steps=50
    )
    assert ended.code == 130 and checkpoint["step"] == 47
    assert [step for step, *_ in checkpoint["previews"]] == [5, 25, 45]
    ended, _, checkpoint = fit(preview=counted, steps=50)
    assert ended is None and rows == [1, 2, 3, 4]
    assert [losses for *_, losses in checkpoint["previews"]] == [{"training": value} for value in calls]
    for (_, images, _), value in zip(checkpoint["previews"], calls, strict=True):
        assert images.dtype == torch.uint8 and (images == round((value + 1) * 127.5)).all()


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("no such glyph"), MemoryError("no room")])
def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(fit, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(tools.plt.Figure, "savefig", fail)
    ended, said, checkpoint = fit()
    assert ended is None and checkpoint["step"] == 12
    assert f"progress.png: not written ({error})" in said.out
    assert not list(fit.path.parent.glob("*.p[!t]*"))  # neither a picture nor a part of one


def test_curves_that_cannot_be_drawn_do_not_end_the_run(fit, monkeypatch):
    monkeypatch.setattr(tools, "plot_losses", lambda *given: 1 / 0)
    ended, said, checkpoint = fit()
    assert ended is None and checkpoint["step"] == 12
    assert "loss.png: not written (division by zero)" in said.out


def test_held_out_images_may_be_missing_from_some_previews():
    """A resumed run may not find the test images any more."""
    measured = {"training images": 0.5, "held-out images": 0.75}, {"training images": 0.25}
    for given in (measured, measured[::-1]):
        previews = [(step, torch.zeros(1, 1, 2, 2), losses) for step, losses in zip((5, 9), given, strict=True)]
        axes = tools.plot_losses("the loss", np.ones(10), previews).axes[0]
        curves = {line.get_label(): line.get_ydata() for line in axes.lines}
        drawn = [losses.get("held-out images", np.nan) for losses in given]
        np.testing.assert_array_equal(curves["averaged weights, held-out images"], drawn)


@pytest.mark.parametrize(("seconds", "said"), [(10, False), (50, True)])
def test_a_run_of_more_than_an_hour_says_so_once(fit, monkeypatch, seconds, said):
    clock = iter(range(0, 10**9, seconds))  # later at each look; a step looks once or twice
    monkeypatch.setattr(tools.time, "monotonic", lambda: next(clock))
    _, output, _ = fit(steps=100)
    assert output.out.count("hours to go; to save time: --restart with a smaller --epochs") == said


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_stops_the_run(fit, factor):
    fit(lambda step: step == 4 and os.kill(os.getpid(), signal.SIGINT))
    before = fit.path.read_bytes()
    handler = signal.getsignal(signal.SIGINT)
    ended, _, _ = fit(factor=factor)
    assert isinstance(ended, tools.UserError) and "no longer finite by step 6: try" in str(ended)
    assert signal.getsignal(signal.SIGINT) is handler and fit.path.read_bytes() == before


def test_all_numbers_must_stay_finite_before_anything_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "SAVE_EVERY", -1)

    def loop(first):
        for step in range(first, 12):
            yield step, torch.tensor(1.0), torch.tensor(1.0 if step < 7 else torch.inf)

    with pytest.raises(tools.UserError, match="no longer finite by step 8"):
        tools.run_resumable(loop, preview, {}, tmp_path / "checkpoint.pt", {"settings": Settings(), "step": 0})
    assert tools.load_checkpoint(tmp_path / "checkpoint.pt", Settings)["step"] == 7


def test_parts_that_do_not_fit_are_refused(tmp_path):
    line, wide = nn.Linear(1, 1), nn.Linear(3, 1)
    adam = [torch.optim.Adam(layer.parameters()) for layer in (line, nn.Sequential(line, nn.Linear(1, 1)))]
    write_checkpoint(tmp_path / "c.pt", line=wide, adam=adam[0])
    checkpoint = tools.load_checkpoint(tmp_path / "c.pt", Settings)
    for state in ({"line": line}, {"adam": adam[1]}, {"other": line}, {"losses": line}):
        with pytest.raises(tools.UserError, match=r"c.pt: .*--restart"):
            tools.restore(tmp_path / "c.pt", checkpoint, state)
