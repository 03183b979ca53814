"""The recipe's rows: today's, the lecture's denoiser and the road from it, a row on tiny networks, the table."""

import json
import math
import re
import subprocess
from pathlib import Path

import measure_recipe
import numpy as np
import pytest
import torch
from measure_quality import Quality
from torch import nn

import data
import lesson_tools as tools

CPU, CLASSES, RECIPES = torch.device("cpu"), data.fashion_mnist.CLASSES, measure_recipe.RECIPES
LECTURE = RECIPES["road: the lecture's settings"]


@pytest.fixture
def tiny(lesson3, monkeypatch):
    """Both presets tiny, and float32; the settings of a run with `small`."""
    small = lesson3.PRESETS["small"]._replace(widths=(16, 32), groups=4, head_dim=8)
    monkeypatch.setitem(lesson3.PRESETS, "small", small)
    monkeypatch.setitem(lesson3.PRESETS, "lecture", small._replace(patch=1))
    monkeypatch.setattr(tools, "choose_precision", lambda device: None)
    for name in ("schedule", "P_MEAN", "P_STD"):
        monkeypatch.setattr(lesson3, name, getattr(lesson3, name))  # restored when the test is over
    return lesson3.RunSettings("CondUNet", "small", 1, 64, 0, "Fashion-MNIST", 40, CLASSES, (28, 28), 0.7)


def test_todays_recipe_is_the_scripts_own_and_the_road_leads_to_it(lesson3, lesson4, tiny):
    today, small = RECIPES["today's recipe"], lesson3.PRESETS["small"]
    muon = lesson3.Muon([torch.zeros(1)], 1.0).defaults
    assert (today.batch_size, today.max_lr) == (small.batch_size, small.max_lr)
    assert (today.momentum, today.weight_decay) == (muon["momentum"], muon["weight_decay"])
    assert today.levels == (lesson3.P_MEAN, lesson3.P_STD) and today == RECIPES["road: dropped labels, for guidance"]
    torch.manual_seed(tiny.seed)
    ours = lesson3.make_denoiser(lesson4.make_network(small, len(CLASSES)), tiny, CPU)
    same = measure_recipe.make_denoiser(today, tiny, CPU)
    assert type(same) is lesson3.Denoiser
    torch.testing.assert_close(same.state_dict(), ours.state_dict(), rtol=0, atol=0)
    others = [recipe for name, recipe in RECIPES.items() if name != "today's recipe"][:-1]
    assert len({today, *others}) == len(RECIPES) - 2  # the road's last but one is today's without dropped labels


def test_the_lecture_has_batch_norm_after_scale_and_shift_and_no_zero_start(lesson4, tiny):
    network = measure_recipe.make_denoiser(LECTURE, tiny, CPU).network
    kinds = {type(module) for module in network.modules()}
    assert nn.BatchNorm2d in kinds
    assert not kinds & {nn.GroupNorm, lesson4.lesson2.AttentionBlock}
    assert all(module.weight.any() for module in network.modules() if isinstance(module, nn.Conv2d))
    block, embedding = network.down[0][0], torch.randn(4, 64)
    x = torch.randn(4, 16, 7, 7)
    h = block.conv2.scale_shift(block.conv1(x), embedding)
    expected = block.shortcut(x) + block.conv2.conv(nn.functional.silu(block.conv2.norm(h)))
    torch.testing.assert_close(block.train()(x, embedding), expected)


def test_what_is_left_out_has_no_influence(tiny, redraw):
    x, label = torch.randn(3, 1, 28, 28), torch.arange(3)
    for name, same in (("no time", True), ("today's recipe", False)):
        network = redraw(measure_recipe.make_denoiser(RECIPES[name], tiny, CPU)).network
        x4 = torch.pixel_unshuffle(x, 2)
        one, other = (network(x4, torch.full((3,), time), label) for time in (0.0, 300.0))
        assert torch.equal(one, other) == same
    kinds = {type(m).__name__ for m in measure_recipe.make_denoiser(RECIPES["no attention"], tiny, CPU).modules()}
    assert "AttentionBlock" not in kinds and "AttentionResBlock" in kinds


def test_the_lecture_predicts_noise_from_a_mix_of_unit_weights(lesson3):
    """Images in ±0.5 are multiplied by cos(π t / 2), the noise by sin(π t / 2)."""
    seen = []
    denoiser = measure_recipe.NoiseDenoiser(lambda x, time, label: seen.append((x, time)) or 0.3 * x, 0.7)
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


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - measure_recipe.QUESTIONS.keys()))  # test_variants.py has those
def test_each_row_is_trained_until_its_budget_is_spent(lesson3, tiny, name):
    recipe = RECIPES[name]._replace(batch_size=8)
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10
    denoiser, seen = measure_recipe.train(recipe, tiny, (images, labels), lambda seen: seen / 15)
    assert seen == 16 and not denoiser.training
    new = measure_recipe.make_denoiser(recipe, tiny, CPU)
    assert any(not torch.equal(*pair) for pair in zip(denoiser.parameters(), new.parameters(), strict=True))
    samples = measure_recipe.sample(recipe._replace(ddpm=False), tiny, denoiser, 12, 1.4)
    assert samples.shape == (12, 1, 28, 28) and samples.isfinite().all()


