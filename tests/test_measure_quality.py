"""The measurement of quality: its parts, and the command on tiny networks with judges that know nothing."""

import sys

import judge
import measure_quality
import numpy as np
import pytest
import torch
from distances import frechet_distance

import data
import lesson_tools as tools

CPU = torch.device("cpu")
CLASSES = data.fashion_mnist.CLASSES


@pytest.mark.parametrize("n, m, d, tolerance", [(50, 60, 4, 1e-10), (300, 200, 16, 1e-10), (6, 9, 12, 1e-6)])
def test_frechet_distance(n, m, d, tolerance):
    """Against the eigenvalues of A B, not symmetric; of fewer images than features, with the root of rounding, 1e-8."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + 1
    roots = np.sqrt(np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0))
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * roots.sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=tolerance)
    assert frechet_distance(a, a) == pytest.approx(0, abs=tolerance)


def test_distances_are_small_for_halves_of_a_set_and_grow_with_a_shift():
    """The kernel distance compares pair by pair, but no image to itself."""
    deviations = np.array([0.1, 1, 10])
    a, b = deviations * np.random.default_rng(0).standard_normal((2, 1100, 3)) + [1, 2, 3]
    shifted, b = a + deviations, b[:500]
    near, far = measure_quality.measure_distances(a, b), measure_quality.measure_distances(shifted, b)
    assert far[0] == pytest.approx(101, rel=0.15)  # as they are, the large one counts
    assert far[2] == pytest.approx(3, rel=0.15)  # standardised, each counts as one
    assert np.all(np.abs(near) < 0.05 * np.array(far))
    (aa, bb), ab = ((x @ x.T / 3 + 1) ** 3 for x in (shifted, b)), (shifted @ b.T / 3 + 1) ** 3
    expected = (aa.sum() - aa.trace()) / (1100 * 1099) + (bb.sum() - bb.trace()) / (500 * 499) - 2 * ab.mean()
    assert far[1] == pytest.approx(1000 * expected, rel=1e-10)
    dead = [np.column_stack([x, np.full(len(x), value)]) for x, value in ((a, 5.0), (b, 0.0))]  # says nothing
    assert measure_quality.measure_distances(*dead)[2] == pytest.approx(near[2], rel=1e-6)


def test_nearest_neighbours_are_found_and_a_copy_is_found_out():
    """The second time, those that were found don't count."""
    images, others = torch.rand(2, 30, 1, 6, 5) * 2 - 1
    images[3], images[4] = others[17], others[8] + 0.01
    expected, numbers = (images[:, None] - others).square().mean(dim=(2, 3, 4)).sqrt().sort(dim=1)  # 30 30
    found, distances = measure_quality.find_nearest(images, others, batch_size=7)
    second, further = measure_quality.find_nearest(images, others, but=found, batch_size=7)
    assert torch.equal(torch.stack([found, second], dim=1), numbers[:, :2])
    torch.testing.assert_close(torch.stack([distances, further], dim=1), expected[:, :2])


@pytest.fixture(scope="module")
def sets():
    """Little data sets under the official one's name: 40 training images, 20 test images."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
    train = data.Dataset(lambda: images[:40], np.arange(40) // 4, CLASSES, "Fashion-MNIST")
    return {"train": train, "test": data.Dataset(lambda: images[40:], np.arange(20) // 2, CLASSES, "Fashion-MNIST")}


def test_baselines_have_equally_many_of_each_class(sets):
    images, labels = sets["train"].images, sets["train"].labels
    baselines = measure_quality.Baselines(sets["train"], 30)
    assert np.bincount(baselines.labels.numpy(), minlength=10).tolist() == [3] * 10
    assert len(set(baselines.numbers.tolist())) == 30
    assert np.array_equal(labels[baselines.numbers], baselines.labels)
    assert torch.equal(baselines.images[:, 0], torch.from_numpy(images[baselines.numbers]).float() / 127.5 - 1)


@pytest.fixture
def tiny(sets, lesson3, redraw, monkeypatch, tmp_path):
    """tiny(network's name): the path of a checkpoint of such a network, with weights that nobody has trained.

    spoilt: the name of a file beside it, or of itself, that is something else; relabelled: a set of other classes."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, batch_size=4)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)
    monkeypatch.setattr(tools, "choose_precision", lambda device: None)

    def tiny(name="UntimedUNet", data="Fashion-MNIST", classes=CLASSES, steps=10, spoilt=None, relabelled=None):
        settings = lesson3.RunSettings(name, "small", steps, 4, 0, data, 40, classes, (28, 28), 0.7)
        make_network, _ = measure_quality.NETWORKS.get(name, measure_quality.NETWORKS["TimeUNet"])
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
            given = sets[relabelled]
            numbered = type(given)(given.read_images, given.labels, tuple("0123456789"), given.name)
            monkeypatch.setitem(sets, relabelled, numbered)
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
    assert (images[0] - images[10]).abs().max() > 0.1  # of one class, and not one image
    more, _ = measure_quality.draw_samples(denoiser, settings, 13, 4, 0.5)
    torch.testing.assert_close(more[:12], images, rtol=0, atol=1e-4)


def test_without_label_means_without_any(tiny):
    """In training, where it gets some, and in sampling."""
    denoiser, settings = measure_quality.load_denoiser(tiny("UnlabelledUNet"), CPU)
    x, label = torch.randn(3, 1, 28, 28), torch.tensor([0, 9, 10])
    assert torch.equal(denoiser(x, 1.0, label), denoiser(x, 1.0))
    images, labels = measure_quality.draw_samples(denoiser, settings, 3, 2)
    assert labels is None
    denoiser.network.embed_label.weight[:10] += 1
    assert torch.equal(measure_quality.draw_samples(denoiser, settings, 3, 2)[0], images)


def striped(n):
    """n images, uint8 (n, 28, 4), with noise and a bright stripe where the class says; labels (n,)."""
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, 28, 4), dtype=torch.uint8)  # narrow ones are learned faster
    images[torch.arange(n), 2 * labels + 4] = 255
    return images, labels


