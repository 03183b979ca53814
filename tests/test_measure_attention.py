"""Two marks that have to match: the images, the nets, and the command."""

import sys

import measure_attention
import pytest
import torch


def test_marks_are_drawn_and_read():
    images = measure_attention.draw_pairs(200, torch.Generator().manual_seed(0)) / 127.5 - 1
    marks = measure_attention.read_marks(images)
    assert torch.equal(marks[:, 0], marks[:, 1])
    assert marks[:, 0].bincount(minlength=4).min() > 30
    assert len(images.unique(dim=0)) == 4
    assert (images > 0).sum(dim=(1, 2, 3)).unique().tolist() == [2 * 8]
    mixed = torch.cat([images[0, :, :14], images[marks[:, 0] != marks[0, 0]][0, :, 14:]], dim=1)
    first, second = measure_attention.read_marks(mixed[None] + 0.1 * torch.randn(1, 1, 28, 28))[0]
    assert first == marks[0, 0] != second


@pytest.mark.parametrize("attention", [False, True])
def test_only_attention_leads_from_mark_to_mark(attention, redraw):
    network = redraw(measure_attention.make_network(attention))
    one = torch.randn(1, 1, 28, 28)
    first, second = measure_attention.CORNERS
    other = one.clone()
    other[:, :, second, second] += 1
    changed = (network(one, torch.zeros(1)) - network(other, torch.zeros(1)))[:, :, first, first]
    assert bool(changed.any()) == attention


def test_a_norm_keeps_to_each_pixel(redraw):
    x, norm = torch.randn(3, 8, 4, 5), redraw(measure_attention.PixelNorm(1, 8))
    expected = torch.nn.functional.layer_norm(x.movedim(1, 3), (8,), norm.weight, norm.bias).movedim(3, 1)
    torch.testing.assert_close(norm(x), expected)


def test_the_command(monkeypatch, tmp_path, capsys):
    command = ["measure_attention.py", "--steps", "1", "--seeds", "2", "--n", "10", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    measure_attention.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines[1:5]] == [
        [kind, "attention,", "seed", seed] for seed in "01" for kind in ("without", "with")
    ]
    for line in lines[1:5]:
        assert sum(int(share) for share in line.split("patterns")[1].split("%")[:4]) == pytest.approx(100, abs=2)
    assert [path.name for path in tmp_path.iterdir()] == ["marks.png"]
