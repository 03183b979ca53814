"""Lesson 2 against reference_numpy, PyTorch's own classes and diffusers; its claims, its pictures, its command line."""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import EinopsError, rearrange
from torch import nn

import reference_numpy as reference

matplotlib.use("Agg")
lesson = importlib.import_module("02_attention")
SCRIPT = Path(lesson.__file__)
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]
EXPECTED_WEIGHTS = {"norm.weight", "norm.bias", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def shapes(n):
    """Channels, heads, groups, and an image `(n, c, h, w)`, at random; also single pixels, channels and heads."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        heads, groups = rng.integers(1, 5, 2).tolist()
        channels = math.lcm(heads, groups) * int(rng.integers(1, 5))
        yield channels, heads, groups, (int(rng.integers(1, 4)), channels, *rng.integers(1, 9, 2).tolist())


def arrays(module):
    """A module's parameters for reference_numpy, in float64."""
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


def assert_near(result, expected, tolerance):
    """Relative to the largest expected value."""
    result, expected = (torch.as_tensor(tensor).detach().double() for tensor in (result, expected))
    assert result.shape == expected.shape
    error = (result - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"relative difference {error:.1e}"


def assert_gradients_near(output, inputs, expected_output, expected_inputs, tolerance):
    """The gradients of one random weighted sum of both outputs; relative to the largest expected value among them all,
    because some are zero but for rounding (that of the keys' bias, for one)."""
    weights = torch.randn_like(output)
    results = torch.autograd.grad(output, inputs, weights)
    expected = torch.autograd.grad(expected_output, expected_inputs, weights)
    assert [tensor.shape for tensor in results] == [tensor.shape for tensor in expected]
    assert_near(*(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (results, expected)), tolerance)


def token_attention(redraw, channels, heads, dtype=torch.float64):
    return redraw(lesson.TokenSelfAttention(channels, heads).to(dtype))


def pixel_attention(redraw, channels, heads, groups=1, dtype=torch.float64):
    return redraw(lesson.MultiHeadSelfAttention(channels, heads, groups).to(dtype))


# 1. Sequences


def test_tokens_are_pixels_row_after_row():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = lesson.to_tokens(x)
    assert tokens.shape == (2, 20, 3)
    for row in range(4):
        for column in range(5):
            assert torch.equal(tokens[:, 5 * row + column], x[:, :, row, column])
    assert torch.equal(lesson.to_image(tokens, 4), x)
    assert lesson.to_image(lesson.to_tokens(x[:0]), 4).shape == (0, 3, 4, 5)


def test_permuting_pixels_permutes_the_output_of_attention_only(redraw):
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    order = torch.randperm(35)
    attention = pixel_attention(redraw, 8, 2)
    for layer in (lesson.black_box, attention):
        assert_near(layer(lesson.permute_pixels(x, order)), lesson.permute_pixels(layer(x), order), 1e-12)
    convolution = redraw(nn.Conv2d(8, 8, 3, padding=1).double())
    changed = convolution(lesson.permute_pixels(x, order)) - lesson.permute_pixels(convolution(x), order)
    assert changed.abs().max() > 0.1


# 2. What a pixel depends on


@pytest.mark.parametrize("layers, reach", [(1, 1), (2, 2), (5, 5)])
def test_convolutions_see_a_neighbourhood(redraw, layers, reach):
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))).double()
    seen = lesson.influence(redraw(network), torch.randn(1, 3, 15, 13, dtype=torch.float64), 7, 6) > 0
    expected = torch.zeros(15, 13, dtype=bool)
    expected[7 - reach : 8 + reach, 6 - reach : 7 + reach] = True
    assert torch.equal(seen, expected)


def test_residual_blocks_reach_two_pixels_each(redraw):
    x = torch.randn(1, 4, 15, 15, dtype=torch.float64)
    for blocks, side in ((1, 5), (3, 13)):
        network = nn.Sequential(*(lesson.residual_block(4) for _ in range(blocks)))
        assert lesson.influence(redraw(network.double()), x, 7, 7).count_nonzero() == side**2


