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
CLASSES = data.fashion_mnist.CLASSES


# The kernel distance


def test_kernel_distance_pair_by_pair():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((7, 4)), rng.standard_normal((5, 4)) + 1

    def mean_kernel(a, b):
        same = a is b
        values = [(x @ y / 4 + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not (same and i == j)]
        return sum(values) / len(values)

    expected = mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)
    assert reference.kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert reference.kernel_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_kernel_sum_needs_no_whole_table():
    a, b = np.random.default_rng(0).standard_normal((2, 2300, 3))
    assert reference.kernel.kernel_sum(a, b[:50]) == pytest.approx(np.sum((a @ b[:50].T / 3 + 1) ** 3), rel=1e-10)


def test_kernel_distance_is_right_however_few_the_images():
    """Halves of one set: around zero, and negative about as often as not. Moved by 1, it is what it is for many."""
    rng = np.random.default_rng(0)
    halves = [reference.kernel_distance(*rng.standard_normal((2, 10, 3))) for _ in range(400)]
    error = np.std(halves) / 400**0.5
    assert abs(np.mean(halves)) < 3 * error
    assert 0.3 < np.mean(np.array(halves) < 0) < 0.8
    apart = np.array([0, 1])[:, None, None]
    moved = [reference.kernel_distance(*(rng.standard_normal((2, 10, 3)) + apart)) for _ in range(400)]
    many = reference.kernel_distance(*(rng.standard_normal((2, 3000, 3)) + apart))
    assert many > 20 * error
    assert abs(np.mean(moved) - many) < 4 * np.std(moved) / 400**0.5


def test_all_distances_are_small_for_halves_of_a_set_and_grow_with_a_shift():
    rng = np.random.default_rng(0)
    deviations = np.array([0.1, 1, 10])
    a, b = deviations * rng.standard_normal((2, 500, 3)) + [1, 2, 3]
    near = measure_quality.measure_distances(a, b)
    far = measure_quality.measure_distances(a + deviations, b)
    assert far[2] == pytest.approx(3, rel=0.15)  # standardised, each counts as one
    assert far[0] == pytest.approx(101, rel=0.15)  # as they are, the large one does
    for small, large in zip(near, far, strict=True):
        assert abs(small) < 0.05 * large


def test_features_that_say_nothing_are_left_out():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 3))
    expected = measure_quality.measure_distances(a, b)[2:]
    with_dead = [np.column_stack([x, np.full(len(x), value)]) for x, value in ((a, 5.0), (b, 0.0))]
    distances = measure_quality.measure_distances(*with_dead)
    assert np.isfinite(distances).all()
    assert distances[2] == pytest.approx(expected[0], rel=1e-6)


# Nearest neighbours


def test_nearest_neighbours_are_found_and_a_copy_is_found_out():
    images, others = torch.rand(2, 30, 1, 6, 5) * 2 - 1
    images[3] = others[17]
    images[4] = others[8] + 0.01
    found, distances = measure_quality.find_nearest(images, others, batch_size=7)
    table = (images[:, None] - others).square().mean(dim=(2, 3, 4)).sqrt()  # 30 30
    torch.testing.assert_close(distances, table.amin(dim=1))
    assert torch.equal(found, table.argmin(dim=1))
    assert found[[3, 4]].tolist() == [17, 8]
    assert distances[[3, 4]].tolist() == pytest.approx([0, 0.01], abs=1e-6)


def test_an_image_is_not_its_own_neighbour():
    others = torch.rand(20, 1, 6, 5)
    numbers = torch.tensor([5, 0, 19, 5])
    found, distances = measure_quality.find_nearest(others[numbers], others, but=numbers, batch_size=3)
    assert not (found == numbers).any()
    table = (others[numbers][:, None] - others).square().mean(dim=(2, 3, 4)).sqrt()
    torch.testing.assert_close(distances, table.sort(dim=1).values[:, 1])


# Confusions, baselines, samples


def test_confusions_are_shares_of_the_class_asked_for():
    asked, taken_for = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 2, 1, 1])
    table = measure_quality.count_confusions(asked, taken_for, 3)
    assert table[0].tolist() == [0.5, 0.25, 0.25]
    assert table[1].tolist() == [0, 1, 0]


@pytest.fixture(scope="module")
def sets():
    """Little data sets under the official one's name: 40 training images, 20 test images."""
    rng = np.random.default_rng(0)
    return {
        split: data.Dataset(
            rng.integers(0, 256, (n, 28, 28)).astype(np.uint8), np.arange(n) // (n // 10), CLASSES, "Fashion-MNIST"
        )
        for split, n in (("train", 40), ("test", 20))
    }