@pytest.mark.parametrize(("name", "precision"), [("residual", None), ("plain", torch.bfloat16)])
def test_a_judge_learns_in_the_precision_of_its_device_and_is_kept(name, precision, monkeypatch, tmp_path):
    types, loss = set(), judge.F.cross_entropy
    monkeypatch.setattr(judge.F, "cross_entropy", lambda y, *rest, **more: types.add(y.dtype) or loss(y, *rest, **more))
    monkeypatch.setattr(tools, "choose_precision", lambda device: precision)
    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "augment", lambda x, generator: x)  # the stripes are two pixels apart
    monkeypatch.setattr(judge.train, "__defaults__", (4, 10, 2e-3, 0))  # epochs, batch size, rate, seed
    learned = judge.get_judge(name, *striped(120))
    assert types == {precision or torch.float32}
    images, labels = striped(50)
    features, taken_for = judge.look(learned, judge.to_range(images), batch_size=30)
    assert features.shape == (50, 256)
    assert (taken_for == labels).float().mean() > 0.9
    (path,) = tmp_path.glob("judge/*")
    assert path.name == f"{name}.pt"
    monkeypatch.setattr(judge, "train", None)
    kept = judge.get_judge(name, images, labels)
    torch.testing.assert_close(judge.look(kept, judge.to_range(images))[0], features)
    torch.save(torch.zeros(3), path)
    with pytest.raises(tools.UserError, match=f"{name}.pt: damaged, or of another version"):
        judge.get_judge(name, images, labels)


def test_a_residual_block_has_a_shortcut():
    block, x = judge.Block(2, 4, 2), torch.randn(3, 2, 8, 8)
    for parameter in block.branch.parameters():
        torch.nn.init.zeros_(parameter)
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], x)[..., ::2, ::2].relu()
    torch.testing.assert_close(block(x), expected)


def test_augmentation_moves_and_mirrors_and_fills_with_background():
    x = torch.rand(3, 1, 28, 28)
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), value=-1)
    places = [wide[:, :, dy : dy + 28, dx : dx + 28] for dy in range(5) for dx in range(5)]
    places += [place.flip(3) for place in places]
    moved = [judge.augment(x, torch.Generator().manual_seed(seed)) for seed in range(300)]
    found = torch.tensor([[torch.equal(each, place) for place in places] for each in moved])
    assert torch.all(found.sum(dim=1) == 1)
    assert torch.all(found.any(dim=0))


@pytest.fixture
def little_judges(monkeypatch, tmp_path):
    """They have learned nothing: their 16 features are means of every fourth pixel in every fourth row."""
    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "FEATURES", 16)
    monkeypatch.setattr(judge, "ARCHITECTURES", dict.fromkeys(judge.ARCHITECTURES, lambda: torch.nn.PixelUnshuffle(4)))
    monkeypatch.setattr(judge, "train", lambda *arguments, **options: None)


def test_the_panel_says_what_its_judges_see(sets, little_judges):
    panel, images = measure_quality.Panel(sets["train"], sets["test"], CPU), 5 * torch.randn(10, 1, 28, 28)
    both = images, torch.from_numpy(sets["test"].images)[:, None] / 127.5 - 1
    pair = (torch.pixel_unshuffle(x, 4).mean(dim=(2, 3)).double().numpy() for x in both)
    expected = measure_quality.measure_distances(*pair)
    for name, little in panel.judges.items():
        seen = little(images).argmax(dim=1)
        verdict = panel.judge(images, torch.cat([(seen[:2] + 1) % 10, seen[2:]]))[name]
        assert [*verdict.distances, verdict.right] == pytest.approx([*expected, 0.8])


@pytest.fixture
def command(sets, little_judges, monkeypatch, tmp_path, capsys):
    """command(arguments): run it with the little data sets and judges; returns what it prints, and what it writes."""
    monkeypatch.setattr(tools, "load_data", lambda name, split, data_dir: sets[split])
    monkeypatch.setattr(tools, "RUNS", tmp_path / "runs")

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["measure_quality.py", *map(str, arguments)])
        tools.run_command(measure_quality.main)
        text = capsys.readouterr().out
        return text, [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("wrote ")]

    return command