def test_from_corner_to_corner_takes_one_convolution_less_than_the_side(redraw):
    x = torch.randn(1, 3, 6, 4, dtype=torch.float64)
    for layers in (4, 5):
        network = redraw(nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))).double())
        assert (lesson.influence(network, x, 0, 0)[-1, -1] > 0) == (layers == 5)


def test_attention_sees_everything(redraw):
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    for layer in (lesson.black_box, pixel_attention(redraw, 4, 2)):
        assert lesson.influence(layer, x, 0, 0).count_nonzero() == 99


def test_residual_adds_its_input():
    x = torch.randn(2, 3)
    assert torch.equal(lesson.Residual(nn.Tanh(), nn.ReLU())(x), x + x.tanh().relu())


# 3 and 4. The weighted average


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_weights_and_averages_equal_numpy(dtype, tolerance):
    for scale in (1, 5):
        q, k, v = scale * torch.randn(3, 1, 40, 6, dtype=dtype)
        averages = lesson.attention_weights(q, k) @ v
        assert_near(averages[0], reference.self_attention(*(t[0].double().numpy() for t in (q, k, v))), tolerance)
    assert_near(lesson.black_box(v.mT.unflatten(2, (8, 5))).flatten(2).mT, lesson.attention_weights(v, v) @ v, 1e-5)


@pytest.mark.parametrize("scale", [0, 1, 30, 1e15])
def test_averages_stay_between_the_extremes(scale):
    q, k, v = torch.randn(3, 2, 50, 8, dtype=torch.float64)
    weights = lesson.attention_weights(scale * q, scale * k)
    assert weights.min() >= 0
    assert (weights.sum(dim=-1) - 1).abs().max() < 1e-13
    averages = weights @ v
    assert (averages <= v.amax(dim=1, keepdim=True) + 1e-13).all()
    assert (averages >= v.amin(dim=1, keepdim=True) - 1e-13).all()


def test_alike_patches_hear_each_other():
    picture = torch.full((1, 1, 20, 20), -1.0)
    picture[..., 4] = picture[..., 15] = 1  # the same line twice, far apart
    tokens = lesson.patch_tokens(picture)
    assert tokens.shape == (1, 400, 25)
    assert_near(tokens[0, 7 * 20 + 13], F.layer_norm(picture[0, 0, 5:10, 11:16].flatten(), (25,)), 1e-6)
    assert not tokens[0, 0].any()  # background, also outside the picture
    weights = lesson.attention_weights(tokens, tokens)[0, 10 * 20 + 4].unflatten(0, (20, 20))
    assert_near(weights[2:-2, 4], weights[2:-2, 15], 1e-6)
    assert weights[10, 4] == weights.max() > 10 * weights[10, 9]


# 5. The division


@pytest.mark.parametrize("d", [4, 64, 256])
def test_division_keeps_the_spread_of_the_scores(d):
    q, k = torch.randn(2, 4, 256, d)
    spread, bits, through = lesson.measure_spread(q @ k.mT)
    spread_divided, bits_divided, through_divided = lesson.measure_spread(q @ k.mT / math.sqrt(d))
    assert spread == pytest.approx(math.sqrt(d), rel=0.05)
    assert spread_divided == pytest.approx(1, rel=0.05)
    assert 7 < bits_divided < 8
    assert 0.95 < through_divided < 1
    assert bits < bits_divided
    assert d < 256 or (bits < 1 and through < 0.25)


def test_entropy():
    assert_near(lesson.entropy(torch.tensor([[0, 1, 0, 0], [0.25] * 4, [0.5, 0, 0.5, 0]])), [0, 2, 1], 1e-6)


def test_gradient_that_comes_through_is_that_of_softmax():
    scores = torch.randn(6, 6, dtype=torch.float64)
    jacobians = torch.stack([torch.func.jacrev(lambda row: row.softmax(dim=-1))(row) for row in scores])
    expected = jacobians.diagonal(dim1=1, dim2=2).sum(dim=1).mean()
    assert_near(lesson.measure_spread(scores)[2], expected, 1e-12)