def test_baselines_have_equally_many_of_each_class(sets):
    baselines = measure_quality.Baselines(sets["train"], 30)
    assert np.bincount(baselines.labels.numpy(), minlength=10).tolist() == [3] * 10
    assert len(set(baselines.numbers.tolist())) == 30
    assert torch.equal(
        baselines.images[:, 0], torch.from_numpy(sets["train"].images[baselines.numbers]).float() / 127.5 - 1
    )
    assert np.array_equal(sets["train"].labels[baselines.numbers], baselines.labels)


@pytest.fixture
def tiny(lesson3, redraw, monkeypatch, tmp_path):
    """tiny(network's name): the path of a checkpoint of such a network, with weights that nobody has trained."""
    preset = lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=2, head_dim=8, batch_size=4)
    monkeypatch.setitem(lesson3.PRESETS, "small", preset)

    def tiny(name, data_name="Fashion-MNIST", classes=CLASSES, epochs=1.0):
        run = lesson3.Run(name, "small", epochs, 4, 0, data_name, 40, classes, (28, 28), 0.7)
        network_class = measure_quality.NETWORKS.get(name, lesson3.UNet)
        denoiser = redraw(lesson3.make_denoiser(run, network_class, torch.device("cpu")))
        content = {"run": run._asdict(), "step": 1, "losses": torch.zeros(1), "average": denoiser.state_dict()}
        lesson3.save_checkpoint(tmp_path / "checkpoint.pt", content)
        return tmp_path / "checkpoint.pt"

    return tiny


def test_heun_takes_as_many_evaluations_as_the_others_or_one_less(tiny):
    denoiser, run = measure_quality.load_denoiser(tiny("CondUNet"), torch.device("cpu"))
    counts = {}
    for method in ("ddim", "dpm++", "heun"):
        calls = []
        handle = denoiser.network.register_forward_pre_hook(lambda network, inputs, calls=calls: calls.append(inputs))
        images, labels = measure_quality.draw_samples(denoiser, run, 12, 7, 0.5, method, batch_size=12)
        handle.remove()
        counts[method] = len(calls)
        assert images.shape == (12, 1, 28, 28)
        assert images.abs().max() <= 1
        assert labels.tolist() == [*range(10), 0, 1]
        assert calls[0][2].tolist() == [*range(10), 0, 1]  # asked for,
        assert calls[-1][2].tolist() == [*range(10), 0, 1, *[10] * 12]  # and in the end no label as well
    assert counts == {"ddim": 7, "dpm++": 7, "heun": 7}


def test_a_sample_is_the_same_in_any_batch(tiny):
    denoiser, run = measure_quality.load_denoiser(tiny("CondUNet"), torch.device("cpu"))
    denoiser.precision = None
    few, _ = measure_quality.draw_samples(denoiser, run, 11, 2, 0.5, batch_size=11)
    more, _ = measure_quality.draw_samples(denoiser, run, 13, 2, 0.5, batch_size=3)
    torch.testing.assert_close(more[:11], few)
    assert (few[0] - few[10]).abs().max() > 0.1  # of one class, and not one image
    rows = denoiser.network.embed_label.weight
    rows[:] = rows[[1, 0, *range(2, 11)]]
    other, _ = measure_quality.draw_samples(denoiser, run, 11, 2, 0.5, batch_size=3)
    changed = (other - few).flatten(1).abs().amax(dim=1) > 1e-3
    assert changed.nonzero().flatten().tolist() == [0, 1, 10]  # those that were told one of these two labels


# The judges


@pytest.fixture
def striped():
    """striped(n): n images, uint8 (n, 28, 28), with noise and a bright stripe where the class says; labels (n,)."""

    def striped(n):
        labels = torch.arange(n) % 10
        images = torch.randint(0, 60, (n, 28, 28), dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 4] = 255  # across, so that it stays what it is when mirrored
        return images, labels

    return striped


