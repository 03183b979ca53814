"""What measure_speed compares and counts. No test here depends on how long anything takes."""

import itertools

import measure_speed
import pytest
import torch

CPU = torch.device("cpu")


@pytest.fixture
def tiny(lesson3, monkeypatch):
    """Presets small enough for tests."""
    preset = lesson3.PRESETS["small"]._replace(widths=(16, 32), groups=4, head_dim=8)
    for name in ("small", "lecture"):
        monkeypatch.setitem(lesson3.PRESETS, name, preset)


class FakeClock:
    """A clock that advances only during calls: those of the function work(1, 2) take 1, 2, 1, 2, ... seconds."""

    now = 0.0

    def __call__(self):
        return self.now

    def work(self, *seconds):
        left = itertools.cycle(seconds)
        return lambda *_: setattr(self, "now", self.now + next(left))


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (18, 2), (19, 3), (30, 4)])
def test_a_round_runs_each_once_and_rounds_go_on_until_the_time_is_up(seconds, rounds):
    clock = FakeClock()
    runs = {"a": clock.work(1, 3, 2), "b": clock.work(7)}
    taken = measure_speed.interleave(runs, rounds=2, seconds=seconds, clock=clock)
    assert taken == {"a": [1, 3, 2, 1][:rounds], "b": [7] * rounds}


def test_ratios_are_those_of_the_same_round():
    """A machine that slows down for a round slows down both."""
    assert measure_speed.compare([10, 1, 30], [5, 0.5, 10]) == (2, 2, 3)


def test_competitors_have_the_same_structure_and_lesson_4s_batches(tiny, lesson3, monkeypatch):
    """Equal numbers of parameters; only "by hand" computes attention by hand. One label in ten is dropped."""
    by_hand, attention, counts = [], measure_speed.lesson2.attention, set()
    monkeypatch.setattr(measure_speed.lesson2, "attention", lambda *qkv: by_hand.append(kind) or attention(*qkv))
    for kind in ("ours", "by hand", "diffusers"):
        denoiser = measure_speed.Competitor(kind, "small").make_denoiser(CPU)
        assert denoiser(torch.randn(2, 1, 28, 28), torch.ones(2), torch.tensor([0, 9])).shape == (2, 1, 28, 28)
        counts.add(lesson3.count_parameters(denoiser))
    assert len(counts) == 1 and set(by_hand) == {"by hand"}
    labels, loss = [], lesson3.denoising_loss
    monkeypatch.setattr(lesson3, "denoising_loss", lambda *parts: labels.append(parts[4]) or loss(*parts))
    measure_speed.start_training(measure_speed.Competitor("ours", "small"), CPU, 64)()
    assert 10 in labels[0]


def test_a_round_makes_the_calls_of_a_task_and_counts_all_of_them(monkeypatch):
    made, task = [], measure_speed.Task("", lambda device, n: lambda: made.append(n), work=0.5)
    monkeypatch.setattr(measure_speed, "interleave", lambda runs, *_: {name: [0.5] for name in runs})
    assert measure_speed.measure([task], CPU, 10, 3, 1, 0) == {"": [10 * 3 * 0.5 / 0.5]}
    assert made == [10] * 3  # the warm-up


def test_the_tables(tiny, monkeypatch, capsys, lesson3, lesson4):
    """Two sampling steps stand for all of them: in both cases half are guided."""
    monkeypatch.setattr(measure_speed.tools, "choose_precision", lambda device: torch.bfloat16)
    measure_speed.main(["--device", "cpu", "--batch-size", "2", "--rounds", "1"])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if " to " in line]
    assert len(rows) == 6 + 6 + 5 and out.count("1.00 (1.00 to 1.00)") >= 3
    assert [row.split(",")[0].strip() for row in rows[:6]] == ["diffusers"] * 2 + ["by hand"] + ["ours"] * 3
    measure_speed.main(["--questions", "--device", "cpu", "--batch-size", "2", "--rounds", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if " to " in line]
    assert [row[3:44].strip() for row in rows] == ["today's recipe", "no attention", *measure_speed.QUESTIONS]
    for steps in (2, lesson3.STEPS):
        guided = [sigma <= lesson4.GUIDED_BELOW for sigma in lesson3.noise_levels(steps)[:-1]]
        assert 2 * sum(guided) == steps


def test_growth(tiny, lesson4):
    preset = measure_speed.PRESETS["small"]
    costs = [measure_speed.measure_cost("tiny", preset, size, CPU, None, 4e7) for size in (28, 56)]
    del measure_speed.PRESETS["tiny"]
    parameters, operations, kept, _, batch_size = zip(*costs, strict=True)
    assert parameters[0] == parameters[1]
    assert 4 < operations[1] / operations[0] < 16  # attention grows with the square of the number of pixels
    assert kept[1] / kept[0] == pytest.approx(4, rel=0.1)
    assert batch_size == tuple(round(4e7 / each) for each in operations)