# 6. One head


def with_one_linear(attention):
    """The parameters of a SelfAttention under the names of MultiHeadSelfAttention."""
    stacked = {
        f"qkv.{name}": value for name, value in lesson.stack(attention.q, attention.k, attention.v).state_dict().items()
    }
    return stacked | {name: value for name, value in attention.state_dict().items() if name[:4] in ("norm", "proj")}


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_one_linear_is_the_same_function_as_three(redraw, dtype, tolerance):
    for channels, _, groups, shape in shapes(20):
        separate = redraw(lesson.SelfAttention(channels, groups).to(dtype))
        fused = lesson.MultiHeadSelfAttention(channels, 1, groups).to(dtype)
        fused.load_state_dict(with_one_linear(separate))
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        assert_near(fused(x), separate(x), tolerance)
        expected = reference.multi_head_self_attention(x.detach().double().numpy(), arrays(fused), 1, groups)
        assert_near(separate(x), expected, tolerance)
        assert_gradients_near(fused(x), [x], separate(x), [x], tolerance)


def test_stack_gives_the_outputs_side_by_side(redraw):
    projections = [redraw(nn.Linear(5, size).double()) for size in (5, 2, 7)]
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    stacked = lesson.stack(*projections)
    assert stacked.weight.dtype == torch.float64
    assert_near(stacked(x), torch.cat([projection(x) for projection in projections], dim=-1), 1e-14)


# 7. Several heads


@pytest.mark.parametrize("n, s, heads, d", [(1, 1, 1, 1), (2, 6, 3, 4), (0, 5, 2, 3), (3, 1, 4, 1)])
def test_splitting_and_joining_heads(n, s, heads, d):
    tokens = torch.randn(n, s, heads * d)
    split = rearrange(tokens, "n s (heads d) -> n heads s d", heads=heads)
    if n:
        assert torch.equal(lesson.split_heads(tokens, heads), split)
    assert torch.equal(lesson.join_heads(split), tokens)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_heads_equal_numpy(redraw, dtype, tolerance):
    for channels, heads, groups, shape in shapes(60):
        attention = pixel_attention(redraw, channels, heads, groups, dtype)
        x = torch.randn(shape, dtype=dtype)
        expected = reference.multi_head_self_attention(x.double().numpy(), arrays(attention), heads, groups)
        assert_near(attention(x), expected, tolerance)
        tokens = x.flatten(2).mT
        expected = [
            reference.multi_head_attention(image, arrays(attention), heads) for image in tokens.double().numpy()
        ]
        assert_near(lesson.TokenSelfAttention.forward(attention, tokens), np.stack(expected), tolerance)


def test_explicit_weights_change_nothing(redraw):
    for channels, heads, groups, shape in shapes(20):
        attention = pixel_attention(redraw, channels, heads, groups)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        pixels = shape[2] * shape[3]
        y, weights = attention(x, return_weights=True)
        assert weights.shape == (shape[0], heads, pixels, pixels)
        assert weights.min() >= 0
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-12
        assert_near(attention(x), y, 1e-12)
        inputs = x, *attention.parameters()
        assert_gradients_near(attention(x), inputs, y, inputs, 1e-12)


def test_the_lectures_layout(redraw):
    """The lecture splits the rows of qkv into heads, and then each head's into q, k and v."""
    heads, d, c = 3, 4, 12
    lecture = redraw(nn.Linear(c, 3 * c).double())
    tokens = torch.randn(2, 7, c, dtype=torch.float64)
    q, k, v = (lecture(tokens).view(2, 7, heads, 3 * d).transpose(1, 2)).chunk(3, dim=-1)
    heard = ((q @ k.mT / math.sqrt(d)).softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 7, c)
    attention = token_attention(redraw, c, heads)
    state = {f"qkv.{name}": lesson.to_pytorch_layout(rows, heads) for name, rows in lecture.state_dict().items()}
    attention.load_state_dict(state, strict=False)
    assert_near(attention(tokens), attention.proj(heard), 1e-12)
    attention.load_state_dict({f"qkv.{name}": rows for name, rows in lecture.state_dict().items()}, strict=False)
    assert (attention(tokens) - attention.proj(heard)).abs().max() > 0.1


