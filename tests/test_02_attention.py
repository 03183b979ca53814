"""Lesson 2 against reference_numpy, PyTorch's own classes and diffusers; its claims, its pictures, its command line."""

import functools
import importlib
import math
import re
import sys

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import nn

import data
import reference_numpy as reference

matplotlib.use("Agg")
lesson = importlib.import_module("02_attention")
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


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
    """Relative to the largest of them all: some are zero but for rounding (that of the keys' bias, for one)."""
    weights = torch.randn_like(output)
    results = torch.autograd.grad(output, inputs, weights)
    expected = torch.autograd.grad(expected_output, expected_inputs, weights)
    assert [tensor.shape for tensor in results] == [tensor.shape for tensor in expected]
    assert_near(*(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (results, expected)), tolerance)


@pytest.fixture
def attention_layer(redraw):
    def make(channels, heads, groups=1, dtype=torch.float64, by_hand=False):
        layer = redraw(lesson.MultiHeadSelfAttention(channels, heads, groups).to(dtype))
        if by_hand:
            layer.attention.attend = lesson.attention
        return layer

    return make


# 1. The weighted average
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_weights_and_averages_equal_numpy(dtype, tolerance):
    for scale in (0, 1, 5):
        q, k, v = torch.tensor([scale, scale, 1])[:, None, None, None] * torch.randn(3, 1, 40, 6, dtype=dtype)
        weights = lesson.attention_weights(q, k)
        expected = reference.self_attention(*(t[0].double().numpy() for t in (q, k, v)))
        for averages in (weights @ v, lesson.attention(q, k, v), lesson.fused_attention(q, k, v)):
            assert_near(averages[0], expected, tolerance)
        assert weights.min() >= 0
        assert_near(weights.sum(dim=-1), torch.ones(1, 40), tolerance)
    heard = lesson.pixel_attention(v.mT.unflatten(2, (8, 5)))
    assert_near(heard.flatten(2).mT, lesson.attention(v, v, v), tolerance)


# 2. Pixels
def test_tokens_are_pixels_row_after_row():
    x = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert torch.equal(lesson.to_tokens(x), rearrange(x, "n c h w -> n (h w) c"))
    assert torch.equal(lesson.to_image(lesson.to_tokens(x), 4), x)
    assert lesson.to_image(lesson.to_tokens(x[:0]), 4).shape == (0, 3, 4, 5)


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


