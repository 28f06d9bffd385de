"""Positional attention as a layer, the vision transformer, resumable training, and permuted patches."""

import pytest
import torch

from cvxlib import spatial

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def tiny(attention="positional", seed=0, **sizes):
    pytest.importorskip("timm")
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "channels": 1, "patch": 2, "width": 12, "depth": 2, "heads": 3} | sizes
    return spatial.VisionTransformer(3, attention, **sizes)


def stripes(count, seed):
    """Bright rows in the upper third, the middle or the lower part: easy images with a spatial structure."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels, strict=True):
        image[0, 3 * int(label) : 3 * int(label) + 2] += 1
    return images, labels


def test_positional_attention_is_its_formula():
    torch.manual_seed(0)
    layer = spatial.PositionalAttention(6, 2).double()
    tokens, positions = torch.randn(3, 5, 6).double(), torch.randn(5, 6).double()
    query, key = (positions @ weight.mT for weight in layer.query_key.weight.chunk(2))
    values = tokens @ layer.value.weight.mT + layer.value.bias
    heads = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        heads.append(torch.softmax(query[:, part] @ key[:, part].mT / 3**0.5, 1) @ values[..., part])
    expected = torch.cat(heads, 2) @ layer.output.weight.mT + layer.output.bias
    torch.testing.assert_close(layer(tokens, positions), expected)
    assert layer.scores(positions).shape == (2, 5, 5)


def test_positional_attention_is_linear_in_the_tokens():
    torch.manual_seed(1)
    layer = spatial.PositionalAttention(6, 2).double()
    positions, (a, b) = torch.randn(5, 6).double(), torch.randn(2, 3, 5, 6).double()
    zero = layer(torch.zeros_like(a), positions)
    mixed = layer(2 * a - 3 * b, positions) - zero
    torch.testing.assert_close(mixed, 2 * (layer(a, positions) - zero) - 3 * (layer(b, positions) - zero))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["positional", "vanilla"])
def test_transformer_shapes_and_gradients(attention, device):
    model = tiny(attention).to(device)
    logits = model(torch.randn(4, 1, 8, 8, device=device))
    assert logits.shape == (4, 3)
    logits.square().sum().backward()
    # the last layer's vanilla query of patches is unused by the class token only in part: every weight has a gradient
    assert all(weight.grad is not None and bool(torch.isfinite(weight.grad).all()) for weight in model.parameters())
    assert float(model.positions.grad.abs().sum()) > 0


def test_the_papers_size():
    pytest.importorskip("timm")
    model = spatial.VisionTransformer(10)
    assert len(model.blocks) == 7 and model.positions.shape == (65, 384)
    assert model.blocks[0].attention.heads == 12
    assert model.position_scores().shape == (7, 12, 64, 64)


def test_switch_and_sizes_are_checked():
    with pytest.raises(ValueError, match="attention"):
        tiny("linear")
    with pytest.raises(ValueError, match="patch"):
        tiny(patch=3)
    with pytest.raises(ValueError, match="heads"):
        tiny(heads=5)
    with pytest.raises(ValueError, match="attention"):
        tiny("vanilla").position_scores()


def test_permuted_patches():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).float()
    assert torch.equal(spatial.permute_patches(images, 1), images)
    for grid in (2, 4, 8):
        shuffled = spatial.permute_patches(images, grid, seed=3)
        assert not torch.equal(shuffled, images)
        assert torch.equal(shuffled.flatten().sort().values, images.flatten().sort().values)
        # cells are moved whole: the multiset of cells is the same
        size = 8 // grid
        cells = [
            {
                tuple(part[:, r : r + size, c : c + size].flatten().tolist())
                for r in range(0, 8, size)
                for c in range(0, 8, size)
            }
            for part in (images[0], shuffled[0])
        ]
        assert cells[0] == cells[1]
    # one permutation for all images
    assert torch.equal(
        spatial.permute_patches(images, 4)[1] - spatial.permute_patches(images, 4)[0], torch.full((3, 8, 8), 192.0)
    )
    with pytest.raises(ValueError, match="grid"):
        spatial.permute_patches(images, 3)


def test_shuffling_whole_patches_only_permutes_positions():
    """A positional transformer on shuffled images equals one with permuted position vectors on the originals."""
    model, images = tiny(), torch.randn(3, 1, 8, 8)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        shuffled = model(spatial.permute_patches(images, 4, seed=5))
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(16)  # patch k of the original sits at place inverse[k]
        model.positions[1:] = model.positions[1:][inverse]
        torch.testing.assert_close(model(images), shuffled)


def test_crop_and_flip():
    images = torch.rand(64, 2, 6, 6)
    augment = spatial.crop_and_flip(2)
    one, two = (augment(images, torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(one, two) and one.shape == images.shape
    still = spatial.crop_and_flip(0, flip=False)(images, torch.Generator().manual_seed(0))
    assert torch.equal(still, images)
    mirrored = spatial.crop_and_flip(0)(images, torch.Generator().manual_seed(0))
    flipped = (mirrored == images.flip(3)).all((1, 2, 3))
    assert bool((flipped | (mirrored == images).all((1, 2, 3))).all()) and 10 < int(flipped.sum()) < 54


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["positional", "vanilla"])
def test_training_learns(attention, device):
    model = tiny(attention).to(device)
    history = spatial.train_classifier(model, stripes(300, 0), stripes(200, 1), epochs=12, batch=50, lr=5e-3)
    assert history[-1]["test_error"] < 0.1 and len(history) == 12
    assert history[-1]["test_error"] == spatial.classification_error(
        model, tuple(part.to(device) for part in stripes(200, 1))
    )


def test_training_resumes_exactly(tmp_path):
    options = {"epochs": 4, "batch": 50, "lr": 5e-3, "augment": spatial.crop_and_flip(1), "seed": 3}
    data = stripes(150, 0), stripes(50, 1)
    whole = tiny()
    history = spatial.train_classifier(whole, *data, **options)
    path = tmp_path / "run.pt"
    broken = tiny()
    part = spatial.train_classifier(broken, *data, checkpoint=path, max_seconds=0.0, **options)
    assert len(part) == 1
    again = tiny(seed=8)  # other weights: all must come from the file
    resumed = spatial.train_classifier(again, *data, checkpoint=path, **options)
    assert len(resumed) == 4
    for one, two in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert [r["test_error"] for r in history] == [r["test_error"] for r in resumed]
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ValueError, match="checkpoint"):
        spatial.train_classifier(tiny(), *data, checkpoint=path, **(options | {"lr": 1e-3}))


def test_small_cnn_learns():
    torch.manual_seed(0)
    model = spatial.small_cnn(3, channels=1, width=4)
    history = spatial.train_classifier(model, stripes(300, 0), stripes(200, 1), epochs=8, batch=50, lr=1e-2)
    assert history[-1]["test_error"] < 0.1
