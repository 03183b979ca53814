"""The ladder from the lecture's settings to ours: its rungs, the lecture's denoiser, the command on tiny nets."""

import json
import math

import measure_recipe
import numpy as np
import pytest
import torch
from measure_quality import Verdict
from torch import nn

import data
import lesson_tools as tools

CPU, CLASSES = torch.device("cpu"), data.fashion_mnist.CLASSES
RECIPES = list(measure_recipe.RECIPES.values())


@pytest.fixture
def tiny(lesson3, monkeypatch):
    """Both presets small, and float32; settings of a run with the second."""
    small = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4, head_dim=8)
    monkeypatch.setitem(lesson3.PRESETS, "small", small)
    monkeypatch.setitem(lesson3.PRESETS, "lecture", small._replace(patch=1))
    monkeypatch.setattr(tools, "choose_precision", lambda device: None)
    for name in ("schedule", "P_MEAN", "P_STD"):
        monkeypatch.setattr(lesson3, name, getattr(lesson3, name))  # is as it was when the test is over
    return lesson3.RunSettings("CondUNet", "small", 1, 64, 0, "Fashion-MNIST", 40, CLASSES, (28, 28), 0.7)


def test_the_rungs_lead_from_the_lecture_to_lesson_4(lesson3, lesson4, tiny):
    assert len(set(RECIPES)) == len(measure_recipe.CHANGES)
    top = RECIPES[-1]
    small = lesson3.PRESETS["small"]
    assert (top.batch_size, top.muon) == (small.batch_size, small.max_lr)
    torch.manual_seed(tiny.seed)
    ours = lesson3.make_denoiser(lesson4.make_network(small, len(CLASSES)), tiny, CPU)
    same = measure_recipe.make_denoiser(top, tiny, CPU)
    assert type(same) is lesson3.Denoiser
    torch.testing.assert_close(same.state_dict(), ours.state_dict(), rtol=0, atol=0)


def test_the_lecture_has_batch_norm_behind_scale_and_shift_and_no_silent_start(lesson4, tiny):
    network = measure_recipe.make_denoiser(RECIPES[0], tiny, CPU).network
    kinds = {type(module) for module in network.modules()}
    assert nn.BatchNorm2d in kinds
    assert not kinds & {nn.GroupNorm, lesson4.AttentionResBlock, lesson4.lesson2.AttentionBlock}
    assert all(module.weight.any() for module in network.modules() if isinstance(module, nn.Conv2d))
    x, time, label = torch.randn(4, 1, 28, 28), torch.rand(4), torch.arange(4)
    assert network(x, time, label).std() > 0.01
    block, embedding = network.down[0][0], torch.randn(4, 32)
    h = block.conv2.scale_shift(block.conv1(torch.ones(4, 8, 7, 7)), embedding)
    expected = block.shortcut(torch.ones(4, 8, 7, 7)) + block.conv2.conv(nn.functional.silu(block.conv2.norm(h)))
    torch.testing.assert_close(block(torch.ones(4, 8, 7, 7), embedding), expected)


def test_the_lecture_predicts_noise_from_a_mix_of_unit_weights(lesson3):
    """In images of ±0.5, of which cos(π t / 2) is left, with sin(π t / 2) of noise."""
    seen = []
    denoiser = measure_recipe.LectureDenoiser(lambda x, time, label: seen.append((x, time)) or 0.3 * x, 0.7)
    t = torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999])
    sigma, x0, noise = measure_recipe.sigma_of(t), torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    loss = lesson3.denoising_loss(denoiser, x0, sigma, noise)
    ((x, time),) = seen
    angle = math.pi / 2 * t.view(-1, 1, 1, 1)
    torch.testing.assert_close(time, t)
    torch.testing.assert_close(x, angle.cos() * x0 / 2 + angle.sin() * noise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, (0.3 * x - noise).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=1e-4)


def test_one_cycle_is_that_of_pytorch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1001, final_div_factor=1e9)
    for step in range(1001):
        assert measure_recipe.one_cycle((step + 1) / 1001) == pytest.approx(theirs.get_last_lr()[0], abs=0.01)
        optimizer.step()
        if step < 1000:
            theirs.step()


@pytest.mark.parametrize("rung", [0, 2, 4, len(RECIPES) - 1])
def test_a_rung_is_trained_until_its_budget_is_spent(lesson3, tiny, rung):
    recipe, ours = RECIPES[rung]._replace(batch_size=8), (lesson3.P_MEAN, lesson3.P_STD)
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10
    denoiser, seen = measure_recipe.train(recipe, tiny, (images, labels), lambda seen: seen / 30)
    assert seen == 32
    assert (ours if recipe.between else (-1.2, 1.2)) == (lesson3.P_MEAN, lesson3.P_STD)
    assert not denoiser.training
    new = measure_recipe.make_denoiser(recipe, tiny, CPU)
    assert not torch.equal(denoiser.network.conv_in.weight, new.network.conv_in.weight)
    samples = measure_recipe.sample(recipe, tiny, denoiser, 12)
    assert samples.shape == (12, 1, 28, 28)
    assert samples.isfinite().all()


def test_what_is_there_is_not_done_again_and_all_is_shown(monkeypatch, tmp_path, capsys):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 28, 28), np.uint8)
    little = data.Dataset(lambda: images, np.arange(40) // 4, CLASSES, "Fashion-MNIST")
    verdicts = {name: Verdict([2.0, 1, 1], 0.9) for name in ("residual", "plain")}
    monkeypatch.setattr(tools, "load_data", lambda name, split, folder: little)
    monkeypatch.setattr(measure_recipe, "Panel", lambda *_: type("P", (), {"judge": lambda *_: verdicts}))
    made = []

    def make(command, check):
        rung, seed = map(int, command[-2:])
        made.append((rung, seed))
        path = tmp_path / "5_minutes_20" / f"{rung:02}_seed_{seed}.npy"
        np.save(path, generator.uniform(-1, 1, (20, 1, 28, 28)).astype(np.float32))
        path.with_suffix(".json").write_text(json.dumps({"seen": 3000 * (seed + 1), "seconds": 30.0, "sampling": 4.0}))

    monkeypatch.setattr(measure_recipe.subprocess, "run", make)
    for asked in (["--rungs", "0", "12", "--seeds", "0", "1"], ["--rungs", "12"]):
        monkeypatch.setattr("sys.argv", ["measure", *asked, "--n", "20", "--out", str(tmp_path)])
        measure_recipe.main()
        assert made == [(0, 0), (0, 1), (12, 0), (12, 1)]
        lines = capsys.readouterr().out.splitlines()
        (first,) = [line for line in lines if line.startswith("| the lecture's settings |")]
        assert "| 4,500 (3,000 to 6,000) | 150 (100 to 200) | 5.0 (5.0 to 5.0) | 2 (2 to 2) | 90.0%" in first
    assert (tmp_path / "5_minutes_20" / "recipe.png").stat().st_size > 10_000
