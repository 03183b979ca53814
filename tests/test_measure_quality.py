"""The measurement of quality: its parts, and the command on tiny networks with untrained classifiers."""

import os
import sys

import classifiers
import measure_quality
import numpy as np
import pytest
import torch
from measure_quality import frechet_distance

import data
import lesson_tools as tools

CPU = torch.device("cpu")
CLASSES = data.fashion_mnist.CLASSES


@pytest.mark.parametrize("n, m, d, tolerance", [(50, 60, 4, 1e-10), (300, 200, 16, 1e-10), (6, 9, 12, 1e-6)])
def test_frechet_distance(n, m, d, tolerance):
    """Against the eigenvalues of A B. With fewer images than features, some are zero; their roots are about 1e-8."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + 1
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(a, a) == pytest.approx(0, abs=tolerance)


def test_nearest_neighbours_are_found_and_a_copy_is_found_out():
    """The second time, those found the first time don't count."""
    images, others = torch.rand(2, 30, 1, 6, 5) * 2 - 1
    images[3], images[4] = others[17], others[8] + 0.01
    expected, numbers = (images[:, None] - others).square().mean(dim=(2, 3, 4)).sqrt().sort(dim=1)  # 30 30
    found, distances = measure_quality.find_nearest(images, others, batch_size=7)
    second, further = measure_quality.find_nearest(images, others, but=found, batch_size=7)
    assert torch.equal(torch.stack([found, second], dim=1), numbers[:, :2])
    torch.testing.assert_close(torch.stack([distances, further], dim=1), expected[:, :2])


@pytest.fixture(scope="module")
def sets():
    """Little data sets with the official one's name: 40 training images, 20 test images."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
    train = data.Dataset(images[:40], np.arange(40) // 4, CLASSES, "Fashion-MNIST")
    return {"train": train, "test": data.Dataset(images[40:], np.arange(20) // 2, CLASSES, "Fashion-MNIST")}


def test_baselines_have_equally_many_of_each_class(sets):
    images, labels = sets["train"].images, sets["train"].labels
    baselines = measure_quality.Baselines(sets["train"], 30)
    assert np.bincount(baselines.labels.numpy(), minlength=10).tolist() == [3] * 10
    assert len(set(baselines.numbers.tolist())) == 30
    assert np.array_equal(labels[baselines.numbers], baselines.labels)
    assert torch.equal(baselines.images[:, 0], torch.from_numpy(images[baselines.numbers]).float() / 127.5 - 1)


@pytest.fixture
def tiny(sets, lesson3, redraw, monkeypatch, tmp_path):
    """tiny(network's name): the path of a checkpoint of a tiny network with random weights.

    spoilt: a file to overwrite with garbage, maybe the checkpoint; relabelled: a set to give other classes."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, batch_size=4)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)
    monkeypatch.setattr(tools, "choose_precision", lambda device: None)

    def tiny(name="UntimedUNet", data="Fashion-MNIST", classes=CLASSES, steps=10, spoilt=None, relabelled=None):
        settings = lesson3.RunSettings(name, "small", steps, 4, 0, data, 40, classes, (28, 28), 0.7)
        make_network = measure_quality.NETWORKS.get(name, measure_quality.NETWORKS["TimeUNet"])
        denoiser = redraw(lesson3.make_denoiser(make_network(preset, len(classes)), settings, CPU))
        content = {
            "settings": settings._asdict(),
            "step": settings.steps,
            "losses": torch.zeros(1),
            "ema": denoiser.state_dict(),
        }
        tools.save_checkpoint(tmp_path / "checkpoint.pt", content)
        if spoilt:
            (tmp_path / spoilt).parent.mkdir(exist_ok=True)
            (tmp_path / spoilt).write_bytes(b"nothing")
        if relabelled:
            monkeypatch.setitem(sets, relabelled, sets[relabelled]._replace(classes=tuple("0123456789")))
        return tmp_path / "checkpoint.pt"

    return tiny


def test_the_classes_are_drawn_in_turn(tiny):
    """The network gets their labels in each evaluation; if guidance acts, "no label" as well."""
    denoiser, settings = measure_quality.load_denoiser(tiny("CondUNet"), CPU)
    given = []
    denoiser.network.register_forward_pre_hook(lambda network, inputs: given.append(inputs[2].tolist()))
    images, labels = measure_quality.draw_samples(denoiser, settings, 12, 4, 0.5)
    assert images.shape == (12, 1, 28, 28)
    assert images.abs().max() <= 1
    assert len(given) == 4
    assert labels.tolist() == given[0] == [*range(10), 0, 1]
    assert given[-1] == [*given[0], *[10] * 12]
    assert (images[0] - images[10]).abs().max() > 0.1  # the same class, but another image
    more, _ = measure_quality.draw_samples(denoiser, settings, 13, 4, 0.5)
    torch.testing.assert_close(more[:12], images, rtol=0, atol=1e-4)


def striped(n):
    """n images, uint8 (n, 28, 4), of noise, with a bright stripe whose row tells the class; labels (n,)."""
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, 28, 4), dtype=torch.uint8)  # narrow images are learned faster
    images[torch.arange(n), 2 * labels + 4] = 255
    return images, labels


