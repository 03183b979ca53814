"""The measurement of quality: its parts, and the command on tiny networks with judges that know nothing."""

import importlib
import itertools
import sys

import judge
import measure_quality
import numpy as np
import pytest
import torch

import reference_numpy as reference

data = importlib.import_module("data")
CPU = torch.device("cpu")
CLASSES = data.fashion_mnist.CLASSES


# Distances


def test_kernel_distance_pair_by_pair():
    """No image is compared to itself, so it is right however few there are; and no whole table is needed."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 4)), rng.standard_normal((5, 4)) + 1
    (aa, bb), ab = ((x @ x.T / 4 + 1) ** 3 for x in (a, b)), (a @ b.T / 4 + 1) ** 3
    expected = (aa.sum() - aa.trace()) / 42 + (bb.sum() - bb.trace()) / 20 - 2 * ab.mean()
    assert reference.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert reference.kernel_distance(b, a) == pytest.approx(expected, rel=1e-12)
    many, few = rng.standard_normal((2300, 3)), rng.standard_normal((50, 3))
    assert reference.kernel.kernel_sum(many, few) == pytest.approx(np.sum((many @ few.T / 3 + 1) ** 3), rel=1e-10)


def test_distances_are_small_for_halves_of_a_set_and_grow_with_a_shift():
    deviations = np.array([0.1, 1, 10])
    a, b = deviations * np.random.default_rng(0).standard_normal((2, 500, 3)) + [1, 2, 3]
    near, far = measure_quality.measure_distances(a, b), measure_quality.measure_distances(a + deviations, b)
    assert far[0] == pytest.approx(101, rel=0.15)  # as they are, the large one counts
    assert far[2] == pytest.approx(3, rel=0.15)  # standardised, each counts as one
    assert np.all(np.abs(near) < 0.05 * np.array(far))
    dead = [np.column_stack([x, np.full(len(x), value)]) for x, value in ((a, 5.0), (b, 0.0))]  # says nothing
    assert measure_quality.measure_distances(*dead)[2] == pytest.approx(near[2], rel=1e-6)


def test_nearest_neighbours_are_found_and_a_copy_is_found_out():
    """The second time, those that were found don't count."""
    images, others = torch.rand(2, 30, 1, 6, 5) * 2 - 1
    images[3], images[4] = others[17], others[8] + 0.01
    expected, numbers = (images[:, None] - others).square().mean(dim=(2, 3, 4)).sqrt().sort(dim=1)  # 30 30
    found, distances = measure_quality.find_nearest(images, others, batch_size=7)
    assert found[[3, 4]].tolist() == [17, 8]
    assert distances[[3, 4]].tolist() == pytest.approx([0, 0.01], abs=1e-6)
    second, further = measure_quality.find_nearest(images, others, but=found, batch_size=7)
    assert torch.equal(torch.stack([found, second], dim=1), numbers[:, :2])
    torch.testing.assert_close(torch.stack([distances, further], dim=1), expected[:, :2])


# Confusions, baselines, samples


def test_confusions_are_shares_of_the_class_asked_for():
    asked, taken_for = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 2, 1, 1])
    table = measure_quality.count_confusions(asked, taken_for, 3)
    assert table[:2].tolist() == [[0.5, 0.25, 0.25], [0, 1, 0]]