def test_layer_has_the_promised_parts():
    attention = lesson.MultiHeadSelfAttention(12, heads=3, groups=2)
    assert set(attention.state_dict()) == EXPECTED_WEIGHTS
    assert attention.norm.eps == 1e-5
    assert attention.norm.num_groups == 2
    assert attention.qkv.weight.shape == (36, 12)


def test_a_zero_projection_leaves_the_input_as_it_is():
    attention = lesson.MultiHeadSelfAttention(8, heads=2)
    nn.init.zeros_(attention.proj.weight)
    nn.init.zeros_(attention.proj.bias)
    x = torch.randn(2, 8, 3, 4)
    assert torch.equal(attention(x), x)


def test_images_of_a_batch_know_nothing_of_each_other(redraw):
    attention = pixel_attention(redraw, 8, 2, 4)
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    changed = x.clone()
    changed[1] += 5
    y, z = attention(x), attention(changed)
    assert_near(z[[0, 2]], y[[0, 2]], 1e-14)
    assert (z[1] - y[1]).abs().max() > 1


def test_layout_in_memory_does_not_matter(redraw):
    attention = pixel_attention(redraw, 8, 2)
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
    assert_near(attention(x.to(memory_format=torch.channels_last)), attention(x), 1e-13)
    assert_near(attention(x.transpose(2, 3)), attention(x.transpose(2, 3).contiguous()), 1e-13)


def test_large_activations_stay_finite_and_small_ones_count(redraw):
    attention = pixel_attention(redraw, 8, 2, dtype=torch.float32)
    x = torch.randn(2, 8, 5, 6)
    for scale in (1e6, 1e-6, 0):
        assert attention(scale * x).isfinite().all()
    assert lesson.attention_weights(1e18 * x[:, :, 0], 1e18 * x[:, :, 0]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(redraw, dtype):
    attention = pixel_attention(redraw, 8, 2, 4, dtype)
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    for y in (attention(x), attention(x, return_weights=True)[0]):
        assert y.dtype == dtype
        assert_near(y, attention.double()(x.double()), 0.05)
        attention.to(dtype)


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_attention_in_bfloat16(autocast):
    q, k, v = torch.randn(3, 2, 3, 10, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        heard = lesson.fused_attention(q, k, v)
    assert heard.dtype == torch.bfloat16
    q, k, v = (tensor.float() for tensor in (q, k, v))
    assert torch.equal(heard, F.scaled_dot_product_attention(q, k, v).bfloat16())


def test_no_images_and_single_pixels(redraw):
    attention = pixel_attention(redraw, 8, 2, 4)
    y, weights = attention(torch.zeros(0, 8, 3, 4).double(), return_weights=True)
    assert y.shape == attention(torch.zeros(0, 8, 3, 4).double()).shape == (0, 8, 3, 4)
    assert weights.shape == (0, 2, 12, 12)
    assert torch.equal(attention(torch.randn(2, 8, 1, 1).double(), return_weights=True)[1], torch.ones(2, 2, 1, 1))


@pytest.mark.parametrize("kind", [lesson.TokenSelfAttention, lesson.MultiHeadSelfAttention, lesson.TransformerBlock])
@pytest.mark.parametrize("channels, heads", [(8, 3), (8, 16), (8, 0), (8, -2)])
def test_heads_that_do_not_divide_are_refused(kind, channels, heads):
    with pytest.raises(ValueError, match=f"must divide the channels, got {heads} heads, {channels} channels"):
        kind(channels, heads)


@pytest.mark.parametrize("groups", [3, 0, -1, 16])
def test_groups_that_do_not_divide_are_refused(groups):
    with pytest.raises(ValueError, match=f"must divide the channels, got {groups} groups, 8 channels"):
        lesson.MultiHeadSelfAttention(8, 2, groups)


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 8, 4), (2, 8, 4, 4, 4), (2, 4, 4, 4), (2, 8, 0, 4), (2, 8, 4, 0)])
def test_activations_of_another_shape_are_refused(shape):
    layers = (
        lesson.SelfAttention(8),
        lesson.MultiHeadSelfAttention(8, 2),
        lesson.attention_from_convolution(nn.Conv2d(8, 2, 3, padding=1)),
    )
    for layer in layers:
        with pytest.raises(ValueError, match=r"expected activations \(n, 8, h, w\) with h, w >= 1") as raised:
            layer(torch.zeros(shape))
        assert str(raised.value).endswith(f"got {shape}")


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 0, 8), (2, 4, 6), (2, 8, 4, 4)])
def test_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected tokens \(n, s, 8\) with s >= 1"):
        lesson.TokenSelfAttention(8, 2)(torch.zeros(shape))