def test_the_loss_is_that_of_the_training(lesson3, tiny, redraw):
    denoiser = redraw(measure_recipe.make_denoiser(RECIPES["today's recipe"], tiny, CPU))
    images, labels = torch.randint(256, (300, 1, 28, 28), dtype=torch.uint8), torch.arange(300) % 10
    losses = [measure_recipe.measure_loss(denoiser, 0.7, images, labels, (28, 28)) for _ in range(2)]
    assert losses[0] == losses[1]
    generator = torch.Generator().manual_seed(0)
    sigma = (lesson3.P_MEAN + lesson3.P_STD * torch.randn(300, generator=generator)).exp()
    noise = torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        expected = lesson3.denoising_loss(denoiser, images / 127.5 - 1, sigma, noise, labels).mean()
    assert losses[0] == pytest.approx(float(expected), rel=1e-4)


def test_averaged_weights_get_batch_statistics_of_their_own(tiny):
    recipe = RECIPES["batch norm"]._replace(batch_size=8)
    denoiser = measure_recipe.make_denoiser(recipe, tiny, CPU)
    images, labels = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10
    seen = []
    denoiser.network.conv_out.norm.register_forward_pre_hook(lambda norm, inputs: seen.append(inputs[0]))
    measure_recipe.measure_batch_norm(denoiser, measure_recipe.draw_batches(recipe, tiny, (images, labels)), 5)
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
    assert len(seen) == 5
    torch.testing.assert_close(denoiser.network.conv_out.norm.running_mean, means)


def test_every_result_belongs_to_a_row():
    for line in measure_recipe.read_results():
        assert line["row"] in RECIPES and line["loss"] > 0 and "dirty" not in line["commit"]
        assert all(0 <= accuracy <= 1 < 1000 > distance for distance, accuracy in line["unguided"].values())