@pytest.mark.parametrize("name", classifiers.ARCHITECTURES)
def test_a_classifier_learns(name, monkeypatch):
    monkeypatch.setattr(classifiers, "augment", lambda x, generator: x)  # the stripes are two pixels apart
    classifier = classifiers.Classifier(name)
    classifiers.train(classifier, *striped(120), epochs=4, batch_size=10)
    images, labels = striped(50)
    features, taken_for = classifiers.look(classifier.eval(), classifiers.to_range(images), batch_size=30)
    assert features.shape == (50, classifier.classify.in_features)
    assert (taken_for == labels).float().mean() > 0.9


def test_the_shipped_classifiers_know_fashion(monkeypatch):
    """They are small, contain no code, and classify over 92 % of the first 2,000 test images correctly."""
    assert classifiers.PATH.stat().st_size < 2e6
    weights = torch.load(classifiers.PATH, weights_only=True)
    assert {value.dtype for each in weights.values() for value in each.values()} == {torch.float16, torch.int64}
    if folder := os.environ.get("FASHION_MNIST_DIR"):
        test = data.load("fashion-mnist", "test", folder)
        for classifier in classifiers.load(CPU).values():
            _, taken_for = classifiers.look(classifier, classifiers.to_range(torch.from_numpy(test.images[:2000])))
            assert (taken_for == torch.from_numpy(test.labels[:2000])).float().mean() > 0.92


def test_a_residual_block_has_a_shortcut():
    block, x = classifiers.Block(2, 4, 2), torch.randn(3, 2, 8, 8)
    for parameter in block.branch.parameters():
        torch.nn.init.zeros_(parameter)
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], x)[..., ::2, ::2].relu()
    torch.testing.assert_close(block(x), expected)


def test_augmentation_moves_and_mirrors_and_fills_with_background():
    x = torch.rand(3, 1, 28, 28)
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), value=-1)
    places = [wide[:, :, dy : dy + 28, dx : dx + 28] for dy in range(5) for dx in range(5)]
    places += [place.flip(3) for place in places]
    moved = [classifiers.augment(x, torch.Generator().manual_seed(seed)) for seed in range(300)]
    found = torch.tensor([[torch.equal(each, place) for place in places] for each in moved])
    assert torch.all(found.sum(dim=1) == 1)
    assert torch.all(found.any(dim=0))