@pytest.fixture(scope="module")
def sets():
    """Little data sets under the official one's name: 40 training images, 20 test images."""
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28)).astype(np.uint8)
    train = data.Dataset(images[:40], np.arange(40) // 4, CLASSES, "Fashion-MNIST")
    return {"train": train, "test": data.Dataset(images[40:], np.arange(20) // 2, *train[2:])}


def test_baselines_have_equally_many_of_each_class(sets):
    images, labels, *_ = sets["train"]
    baselines = measure_quality.Baselines(sets["train"], 30)
    assert np.bincount(baselines.labels.numpy(), minlength=10).tolist() == [3] * 10
    assert len(set(baselines.numbers.tolist())) == 30
    assert np.array_equal(labels[baselines.numbers], baselines.labels)
    assert torch.equal(baselines.images[:, 0], torch.from_numpy(images[baselines.numbers]).float() / 127.5 - 1)


@pytest.fixture
def tiny(lesson3, redraw, monkeypatch, tmp_path):
    """tiny(network's name): the path of a checkpoint of such a network, with weights that nobody has trained."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, batch_size=4)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)
    monkeypatch.setattr(lesson3, "choose_precision", lambda device: None)

    def tiny(name="UntimedUNet", data_name="Fashion-MNIST", classes=CLASSES, epochs=1.0):
        run = lesson3.Run(name, "small", epochs, 4, 0, data_name, 40, classes, (28, 28), 0.7)
        denoiser = redraw(lesson3.make_denoiser(run, measure_quality.MODELS.get(name, measure_quality.UNTIMED), CPU))
        content = {"run": run._asdict(), "step": 1, "losses": torch.zeros(1), "ema": denoiser.state_dict()}
        lesson3.save_checkpoint(tmp_path / "checkpoint.pt", content)
        return tmp_path / "checkpoint.pt"

    return tiny


@pytest.mark.parametrize("method", ["ddim", "dpm++", "heun"])
def test_steps_and_evaluations(method, tiny):
    """Each class in turn, and its label in each evaluation; where guidance acts, "no label" as well."""
    denoiser, run = measure_quality.load_denoiser(tiny("CondUNet"), CPU)
    told = []
    denoiser.network.register_forward_pre_hook(lambda network, inputs: told.append(inputs[2].tolist()))
    images, labels = measure_quality.draw_samples(denoiser, run, 12, 4, 0.5, method)
    assert images.shape == (12, 1, 28, 28)
    assert images.abs().max() <= 1
    assert len(told) == measure_quality.count_evaluations(method, 4) == (7 if method == "heun" else 4)
    assert labels.tolist() == told[0] == [*range(10), 0, 1]
    assert told[-1] == [*told[0], *[10] * 12]
    assert (images[0] - images[10]).abs().max() > 0.1  # of one class, and not one image
    more, _ = measure_quality.draw_samples(denoiser, run, 13, 4, 0.5, method)
    torch.testing.assert_close(more[:12], images, rtol=0, atol=1e-4)


def test_without_label_means_without_any(tiny):
    """In training and in sampling."""
    told = measure_quality.MODELS["UnlabelledUNet"].told(torch.arange(10), 10)
    assert [label.tolist() for label in told] == [[10] * 10]
    denoiser, run = measure_quality.load_denoiser(tiny("UnlabelledUNet"), CPU)
    images, labels = measure_quality.draw_samples(denoiser, run, 3, 2)
    assert labels is None
    denoiser.network.embed_label.weight[:10] += 1
    assert torch.equal(measure_quality.draw_samples(denoiser, run, 3, 2)[0], images)


# The judges


def striped(n):
    """n images, uint8 (n, 28, 28), with noise and a bright stripe where the class says; labels (n,)."""
    labels = torch.arange(n) % 10
    images = torch.randint(0, 60, (n, 28, 28), dtype=torch.uint8)
    images[torch.arange(n), 2 * labels + 4] = 255  # across, so that it stays what it is when mirrored
    return images, labels


@pytest.mark.parametrize("name", ["residual", "plain"])
def test_a_judge_learns_and_is_kept(name, monkeypatch, tmp_path):
    monkeypatch.setattr(judge.lesson3, "choose_precision", lambda device: None)
    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "augment", lambda x, generator: x)  # the stripes are two pixels apart
    monkeypatch.setattr(judge.train, "__defaults__", (4, 10, 2e-3, 0))  # epochs, batch size, rate, seed
    learned = judge.get_judge(name, *striped(120))
    images, labels = striped(50)
    features, taken_for = judge.look(learned, judge.to_range(images), batch_size=30)
    assert features.shape == (50, 256)
    assert (taken_for == labels).float().mean() > 0.9
    assert [path.name for path in tmp_path.glob("judge/*")] == [f"{name}.pt"]
    monkeypatch.setattr(judge, "train", None)
    kept = judge.get_judge(name, images, labels)
    torch.testing.assert_close(judge.look(kept, judge.to_range(images))[0], features)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_judge_is_trained_in_the_precision_of_its_device(precision, monkeypatch):
    monkeypatch.setattr(judge.lesson3, "choose_precision", lambda device: precision)
    network, types = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)), []
    network.register_forward_hook(lambda network, inputs, output: types.append(output.dtype))
    judge.train(network, "", *striped(20), epochs=1, batch_size=20)
    assert types == [precision or torch.float32]


def test_a_residual_block_has_a_shortcut():
    block, x = judge.Block(2, 4, 2), torch.randn(3, 2, 8, 8)
    for parameter in block.branch.parameters():
        torch.nn.init.zeros_(parameter)
    expected = torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], x)[..., ::2, ::2].relu()
    torch.testing.assert_close(block(x), expected)


def test_augmentation_moves_and_mirrors_and_fills_with_background():
    x, seen = torch.rand(3, 1, 28, 28), set()
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2), value=-1)
    places = {(dy, dx): wide[:, :, dy : dy + 28, dx : dx + 28] for dy in range(5) for dx in range(5)}
    for seed in range(300):
        moved = judge.augment(x, torch.Generator().manual_seed(seed))
        both = {False: moved, True: moved.flip(3)}
        (found,) = [(place, mirror) for place in places for mirror in both if torch.equal(places[place], both[mirror])]
        seen.add(found)
    assert len(seen) == 50


class Reader(torch.nn.Module):
    """A judge whose features are the first ten pixels; the class is the brightest."""

    def __init__(self, *_):
        super().__init__()
        self.classify = torch.nn.Linear(10, 10, bias=False)
        self.classify.weight.data = torch.eye(10)

    def features(self, x):
        return x.flatten(1)[:, :10]


def test_the_panel_says_what_its_judges_see(sets, monkeypatch):
    monkeypatch.setattr(measure_quality, "get_judge", Reader)
    panel = measure_quality.Panel(sets["train"], sets["test"], CPU)
    for verdict in panel.judge(judge.to_range(torch.from_numpy(sets["test"].images))).values():
        assert verdict.distances[::2] == pytest.approx([0, 0], abs=1e-6)
        assert verdict.right is None
    images, seen = torch.rand(10, 1, 28, 28), [0, 1, 2, 3, 4, 5, 6, 7, 9, 8]
    images[range(10), 0, 0, seen] = 2
    pair = (x.flatten(1)[:, :10].double().numpy() for x in (images, torch.from_numpy(sets["test"].images) / 127.5 - 1))
    expected = measure_quality.measure_distances(*pair)
    for verdict in panel.judge(images, torch.arange(10)).values():
        assert verdict.taken_for.tolist() == seen
        assert [*verdict.distances, verdict.right] == pytest.approx([*expected, 0.8])


# The command


@pytest.fixture
def command(sets, lesson3, monkeypatch, tmp_path, capsys):
    """command(arguments): run it with the little data sets and small judges, and return what it prints."""

    def little_judge():
        return torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3, stride=5), torch.nn.Tanh())

    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "FEATURES", 16)
    monkeypatch.setattr(judge, "ARCHITECTURES", {"residual": little_judge, "plain": little_judge})
    monkeypatch.setattr(judge, "train", lambda *arguments, **options: None)
    monkeypatch.setattr(lesson3, "load_once", lambda name, split, data_dir: sets[split])
    monkeypatch.setattr(lesson3, "DATA", {})
    monkeypatch.setattr(measure_quality, "ROOT", tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["measure_quality.py", *map(str, arguments)])
        measure_quality.main()
        return capsys.readouterr().out

    return command


def written(text):
    return [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("wrote ")]


def test_a_checkpoint_is_measured(tiny, command, lesson4, tmp_path):
    text = command(tiny("CondUNet"), "--n", 20, "--steps", 2, "--method", "heun")
    assert f"20 with heun, 2 steps (3 evaluations each), guidance {lesson4.GUIDANCE:g}\n" in text
    for name in ("samples", "training images", "white noise"):
        assert text.count(f"\n{name} ") == 2 + (name == "samples")  # judges, neighbours, what is measured
    assert all(f"\n{name}" in text for name in CLASSES)
    assert written(text) == ["confusion.png", "nearest.png"]
    assert (tmp_path / "quality" / "nearest.png").exists()
    assert lesson4.GUIDANCE_LATER < lesson4.GUIDANCE
    later = command(tiny("CondUNet", epochs=10.0), "--sweep", "--n", 20, "--steps", 1)
    assert f"guidance {lesson4.GUIDANCE_LATER:g}\n" in later


def test_a_network_without_label_gets_no_figures_of_classes(tiny, command):
    text = command(tiny("TimeUNet"), "--n", 20, "--steps", 2)
    _, row, _ = (line.split() for line in text.splitlines() if line.startswith("samples"))
    assert row[4::4] == ["-", "-"]
    assert "guidance" not in text
    assert written(text) == ["nearest.png"]


def test_the_sweep(tiny, command, monkeypatch):
    drawn, draw, figures, save = [], measure_quality.draw_samples, [], measure_quality.lesson1.save_picture
    counter = itertools.count(1)
    monkeypatch.setattr(measure_quality.lesson1, "save_picture", lambda *args: figures.append(args[0]) or save(*args))
    monkeypatch.setattr(measure_quality, "draw_samples", lambda *settings: drawn.append(settings) or draw(*settings))
    monkeypatch.setattr(measure_quality, "measure_distances", lambda *features: [float(next(counter))] * 3)
    monkeypatch.setattr(measure_quality, "SWEPT_STEPS", (1, 2))
    monkeypatch.setattr(measure_quality, "SWEPT_GUIDANCE", (0, 0.5, 1))
    text = command(tiny("CondUNet"), "--sweep", "--n", 20, "--steps", 3, "--guidance", 0.7, "--method", "heun")
    expected = [(1, 0.7), (2, 0.7), (3, 0.7), (3, 0), (3, 0.5), (3, 1)]
    assert [(steps, guidance) for _, _, _, steps, guidance, _ in drawn] == expected
    rows = [line.split()[:3] for line in text.splitlines() if line[:5].strip().isdecimal()]
    assert rows == [[f"{steps}", f"{2 * steps - 1}", f"{guidance:g}"] for steps, guidance in expected]
    assert [tuple(axis.get_xticks()) for axis in figures[0].axes] == [(1, 2), (0, 0.5, 1)]
    for axis in figures[0].axes:
        for line in axis.lines:  # none leaves the picture
            assert 0 <= min(line.get_ydata()) <= max(line.get_ydata()) < axis.get_ylim()[1]
    assert written(text) == ["sweep_heun.png"]
    assert written(command(tiny("TimeUNet"), "--sweep", "--n", 20, "--steps", 2)) == ["sweep_dpm++.png"]


def test_the_ladder_keeps_what_is_trained(tiny, command, lesson3, monkeypatch, tmp_path):
    tiny()  # the small preset is a tiny one now
    timed = []

    def measure_seconds(layers, x, enough):
        timed.extend(layer(x).sum().backward() for layer in layers)
        return [0.1] * len(layers)

    monkeypatch.setattr(measure_quality.lesson2, "measure_seconds", measure_seconds)
    text, again = (command("--ladder", "--n", 20, "--steps", 2, "--epochs", 0.2) for _ in range(2))
    assert "ladder.png" in written(text)
    checkpoints = {path.parent.name: lesson3.load_checkpoint(path) for path in tmp_path.glob("runs/ladder/*/*.pt")}
    assert set(checkpoints) == {"UntimedUNet", "TimeUNet", "UnlabelledUNet", "CondUNet"}
    assert {checkpoint["run"].steps for checkpoint in checkpoints.values()} == {2}
    assert (text.count("training  2 steps"), again.count("training  finished in an earlier run")) == (4, 4)
    assert len(timed) == 8
    table, same = (lines.partition("\nFréchet distance")[2].partition("\nwrote")[0] for lines in (text, again))
    assert len(table.splitlines()) == 3 + 5 + 2
    assert table == same


def spoilt(name, write=lambda path: path.write_bytes(b"nothing")):
    """A checkpoint, and a file of that name that is something else."""

    def arguments(tiny, folder):
        path = tiny()
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name)
        return [path, "--n", 20]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (lambda *_: [], "either a CHECKPOINT, or --ladder"),
        (lambda tiny, _: [tiny(), "--ladder"], "either a CHECKPOINT, or --ladder"),
        (lambda *_: ["--ladder", "--sweep"], "--sweep needs a CHECKPOINT"),
        (lambda _, folder: [folder / "nothing.pt"], "nothing.pt: no checkpoint there"),
        (spoilt("checkpoint.pt"), "damaged, or not a checkpoint"),
        (lambda tiny, _: [tiny("VNet")], "not a network of these lessons"),
        (lambda tiny, _: [tiny(data_name="garments")], "Fashion-MNIST's own files alone, and not 'garments'"),
        (lambda tiny, _: [tiny("CondUNet", classes=("0", "1"))], "Fashion-MNIST's own files alone"),
        (lambda tiny, _: [tiny(), "--restart"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny(), "--epochs", "2"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny(), "--preset", "small"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny("TimeUNet"), "--guidance", "1"], "--guidance: TimeUNet in"),
        (lambda tiny, _: [tiny(), "--n", "5"], "error: argument --n: must be from 20 to 60000, got 5"),
        (lambda tiny, _: [tiny(), "--steps", "0"], "error: argument --steps: must be from 1"),
        (lambda tiny, _: [tiny(), "--out", __file__], "error: argument --out: must be a folder"),
        (spoilt("quality"), "--out must be a folder"),
        (spoilt("judge/plain.pt"), "plain.pt: damaged, or of another version"),
        (spoilt("judge/plain.pt", lambda path: torch.save(torch.zeros(3), path)), "plain.pt: damaged"),
        (spoilt("judge"), "residual.pt: can't be written"),
    ],
)
def test_what_cannot_be_done_is_said(arguments, told, tiny, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command(*arguments(tiny, tmp_path))
    assert exit.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert line.startswith("measure_quality.py: ")
    assert told in line
    assert bool(usage) == ("error: argument" in told)


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_images_are_refused_whatever_their_folder_is_called(split, tiny, command, sets, monkeypatch, capsys):
    monkeypatch.setitem(sets, split, sets[split]._replace(classes=tuple("0123456789")))
    with pytest.raises(SystemExit):
        command(tiny(), "--n", 20)
    assert "Fashion-MNIST's own files alone" in capsys.readouterr().err
