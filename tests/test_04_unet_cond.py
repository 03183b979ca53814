"""Lesson 4: attention on the levels asked for, labels, guidance."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import lesson_tools as tools
from data.fashion_mnist import CLASSES


@pytest.fixture
def cond_unet(lesson4, redraw):
    return redraw(lesson4.CondUNet(2, (8, 16), 1, 4, attention_levels=(1,), head_dim=4, n_classes=3))


@pytest.fixture
def inputs():
    return torch.randn(4, 2, 8, 12), torch.randn(4) * 100, torch.tensor([0, 1, 2, 3])


def test_attention_is_on_its_levels_and_in_the_middle_and_starts_at_zero(lesson4):
    network = lesson4.CondUNet(1, (8, 16, 32), 2, 4, attention_levels=(0, 1), head_dim=8, n_classes=10)
    kind = lesson4.lesson2.AttentionBlock
    layers = {name: module for name, module in network.named_modules() if isinstance(module, kind)}
    assert list(layers) == [
        *(f"down.{level}.{i}.attention" for level in (0, 1) for i in (0, 1)),
        "middle.0.attention",
        *(f"up.{level}.{i}.attention" for level in (1, 2) for i in (0, 1, 2)),  # the lowest level first
    ]
    for layer in layers.values():
        assert layer.norm.num_channels == 8 * layer.attention.heads
        x = torch.randn(1, layer.norm.num_channels, 4, 4)
        torch.testing.assert_close(layer(x), x)
    assert not network(torch.randn(2, 1, 8, 4), torch.randn(2), torch.tensor([0, 10])).any()


def test_skips_are_taken_after_attention(lesson4, cond_unet, inputs):
    block = cond_unet.down[1][0]
    assert isinstance(block, lesson4.SavedAttentionResBlock)
    seen, take = {}, block.take
    block.attention.register_forward_hook(lambda module, arguments, output: seen.update(attention=output))
    block.take = lambda: seen.setdefault("skip", take())
    cond_unet(*inputs)
    assert seen["skip"] is seen["attention"]


def test_the_compiled_network_is_the_same_network(lesson3, cond_unet):
    """Traced once and as a whole (fullgraph), but without a C++ compiler, which would take a minute."""
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cond_unet, backend=graphs, fullgraph=True)
    batch = torch.randn(3, 2, 8, 8), torch.tensor([0.1, 1.0, 9.0]), torch.randn(3, 2, 8, 8), torch.tensor([0, 2, 3])

    def loss_and_gradients(network):
        cond_unet.zero_grad()
        loss = lesson3.denoising_loss(lesson3.Denoiser(network, 0.5), *batch).mean()
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in cond_unet.parameters())]

    before = loss_and_gradients(cond_unet)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(compiled), before, rtol=1e-3, atol=1e-5)
    assert graphs.frame_count == 1
    assert all(layer.saved is None for layer in cond_unet.modules() if isinstance(layer, lesson3.Saved))


def test_labels_are_dropped_one_time_in_ten(lesson4):
    label = torch.arange(30_000) % 3
    batch = 7, torch.zeros(1), torch.ones(1), torch.ones(1), label

    def drop():
        torch.manual_seed(0)
        (((step, *rest, dropped)),) = lesson4.drop_labels([batch], 3)
        assert step == 7 and all(kept is part for kept, part in zip(rest, batch[1:], strict=False))
        return dropped, torch.rand(1)

    (dropped, after), (again, _) = drop(), drop()
    no_label = dropped == 3
    assert no_label.float().mean() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(dropped[~no_label], label[~no_label])
    torch.testing.assert_close(again, dropped)  # the seed of the step decides
    torch.manual_seed(0)
    torch.rand(len(label))
    torch.testing.assert_close(torch.rand(1), after)  # one number for each label, drawn after noise levels and noise


@pytest.mark.parametrize("guidance", [-1.0, 0, 0.7, 3])
@pytest.mark.parametrize(
    ("sigma", "more", "guided"),
    [
        (0.1, {}, True),
        (3.0, {}, True),
        (3.01, {}, False),
        (3.01, {"below": math.inf}, True),
        (0.1, {"below": 0}, False),
    ],
)
def test_guidance_is_a_line_through_two_predictions(lesson3, lesson4, cond_unet, guidance, sigma, more, guided):
    denoiser = lesson3.Denoiser(cond_unet.double(), 0.6)
    x = torch.randn(3, 2, 8, 8).double()
    label = torch.tensor([2, 0, 1])
    calls = []
    cond_unet.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    found = lesson4.guide(denoiser, guidance, **more)(x, sigma, label)
    assert calls == [6 if guided and guidance else 3]  # one call, without the half that isn't needed
    with_label, without = denoiser(x, sigma, label), denoiser(x, sigma, torch.full((3,), 3))
    assert (with_label - without).abs().max() > 1e-2
    expected = (1 + guidance) * with_label - guidance * without if guided else with_label
    torch.testing.assert_close(found, expected)


def test_a_class_is_found_by_name_or_number(lesson4):
    for text, number in (("Ankle boot", 9), ("ankle BOOT", 9), ("9", 9), ("0", 0), ("T-shirt/top", 0)):
        assert lesson4.find_classes(text, CLASSES) == [number]
    assert lesson4.find_classes("3", ("0", "1", "2", "3")) == [3]  # a number that is a name
    with pytest.raises(tools.UserError, match=r"must be one of 3, 7$"):  # so positions don't count
        lesson4.find_classes("1", ("3", "7"))
    assert lesson4.find_classes(None, ("a", "b", "c")) == [0, 1, 2]
    for text in ("10", "-1", "boot", "", "1.5", "²"):
        with pytest.raises(tools.UserError, match=r"T-shirt/top, .*, Ankle boot, or a number from 0 to 9"):
            lesson4.find_classes(text, CLASSES)


def test_a_class_is_found_exactly_first_and_never_by_guessing(lesson4):
    assert lesson4.find_classes("a", ("A", "a", "b")) == [1]
    assert lesson4.find_classes("B", ("A", "a", "b")) == [2]
    assert lesson4.find_classes("STRASSE", ("Weg", "straße")) == [1]
    assert lesson4.find_classes("é", ("e", "E\u0301")) == [1]  # as macOS writes it in a folder's name
    with pytest.raises(tools.UserError, match=r"--class BAG: ambiguous; write Bag or bag$"):
        lesson4.find_classes("BAG", ("Bag", "bag"))


def test_heads_of_another_size_are_refused(lesson4):
    with pytest.raises(ValueError, match="head_dim must divide the 12 channels"):
        lesson4.AttentionResBlock(8, 12, 4, 16).add_attention(head_dim=8)


# The lesson's claims
def test_blended_labels_lead_from_class_to_class(lesson3, lesson4, cond_unet, inputs):
    x, time, _ = inputs
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    blended = lesson4.blend(denoiser, 2, 0, 3).network
    for label, expected in ((0, 2), (2, 0)):
        ours, theirs = blended(x, time, torch.full((4,), label)), cond_unet(x, time, torch.full((4,), expected))
        torch.testing.assert_close(ours, theirs)
    middle = blended.embed_label.weight[1]
    torch.testing.assert_close(middle, (cond_unet.embed_label.weight[0] + cond_unet.embed_label.weight[2]) / 2)
    assert blended.embed_label is not cond_unet.embed_label


@pytest.mark.parametrize("n", [2, 4, 9, 10, 11])
def test_each_row_leads_from_one_class_to_another(lesson4, monkeypatch, n):
    rows, settings = [], SimpleNamespace(classes=tuple(map(str, range(n))), data="pictures")
    monkeypatch.setattr(lesson4, "load_demo_model", lambda: (SimpleNamespace(device="cpu"), settings))
    monkeypatch.setattr(lesson4, "blend", lambda denoiser, one, other, steps: rows.append((one, other)) or print)
    monkeypatch.setattr(lesson4, "generate", lambda denoise, label, noise_ids: torch.rand(len(noise_ids), 1, 4, 4))
    lesson4.show_blend()
    assert rows and all(one != other and max(one, other) < n for one, other in rows)


def test_caught_weights_are_those_of_the_layer(lesson3, lesson4, cond_unet):
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    layer = cond_unet.middle[0].attention
    seen = []
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    weights = lesson4.catch_weights(layer, denoiser, torch.randn(2, 2, 8, 12), 1.5)
    assert weights.shape == (2, layer.attention.heads, 4, 6, 4, 6)
    weights = weights.flatten(4).flatten(2, 3)  # n heads (h w) (h w)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, layer.attention.heads, 4 * 6))
    ((x, expected),) = seen
    values = layer.attention.split(layer.norm(x).flatten(2).mT)[2]
    averages = layer.attention.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(x + averages.mT.unflatten(2, (4, 6)), expected)  # as computed by the fused kernel
    assert not layer._forward_pre_hooks


def test_without_attention_nothing_else_changes(lesson3, lesson4, cond_unet):
    denoiser = lesson3.Denoiser(cond_unet, 0.6)
    plain, before = lesson4.without_attention(denoiser), copy.deepcopy(denoiser.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, torch.zeros_like(value) if ".attention.proj." in name else before[name])
        assert torch.equal(denoiser.state_dict()[name], before[name])
    x = torch.randn(1, 16, 4, 4)
    assert torch.equal(plain.network.middle[0].attention(x), x)


def test_states_on_the_way_are_those_of_sampling(lesson3, lesson4, cond_unet, monkeypatch):
    settings = lesson3.RunSettings("CondUNet", "small", 1, 32, 0, "", 1, ("a", "b"), (28, 28), 0.6)
    denoiser, label = lesson3.Denoiser(cond_unet, 0.6), torch.tensor([0, 1])
    monkeypatch.setattr(lesson3, "draw_noise", lambda settings, ids, device: torch.randn(2, 2, 8, 8) + len(ids))
    states = lesson4.states_on_the_way(denoiser, settings, label, (50, 1))
    for wanted, (sigma, x, x0_hat) in zip((50, 1), states, strict=True):
        assert min(lesson3.noise_levels()[:-1], key=lambda level: abs(math.log(level / wanted))) == sigma
        torch.testing.assert_close(denoiser(x, sigma, label), x0_hat)


def test_the_share_from_far_away(lesson4):
    """The window is cut off at the border."""
    influence = torch.rand(7, 9)
    far = sum(float(influence[i, j]) for i in range(7) for j in range(9) if max(abs(i - 1), abs(j - 4)) > 2)
    assert lesson4.far_share(influence, 1, 4, 2) == pytest.approx(far / float(influence.sum()), abs=1e-6)
    assert lesson4.far_share(influence, 1, 4, 9) == pytest.approx(0, abs=1e-6)
