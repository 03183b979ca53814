"""The networks with one thing changed: each does what its name says, and nothing else changes."""

import copy

import pytest
import torch
import variants
from torch import nn

CHANGES = {name: change for name, change in vars(variants).items() if callable(change) and name.islower()}
HELPERS = {"rearrange", "replace", "to_ln_sigma", "to_unit", "sines", "change_skips", "layers_in_a_row"}
CHANGES = {name: change for name, change in CHANGES.items() if name not in HELPERS}
CHANGES["sines"] = variants.sines(10)


@pytest.fixture
def preset(lesson3):
    return lesson3.PRESETS["small"]._replace(widths=(8, 16), groups=4, head_dim=8)


@pytest.fixture
def make(preset, lesson4, redraw):
    """make(change): a small new network, with all weights redrawn."""

    def make(change=None, **others):
        network = lesson4.make_network(preset._replace(**others), 10)
        if change:
            change(network)
        return redraw(network)

    return make


def inputs(n=3):
    return torch.randn(n, 4, 14, 14), torch.linspace(-1100, 1000, n), torch.arange(n)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_makes_another_network_that_learns(make, name):
    network, plain = make(CHANGES[name]), make()
    y = network(*inputs())
    assert y.shape == (3, 4, 14, 14) and y.isfinite().all()
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    shapes, others = ({k: v.shape for k, v in each.state_dict().items()} for each in (network, plain))
    if shapes == others and name not in ("no_zero_start", "drawn_again"):  # then what differs is the computation
        plain.load_state_dict(network.state_dict())
        assert not torch.allclose(plain(*inputs()), y)


@pytest.mark.parametrize("name", CHANGES)
def test_a_copy_computes_with_its_own_weights(make, name):
    """The average of the weights is such a copy."""
    network, x = make(CHANGES[name]).eval(), inputs()
    twin = copy.deepcopy(network)
    before = twin(*x)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(twin(*x), before) and not torch.equal(network(*x), before)


def test_skips_are_added_through_a_convolution_where_widths_differ(make):
    network, embedding = make(variants.skips_added), torch.randn(2, 32)
    for blocks in network.up:
        for block in blocks:
            width = block.width
            skip_width = block.match.in_channels if isinstance(block.match, nn.Conv2d) else width
            h, skip = torch.randn(2, width, 7, 7), torch.randn(2, skip_width, 7, 7)
            expected = block.block(h + block.match(skip), embedding)
            torch.testing.assert_close(block(torch.cat([h, skip], dim=1), embedding), expected)
            assert isinstance(block.match, nn.Identity) == (skip_width == width)
            assert block.block.conv1.norm.num_channels == width
    assert {type(block.match) for blocks in network.up for block in blocks} == {nn.Conv2d, nn.Identity}


def test_without_skips_the_way_down_reaches_the_end_only_through_the_middle(make):
    for change, reaches in ((variants.skips_cut, False), (variants.skips_added, True), (None, True)):
        network = make(change)
        network.middle = nn.ModuleList([Nothing()])
        x, time, label = inputs()
        assert torch.allclose(network(x, time, label), network(torch.zeros_like(x), time, label)) != reaches


class Nothing(nn.Module):
    def forward(self, x, embedding):
        return torch.zeros_like(x)


def test_every_second_pixel_is_all_that_comes_down(make):
    network, h = make(variants.every_second_pixel), torch.randn(2, 8, 6, 6)
    y = network.downsample[0](h)
    assert torch.equal(y, h[:, :, 0::2, 0::2]) and torch.equal(network.downsample[0].take(), y)


def test_pooling_comes_before_the_convolution(make):
    h = torch.randn(2, 8, 6, 6)
    pooled = make(variants.pool_down).downsample[0]
    means = nn.functional.avg_pool2d(h, 2)
    torch.testing.assert_close(pooled(h), nn.functional.conv2d(means, pooled[1].weight, pooled[1].bias, padding=1))


def test_the_transposed_convolution_starts_as_upsampling_and_convolution(preset, lesson4):
    network, h = lesson4.make_network(preset, 10), torch.randn(2, 16, 5, 3)
    expected = network.upsample[0](h)
    variants.transposed_up(network)
    torch.testing.assert_close(network.upsample[0](h), expected, atol=1e-6, rtol=1e-5)
    assert network.upsample[0].weight.shape == (16, 16, 4, 4)