def test_one_garment_of_each_class_also_of_other_data(monkeypatch):
    """Of images that are not 28 × 28, few classes, and one that doesn't occur."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 14, 7), np.uint8)
    test = data.Dataset(pixels, np.array([2, 2, 0, 2, 0, 0]), ("none", "all", "some"), "symbols")
    monkeypatch.setattr(data, "load", lambda name, split, download: test)
    monkeypatch.setattr(lesson, "load_garments", functools.cache(lesson.load_garments.__wrapped__))
    images, classes, name = lesson.load_garments()
    assert classes == ["none", "some"] and name == "symbols" and images.shape == (2, 1, 28, 28)
    expected = torch.from_numpy(pixels[[2, 0]]).repeat_interleave(2, dim=1).repeat_interleave(4, dim=2)
    assert_near(images[:, 0], expected / 127.5 - 1, 1e-6)
    for show in (lesson.show_one_pixel, lesson.show_rearrange):
        lesson.plt.close(show())


# 3. What a pixel depends on
@pytest.mark.parametrize("layers, reach", [(1, 1), (2, 2), (5, 5)])
def test_convolutions_see_a_neighbourhood(redraw, layers, reach):
    network = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(layers))).double()
    seen = lesson.influence(redraw(network), torch.randn(1, 3, 15, 13, dtype=torch.float64), 7, 6) > 0
    rows, columns = (torch.arange(15) - 7).abs() <= reach, (torch.arange(13) - 6).abs() <= reach
    assert torch.equal(seen, rows[:, None] & columns)


def test_attention_sees_everything(attention_layer):
    x = torch.randn(1, 4, 15, 17, dtype=torch.float64)
    for layer in (lesson.pixel_attention, attention_layer(4, 2)):
        assert lesson.influence(layer, x, 0, 0).count_nonzero() == 15 * 17


# 4. What flattening loses
def test_permuting_pixels_permutes_the_output_of_attention_only(redraw, attention_layer):
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    order = torch.randperm(35)
    for layer in (lesson.pixel_attention, attention_layer(8, 2)):
        assert_near(layer(lesson.permute_pixels(x, order)), lesson.permute_pixels(layer(x), order), 1e-12)
    convolution = redraw(nn.Conv2d(8, 8, 3, padding=1).double())
    changed, plain = convolution(lesson.permute_pixels(x, order)), lesson.permute_pixels(convolution(x), order)
    assert lesson.relative_error(changed, plain) > 0.1
    assert lesson.relative_error(torch.tensor([1.0, -3.0]), torch.tensor([2.0, -4.0])) == 0.25


# 5. The division
@pytest.mark.parametrize("d", [4, 64, 256])
def test_division_keeps_the_spread_of_the_scores(d):
    q, k = torch.randn(2, 4, 256, d)
    assert (q @ k.mT).std() == pytest.approx(math.sqrt(d), rel=0.05)
    sides = (q @ k.mT).softmax(dim=-1), lesson.attention_weights(q, k)
    bits, divided_bits = (lesson.entropy(weights).mean() for weights in sides)
    through, divided_through = (lesson.gradient_through(weights).mean() for weights in sides)
    assert bits < divided_bits and 7 < divided_bits < 8 and 0.95 < divided_through < 1
    assert d < 256 or (bits < 1 and through < 0.25)


def test_entropy_and_gradient_are_those_of_softmax():
    assert_near(lesson.entropy(torch.tensor([[0, 1, 0, 0], [0.25] * 4, [0.5, 0, 0.5, 0]])), [0, 2, 1], 1e-6)
    scores = torch.randn(6, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda row: row.softmax(dim=-1))(scores)
    assert_near(lesson.gradient_through(scores.softmax(dim=-1)), jacobian.trace(), 1e-12)


# 6. One head
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_one_head_with_three_projections_equals_numpy_with_one(redraw, dtype, tolerance):
    for channels, _, groups, shape in shapes(20):
        layer = redraw(lesson.SelfAttention(channels, groups).to(dtype))
        p = {name.replace("proj", "attention.proj"): array for name, array in arrays(layer).items()}
        for name in ("weight", "bias"):
            p[f"attention.qkv.{name}"] = np.concatenate([p[f"{part}.{name}"] for part in "qkv"])
        x = torch.randn(shape, dtype=dtype)
        expected = reference.multi_head_self_attention(x.double().numpy(), p, 1, groups)
        assert_near(layer(x), expected, tolerance)


# 8. Several heads
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_heads_equal_numpy(attention_layer, by_hand, dtype, tolerance):
    for channels, heads, groups, shape in shapes(60):
        layer = attention_layer(channels, heads, groups, dtype, by_hand)
        x, parameters = torch.randn(shape, dtype=dtype), arrays(layer.attention)
        expected = reference.multi_head_self_attention(x.double().numpy(), arrays(layer), heads, groups)
        assert_near(layer(x), expected, tolerance)
        tokens = x.flatten(2).mT
        expected = [reference.multi_head_attention(image, parameters, heads) for image in tokens.double().numpy()]
        assert_near(layer.attention(tokens), np.stack(expected), tolerance)


def test_the_lectures_order_of_the_rows(redraw):
    """The lecture splits the rows of qkv into heads, and then each head's into q, k and v."""
    heads, c = 3, 12
    lecture, layer = redraw(nn.Linear(c, 3 * c).double()), redraw(lesson.TokenSelfAttention(c, heads).double())
    tokens = torch.randn(2, 7, c, dtype=torch.float64)
    q, k, v = rearrange(lecture(tokens), "n s (heads three d) -> three n heads s d", heads=heads, three=3)
    heard = rearrange((q @ k.mT / math.sqrt(c // heads)).softmax(dim=-1) @ v, "n heads s d -> n s (heads d)")
    layer.qkv.load_state_dict(lecture.state_dict())
    assert (layer(tokens) - layer.proj(heard)).abs().max() > 0.1
    order = rearrange(torch.arange(3 * c), "(heads three d) -> (three heads d)", heads=heads, three=3)
    layer.qkv.load_state_dict({name: rows[order] for name, rows in lecture.state_dict().items()})
    assert_near(layer(tokens), layer.proj(heard), 1e-12)


def test_layer_has_the_promised_parts_and_a_silent_projection_changes_nothing():
    layer = lesson.MultiHeadSelfAttention(12, heads=3, groups=2)
    parts = {f"{part}.{kind}" for part in ("norm", "attention.qkv", "attention.proj") for kind in ("weight", "bias")}
    assert set(layer.state_dict()) == parts
    assert (layer.norm.eps, layer.norm.num_groups, layer.attention.qkv.out_features) == (1e-5, 2, 36)
    assert not torch.equal(layer(x := torch.randn(2, 12, 3, 4)), x)
    for parameter in layer.attention.proj.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(layer(x), x)


def test_images_of_a_batch_know_nothing_of_each_other_nor_of_their_layout_in_memory(attention_layer):
    layer = attention_layer(8, 2, 4)
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64)
    other = torch.randn(8, 4, 5, dtype=torch.float64)
    y, z = layer(x), layer(torch.stack([x[0], other, x[2]]))
    assert_near(z[[0, 2]], y[[0, 2]], 1e-14)
    assert (z[1] - y[1]).abs().max() > 1
    assert_near(layer(x.to(memory_format=torch.channels_last)), y, 1e-13)
    assert_near(layer(x.transpose(2, 3)), layer(x.transpose(2, 3).contiguous()), 1e-13)


@pytest.mark.parametrize("by_hand", [False, True])
def test_extreme_activations_no_images_and_single_pixels(attention_layer, by_hand):
    layer = attention_layer(8, 2, dtype=torch.float32, by_hand=by_hand)
    x = torch.randn(2, 8, 5, 6)
    for scale in (1e6, 1e-6, 0):
        assert layer(scale * x).isfinite().all()
    assert lesson.attention_weights(1e18 * x[:, :, 0], 1e18 * x[:, :, 0]).isfinite().all()
    assert layer(x[:0]).shape == (0, 8, 5, 6)
    assert layer.weights(x[:0]).shape == (0, 2, 30, 30)
    assert torch.equal(layer.weights(x[:, :, :1, :1]), torch.ones(2, 2, 1, 1))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(attention_layer, dtype, by_hand):
    layer = attention_layer(8, 2, 4, dtype, by_hand)
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y, layer.double()(x.double()), 0.05)


@pytest.mark.parametrize("autocast", [False, True])
def test_fused_attention_in_bfloat16(autocast):
    q, k, v = torch.randn(3, 2, 3, 10, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=autocast):
        heard = lesson.fused_attention(q, k, v)
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
    assert heard.dtype == torch.bfloat16 and torch.equal(heard, expected)


@pytest.mark.parametrize("kind", [lesson.TokenSelfAttention, lesson.MultiHeadSelfAttention, lesson.TransformerBlock])
@pytest.mark.parametrize("channels, heads", [(8, 3), (8, 16), (8, 0), (8, -2)])
def test_heads_that_do_not_divide_are_refused(kind, channels, heads):
    with pytest.raises(ValueError, match=f"must divide the channels, got {heads} heads, {channels} channels"):
        kind(channels, heads)


@pytest.mark.parametrize("kind", [lesson.SelfAttention, functools.partial(lesson.MultiHeadSelfAttention, heads=2)])
@pytest.mark.parametrize("groups", [3, 16])
def test_groups_that_do_not_divide_are_refused(kind, groups):
    with pytest.raises(ValueError, match="num_channels"):
        kind(8, groups=groups)


# 9. What heads are for
def test_ears_are_marked_and_asked_for():
    images, answers = lesson.make_ears(20)
    assert images.shape == (20, 8, 5, 5) and answers.shape == (20, 12)
    for image, answer in zip(images, answers, strict=True):
        left, right = (mark.nonzero() for mark in image[-2:])
        assert len(left) == len(right) == 1 and not torch.equal(left, right)
        assert_near(answer, torch.cat([image[:6, *left[0]], image[:6, *right[0]]]), 1e-6)
    two_off = answers[:, :, None, None].expand(20, 12, 5, 5) + 2
    assert_near(lesson.ear_error(lambda _: two_off, images, answers), 4, 1e-6)


# 10. Other people's attention
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_pytorch(attention_layer, by_hand, dtype, tolerance):
    for channels, heads, groups, shape in shapes(20):
        layer = attention_layer(channels, heads, groups, dtype, by_hand)
        theirs = lesson.to_torch(layer)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        tokens = layer.norm(x).flatten(2).mT
        heard, weights = theirs(tokens, tokens, tokens, average_attn_weights=False)
        expected = x + heard.mT.reshape(x.shape)
        assert_near(layer(x), expected, tolerance)
        assert_near(layer.weights(x), weights, tolerance)
        shared = x, layer.norm.weight, layer.norm.bias
        ours = *shared, *layer.attention.qkv.parameters(), *layer.attention.proj.parameters()
        theirs = *shared, theirs.in_proj_weight, theirs.in_proj_bias, *theirs.out_proj.parameters()
        assert_gradients_near(layer(x), ours, expected, theirs, tolerance)


def test_to_torch_copies(redraw):
    layer = lesson.TokenSelfAttention(8, 2).bfloat16().eval()
    theirs = lesson.to_torch(layer)
    assert theirs.in_proj_weight.dtype == torch.bfloat16 and not theirs.training
    before = theirs.in_proj_weight.clone()
    redraw(layer)
    assert torch.equal(theirs.in_proj_weight, before)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_equals_diffusers(attention_layer, dtype, tolerance):
    for channels, heads, groups, shape in shapes(20):
        layer = attention_layer(channels, heads, groups, dtype)
        sizes = {"query_dim": channels, "heads": heads, "dim_head": channels // heads, "norm_num_groups": groups}
        theirs = Attention(**sizes, bias=True, eps=1e-5, residual_connection=True).to(dtype)
        state = {f"to_out.0.{name}": value for name, value in layer.attention.proj.state_dict().items()}
        state |= {f"group_norm.{name}": value for name, value in layer.norm.state_dict().items()}
        for name, value in layer.attention.qkv.state_dict().items():
            state |= {f"to_{part}.{name}": rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        theirs.load_state_dict(state)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        assert_near(layer(x), theirs(x), tolerance)
        assert_gradients_near(layer(x), [x], theirs(x), [x], tolerance)


# 11. What it costs
def test_fused_attention_keeps_no_weights():
    kept = {}
    for side in (16, 32):
        x, layers = torch.randn(3, 16, side, side), lesson.cost_layers(channels=16, heads=4)
        by_hand, fused, convolution = kept[side] = [lesson.measure_kept(layer, x) for layer in layers.values()]
        assert by_hand >= 4 * 4 * side**4  # all weights of one image
        assert fused < by_hand / 10
        assert convolution == 4 * 16 * side**2  # its input, and neither its parameters nor the other images
    assert kept[32][0] > 14 * kept[16][0]  # grows with the square of the pixels
    assert kept[32][1] < 4.1 * kept[16][1]  # grows with the pixels


# 12. Transformers
@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_transformer_equals_numpy_and_pytorch(redraw, dtype, tolerance):
    for channels, heads, _, (n, _, s, _) in shapes(20):
        block = redraw(lesson.TransformerBlock(channels, heads).to(dtype))
        tokens = torch.randn(n, s, channels, dtype=dtype)
        expected = [reference.transformer_block(x, arrays(block), heads) for x in tokens.double().numpy()]
        assert_near(block(tokens), np.stack(expected), tolerance)

        options = {"dropout": 0, "activation": "gelu", "batch_first": True, "norm_first": True}
        theirs = nn.TransformerEncoderLayer(channels, heads, 4 * channels, **options).to(dtype)
        theirs.self_attn.load_state_dict(lesson.to_torch(block.attention).state_dict())
        for name, part in (("norm1", "norm1"), ("norm2", "norm2"), ("linear1", "mlp.0"), ("linear2", "mlp.2")):
            theirs.get_submodule(name).load_state_dict(block.get_submodule(part).state_dict())
        assert_near(block(tokens), theirs(tokens), tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("size, patch, channels_in", [(28, 7, 1), (6, 2, 3), (4, 4, 2), (3, 1, 1)])
def test_vision_transformer_equals_numpy(redraw, dtype, tolerance, size, patch, channels_in):
    model = lesson.VisionTransformer(size, patch, channels=8, depth=2, heads=2, n_classes=5, channels_in=channels_in)
    parameters, images = arrays(redraw(model.to(dtype))), torch.randn(2, channels_in, size, size, dtype=dtype)
    expected = [reference.vision_transformer(x, parameters, 2, 2, patch) for x in images.double().numpy()]
    assert model.encode(images).shape == (2, (size // patch) ** 2, 8)
    assert_near(model(images), np.stack(expected), tolerance)


@pytest.mark.parametrize("patch", [3, 0, -2])
def test_patches_that_do_not_divide_are_refused(patch):
    with pytest.raises(ValueError, match=f"must divide that of the image, got {patch} and 28"):
        lesson.VisionTransformer(patch=patch)


# 13. Convolutions
def convolutions(n):
    """3×3 convolutions with random weights, and images `(n, c, h, w)`, some of a single pixel, row or column."""
    rng = np.random.default_rng(0)
    for i in range(n):
        channels_in, channels_out = rng.integers(1, 20, 2).tolist()
        height, width = ((1, 1), (1, 9), (7, 1), (2, 2), (3, 3))[i] if i < 5 else rng.integers(1, 20, 2).tolist()
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bool(rng.integers(2)))
        yield conv, torch.randn(int(rng.integers(1, 4)), channels_in, height, width)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
def test_attention_expresses_any_convolution(redraw, dtype, tolerance):
    for i, (conv, x) in enumerate(convolutions(40)):
        layer, x = lesson.attention_from_convolution(redraw(conv.to(dtype))), x.to(dtype)
        expected = conv(x)
        assert_near(layer(x), expected, tolerance)
        for scale in (1e-4, 1e4):  # without bias this would be the same; with it, small inputs drown
            assert_near(layer(scale * x), conv(scale * x), tolerance)
        if i < 7 and conv.bias is not None:
            numpys = reference.convolution_by_attention(x[0].double().numpy(), *arrays(conv).values())
            assert_near(expected[0], numpys, tolerance)
    redraw(conv)  # the kernel has been copied
    assert_near(layer(x), expected, tolerance)


def test_the_scores_single_out_one_pixel_or_the_zeros():
    scores = lesson.attention_from_convolution(nn.Conv2d(1, 1, 3, padding=1)).scores(4, 6)
    assert scores.shape == (9, 24, 25)
    weights = scores.softmax(dim=-1)
    assert_near(weights.sum(dim=-1), torch.ones(9, 24), 1e-6)
    inside = weights[:, 2 * 6 + 3]  # of pixel (2, 3), away from the borders
    assert inside.argmax(dim=-1).tolist() == [6 * r + c for r in (1, 2, 3) for c in (2, 3, 4)]
    assert inside[:, -1].max() < 1e-20
    assert_near(weights[:, 0, -1], torch.tensor([1, 1, 1, 1, 0, 0, 1, 0, 0]), 1e-20)  # of the corner


OPTIONS = [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}, {"padding": "valid"}]
OTHERS = [nn.Conv2d(2, 2, **{"kernel_size": 3, "padding": 1} | options) for options in OPTIONS]
OTHERS += [nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 5, padding=1), nn.Conv2d(2, 2, (3, 1), padding=1)]
OTHERS += [nn.ConvTranspose2d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1), nn.Linear(2, 2)]


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_convolutions_are_refused(other):
    with pytest.raises(ValueError, match=r"expected an nn.Conv2d with .*'kernel_size': \(3, 3\)"):
        lesson.attention_from_convolution(other)


# The script
def test_script_draws_and_prints_what_is_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["02_attention.py", "--out", str(tmp_path)])
    monkeypatch.setattr(lesson, "SIDES", (4, 8))
    lesson.main()
    printed = capsys.readouterr().out
    assert re.findall(r"^(\d+)\. ", printed, re.M) == [str(i) for i in range(1, 14)]
    pictures = sorted(tmp_path.iterdir())
    expected = ["02_one_pixel", "03_reach", "04_shuffled_pixels", "05_division", "07_rearrange", "09_ears", "11_cost"]
    assert [picture.stem for picture in pictures] == [*expected, "13_convolution"]
    assert re.findall(r"^wrote (.+)$", printed, re.M) == [str(picture) for picture in pictures]
    for picture in pictures:
        pixels = matplotlib.image.imread(picture)
        assert 700 < pixels.shape[1] < 1000 and pixels.shape[0] < pixels.shape[1]
        assert pixels[..., :3].std() > 0.05

    sections = re.split(r"^\d+\. ", printed, flags=re.M)

    def numbers(section, pattern):
        return [float(found) for found in re.findall(pattern, sections[section])]

    assert numbers(3, r"depends on (\d+) of 784") == [9, 25, 169, 784]
    attention, convolution = numbers(4, r"relative difference (\S+)")
    assert attention < 1e-12 and convolution > 0.1
    assert sections[7].count("the same by hand: True") == len(lesson.GALLERY)
    assert max(numbers(6, r"off by (\S+)") + numbers(8, r"off by (\S+)")) < 1e-5
    one_head, two_heads = numbers(9, r"error (\S+)")
    assert one_head > 0.4 and two_heads < 0.01
    shares = np.array([numbers(9, r"gives (\d+)%")[1:], numbers(9, r"(\d+)% to the right")[1:]])  # ears heads, of two
    assert abs(np.linalg.det(shares / 100)) > 0.9  # each ear has a head of its own
    right, wrong = numbers(10, r"off by (\S+);")
    none, some = numbers(10, r"changes image 0 by (\S+)")
    assert right < 1e-5 and none == 0 and wrong > 0.1 and some > 0.1
    with_positions, without = numbers(12, r"by (\S+)\n")
    assert with_positions > 1e-4 and without < 1e-5
    assert max(numbers(13, r"relative difference (\S+)")) < 1e-5


def test_a_file_is_no_folder_to_write_to(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["02_attention.py", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit) as stopped:
        lesson.main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "--out: must be a folder that can be written to" in error
