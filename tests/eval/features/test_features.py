"""Networks by name, on untrained weights in the formats that their libraries offer, against those libraries."""

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from eval.features import features
from eval.features.features import open_features
from eval.features.mini import DIM
from eval.features.reference import FeatureSet, reference
from eval.metrics.clip_score import Clip, clip_scores, cosines, r_precision
from sd_mini import shapes
from sd_mini.text_encoder.loading import open_clip_encoder
from tests.text_encoder.test_open_clip import save_model

OWN_WIDTH = 5


def own_network():
    """What a user would name: module:tests.eval.features.test_features:own_network."""
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, OWN_WIDTH))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, pictures):
            return self.net(pictures.float() / 255)

    return Own()


SHADE = {"added": 0.0}


def own_function():
    """No module: what it gives depends on a mapping that its source does not show."""
    return lambda pictures: pictures.float().mean((2, 3)) + SHADE["added"]


def no_network():
    return 3


def broken_network():
    return lambda pictures: torch.full((len(pictures), 3), torch.nan)


@pytest.fixture(scope="module")
def pictures():
    return shapes.draw_batch(shapes.sample_scenes(20, "test", seed=3), 48)


@pytest.fixture(scope="module")
def stock_inception():
    """torch-fidelity's network, untrained, its batch norms as if they had seen something."""

    class Untrained(feature_extractor_inceptionv3.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        torch.manual_seed(0)
        network = Untrained("inception", ["2048"])
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network


@pytest.fixture(scope="module")
def inception_file(stock_inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(stock_inception.state_dict(), path)
    return path


def test_inception_is_torch_fidelity_s(stock_inception, inception_file, pictures):
    extract = open_features(f"inception={inception_file}")
    found = extract(pictures[:3])
    with torch.no_grad():
        expected = stock_inception(torch.from_numpy(pictures[:3]))[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert extract.distance == "FID" and found.shape == (3, 2048)


def test_only_inception_s_distance_is_called_fid(tmp_path):
    assert open_features("mini").distance == "FD-mini"
    assert open_features("module:tests.eval.features.test_features:own_network").distance == "FD-own_network"


def test_dinov2_is_a_model_that_timm_has_weights_of():
    assert features.DINOV2 in timm.list_pretrained()


def test_a_timm_model_from_a_file(tmp_path, pictures):
    torch.manual_seed(0)
    stock = timm.create_model("test_vit", pretrained=False, num_classes=7)
    save_file(stock.state_dict(), tmp_path / "weights.safetensors")
    extract = open_features(f"timm:test_vit={tmp_path / 'weights.safetensors'}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(stock), is_training=False)
    batch = torch.stack([transform(Image.fromarray(p.transpose(1, 2, 0))) for p in pictures])
    with torch.no_grad():
        expected = stock.eval().forward_head(stock.forward_features(batch), pre_logits=True).numpy()
    np.testing.assert_allclose(extract(pictures), expected, rtol=1e-4, atol=1e-5)
    assert extract.distance == "FD-test_vit"


def test_dinov2_by_transformers_from_a_folder(tmp_path, pictures):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    stock = Dinov2Model(config).eval()
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for part in (stock, processor):
        part.save_pretrained(tmp_path / "tiny-dinov2")
    extract = open_features(f"transformers:{tmp_path / 'tiny-dinov2'}")
    given = [Image.fromarray(p.transpose(1, 2, 0)) for p in pictures]
    with torch.no_grad():
        expected = stock(**processor(given, return_tensors="pt")).pooler_output.numpy()
    np.testing.assert_allclose(extract(pictures), expected, rtol=1e-4, atol=1e-5)
    assert extract.distance == "FD-tiny-dinov2"


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("clip") / "tiny")


def test_an_open_clip_tower_from_a_folder(clip_name, pictures):
    model, _, transform = open_clip.create_model_and_transforms(clip_name)
    batch = torch.stack([transform(Image.fromarray(p.transpose(1, 2, 0))) for p in pictures])
    with torch.no_grad():
        expected = model.eval().encode_image(batch, normalize=True).numpy()
    np.testing.assert_allclose(open_features(f"open_clip:{clip_name}")(pictures), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(Clip(clip_name).pictures(pictures), expected, rtol=1e-4, atol=1e-6)


def test_a_network_of_one_s_own(pictures):
    found = open_features("module:tests.eval.features.test_features:own_network")(pictures)
    with torch.no_grad():
        expected = own_network()(torch.from_numpy(pictures)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_picture_s_features_do_not_depend_on_how_many_are_asked(pictures):
    extract = open_features("mini")
    everything = extract(pictures)
    assert everything.shape == (len(pictures), DIM)
    assert np.array_equal(extract(pictures[:16]), everything[:16])  # to the last bit where the batches are the same
    np.testing.assert_allclose(extract(pictures[:3]), everything[:3], rtol=1e-5, atol=1e-5)


def test_fd_mini_grows_with_what_is_wrong():
    """Blur, noise and missing kinds, each worse than the last and all worse than other true drawings."""
    scenes = shapes.sample_scenes(900, "test", seed=5)
    drawn = shapes.draw_batch(scenes, 64)
    extract = open_features("mini")
    seen, floor = FeatureSet.of(extract(drawn[:300])), FeatureSet.of(extract(drawn[300:600]))
    rest, draw = drawn[600:].astype(np.float32), np.random.default_rng(0)
    ladder = [seen.distance(floor)]
    for noise in (4, 8, 16):
        made = np.clip(rest + draw.normal(0, noise, rest.shape), 0, 255).astype(np.uint8)
        ladder.append(seen.distance(FeatureSet.of(extract(made))))
    assert ladder == sorted(ladder)
    one_kind = drawn[600:][[scene.kind == "one_object" for scene in scenes[600:]]]
    assert seen.distance(FeatureSet.of(extract(one_kind))) > 3 * ladder[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vgg", "expected mini, inception"),
        ("inception=nowhere.pth", "inception weights nowhere.pth: no such file"),
        ("timm:test_vit=nowhere.pth", "no weights file nowhere.pth"),
        ("timm:no_such_model", "timm model 'no_such_model' cannot be loaded"),
        ("timm:test_vit", "where there is no hub, give a file or a folder"),
        ("transformers:nowhere", "'nowhere' cannot be loaded"),
        ("open_clip:ViT-B-32=nowhere.pt", "no weights file nowhere.pt"),
        ("mini=nowhere.pth", "mini=nowhere.pth: mini is drawn from a seed and takes no weights"),
        ("module:tests.eval.features.test_features:nothing", "module:PACKAGE.MODULE:FUNCTION"),
        ("module:.relative:nothing", "module:PACKAGE.MODULE:FUNCTION"),
        ("module:math:pi", "expected a function that is called without arguments"),
        ("module:math:sqrt", "expected a function that is called without arguments"),
        ("module:tests.eval.features.test_features:no_network", "gives int, expected a function or torch.nn.Module"),
        ("module:time:time", "no signature found .* expected a function that is called without arguments"),
    ],
)
def test_what_is_no_network_is_refused(name, says):
    with pytest.raises(ValueError, match=says) as refused:
        open_features(name)
    assert "\n" not in str(refused.value)


def test_a_network_that_gives_nan_is_refused(pictures):
    with pytest.raises(ValueError, match="expected one finite vector for each"):
        open_features("module:tests.eval.features.test_features:broken_network")(pictures)


def test_offline_the_weights_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth cannot be downloaded"):
        open_features("inception")


def test_a_reference_is_looked_at_once(pictures, tmp_path, monkeypatch):
    extract = open_features("mini")
    first = reference(extract, pictures, tmp_path)
    monkeypatch.setattr(features.Extractor, "__call__", lambda *_: pytest.fail("looked at twice"))
    again = reference(extract, pictures, tmp_path)
    for name in ("features", "mean", "covariance"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="delete it, and it is made again"):
        reference(extract, pictures, tmp_path)


def test_other_pictures_networks_and_preparations_have_references_of_their_own(pictures, tmp_path):
    extract = open_features("mini")
    changed = pictures.copy()
    changed[0, 0, 0, 0] ^= 1
    other = open_features("module:tests.eval.features.test_features:own_network")
    for given, network in ((pictures, extract), (changed, extract), (pictures[:-1], extract), (pictures, other)):
        reference(network, given, tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_function_s_reference_is_not_kept(pictures, tmp_path, monkeypatch):
    extract = open_features("module:tests.eval.features.test_features:own_function")
    first = reference(extract, pictures, tmp_path)
    monkeypatch.setitem(SHADE, "added", 9.0)
    np.testing.assert_allclose(reference(extract, pictures, tmp_path).features, first.features + 9, rtol=1e-6)
    assert not list(tmp_path.iterdir())


def test_clip_scores_of_known_cosines():
    found = clip_scores(np.array([1.0, 0.0, -0.5]))
    assert found["hessel"].tolist() == [2.5, 0, 0] and found["x100"].tolist() == [100, 0, 0]
    assert found["cosine"].tolist() == [1, 0, -0.5]
    turned = np.array([[3.0, 0], [0, 2], [1, 1]])
    assert cosines(turned, np.array([[1.0, 0], [1, 0], [1, 0]])) == pytest.approx([1, 0, np.sqrt(0.5)])
    with pytest.raises(ValueError, match="one text a picture"):
        cosines(turned, turned[:2])


def test_clip_score_is_open_clip_s_cosine_and_long_prompts_keep_their_end(clip_name, pictures):
    model, _, transform = open_clip.create_model_and_transforms(clip_name)
    words, clip = open_clip.get_tokenizer(clip_name), Clip(clip_name)
    prompts = ["a red circle", "a small blue square " * 30]
    tokens = words(prompts)
    assert tokens[1, -1] == words.eot_token_id  # cut to the length, the last token is the end mark
    batch = torch.stack([transform(Image.fromarray(p.transpose(1, 2, 0))) for p in pictures[:2]])
    with torch.no_grad():
        expected = torch.cosine_similarity(model.eval().encode_image(batch), model.encode_text(tokens)).numpy()
    assert cosines(clip.pictures(pictures[:2]), clip.texts(prompts)) == pytest.approx(expected, abs=1e-5)


def test_a_model_that_scores_what_it_conditioned_is_known(clip_name):
    clip = Clip(clip_name)
    _, same = open_clip_encoder(clip_name)
    assert clip.is_among([same]) and not clip.is_among([])
    torch.nn.init.normal_(same.get_input_embeddings().weight)
    assert not clip.is_among([same])


def test_r_precision_by_hand():
    texts = np.eye(4)
    pictures = np.array([[1, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    assert r_precision(pictures, texts, ["a", "b", "c", "d"]).tolist() == [1, 0, 1, 1]
    # a caption that is asked twice is no wrong answer to itself
    assert r_precision(pictures, texts[[0, 0, 2, 3]], ["a", "a", "c", "d"]).tolist() == [1, 1, 1, 1]
    # only 99 of the 500 others are looked at: by chance one in 100
    draw = np.random.default_rng(0).normal(size=(2, 500, 8))
    assert 0 < r_precision(draw[0], draw[1], [str(i) for i in range(500)]).mean() < 0.04


def test_efficientnet_is_that_of_its_own_package():
    """Of this picture `extract_features` of efficientnet-lite-pytorch 0.1.0, pooled, has this norm, mean and value."""
    i = np.arange(224)
    picture = np.stack([(i[:, None] * 3 + i * 5 + c * 40) % 256 for c in range(3)]).astype(np.uint8)
    extractor = open_features("efficientnet")
    found = extractor(picture[None])
    assert extractor.distance == "FD-EfficientNet-Lite0" and found.shape == (1, 1280)
    assert np.linalg.norm(found) == pytest.approx(15.99678, rel=1e-4) and found.mean() == pytest.approx(
        0.1268507, rel=1e-4
    )
    assert found[0, 100] == pytest.approx(0.56164, rel=1e-3) and found[0, 50] == 0


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="efficientnet's weights"):
        open_features(f"efficientnet={tmp_path / 'other.pth'}")
    with pytest.raises(ValueError, match="efficientnet's weights"):
        open_features(f"efficientnet={tmp_path / 'none.pth'}")