def test_two_layers_start_like_the_axial_ones_and_unlike_each_other(preset, lesson4):
    weights = []
    for change in (variants.two_layers, variants.axial):
        torch.manual_seed(0)
        network = lesson4.make_network(preset, 10)
        change(network)
        weights.append([part.qkv.weight for part in network.modules() if hasattr(part, "qkv")])
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert len({weight.sum().item() for weight in weights[0]}) == len(weights[0]) == 8
    block, x = lesson4.lesson2.AttentionBlock(16, 2, 4), torch.randn(1, 16, 5, 4)
    new = variants.NewAttention(block, "n (h w)")
    new.load_state_dict(block.state_dict())
    torch.testing.assert_close(new(x), block(x))


def test_the_control_draws_all_random_weights_again(preset, lesson4):
    network, twin = (lesson4.make_network(preset, 10) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    variants.drawn_again(network)
    for (name, new), old in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(new, old) == ("norm" in name or not old.any()), name


def test_the_lecture_s_time_has_columns_of_variance_one(preset, lesson4):
    network = lesson4.make_network(preset, 10)
    variants.lecture_time(network)
    time = torch.linspace(-1151, 1096, 64)
    columns = network.embed_time.features(time)
    expected = variants.lesson1.timestep_embedding((time - time[0]) / (time[-1] - time[0]), 8)
    torch.testing.assert_close(columns, expected, atol=1e-3, rtol=0)
    assert columns[:, 1].std() < 0.1 and 0.9 < network.embed_time.layers[0](columns)[:, 1].std() < 1.1


def test_attention_along_a_row_sees_no_other_row(make):
    network = make(variants.axial)
    rows, columns = network.middle[0].attention
    x = torch.randn(1, 16, 5, 4, requires_grad=True)
    rows.norm = columns.norm = nn.Identity()  # a group norm mixes all pixels
    for line, seen in ((rows, (slice(2, 3), slice(None))), (columns, (slice(None), slice(1, 2)))):
        (gradient,) = torch.autograd.grad(line(x)[0, :, 2, 1].sum(), x)
        inside = gradient[0].abs().sum(dim=0)
        assert inside[seen].min() > 0
        inside[seen] = 0
        assert not inside.any()


def test_positions_are_seen(make):
    """Attention alone is permutation-equivariant: order doesn't matter. With learned positions it does."""
    for change, ordered in ((None, False), (variants.learned_positions, True)):
        attention = make(change).middle[0].attention
        x = torch.randn(1, 16, 7, 7)
        turned = x.flip(2, 3)
        assert torch.allclose(attention(turned).flip(2, 3), attention(x), atol=1e-5) != ordered


def test_times_in_other_units_and_their_bins(make, lesson3):
    sigma = torch.tensor([lesson3.SIGMA_MIN, 1.0, lesson3.SIGMA_MAX])
    times = lesson3.Denoiser(None, 0.7).c_noise(sigma)
    torch.testing.assert_close(variants.to_ln_sigma(times), sigma.log())
    torch.testing.assert_close(variants.to_unit(times)[[0, 2]], torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    table = make(variants.learned_table).embed_time.features
    times = lesson3.Denoiser(None, 0.7).c_noise(torch.tensor([-3.49, -3.46, -3.44, 1.49, 4.0, -4.0]).exp())
    torch.testing.assert_close(table(times), table.weight[[0, 0, 1, 99, 99, 0]])


def test_sines_start_with_the_weights_that_they_would_have(preset, lesson4):
    """So the usual sines, put in by a variant, change nothing."""
    times = torch.linspace(-1100, 1000, 5)
    for change, same in ((variants.sines(), True), (variants.sines(10), False)):
        network = lesson4.make_network(preset, 10)
        before = network.embed_time(times)
        change(network)
        assert torch.equal(network.embed_time(times), before) == same


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "no_zero_start"])
def test_a_new_network_outputs_zero_and_takes_a_label_or_none(preset, lesson4, name):
    network = lesson4.make_network(preset, 10)
    CHANGES[name](network)
    x, time, label = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        assert not network(x, time, label).any() and not network(x, time, None).any()


def test_attention_on_the_levels_asked_for(make, lesson4):
    for levels, expected in (((), 1), ((1,), 4), ((0, 1), 7)):
        network = make(None, attention_levels=levels)
        assert sum(isinstance(module, lesson4.lesson2.AttentionBlock) for module in network.modules()) == expected
    kinds = {type(module) for module in make(variants.no_attention).modules()}
    assert lesson4.lesson2.AttentionBlock not in kinds and lesson4.AttentionResBlock in kinds
