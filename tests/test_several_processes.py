"""04 in two processes that torchrun starts. The file is also what these run: 04 in float32, with a network that's
quick, and with a process that gets a signal at a certain step."""

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "04_unet_cond.py")


def run_script(arguments, patch, stop_at=None, interrupt=lambda requests: None):
    """04 as a script in this process; interrupt(requests) is called as step `stop_at` begins, with the requests to stop
    that have come so far."""
    lesson3 = importlib.import_module("03_unet_uncond")
    draw_batch, stop_requests, requests = lesson3.draw_batch, lesson3.stop_requests, []

    def draw(images, labels, batch_size, seed, step, *rest):
        if step == stop_at:
            interrupt(requests[-1])
        return draw_batch(images, labels, batch_size, seed, step, *rest)

    @contextmanager
    def watched():
        with stop_requests() as those:
            requests.append(those)
            yield those

    patch.setattr(lesson3, "draw_batch", draw)
    patch.setattr(lesson3, "stop_requests", watched)
    patch.setattr(lesson3, "choose_precision", lambda device: None)
    quick = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4, head_dim=8)
    patch.setitem(lesson3.PRESETS, "small", quick)
    patch.setattr(sys, "argv", [SCRIPT, *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def kill(requests):
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_self(requests):
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_torchrun(requests):
    """As Ctrl-C does; torchrun then tells its processes."""
    os.kill(os.getppid(), signal.SIGINT)
    while not requests:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """20 steps on a few small pictures."""
    from test_data import idx

    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (40, 12, 12), np.uint8), (np.arange(40) % 4).astype(np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    return ["--data-dir", folder, "--device", "cpu", "--epochs", "4", "--batch-size", "8", "--steps", "2"]


def alone(arguments, **how):
    """A run in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            run_script(arguments, patch, **how)
        except SystemExit as stopped:
            return stopped.code
        return 0


def together(arguments, at=None, happens=None):
    """A run in two processes that torchrun starts; as step `at` begins, `happens` happens in the second one."""
    happening = {"HAPPENING": f"{at} {happens.__name__}"} if happens else {}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, __file__, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | happening, **pipes)
    try:
        output, errors = process.communicate(timeout=900)  # they must end by themselves, on a busy machine too
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends the others
        output, errors = process.communicate()
        pytest.fail(f"still running\n{output}{errors}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def read(folder):
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content["step"], content["losses"]


def test_processes_come_and_go_and_the_losses_stay_the_same(options, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    assert alone([*options, "--out", one]) == 0
    arguments = [*options, "--out", many]

    result = together(arguments, 6, interrupt_torchrun)  # the second process alone takes notice of it
    assert result.stdout.count("stopped after step 7 of 20") == 1, result.stderr
    assert result.stdout.count("2 × cpu") == 1
    assert "torchrun ... " in result.stdout.splitlines()[-1]
    assert read(many)[0] == 7
    assert [path.name for path in many.iterdir()] == ["checkpoint.pt"]

    assert alone(arguments, stop_at=10, interrupt=interrupt_self) == 130
    assert read(many)[0] == 11

    result = together(arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("from step 11") == 1
    written = [Path(line.removeprefix("wrote ")).name for line in result.stdout.splitlines() if "wrote" in line]
    assert sorted(written) == sorted(path.name for path in many.iterdir())
    assert sorted(written) == sorted(path.name for path in one.iterdir())
    (done, losses), (_, expected) = read(many), read(one)
    assert done == len(losses) == 20
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    np.testing.assert_allclose(np.load(many / "samples.npy"), np.load(one / "samples.npy"), atol=1e-3)


def test_a_process_that_dies_ends_the_other(options, tmp_path):
    result = together([*options, "--out", tmp_path], 5, kill)
    assert result.returncode != 0
    assert "process 0 ends, because another one is gone" in result.stderr
    assert "(SIGKILL)" in result.stderr
    assert "[rank0]" not in result.stderr  # no traceback of the one that waited


def test_a_batch_that_cannot_be_shared_is_refused(options, tmp_path):
    result = together([*options, "--batch-size", "9", "--out", tmp_path])
    assert result.returncode != 0
    assert result.stderr.count("--batch-size 9: must be a multiple of 2") == 1
    assert "exitcode  : 2 " in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    how = os.environ.get("HAPPENING", "").split()
    if os.environ["RANK"] == "1" and how:
        how = {"stop_at": int(how[0]), "interrupt": globals()[how[1]]}
    else:
        how = {}
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the first process takes no notice
    sys.path.insert(0, str(ROOT))
    run_script(sys.argv[1:], pytest.MonkeyPatch(), **how)