def test_a_checkpoint_is_measured(tiny, command):
    text, written = command(tiny("CondUNet"), "--n", 20, "--steps", 2, "--guidance", 0.7)
    assert "20 in 2 steps, guidance 0.7\n" in text
    for name in ("samples", "training images", "white noise"):
        assert text.count(f"\n{name} ") == 2 + (name == "samples")  # judges, neighbours, what is measured
    assert not written
    text, _ = command(tiny("TimeUNet"), "--n", 20, "--steps", 2)
    _, row, _ = (line.split() for line in text.splitlines() if line.startswith("samples"))
    assert row[4::4] == ["-", "-"]
    assert "guidance" not in text


def test_the_sweep(tiny, command, lesson4, monkeypatch):
    drawn, draw = [], measure_quality.draw_samples
    strong, later = lesson4.GUIDANCE, lesson4.GUIDANCE_LONG
    monkeypatch.setattr(measure_quality, "draw_samples", lambda *given: drawn.append(given) or draw(*given))
    monkeypatch.setattr(measure_quality, "SWEPT_STEPS", (1, 2))
    monkeypatch.setattr(measure_quality, "SWEPT_GUIDANCE", (0, 0.5, strong))
    text, _ = command(tiny("CondUNet", steps=200_000), "--sweep", "--n", 20, "--steps", 3)
    expected = [(1, later), (2, later), (3, later), (3, 0), (3, 0.5), (3, strong)]
    assert [(steps, guidance) for *_, steps, guidance in drawn] == expected
    rows = [line.split()[:2] for line in text.splitlines() if line[:5].strip().isdecimal()]
    assert rows == [[f"{steps}", f"{guidance:g}"] for steps, guidance in expected]
    assert "\ntraining images" in command(tiny("TimeUNet"), "--sweep", "--n", 20, "--steps", 2)[0]


def test_the_ladder_keeps_what_is_trained(tiny, command, lesson4, monkeypatch, tmp_path):
    tiny()  # the small preset is a tiny one now
    measure_seconds = lambda layers, x, enough: [layer(x).sum().backward() or 0.1 for layer in layers]  # noqa: E731
    monkeypatch.setattr(measure_quality.lesson2, "measure_seconds", measure_seconds)
    (text, written), (again, _) = (command("--ladder", "--n", 20, "--steps", 2, "--epochs", 0.2) for _ in range(2))
    assert "ladder.png" in written
    folders = {path.parent.name for path in tmp_path.glob("runs/ladder/*/checkpoint.pt")}
    assert folders == {"UntimedUNet", "TimeUNet", "UnlabelledUNet", "CondUNet"}
    assert (text.count("training  2 steps"), again.count("training  finished in an earlier run")) == (4, 4)
    table, same = (lines.partition("\nFréchet distance")[2].partition("\nwrote")[0] for lines in (text, again))
    assert len(table.splitlines()) == 3 + 5 + 2
    assert f"with guidance {lesson4.GUIDANCE:g} " in table
    assert table == same


@pytest.mark.parametrize(
    ("network", "arguments", "message"),
    [
        ({}, "", "either a CHECKPOINT, or --ladder"),
        ({}, "checkpoint.pt --ladder", "either a CHECKPOINT, or --ladder"),
        ({}, "nothing.pt", "nothing.pt: no checkpoint of these lessons there"),
        ({"spoilt": "checkpoint.pt"}, "checkpoint.pt --n 20", "damaged, or not a checkpoint"),
        ({"name": "VNet"}, "checkpoint.pt --n 20", "no checkpoint of these lessons there"),
        ({"data": "garments"}, "checkpoint.pt --n 20", "Fashion-MNIST's own files alone"),
        ({"name": "CondUNet", "classes": ("0", "1")}, "checkpoint.pt --n 20", "Fashion-MNIST's own files alone"),
        ({"relabelled": "train"}, "checkpoint.pt --n 20", "the judges know Fashion-MNIST's own files"),
        ({"relabelled": "test"}, "checkpoint.pt --n 20", "the judges know Fashion-MNIST's own files"),
        ({"name": "TimeUNet"}, "checkpoint.pt --n 20 --guidance 1", "--guidance: TimeUNet in"),
        ({}, "checkpoint.pt --n 5", "error: argument --n: must be a whole number from 20 to 60,000, got '5'"),
        ({}, "checkpoint.pt --steps 0", "error: argument --steps: must be a whole number from 1"),
        ({"spoilt": "judge/plain.pt"}, "checkpoint.pt --n 20", "plain.pt: damaged, or of another version"),
        ({"spoilt": "judge"}, "checkpoint.pt --n 20", "residual.pt: can't be written"),
    ],
)
def test_what_cannot_be_done_is_said(network, arguments, message, tiny, command, tmp_path, monkeypatch, capsys):
    tiny(**network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        command(*arguments.split())
    assert exit.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith("measure_quality.py: ")
    assert message in line
    assert bool(usage) == ("error: argument" in message)
