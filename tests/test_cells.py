"""Every section of the four scripts runs cell by cell in IPython, shows its picture under its cell, and prints true
claims. The subprocesses run this file too: it shortens the slow parts, and changes nothing else."""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEW = {  # synthetic garments, and no attempt to download Fashion-MNIST
    "import lesson_tools as tools\n": """import lesson_tools as tools
tools.data.fashion_mnist.HOSTS = ()
tools.data.garments.SPLITS.update(train=500, test=100)
"""
}
SHORTER = {
    "01_time_embedding.py": {},
    "02_attention.py": FEW | {"SIDES = (8, 16, 32, 64)": "SIDES = (2, 4)", "steps=200": "steps=2"},
    "03_unet_uncond.py": FEW
    | {
        "max_lr, steps=600": "max_lr, steps=2",
        "noise_levels(400)": "noise_levels(40)",
        "images, steps=100": "images, steps=2",
        "range(100), curves": "range(2), curves",
        "index in range(100)": "index in range(4)",
    },
    "04_unet_cond.py": {"noise_levels()": "noise_levels(2)"},
}


def run_cells(script):
    """For each cell of a script, run in IPython: its title, what it prints, whether it draws, and how many pictures are
    open afterwards."""
    import matplotlib
    import matplotlib.pyplot as plt
    from IPython.core.interactiveshell import InteractiveShell

    matplotlib.use("agg")
    shell = InteractiveShell.instance()
    text = (ROOT / script).read_text()
    for before, after in SHORTER[script].items():
        assert before in text, before
        text = text.replace(before, after)
    for cell in re.split(r"^(?=# %%)", text, flags=re.MULTILINE):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            shell.run_cell(cell).raise_error()
        draws = any(f"    return {drawn}" in cell for drawn in ("figure\n", "tools.plot_", "plot_denoising"))
        yield cell.partition("\n")[0], printed.getvalue(), draws, len(plt.get_fignums())
        plt.close("all")


def run_magic(*arguments):
    """`%run` with these arguments, as a user of IPython, Jupyter or Spyder types it."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.instance().run_line_magic("run", shlex.join(arguments))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Arguments for a process that runs this file in an empty folder, without data or a trained network."""
    folder = tmp_path_factory.mktemp("cells")
    variables = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder), "OMP_NUM_THREADS": "1", "LESSON_RUN": str(folder)}
    kept = {name: value for name, value in os.environ.items() if name != "FASHION_MNIST_DIR"}
    return {"cwd": folder, "env": kept | variables, "stdout": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def cells(environment):
    """The output of `run_cells` for each script."""
    processes = [subprocess.Popen([sys.executable, __file__, script], **environment) for script in SHORTER]
    cells = {}
    for script, process in zip(SHORTER, processes, strict=True):
        output, _ = process.communicate()
        assert process.returncode == 0, output
        cells[script] = json.loads(output.splitlines()[-1])
    assert not [path for path in environment["cwd"].iterdir() if path.suffix in (".png", ".pt")]  # nothing was trained
    return cells


def test_run_in_ipython_trains_like_the_command(environment, tmp_path):
    from test_command_line import squares

    options = [*squares(environment["cwd"], 20), "--out", str(tmp_path)]
    command = [sys.executable, __file__, "%run", str(ROOT / "04_unet_cond.py"), *options]
    result = subprocess.run(command, **environment)
    assert result.returncode == 0
    assert "2 steps of 10 images" in result.stdout and "1. Attention" not in result.stdout  # no section ran
    written = ["checkpoint.pt", "denoising.png", "loss.png", "progress.png", "samples.npy", "samples.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written


@pytest.mark.parametrize(("script", "sections"), [*zip(SHORTER, (6, 16, 14, 7), strict=True)])
def test_every_cell_runs_in_order_and_shows_its_picture(cells, script, sections):
    numbers = [re.match(r"# %% (\d+)", title) for title, *_ in cells[script]]
    assert [int(number[1]) for number in numbers if number] == list(range(1, sections + 1))
    for number, (title, printed, draws, pictures) in zip(numbers, cells[script], strict=True):
        assert pictures == (draws if number else 0), title
        assert (printed != "") >= (number is not None and not draws), title


def test_what_lesson_3_prints_is_true(cells):
    printed = "".join(output for _, output, *_ in cells["03_unet_uncond.py"])
    by_batch, by_group = re.findall(r"first one's activations by (\d+)%", printed)
    assert int(by_batch) > 10 and by_group == "0"
    assert re.search(r"SavedConv -> Saved -> Conv2d -> .*: runs Saved.forward, saves \(2, 4, 6, 6\)\n .*True", printed)
    assert re.search(r"WrongOrder -> Conv2d -> .* saves nothing\n .*True", printed)
    assert "by hand and by sample_dpm: largest difference 0\n" in printed
    losses = re.search(r"loss of a new network +(.*)", printed)[1].split()
    expected = [1, float(re.search(r"1 \+ \(mean / sigma_data\)² (\S+)", printed)[1])]
    assert [float(losses[0]), float(losses[-1])] == pytest.approx(expected, abs=0.02)
    assert re.search(r"saved\(conv\): saves \(2, 4, 6, 6\)\n .*original's output: True", printed)
    assert float(re.search(r"DDIM's in sigma: largest difference (\S+)", printed)[1]) < 1e-11
    steps = re.findall(r"^ +(?:0\.010|0\.047) .*? (\d+) ", printed, re.M)
    assert steps == ["0", "10"]  # as 01 says
    ddim, dpm = (re.search(rf"{method} +(.*)  of 100", printed)[1].split() for method in ("DDIM", r"DPM-Solver\+\+"))
    assert all(float(a) > float(b) for a, b in zip(ddim[2:], dpm[2:], strict=True))


def test_what_lesson_4_prints_is_true(cells):
    printed = "".join(output for _, output, *_ in cells["04_unet_cond.py"])
    (away,) = re.findall(r"at guidance -1, 0, 0\.5, 1, 3: (.*)", printed)
    away = [float(number) for number in away.split(", ")]
    assert away == pytest.approx([away[3] * abs(w) for w in (-1, 0, 0.5, 1, 3)], abs=0.02)


if __name__ == "__main__":
    if sys.argv[1] == "%run":
        run_magic(*sys.argv[2:])
    else:
        print(json.dumps(list(run_cells(sys.argv[1]))))