@pytest.mark.parametrize("name", ["residual", "plain"])
def test_a_judge_learns_and_is_kept(name, striped, monkeypatch, tmp_path):
    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "augment", lambda x, generator: x)  # the stripes are two pixels apart
    monkeypatch.setattr(judge.train, "__defaults__", (5, 20, 2e-3, 0))  # epochs, batch size, rate, seed
    learned = judge.get_judge(name, *striped(200))
    images, labels = striped(100)
    features, taken_for = judge.look(learned, judge.to_range(images), batch_size=30)
    assert features.shape == (100, 256)
    assert (taken_for == labels).float().mean() > 0.9
    assert [path.name for path in tmp_path.glob("judge/*")] == [f"{name}.pt"]
    monkeypatch.setattr(judge, "train", None)
    kept = judge.get_judge(name, images, labels)
    torch.testing.assert_close(judge.look(kept, judge.to_range(images))[0], features)


def test_a_residual_block_has_a_shortcut():
    block = judge.Block(2, 4, 2)
    for parameter in block.branch.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(3, 2, 8, 8)
    torch.testing.assert_close(
        block(x), torch.einsum("oi,nihw->nohw", block.shortcut.weight[..., 0, 0], x)[..., ::2, ::2].relu()
    )


def test_augmentation_moves_and_mirrors_and_fills_with_background():
    x = torch.rand(3, 1, 28, 28)
    seen = set()
    for seed in range(300):
        moved = judge.augment(x, torch.Generator().manual_seed(seed))
        found = [
            (dy, dx, mirror)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for mirror in (False, True)
            if torch.equal(shift(x, dy, dx, mirror), moved)
        ]
        assert len(found) == 1
        seen |= set(found)
    assert len(seen) == 50


def shift(x, dy, dx, mirror):
    """A batch moved down and right by some pixels, with -1 where nothing was, and then mirrored."""
    moved = torch.full_like(x, -1)
    ours, theirs = ([slice(max(0, sign * d), 28 + min(0, sign * d)) for d in (dy, dx)] for sign in (1, -1))
    moved[:, :, ours[0], ours[1]] = x[:, :, theirs[0], theirs[1]]
    return moved.flip(3) if mirror else moved