@pytest.fixture
def little_classifiers(monkeypatch):
    """Untrained ones: their 16 features are means of every fourth pixel in every fourth row."""
    little = dict.fromkeys(classifiers.ARCHITECTURES, lambda: torch.nn.PixelUnshuffle(4))
    monkeypatch.setattr(classifiers, "ARCHITECTURES", little)
    made = {name: classifiers.Classifier(name) for name in little}
    monkeypatch.setattr(classifiers, "load", lambda device: made)


def test_the_panel_measures_what_its_classifiers_see(sets, little_classifiers):
    panel, images = measure_quality.Panel(sets["test"], CPU), 5 * torch.randn(10, 1, 28, 28)
    both = images, torch.from_numpy(sets["test"].images)[:, None] / 127.5 - 1
    pair = (torch.pixel_unshuffle(x, 4).mean(dim=(2, 3)).double().numpy() for x in both)
    expected = frechet_distance(*pair)
    for name, little in panel.classifiers.items():
        seen = little(images).argmax(dim=1)
        quality = panel.measure(images, torch.cat([(seen[:2] + 1) % 10, seen[2:]]))[name]
        assert quality == pytest.approx((expected, 0.8))


@pytest.fixture
def command(sets, little_classifiers, monkeypatch, capsys):
    """command(arguments): run it with the little data sets and classifiers; returns what it prints."""
    monkeypatch.setattr(tools, "load_data", lambda name, split, data_dir: sets[split])

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["measure_quality.py", *map(str, arguments)])
        tools.run_command(measure_quality.main)
        return capsys.readouterr().out

    return command


def test_a_checkpoint_is_measured(tiny, command, lesson4):
    text = command(tiny("CondUNet"), "--n", 20, "--steps", 2, "--guidance", 0.7)
    assert "20 in 2 steps, guidance 0.7\n" in text
    for name in ("samples", "training images", "white noise"):
        assert text.count(f"\n{name} ") == 2 + (name == "samples")  # both tables; the first line too
    text = command(tiny("CondUNet", steps=200_000), "--n", 20, "--steps", 2)
    assert f"20 in 2 steps, guidance {lesson4.GUIDANCE_LONG:g}\n" in text
    text = command(tiny("TimeUNet"), "--n", 20, "--steps", 2)
    _, row, _ = (line.split() for line in text.splitlines() if line.startswith("samples"))
    assert row[2::2] == ["-", "-"]
    assert "guidance" not in text


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ({}, "", "error: the following arguments are required: CHECKPOINT"),
        ({}, "nothing.pt", "nothing.pt: no checkpoint of lesson 3 or 4"),
        ({"spoilt": "checkpoint.pt"}, "checkpoint.pt --n 20", "damaged, or not a checkpoint"),
        ({"name": "VNet"}, "checkpoint.pt --n 20", "no checkpoint of lesson 3 or 4"),
        ({"data": "garments"}, "checkpoint.pt --n 20", "the classifiers know only Fashion-MNIST"),
        (
            {"name": "CondUNet", "classes": ("0", "1")},
            "checkpoint.pt --n 20",
            "the classifiers know only Fashion-MNIST",
        ),
        ({"relabelled": "train"}, "checkpoint.pt --n 20", "the classifiers know only Fashion-MNIST"),
        ({"relabelled": "test"}, "checkpoint.pt --n 20", "the classifiers know only Fashion-MNIST"),
        ({"name": "TimeUNet"}, "checkpoint.pt --n 20 --guidance 1", "--guidance: TimeUNet in"),
        ({}, "checkpoint.pt --n 5", "error: argument --n: must be a whole number from 20 to 60,000, got '5'"),
        ({}, "checkpoint.pt --steps 0", "error: argument --steps: must be a whole number from 1"),
    ],
)
def test_what_cannot_be_done_is_reported(network, arguments, message, tiny, command, tmp_path, monkeypatch, capsys):
    tiny(**network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        command(*arguments.split())
    assert exit.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith("measure_quality.py: ")
    assert message in line
    assert bool(usage) == message.startswith("error: ")