# 8. What heads are for


def test_ears_are_marked_and_asked_for():
    images, answers = lesson.make_ears(20)
    assert images.shape == (20, 8, 5, 5)
    assert answers.shape == (20, 12)
    for image, answer in zip(images, answers, strict=True):
        left, right = (mark.nonzero() for mark in image[-2:])
        assert len(left) == len(right) == 1
        assert not torch.equal(left, right)
        expected = torch.cat([image[:6, row, column] for row, column in (left[0], right[0])])
        assert_near(answer, expected, 1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_one_head_fails_where_two_succeed(seed):
    images, answers = lesson.make_ears(500)
    errors = [lesson.ear_error(lesson.train_ears(heads, seed=seed)[0], images, answers) for heads in (1, 2)]
    assert errors[0] > 0.4
    assert errors[1] < 0.01


# 9. Other people's attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_pytorch(redraw, dtype, tolerance):
    for channels, heads, groups, shape in shapes(20):
        attention = pixel_attention(redraw, channels, heads, groups, dtype)
        theirs = lesson.to_torch(attention)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)

        tokens = attention.norm(x).flatten(2).mT
        expected = x + theirs(tokens, tokens, tokens)[0].mT.reshape(x.shape)
        assert_near(attention(x), expected, tolerance)
        shared = x, attention.norm.weight, attention.norm.bias
        ours = *shared, *attention.qkv.parameters(), *attention.proj.parameters()
        theirs = *shared, theirs.in_proj_weight, theirs.in_proj_bias, *theirs.out_proj.parameters()
        assert_gradients_near(attention(x), ours, expected, theirs, tolerance)


def test_weights_equal_pytorchs(redraw):
    attention = token_attention(redraw, 12, 3)
    tokens = torch.randn(2, 9, 12, dtype=torch.float64)
    theirs = lesson.to_torch(attention)(tokens, tokens, tokens, average_attn_weights=False)[1]
    assert_near(attention(tokens, return_weights=True)[1], theirs, 1e-12)


def test_to_torch_copies(redraw):
    attention = token_attention(redraw, 8, 2, torch.bfloat16).eval()
    theirs = lesson.to_torch(attention)
    assert theirs.in_proj_weight.dtype == torch.bfloat16
    assert not theirs.training
    before = theirs.in_proj_weight.clone()
    redraw(attention)
    assert torch.equal(theirs.in_proj_weight, before)