def test_the_panel_says_what_its_judges_see(sets, monkeypatch):
    """With a judge that reads class and features from the first pixels."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.classify = torch.nn.Linear(3, 10)

        def features(self, x):
            return x.flatten(1)[:, :3]

    reader = Reader()
    reader.classify.weight.data = torch.linspace(0, 1, 10)[:, None] * torch.tensor([1.0, 0, 0])
    reader.classify.bias.data = -(torch.linspace(0, 1, 10) ** 2) / 2  # the class whose number / 9 is nearest to a pixel
    monkeypatch.setattr(measure_quality, "get_judge", lambda *_: reader)
    panel = measure_quality.Panel(sets["train"], sets["test"], torch.device("cpu"))
    images = judge.to_range(torch.from_numpy(sets["test"].images))
    for verdict in panel.judge(images).values():  # the test images themselves
        assert verdict.distances[0] == pytest.approx(0, abs=1e-6)
        assert verdict.distances[2] == pytest.approx(0, abs=1e-6)
        assert verdict.right is None
    asked = torch.arange(10)
    images = torch.randn(10, 1, 28, 28)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 8]) / 9
    for verdict in panel.judge(images, asked).values():
        assert verdict.taken_for.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 8]
        assert verdict.right == pytest.approx(0.8)
        expected = reference.frechet_distance(
            images.flatten(1)[:, :3].double().numpy(), panel.seen["plain"][0].double().numpy()
        )
        assert verdict.distances[0] == pytest.approx(expected)
        assert expected > 0.1


# The command


@pytest.fixture
def command(sets, lesson3, monkeypatch, tmp_path, capsys):
    """command(arguments): run it with the little data sets and small judges, and return what it prints."""

    def little_judge():
        return torch.nn.Sequential(torch.nn.Conv2d(1, 256, 3, stride=5), torch.nn.Tanh())

    def load(name, split, data_dir=None):
        return sets[split]

    monkeypatch.setattr(judge, "KEPT", tmp_path / "judge")
    monkeypatch.setattr(judge, "ARCHITECTURES", {"residual": little_judge, "plain": little_judge})
    monkeypatch.setattr(judge, "train", lambda *arguments, **options: None)
    monkeypatch.setattr(data, "load", load)
    monkeypatch.setattr(lesson3, "load", load)
    monkeypatch.setattr(measure_quality, "ROOT", tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["measure_quality.py", *map(str, arguments)])
        measure_quality.main()
        return capsys.readouterr().out

    return command


def written(text):
    return [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("wrote ")]


def test_a_checkpoint_is_measured(tiny, command, lesson4, tmp_path):
    text = command(tiny("CondUNet"), "--n", 20, "--steps", 4, "--method", "heun")
    assert "with heun, 3 evaluations each" in text
    for name in ("samples", "training images", "white noise"):
        assert text.count(f"\n{name} ") == 2 + 1 + (name == "samples")  # judges, neighbours, what is measured
    assert all(f"\n{name}" in text for name in CLASSES)
    assert f"guidance {lesson4.GUIDANCE:g}\n" in text
    assert written(text) == ["confusion.png", "nearest.png"]
    assert (tmp_path / "quality" / "nearest.png").exists()


def test_a_network_that_was_trained_for_long_has_less_guidance(tiny, command, lesson4):
    assert lesson4.GUIDANCE_LATER < lesson4.GUIDANCE
    text = command(tiny("CondUNet", epochs=10.0), "--n", 20, "--steps", 1)
    assert f"guidance {lesson4.GUIDANCE_LATER:g}\n" in text


@pytest.mark.parametrize("name", ["UNet", "TimeUNet", "UnlabelledUNet"])
def test_a_network_without_label_gets_no_figures_of_classes(tiny, command, name):
    text = command(tiny(name), "--n", 20, "--steps", 2)
    assert "distances of 20 each" in text
    assert "right class" not in text
    assert "guidance" not in text
    assert written(text) == ["nearest.png"]


def test_the_sweep(tiny, command, monkeypatch):
    drawn, draw, figures, save = [], measure_quality.draw_samples, [], measure_quality.lesson1.save_picture
    monkeypatch.setattr(
        measure_quality.lesson1, "save_picture", lambda figure, path: figures.append(figure) or save(figure, path)
    )
    monkeypatch.setattr(measure_quality, "SWEPT_STEPS", (1, 2))
    monkeypatch.setattr(measure_quality, "SWEPT_GUIDANCE", (0, 0.5, 1))
    monkeypatch.setattr(measure_quality, "draw_samples", lambda *settings: drawn.append(settings) or draw(*settings))
    counter = itertools.count(1)
    monkeypatch.setattr(measure_quality, "measure_distances", lambda *features: [float(next(counter))] * 4)
    text = command(tiny("CondUNet"), "--sweep", "--n", 20, "--steps", 3, "--guidance", 0.7)
    rows = [line.split()[:2] for line in text.splitlines() if line[:5].isspace()]
    expected = [("1", "0.7"), ("2", "0.7"), ("3", "0.7"), ("3", "0"), ("3", "0.5"), ("3", "1")]
    assert [tuple(row) for row in rows if row[0].isdecimal()] == expected
    assert [(str(steps), f"{guidance:g}") for _, _, _, steps, guidance, _ in drawn] == expected
    assert len(figures[0].axes) == 2
    for axis in figures[0].axes:
        for line in axis.lines:  # none leaves the picture, and no two ticks are of one place
            assert 0 <= min(line.get_ydata()) <= max(line.get_ydata()) < axis.get_ylim()[1]
    assert [tuple(axis.get_xticks()) for axis in figures[0].axes] == [(1, 2), (0, 0.5, 1)]
    assert written(text) == ["sweep_dpm++.png"]
    text = command(tiny("CondUNet"), "--sweep", "--n", 20, "--method", "heun", "--steps", 4)
    assert [steps for _, _, _, steps, _, _ in drawn[6:]] == [1, 3, 3, 3, 3]
    text = command(tiny("TimeUNet"), "--sweep", "--n", 20, "--steps", 2)
    assert written(text) == ["sweep_dpm++.png"]


def test_the_ladder_keeps_what_is_trained(tiny, command, lesson3, monkeypatch, tmp_path):
    tiny("UNet")  # the small preset is a tiny one now
    timed = []

    def measure_seconds(layers, x, enough):
        timed.append(len([layer(x) for layer in layers]))
        return [0.1] * len(layers)

    monkeypatch.setattr(measure_quality.lesson2, "measure_seconds", measure_seconds)
    arguments = "--ladder", "--n", 20, "--steps", 2, "--epochs", 0.2
    text = command(*arguments)
    assert "ladder.png" in written(text)
    assert text.count("training  2 steps") == 4
    checkpoints = {path.parent.name: lesson3.load_checkpoint(path) for path in tmp_path.glob("runs/ladder/*/*.pt")}
    assert set(checkpoints) == set(measure_quality.NETWORKS) == {"UNet", "TimeUNet", "UnlabelledUNet", "CondUNet"}
    assert {checkpoint["run"].steps for checkpoint in checkpoints.values()} == {2}
    again = command(*arguments)
    assert again.count("training  finished in an earlier run") == 4

    assert timed == [4, 4]

    def table(text):
        return [line for line in text.splitlines() if line.startswith(("with", "training images", "white"))]

    assert len(table(text)) == 7
    assert table(again) == table(text)


def test_without_label_means_without_any(lesson4):
    network = measure_quality.UnlabelledUNet(4, (8, 16), 1, 2, (1,), 8, 10)
    assert network.training_label(torch.arange(10), None).tolist() == [10] * 10


def damaged(tiny, folder):
    path = tiny("UNet")
    path.write_bytes(path.read_bytes()[:500])
    return [path]


def damaged_judge(tiny, folder):
    (folder / "judge").mkdir()
    (folder / "judge" / "plain.pt").write_bytes(b"no judge")
    return [tiny("UNet"), "--n", "20"]


def another_judge(tiny, folder):
    (folder / "judge").mkdir()
    torch.save(torch.zeros(3), folder / "judge" / "residual.pt")
    return [tiny("UNet"), "--n", "20"]


def no_place_for_a_judge(tiny, folder):
    (folder / "judge").write_bytes(b"")
    return [tiny("UNet"), "--n", "20"]


def no_checkpoint(content):
    def write(tiny, folder):
        torch.save(content, folder / "tensor.pt")
        return [folder / "tensor.pt"]

    return write


def without_average(tiny, folder):
    path = tiny("UNet")
    content = torch.load(path, weights_only=True)
    del content["average"]
    torch.save(content, path)
    return [path]


@pytest.mark.parametrize(
    ("make_arguments", "told"),
    [
        (lambda *_: [], "either a CHECKPOINT, or --ladder"),
        (lambda tiny, _: [tiny("UNet"), "--ladder"], "either a CHECKPOINT, or --ladder"),
        (lambda *_: ["--ladder", "--sweep"], "--sweep needs a CHECKPOINT"),
        (lambda _, folder: [folder / "nothing.pt"], "nothing.pt: no checkpoint there"),
        (damaged, "damaged, or not a checkpoint"),
        (lambda tiny, _: [tiny("VNet")], "not a network of these lessons"),
        (no_checkpoint(torch.zeros(3)), "damaged, or not a checkpoint"),
        (no_checkpoint(torch.zeros(())), "damaged, or not a checkpoint"),
        (no_checkpoint(["run"]), "damaged, or not a checkpoint"),
        (without_average, "damaged, or not a checkpoint"),
        (lambda tiny, _: [tiny("UNet", "garments")], "Fashion-MNIST's own files alone, and not 'garments'"),
        (lambda tiny, _: [tiny("CondUNet", classes=("0", "1"))], "Fashion-MNIST's own files alone"),
        (lambda tiny, _: [tiny("UNet"), "--n", "41"], "--n 41: at most 40"),
        (lambda tiny, _: [tiny("UNet"), "--restart"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny("UNet"), "--epochs", "2"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny("UNet"), "--preset", "small"], "--restart are the ladder's"),
        (lambda tiny, _: [tiny("TimeUNet"), "--guidance", "1"], "--guidance: TimeUNet in"),
        (lambda tiny, _: [tiny("UNet"), "--n", "5"], "a whole number from 20 up, got '5'"),
        (lambda tiny, _: [tiny("UNet"), "--steps", "0"], "a whole number from 1 up, got '0'"),
        (lambda tiny, _: [tiny("UNet"), "--method", "euler"], "invalid choice: 'euler'"),
        (lambda tiny, _: [tiny("UNet"), "--n", "20", "--out", __file__], "--out must be a folder"),
        (damaged_judge, "plain.pt: damaged, or of another version"),
        (another_judge, "residual.pt: damaged, or of another version"),
        (no_place_for_a_judge, "residual.pt: can't be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(make_arguments, told, tiny, command, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command(*make_arguments(tiny, tmp_path))
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("measure_quality.py: ")
    assert told in line


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_images_are_refused_whatever_their_folder_is_called(split, tiny, command, sets, monkeypatch, capsys):
    monkeypatch.setitem(sets, split, sets[split]._replace(classes=tuple("0123456789")))
    with pytest.raises(SystemExit):
        command(tiny("UNet"), "--n", 20)
    assert "Fashion-MNIST's own files alone" in capsys.readouterr().err