@pytest.mark.parametrize("page", ["measurements.md", "open_questions.md"])
def test_the_tables_in_docs_show_the_results(page):
    """Each row's seeds, loss and distances; in open_questions.md, how much they change."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text(encoding="utf-8").replace("−", "-")
    wanted, spread = (60_000, None, 4000, "AMD EPYC, AVX-512 BF16", "bfloat16", 1), measure_recipe.spread
    results = [line for line in measure_recipe.read_results() if measure_recipe.kind(line) == wanted]
    today = {line["seed"]: line for line in results if line["row"] == "today's recipe"}
    rows = re.findall(r"^\| (.+?) \| (\d(?:, \d)*) \| (.*) \|$", text, flags=re.MULTILINE)
    shown = [row for row in rows if row[0] in RECIPES]
    assert len(shown) >= 10
    for name, seeds, cells in shown:
        lines = sorted((line for line in results if line["row"] == name), key=lambda line: line["seed"])
        assert seeds == ", ".join(str(line["seed"]) for line in lines), name
        for what, value, change in (("loss", ".4f", ".1f"), ("guided", ".2f", ".0f"), ("unguided", ".2f", ".0f")):
            there = [line for line in lines if what in line]
            expected = spread([measure_recipe.value(line, what) for line in there], f"{{:{value}}}")
            if page == "open_questions.md":
                expected = spread(measure_recipe.changes(there, today, what), f"{{:+z{change}}}")
            assert expected in cells.split(" | "), (name, what)


def test_changes_are_in_percent_and_seed_by_seed():
    today = {
        seed: {"seed": seed, "loss": loss, "guided": {"residual": [2.0, 0.9]}} for seed, loss in ((0, 1.0), (1, 2))
    }
    lines = [today[1] | {"loss": 3.0}, today[0] | {"loss": 0.5}, today[0] | {"seed": 2}]
    assert measure_recipe.changes(lines, today, "loss") == [50, -50]
    assert measure_recipe.changes(lines[:1], today, "guided") == [0]
    assert measure_recipe.changes(lines, today, "unguided") == []


def test_the_border_does_not_count_in_the_loss():
    """Otherwise, easy padding pixels would lower the loss."""
    images, labels = torch.randint(256, (10, 1, 12, 12), dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)

    def denoiser(x, sigma, label):
        return torch.zeros_like(x)

    denoiser.device, losses = CPU, []
    for border in (0, 99, 255):
        padded = nn.functional.pad(images, [2] * 4, value=border)
        losses.append(measure_recipe.measure_loss(denoiser, 0.7, padded, labels, (12, 12)))
    assert losses[0] == losses[1] == losses[2] > 0


def test_the_lectures_steps_are_those_of_ddpm(lesson3):
    """Against the posterior of Ho et al. 2020, equation 7, in its own coordinates: mean and variance of the next x."""
    sigma, sigma_next = 2.0, 0.7
    bar, bar_next = (1 / (1 + level**2) for level in (sigma, sigma_next))
    alpha, x0 = bar / bar_next, 0.3
    x = torch.full((200_000,), 1.9)
    mean = bar_next**0.5 * (1 - alpha) / (1 - bar) * x0 + alpha**0.5 * (1 - bar_next) / (1 - bar) * (bar**0.5 * 1.9)
    variance = (1 - bar_next) / (1 - bar) * (1 - alpha)
    found = bar_next**0.5 * measure_recipe.sample_ddpm(
        lambda *_: torch.full_like(x, x0), x / sigma, [sigma, sigma_next]
    )
    assert found.mean() == pytest.approx(mean, abs=0.01) and found.var() == pytest.approx(variance, rel=0.02)
    far = measure_recipe.sample_ddpm(lambda *_: torch.full_like(x, 9.0), x, [sigma, 0.0])
    assert torch.equal(far, torch.full_like(x, 2.0))  # clamped, and no noise is left


def test_the_road_has_a_dot_for_each_row_in_its_order():
    machine = {"processor": "a CPU", "precision": "float32", "threads": 1}
    quality = machine | {"images": None, "minutes": 5.0, "n": 1000, "unguided": {"residual": [5.0, 0.8]}}
    lines = [dict(quality, row="road: attention"), dict(quality, row="road: the lecture's settings")]
    lines += [dict(quality, guided={"residual": [2.0, 0.9]}, row="road: dropped labels, for guidance")]
    (axes,) = measure_recipe.plot_road(lines).axes
    assert list(axes.lines[0].get_xdata()) == [5, 5, 2]
    expected = ["the lecture's settings", "+ attention", "+ dropped labels, for guidance"]
    assert [label.get_text() for label in axes.get_yticklabels()] == expected
    assert axes.texts[-1].get_text() == "5 minutes of training on 1 CPU thread each; 1,000 samples"


def test_a_new_result_does_not_make_the_commit_dirty(tmp_path):
    def git(*arguments):
        who = "-c", "user.name=a", "-c", "user.email=a@b"
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results, code = tmp_path / "tests" / "results.jsonl", tmp_path / "code.py"
    results.parent.mkdir()
    for file in (results, code):
        file.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    for file, dirty in ((None, False), (results, False), (code, True)):
        if file:
            file.write_text("changed")
        assert measure_recipe.describe_commit(results).endswith("-dirty") == dirty


def test_a_row_is_a_line_and_is_not_measured_twice(tiny, monkeypatch, tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), np.uint8)
    little = data.Dataset(images, np.arange(40) // 4, CLASSES, "Fashion-MNIST")
    qualities = {name: Quality(2.0, 0.9) for name in ("residual", "plain")}
    monkeypatch.setattr(tools, "load_data", lambda name, split, folder: little)
    monkeypatch.setattr(measure_recipe, "Panel", lambda *_: type("P", (), {"measure": lambda *_: qualities}))
    monkeypatch.setattr(measure_recipe, "RESULTS", tmp_path / "results.jsonl")
    common = ["--images", "64", "--n", "20", "--device", "cpu", "--out", str(tmp_path)]
    for asked in (["today's recipe"], ["no time", "--sweep"], ["labels never dropped"], ["no time"]):
        monkeypatch.setattr("sys.argv", ["measure", *asked, *common])
        measure_recipe.main()
    assert "no time, seed 0: already in results.jsonl" in capsys.readouterr().out
    lines = measure_recipe.read_results()
    assert [line["row"] for line in lines] == ["today's recipe", "no time", "labels never dropped"]
    today, no_time, undropped = lines
    assert today["seen"] == 64 and today["guided at all levels"]["plain"] == [2.0, 0.9] and "guided" not in undropped
    assert {"guidance 0.8", "guidance 1.6"} <= no_time.keys() and no_time["precision"] == "float32"
    no_time["guided"]["residual"], no_time["seed"] = [3.0, 0.8], 0
    again = dict(no_time, seed=1) | {"loss": 2.0}
    road = dict(undropped, row="road: attention")
    (tmp_path / "results.jsonl").write_text("\n".join(json.dumps(line) for line in (today, no_time, again, road)))
    monkeypatch.setattr("sys.argv", ["measure", "--out", str(tmp_path)])
    measure_recipe.main()
    assert (tmp_path / "road.png").stat().st_size > 5000
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| no time |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "0, 1" and cells[4:7] == ["3 (3 to 3)", "+50.0", "80.0 % (80.0 % to 80.0 %)"]
    monkeypatch.setattr("sys.argv", ["measure", "no such row"])
    with pytest.raises(tools.UserError, match="must be one of today's recipe, "):
        measure_recipe.main()
