"Models of sign recognition: sizes, missing points, padding, training with padded batches, freezing, and what is imported."

import subprocess
import sys

import pytest
import torch

from gcode_ml.core.errors import InputError
from gcode_ml.data.windows import length_mask
from gcode_ml.sign.models import (
    MODELS,
    InceptionV3GRU,
    MaskedBatchNorm,
    MotionChannels,
    SignConv,
    SignTransformer,
    create_backbone,
    create_model,
    load_backbone,
)


def trainable(m):
    return sum(p.numel() for p in m.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "model,count",
    [
        (lambda: SignTransformer(), 3_280_627),
        (lambda: SignTransformer(2048), 3_764_979),
        (lambda: InceptionV3GRU(), 101_743),
        (lambda: InceptionV3GRU(hidden1=32, hidden2=24), 206_923),
        (lambda: SignConv(50), 191_853 + 1_351),
        (lambda: SignConv(50, attention=True), 226_984 + 1_351),
        (lambda: SignConv(156), 212_205 + 1_351),
    ],
)
def test_parameters(model, count):
    "Published counts, the head of seven categories apart."
    assert trainable(model()) == count


def clips(lengths, channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    B = len(lengths)
    T = max(lengths)
    present = (torch.rand(B, T, channels // 2, generator=g) < 0.8).repeat_interleave(2, -1)
    return dict(channels=torch.randn(B, T, channels, generator=g), present=present), length_mask(
        torch.tensor(lengths)
    )


SMALL = dict(
    transformer=dict(d_model=16, nhead=2, num_layers=2, dim_feedforward=32),
    iv3_gru={},
    conv=dict(width=16, bones=[(0, 5), (2, 3)], pairs=[(0, 1), (3, 5)]),
    conv_attention=dict(width=16),
    bigru=dict(width=8),
)


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_value_may_be_anything(name):
    "In training too, and the gradient is finite."
    torch.manual_seed(0)
    model, _ = create_model(
        name,
        channels=52,
        glosses=4,
        categories=2,
        **SMALL[name],
        **({} if name == "iv3_gru" else dict(hands=[list(range(21))])),
    )
    inputs, mask = clips([9, 4, 1], 52)
    inputs["present"][1] = False

    def out(x):
        torch.manual_seed(1)
        return model(dict(inputs, channels=x), mask)

    x = inputs["channels"]
    a = out(x)
    b = out(torch.where(inputs["present"], x, torch.nan))
    assert torch.equal(a["gloss"], b["gloss"])
    assert not torch.equal(a["gloss"], out(x + 1)["gloss"])
    (b["gloss"].sum() + b["category"].sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_alone_and_padded(name):
    "Within 1e-6, and finite without a single real step."
    torch.manual_seed(0)
    model = create_model(name, channels=12, glosses=4, categories=2, **SMALL[name])[0].eval()
    inputs, mask = clips([9, 4, 1], 12)
    with torch.no_grad():
        together = model(inputs, mask)
        for i, n in enumerate([9, 4, 1]):
            alone = model({k: v[i : i + 1, :n] for k, v in inputs.items()}, mask[i : i + 1, :n])
            for k in alone:
                assert (alone[k][0] - together[k][i]).abs().max() < 1e-6
        assert all(v.isfinite().all() for v in model(inputs, mask & False).values())


def test_padding_does_not_move_batch_norm():
    "The step of a padded batch is the step of the same clips without padding: statistics come from real frames."
    torch.manual_seed(0)
    norm = MaskedBatchNorm(4)
    same = MaskedBatchNorm(4)
    x = torch.randn(2, 6, 4)
    mask = length_mask(torch.tensor([6, 3]))
    real = norm(x, mask)[mask]
    same(x[mask][None], torch.ones(1, 9, dtype=torch.bool))
    assert torch.allclose(norm.running_mean, same.running_mean)
    assert torch.allclose(norm.running_var, same.running_var)
    assert torch.allclose(real.mean(0), torch.zeros(4), atol=1e-6)


def test_batch_norm_of_an_answer_is_that_of_torch():
    "The scale and shift by hand are what `batch_norm` computes from running statistics."
    torch.manual_seed(0)
    norm = MaskedBatchNorm(5).eval()
    for b in (norm.running_mean, norm.weight.data, norm.bias.data):
        b.copy_(torch.randn(5))
    norm.running_var.copy_(torch.rand(5) * 3)
    x = torch.randn(3, 4, 5) * 2
    assert torch.allclose(
        norm(x, torch.ones(3, 4, dtype=torch.bool)),
        torch.nn.functional.batch_norm(
            x.mT, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        ).mT,
        atol=1e-5,
    )


def test_hand_shape_does_not_depend_on_place_and_size():
    motion = MotionChannels(84, [range(21), range(21, 42)])
    x = torch.randn(1, 5, 42, 2)
    there = torch.ones(1, 5, 84, dtype=torch.bool)
    mask = torch.ones(1, 5, dtype=torch.bool)

    def out(points):
        return motion(dict(channels=points.flatten(2), present=there), mask)[..., :84].unflatten(
            -1, (-1, 2)
        )

    one = out(x)
    two = out(x * torch.tensor(2.5) + 1)
    fingers = [i for i in range(42) if i % 21]
    assert torch.allclose(one[:, :, fingers], two[:, :, fingers], atol=1e-4)
    assert not torch.allclose(one[:, :, 0], two[:, :, 0])


def test_velocity_needs_both_ends():
    motion = MotionChannels(2)
    x = torch.arange(6.0)[None, :, None].expand(1, 6, 2)
    seen = torch.ones(1, 6, 2, dtype=torch.bool)
    seen[:, 3] = False
    assert motion(dict(channels=x, present=seen), torch.ones(1, 6, dtype=torch.bool))[
        0, :, 2
    ].tolist() == [4, 4, 0, 0, 4, 0]


@pytest.mark.parametrize(
    "bad", [dict(hands=[range(20)]), dict(channels=41, presence=True), dict(hands=[range(10, 31)])]
)
def test_hands_are_checked(bad):
    with pytest.raises(InputError):
        MotionChannels(**{"channels": 42, **bad})


class ImageNet(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv2d(3, 8, 3),
            torch.nn.BatchNorm2d(8),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_means_frozen(frozen):
    "Running statistics are bit-identical after a training step; and they move where nothing is frozen."
    torch.manual_seed(0)
    model = InceptionV3GRU(8, 4, 2, freeze_backbone=frozen)
    model.backbone = ImageNet().requires_grad_(not frozen)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model.train()
    model(dict(frames=torch.randn(2, 3, 3, 8, 8)), torch.ones(2, 3, dtype=torch.bool))[
        "gloss"
    ].sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], 0.1).step()
    same = [torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items()]
    assert all(same) if frozen else not any(same)


def test_weights_of_a_backbone(tmp_path):
    "By name, or by order; what does not fit is refused; the checksum is the file's."
    import hashlib

    from safetensors.torch import save_file

    one = ImageNet()
    two = ImageNet()
    three = ImageNet()
    file = tmp_path / "net.safetensors"
    save_file(one.state_dict(), file)
    assert load_backbone(two, file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(one[0].weight, two[0].weight)
    torch.save({f"other.{k}": v for k, v in one.state_dict().items()}, tmp_path / "net.pt")
    load_backbone(three, tmp_path / "net.pt", in_order=True)
    assert torch.equal(one[0].weight, three[0].weight)
    with pytest.raises(InputError, match="tensors of Linear"):
        load_backbone(torch.nn.Linear(2, 2), file)
    torch.save(ImageNet(), tmp_path / "pickle.pt")
    with pytest.raises(InputError):
        load_backbone(three, tmp_path / "pickle.pt")


def test_image_nets_are_not_imported():
    "Neither by the page nor by features: only frames need them."
    code = "import sys, torch, gcode_ml.sign.models as m; m.InceptionV3GRU(64, 3, 2)(dict(channels=torch.zeros(1,2,64), present=torch.ones(1,2,64)>0), torch.ones(1,2)>0); print([k for k in ('torchvision','timm','fastai','matplotlib') if k in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_absent_packages_are_named():
    try:
        import torchvision  # noqa: F401

        pytest.skip("torchvision is installed")
    except (ImportError, RuntimeError):
        pass
    with pytest.raises(InputError, match=r"gcode_ml\[vision\]"):
        create_backbone("inception_v3")


@pytest.mark.parametrize(
    "name,format",
    [(n, "exported") for n in MODELS]
    + [("conv", "onnx"), ("conv", "torchscript"), ("transformer", "torchscript")],
)
def test_programs(name, format):
    "A program answers as the model does, with other numbers of clips and frames."
    from gcode_ml.lab.export import (
        compare_program,
        eager_programs,
        make_programs,
        read_program,
    )

    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = create_model(name, channels=12, glosses=4, categories=2, **SMALL[name])[0].eval()
    made = make_programs(model, format=format)
    eager = eager_programs(model)["forward"]
    compared = compare_program(
        eager, read_program(made[format], format, eager.inputs, eager.outputs, trusted=True)
    )
    assert compared["within"], compared


def test_direction_does_not_depend_on_the_length_of_an_arm():
    "An arm four times as long in the same direction changes the direction by less than the share that 0.1 has of it; a missing end, or no length, gives zeros and a finite gradient."
    motion = MotionChannels(8, velocity=False, bones=[(0, 1), (1, 2), (2, 3)])
    x = torch.randn(1, 5, 4, 2) * 3
    mask = torch.ones(1, 5, dtype=torch.bool)

    def out(x, there=None):
        return motion(
            dict(
                channels=x.flatten(2),
                present=torch.ones(1, 5, 8, dtype=torch.bool) if there is None else there,
            ),
            mask,
        )[..., 8:].unflatten(-1, (3, 3))

    long = x.clone()
    long[:, :, 1] = x[:, :, 0] + 4 * (x[:, :, 1] - x[:, :, 0])
    a = out(x)[:, :, 0]
    b = out(long)[:, :, 0]
    length = (x[:, :, 1] - x[:, :, 0]).norm(dim=-1)
    assert ((a[..., :2] - b[..., :2]).norm(dim=-1) <= 0.1 / (length + 0.1) + 1e-5).all()
    assert torch.allclose(b[..., 2], 4 * length, atol=1e-3)
    assert torch.allclose(
        a[..., :2] * (length + 0.1)[..., None], x[:, :, 1] - x[:, :, 0], atol=1e-4
    )
    there = torch.ones(1, 5, 8, dtype=torch.bool)
    there[:, 2, 2:4] = False
    assert not out(x, there)[0, 2, :2].any()
    assert out(x, there)[0, 2, 2].any()
    still = torch.zeros(1, 5, 4, 2, requires_grad=True)
    out(still).sum().backward()
    assert still.grad.isfinite().all()
    assert not out(still)[..., :2].any()
    for bad in ([(0, 4)], [(0, 1, 2)]):
        with pytest.raises(InputError, match="pairs of points"):
            MotionChannels(8, bones=bad)


def test_a_clip_and_its_mirror_image_have_one_answer():
    "With pairs, after training, whatever is missing; in training, and without pairs, they have not."
    torch.manual_seed(0)
    pairs = [(0, 1), (3, 5)]
    model = SignConv(12, 5, 2, width=8, pairs=pairs, bones=[(0, 3), (1, 5)])
    inputs, mask = clips([9, 4], 12)
    x = inputs["channels"].unflatten(-1, (-1, 2)).clone()
    seen = inputs["present"].unflatten(-1, (-1, 2)).clone()
    order = [1, 0, 2, 5, 4, 3]
    other = dict(
        channels=(x[:, :, order] * torch.tensor([-1.0, 1.0])).flatten(2),
        present=seen[:, :, order].flatten(2),
    )
    model.eval()
    a = model(inputs, mask)
    b = model(other, mask)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    plain = SignConv(12, 5, 2, width=8, bones=[(0, 3), (1, 5)]).eval()
    plain.load_state_dict(model.state_dict())
    one = plain(inputs, mask)
    two = plain(other, mask)
    assert torch.allclose((one["gloss"] + two["gloss"]) / 2, a["gloss"], atol=1e-6)
    assert not torch.allclose(one["gloss"], two["gloss"], atol=1e-4)


def test_weights_of_an_image_net_as_they_are_published(tmp_path):
    "A `.pth` of tensors is read; one with anything else in it is refused and nothing of it is executed."
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    other = torch.nn.Sequential(torch.nn.Linear(2, 3))
    load_backbone(other, tmp_path / "net.pth")
    assert torch.equal(other[0].weight, net[0].weight)

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save(dict(a=Bomb()), tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="a file of tensors"):
        load_backbone(other, tmp_path / "bomb.pth")
    assert not (tmp_path / "executed").exists()


def test_two_views_side_by_side_are_two_nets():
    "Each half of the grouped net equals a net of its own with the same weights; only the first one sees where the points are."
    torch.manual_seed(0)
    two = SignConv(
        12,
        5,
        2,
        width=8,
        num_layers=2,
        bones=[(0, 3)],
        pairs=[(0, 1), (3, 5)],
        centred=True,
        drop_path=0.0,
    )
    for b in two.modules():
        if isinstance(b, MaskedBatchNorm):
            b.running_mean.normal_()
            b.running_var.uniform_(0.5, 2.0)
    two.eval()
    mask = torch.arange(9) < torch.tensor([9, 4, 1])[:, None]
    x = torch.randn(3, 9, 12)
    present = (torch.rand(3, 9, 6) > 0.2).repeat_interleave(2, -1)
    inputs = dict(channels=torch.where(present, x, 0.0), present=present)
    inside = present & mask[..., None]
    moved = dict(
        channels=torch.where(
            inside,
            x - (x * inside).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1),
            0.0,
        ),
        present=present,
    )
    logits = 0
    for g, seen in enumerate((inputs, moved)):
        one = SignConv(
            12, 5, 2, width=8, num_layers=2, bones=[(0, 3)], pairs=[(0, 1), (3, 5)], drop_path=0.0
        ).eval()
        own = {}
        for k, v in two.state_dict().items():
            size = one.state_dict()[k].shape
            if v.ndim == 3 and "depthwise" not in k and "gate" not in k:
                own[k] = v[g].T
            elif k.startswith(("gloss.weight", "category.weight")):
                own[k] = 2 * v.unflatten(1, (2, -1))[:, g]
            elif v.shape != size:
                own[k] = v.unflatten(0, (2, -1))[g]
            else:
                own[k] = v
        one.load_state_dict(own)
        logits = logits + one(seen, mask)["gloss"] / 2
    assert torch.allclose(two(inputs, mask)["gloss"], logits, atol=1e-5)
    two.train()
    two.drop.p = 0.0
    out = two(inputs, mask)
    assert torch.allclose(out["gloss"], sum(v["gloss"] for v in out["views"]) / 2, atol=1e-5)
    alone = torch.autograd.grad(out["views"][1]["gloss"].sum(), two.stem.weight)[0]
    assert not alone[0].any()
    assert alone[1].any()