def test_without_batch_first_images_hear_each_other(redraw):
    theirs = lesson.to_torch(token_attention(redraw, 8, 2))
    careless = nn.MultiheadAttention(8, 2).double()
    careless.load_state_dict(theirs.state_dict())
    tokens = torch.randn(3, 10, 8, dtype=torch.float64)
    swapped = tokens.transpose(0, 1)
    result = careless(tokens, tokens, tokens)[0]
    assert_near(result, theirs(swapped, swapped, swapped)[0].transpose(0, 1), 1e-12)
    assert (result - theirs(tokens, tokens, tokens)[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equals_diffusers(redraw, dtype, tolerance):
    for channels, heads, groups, shape in shapes(20):
        attention = pixel_attention(redraw, channels, heads, groups, dtype)
        theirs = Attention(
            query_dim=channels,
            heads=heads,
            dim_head=channels // heads,
            bias=True,
            norm_num_groups=groups,
            eps=1e-5,
            residual_connection=True,
        ).to(dtype)
        state = {f"to_out.0.{name}": value for name, value in attention.proj.state_dict().items()}
        state |= {f"group_norm.{name}": value for name, value in attention.norm.state_dict().items()}
        for name, value in attention.qkv.state_dict().items():
            state |= {f"to_{part}.{name}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        theirs.load_state_dict(state)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        assert_near(attention(x), theirs(x), tolerance)
        assert_gradients_near(attention(x), [x], theirs(x), [x], tolerance)


# 10. rearrange


@pytest.mark.parametrize("name", lesson.GALLERY)
def test_rearrange_is_the_same_by_hand(name):
    shape, by_name, by_hand = lesson.GALLERY[name]
    x = torch.randn(shape)
    assert torch.equal(by_name(x), by_hand(x))
    assert not torch.equal(by_name(x).flatten(), x.flatten())


def test_rearrange_says_what_does_not_fit():
    with pytest.raises(EinopsError, match="can't divide axis of length 32 in chunks of 5"):
        rearrange(torch.zeros(2, 64, 32), "n s (heads d) -> n heads s d", heads=5)


# 11. What it costs


def test_fused_attention_keeps_no_weights():
    layers = lesson.ExplicitSelfAttention(16, 4), lesson.MultiHeadSelfAttention(16, 4)
    kept = {side: [lesson.measure_kept(layer, torch.randn(3, 16, side, side)) for layer in layers] for side in (16, 32)}
    for side, (by_hand, fused) in kept.items():
        assert by_hand >= 4 * 4 * side**4
        assert fused < by_hand / 10
    assert kept[32][0] > 14 * kept[16][0]  # grows with the square of the pixels
    assert kept[32][1] < 4.1 * kept[16][1]  # grows with the pixels


def test_cost_table():
    costs = lesson.measure_cost(torch.device("cpu"), sides=(2, 4), channels=8, heads=2, batch=3)
    assert list(costs) == [2, 4]
    assert costs[4]["tokens"] == 16
    assert costs[4]["batch"] == 3
    assert costs[4]["weights"] == 2 * 16 * 16 * 4
    for cost in costs.values():
        assert all(seconds > 0 for seconds in cost["seconds"].values())
        assert cost["kept"]["by hand"] > cost["kept"]["3×3 convolution"] > 0


def test_all_weights_of_a_batch_stay_below_a_gigabyte(monkeypatch):
    monkeypatch.setattr(lesson, "measure_seconds", lambda layers, x: [len(x)] * 3)
    monkeypatch.setattr(lesson, "measure_kept", lambda layer, x: 0)
    costs = lesson.measure_cost(torch.device("cpu"))
    assert list(costs) == [4, 8, 16, 32, 64]
    assert costs[32]["batch"] == 16
    for cost in costs.values():
        assert cost["batch"] * cost["weights"] < 10**9
        assert set(cost["seconds"].values()) == {1}


# 12. Transformers


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_transformer_equals_numpy_and_pytorch(redraw, dtype, tolerance):
    for channels, heads, _, (n, _, s, _) in shapes(20):
        block = redraw(lesson.TransformerBlock(channels, heads).to(dtype))
        tokens = torch.randn(n, s, channels, dtype=dtype)
        expected = [reference.transformer_block(x, arrays(block), heads) for x in tokens.double().numpy()]
        assert_near(block(tokens), np.stack(expected), tolerance)

        theirs = nn.TransformerEncoderLayer(
            channels, heads, 4 * channels, dropout=0, activation="gelu", batch_first=True, norm_first=True
        ).to(dtype)
        theirs.self_attn.load_state_dict(lesson.to_torch(block.attention).state_dict())
        for name, part in (("norm1", "norm1"), ("norm2", "norm2"), ("linear1", "mlp.0"), ("linear2", "mlp.2")):
            theirs.get_submodule(name).load_state_dict(block.get_submodule(part).state_dict())
        assert_near(block(tokens), theirs(tokens), tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("size, patch, channels_in", [(28, 7, 1), (6, 2, 3), (4, 4, 2), (3, 1, 1)])
def test_vision_transformer_equals_numpy(redraw, dtype, tolerance, size, patch, channels_in):
    model = lesson.VisionTransformer(size, patch, channels=8, depth=2, heads=2, n_classes=5, channels_in=channels_in)
    model = redraw(model.to(dtype))
    images = torch.randn(2, channels_in, size, size, dtype=dtype)
    expected = [
        reference.vision_transformer(image, arrays(model), heads=2, depth=2, patch=patch)
        for image in images.double().numpy()
    ]
    assert model.encode(images).shape == (2, (size // patch) ** 2, 8)
    assert_near(model(images), np.stack(expected), tolerance)


def test_without_positions_patches_in_disorder_change_nothing(redraw):
    model = lesson.VisionTransformer(8, 2, channels=8, depth=2, heads=2).double()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    patches = model.to_patches(images)[:, torch.randperm(16)]
    shuffled = rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=4, p=2, q=2)
    assert (model(shuffled) - model(images)).abs().max() > 1e-4
    redraw(model)
    assert (model(shuffled) - model(images)).abs().max() > 0.01
    nn.init.zeros_(model.positions)
    assert_near(model(shuffled), model(images), 1e-12)


def test_vision_transformer_says_what_it_accepts():
    for patch in (3, 0, -2):
        with pytest.raises(ValueError, match=f"must divide that of the image, got {patch} and 28"):
            lesson.VisionTransformer(patch=patch)
    model = lesson.VisionTransformer(8, 4, channels=8, depth=1)
    for shape in ((2, 1, 8, 4), (2, 3, 8, 8), (1, 8, 8), (2, 1, 28, 28)):
        with pytest.raises(ValueError, match=r"expected images \(n, 1, 8, 8\)"):
            model(torch.zeros(shape))


# 13. Convolutions


def convolutions(n):
    """3×3 convolutions with random weights, and images `(n, c, h, w)`, some of a single pixel, row or column."""
    rng = np.random.default_rng(0)
    for i in range(n):
        channels_in, channels_out = rng.integers(1, 20, 2).tolist()
        height, width = ((1, 1), (1, 9), (7, 1), (2, 2), (3, 3))[i] if i < 5 else rng.integers(1, 20, 2).tolist()
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bool(rng.integers(2)))
        yield conv, torch.randn(int(rng.integers(1, 4)), channels_in, height, width)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_attention_expresses_any_convolution(redraw, dtype, tolerance):
    for conv, x in convolutions(40):
        conv, x = redraw(conv.to(dtype)), x.to(dtype)
        attention = lesson.attention_from_convolution(conv)
        assert isinstance(attention, nn.Module)
        assert_near(attention(x), conv(x), tolerance)
        for scale in (1e-4, 1e4):  # without bias this would be the same; with it, small inputs drown
            assert_near(attention(scale * x), conv(scale * x), tolerance)


def test_the_kernel_is_copied(redraw):
    conv = nn.Conv2d(2, 3, 3, padding=1)
    attention = lesson.attention_from_convolution(conv)
    x = torch.randn(1, 2, 4, 4)
    before = attention(x)
    redraw(conv)
    assert torch.equal(attention(x), before)


def test_numpys_convolution_by_attention(redraw):
    for conv, x in convolutions(7):
        conv = redraw(nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).double())
        weight, bias = arrays(conv).values()
        expected = conv(x[:1].double())[0]
        assert_near(reference.convolution_by_attention(x[0].double().numpy(), weight, bias), expected, 1e-12)


def test_weights_are_attention_weights():
    attention = lesson.attention_from_convolution(nn.Conv2d(1, 1, 3, padding=1))
    scores = attention.scores(4, 6)
    assert scores.shape == (9, 24, 25)
    weights = scores.softmax(dim=-1)
    assert_near(weights.sum(dim=-1), torch.ones(9, 24), 1e-6)
    inside = weights[:, 2 * 6 + 3]  # of pixel (2, 3), away from the borders
    assert_near(inside.argmax(dim=-1), torch.tensor([6 * r + c for r in (1, 2, 3) for c in (2, 3, 4)]), 0)
    assert inside[:, -1].max() < 1e-20
    corner = weights[:, 0]
    assert_near(corner[:, -1], torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0]), 1e-20)


def test_scores_depend_on_relative_positions_only():
    scores = lesson.attention_from_convolution(nn.Conv2d(1, 1, 3, padding=1)).scores(5, 5)
    scores = scores[:, :, :-1].unflatten(1, (5, 5)).unflatten(3, (5, 5))  # heads, asking pixel, asked pixel
    assert torch.equal(scores[:, 1:, 2:, 1:, 2:], scores[:, :-1, :-2, :-1, :-2])


def test_without_zeros_the_borders_are_wrong(redraw):
    conv = redraw(nn.Conv2d(1, 1, 3, padding=1).double())
    attention = lesson.attention_from_convolution(conv)
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    weights = attention.scores(6, 6)[:, :, :-1].softmax(dim=-1)
    plain = attention.proj((weights @ x.flatten()[:, None])[:, :, 0].T).T.reshape(1, 1, 6, 6)
    difference = (plain - conv(x)).abs()[0, 0]
    assert difference[1:-1, 1:-1].max() < 1e-12
    assert difference.max() > 0.1


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(2, 2, 3),
        nn.Conv2d(2, 2, 1),
        nn.Conv2d(2, 2, 5, padding=1),
        nn.Conv2d(2, 2, (3, 1), padding=1),
        nn.Conv2d(2, 2, 3, padding=1, stride=2),
        nn.Conv2d(2, 2, 3, padding=1, dilation=2),
        nn.Conv2d(2, 2, 3, padding=1, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, 3, padding="valid"),
        nn.ConvTranspose2d(2, 2, 3, padding=1),
        nn.Conv1d(2, 2, 3, padding=1),
        nn.Linear(2, 2),
    ],
    ids=str,
)
def test_other_convolutions_are_refused(other):
    with pytest.raises(ValueError, match=r"expected an nn.Conv2d with .*'kernel_size': \(3, 3\)"):
        lesson.attention_from_convolution(other)


# The script


def test_every_cell_runs_in_order_and_draws(tmp_path, monkeypatch, capsys):
    """As in an editor: one namespace, no `__file__`. The cost table is cut short."""
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    full, short = "sides=(4, 8, 16, 32, 64)", "sides=(2, 4, 8)"
    text = SCRIPT.read_text()
    assert text.count(full) == 1
    namespace = {"__name__": "__main__"}
    cells = text.replace(full, short).split("\n# %% ")
    for cell in cells:
        exec(compile(cell if cell is cells[0] else "# " + cell, "cell", "exec"), namespace)
    printed = capsys.readouterr().out
    assert [line.split(".")[0] for line in printed.splitlines() if line[:1].isdigit()] == [str(i) for i in range(1, 14)]
    names = ["shuffled_pixels", "bunnys_ear", "one_pixel", "why_divide", "heads", "rearrange", "cost", "convolution"]
    pictures = sorted(tmp_path.iterdir())
    assert [picture.stem[3:] for picture in pictures] == names
    assert printed.count("wrote ") == len(names)
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)
        assert 700 < pixels.shape[1] < 1000
        assert pixels[..., :3].std() > 0.05


def test_bad_options_are_one_line(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    command = [sys.executable, SCRIPT, "--out", blocker]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
