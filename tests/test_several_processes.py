"""04 in several processes, as torchrun starts them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_command_line import QUICK, TINY, run, run_untouched, squares  # noqa: F401  fixtures

import lesson_tools as tools

ROOT = Path(__file__).parent.parent
OPTIONS = [*TINY, "--batch-size", "8"]
DRIVER = f"""
import importlib, sys

lesson3, lesson4, tools = map(importlib.import_module, ("03_unet_uncond", "04_unet_cond", "lesson_tools"))
lesson3.PRESETS["small"] = lesson3.PRESETS["small"]._replace(**{QUICK})
tools.choose_precision, tools.PREVIEW_AT, lesson3.PREVIEW_IMAGES = lambda device: None, (1,), 10
sys.argv[0] = lesson4.__file__
tools.run_command(lesson4.main)
"""  # 04 in float32 with a quick network, like the other side of the comparison


def test_processes_come_and_go_and_the_losses_stay_the_same(lesson3, lesson4, run, tmp_path, monkeypatch):  # noqa: F811
    one, many, options = tmp_path / "one", tmp_path / "many", [*squares(tmp_path, 120), "--batch-size", "8"]  # 15 steps
    run(lesson4, *options, "--out", one)
    with monkeypatch.context() as patch:
        train = lesson3.train

        def interrupted(*arguments):
            for step, loss, norm in train(*arguments):
                if step == 5:
                    os.kill(os.getpid(), signal.SIGINT)
                yield step, loss, norm

        patch.setattr(lesson3, "train", interrupted)
        run(lesson4, *options, "--out", many, status=130)

    (tmp_path / "driver.py").write_text(DRIVER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    command = [*torchrun, tmp_path / "driver.py", *options, "--out", many]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for said in ("device    2 × cpu", "from step 6", "wrote ", "samples.png"):
        assert result.stdout.count(said) == (4 if said == "wrote " else 1), result.stdout  # only the first prints
    assert sorted(path.name for path in many.iterdir()) == sorted(path.name for path in one.iterdir())
    whole, shared = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, many))
    torch.testing.assert_close(shared["losses"], whole["losses"], rtol=1e-4, atol=0)
    assert not torch.equal(shared["losses"][6:], whole["losses"][6:])  # the sums are taken in another order
    np.testing.assert_allclose(np.load(many / "samples.npy"), np.load(one / "samples.npy"), atol=1e-3)


def test_a_batch_that_cannot_be_shared_is_refused(lesson3, lesson4, run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tools, "PROCESSES", 3)
    _, errors = run(lesson4, *OPTIONS, "--out", tmp_path, status=2)
    assert "--batch-size 8: must be a multiple of 3" in errors


@pytest.mark.parametrize("data, step", [("Fashion-MNIST", 0), ("garments", 5)])  # here: garments, and no checkpoint
def test_processes_that_disagree_are_stopped(lesson3, lesson4, run, tmp_path, monkeypatch, data, step):  # noqa: F811
    backends = []

    def gather(all_found, found):
        all_found[:] = found, (found[0]._replace(data=data), step)

    monkeypatch.setattr(tools, "PROCESSES", 2)
    monkeypatch.setattr(tools.dist, "init_process_group", backends.append)
    monkeypatch.setattr(tools.dist, "all_gather_object", gather)
    _, errors = run(lesson4, *OPTIONS, "--out", tmp_path, status=2)
    assert "the processes found different data or checkpoints" in errors
    assert backends == ["gloo"]  # the CPU's, whatever else the machine has
    assert not list(tmp_path.iterdir())


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(tools, "PROCESSES", 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(tools.UserError, match="more processes than GPUs \\(1 here\\)"):
        tools.join_processes(torch.device("cuda"), None)


@pytest.mark.parametrize("asked", [["--sample-only"], ["--pretrained"], ["--show"]])
def test_the_first_process_alone_samples(lesson3, lesson4, run, tmp_path, monkeypatch, asked):  # noqa: F811
    monkeypatch.setattr(tools, "RANK", 1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # other processes silence it; restored afterwards
    assert run(lesson4, *asked, "--out", tmp_path) == ("", "")
    assert list(tmp_path.iterdir()) == []
