"""measure_attention.py's experiment shows what it says: only attention can get from one bar to the other."""

import measure_attention
import pytest
import torch
from torch import nn


def test_bars_match_if_and_only_if_they_have_the_same_colour():
    images = measure_attention.draw_pairs(400, torch.Generator().manual_seed(0)) / 127.5 - 1
    assert measure_attention.bars_match(images).all()
    assert 0.4 < (images[:, 0, 0, 0] > 0).float().mean() < 0.6
    mixed = images.clone()
    mixed[..., measure_attention.BARS[0]] = images.roll(1, dims=0)[..., measure_attention.BARS[0]]
    assert torch.equal(measure_attention.bars_match(mixed), mixed[:, 0, 0, 0] == mixed[:, 0, 0, -1])


def test_a_norm_keeps_to_each_pixel():
    torch.manual_seed(0)
    x, ours, theirs = torch.randn(2, 8, 5, 7), measure_attention.PixelNorm(1, 8), nn.LayerNorm(8)
    torch.testing.assert_close(ours(x), theirs(x.movedim(1, 3)).movedim(3, 1))


@pytest.mark.parametrize("attention", [False, True])
def test_attention_alone_reaches_the_other_bar(redraw, attention):
    network = redraw(measure_attention.make_network(attention))
    x = torch.randn(1, 1, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x, torch.zeros(1))[0, 0, 14, 5], x)  # the left bar's last column
    assert bool(gradient[..., measure_attention.BARS[1]].any()) == attention
    assert gradient[..., 5 + 12].any() and bool(gradient[..., 5 + 13 :].any()) == attention


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["measure", "--steps", "2", "--seeds", "1", "--n", "10", "--out", str(tmp_path)])
    monkeypatch.setattr(measure_attention.lesson3, "P_MEAN", measure_attention.lesson3.P_MEAN)  # main changes it
    measure_attention.main()
    out = capsys.readouterr().out
    assert "without attention, seed 0" in out and "with attention, seed 0" in out
    assert (tmp_path / "bars.png").is_file()
