"""The network in exporters, torch.func, torch.fx and other tools, beside one with PyTorch's own LRN."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn import functional as F

BEST = ROOT / "results" / "cifar10-best" / "best.pt"
CLOSE = {"atol": 1e-4, "rtol": 0}  # of logits that reach 10


def load(ck) -> nn.Module:
    return ck.load_trained(BEST)[0]


def of_a_classifier(ck) -> nn.Module:
    """The same network with the passes of a CPU."""
    return ck.Classifier(BEST, "cpu", "fp32").model


def as_trained(ck) -> nn.Module:
    """The same network as `train` has it, with compiled LRN; nothing of it is run here."""
    model = load(ck)
    ck.replace_lrn(model, compiled=True)
    return model.eval()


NETWORKS = ["krizhevsky", "80sec", "18pct", "13pct", "11pct", "five-conv", "alexnet", "compact"]
every_network = pytest.mark.parametrize("name", NETWORKS)
every_model = pytest.mark.parametrize("make", [load, of_a_classifier, as_trained])


@pytest.fixture(scope="module")
def samples(ck) -> tuple[Tensor, Tensor]:
    """The hundred test images of data/samples (N, 3, 32, 32), normalized, and their classes."""
    trained = ck.load_trained(BEST)[1]
    paths = sorted((ROOT / "data" / "samples").glob("*/*.png"))
    pixels = torch.stack([ck.read_picture(path) for path in paths])
    labels = torch.tensor([trained["classes"].index(path.parent.name) for path in paths])
    mean, std = torch.tensor([trained["mean"], trained["std"]]).view(2, 3, 1, 1)
    return (pixels / 255 - mean) / std, labels


@pytest.fixture(scope="module")
def control(ck) -> nn.Module:
    model, trained = ck.load_trained(BEST)
    config = trained["config"]
    constants = (config.lrn_size, config.lrn_alpha, config.lrn_beta, config.lrn_k)
    model.norm1 = nn.LocalResponseNorm(*constants)
    model.norm2 = nn.LocalResponseNorm(*constants)
    return model


@pytest.fixture(scope="module")
def expected(control, samples) -> Tensor:
    """The logits (N, 10) of the samples."""
    images, labels = samples
    with torch.no_grad():
        logits = control(images)
    assert (logits.argmax(1) == labels).sum() > 85
    return logits


# ---- Exporters: a batch of any size, whatever the batch of the example ---------------------------


def assert_any_batch(run, images: Tensor, expected: Tensor) -> None:
    for count in (1, 3, 100):
        output = torch.as_tensor(np.asarray(run(images[:count])))
        torch.testing.assert_close(output, expected[:count], **CLOSE)


@every_model
def test_torch_export(ck, samples, expected, make):
    images, _ = samples
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(make(ck), (images[:2],), dynamic_shapes=shapes)
    with torch.no_grad():
        assert_any_batch(program.module(), images, expected)


@every_model
def test_jit_trace(ck, samples, expected, make):
    images, _ = samples
    with torch.no_grad():
        assert_any_batch(torch.jit.trace(make(ck), images[:2]), images, expected)


@every_model
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_onnx_in_onnx_runtime(ck, samples, expected, make, dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    images, _ = samples
    file = tmp_path / "network.onnx"
    options = {"dynamic_shapes": ({0: "batch"},)}
    if not dynamo:
        options = {"dynamic_axes": {"x": {0: "batch"}}}
    names = {"input_names": ["x"], "output_names": ["logits"]}
    torch.onnx.export(make(ck), (images[:2],), file, dynamo=dynamo, **names, **options)
    session = onnxruntime.InferenceSession(file)
    assert_any_batch(lambda x: session.run(["logits"], {"x": x.numpy()})[0], images, expected)


@every_model
def test_openvino(ck, samples, expected, make):
    openvino = pytest.importorskip("openvino")
    images, _ = samples
    network = openvino.convert_model(make(ck), example_input=images[:2])
    fp32 = {"INFERENCE_PRECISION_HINT": "f32"}  # else bf16, where the CPU has it
    compiled = openvino.compile_model(network, "CPU", fp32)
    assert_any_batch(lambda x: compiled(x.numpy())[0], images, expected)


def test_the_program_of_tools_md_exports_to_onnx(tmp_path, monkeypatch, capsys):
    for package in ("onnxscript", "onnxruntime", "safetensors"):
        pytest.importorskip(package)
    for folder in ("results", "data"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "results" / "tools.md").read_text()
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```", page)
    exec(program, {})
    assert capsys.readouterr().out.splitlines()[-1] == "True"
    assert (tmp_path / "network.onnx").exists() and (tmp_path / "network.safetensors").exists()


# ---- torch.compile, TorchScript, torch.fx --------------------------------------------------------


@every_model
def test_torch_compile_sees_one_graph_as_small_for_a_large_batch(ck, samples, expected, make):
    images, _ = samples
    sizes = []

    def backend(graph, _):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    for count in (2, 100):
        torch._dynamo.reset()
        model = torch.compile(make(ck), backend=backend, fullgraph=True, dynamic=False)
        with torch.no_grad():
            torch.testing.assert_close(model(images[:count]), expected[:count], **CLOSE)
    assert len(sizes) == 2 and sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_torchscript(ck, samples, expected):
    images, _ = samples
    with torch.no_grad():
        assert_any_batch(torch.jit.script(load(ck)), images, expected)


@every_model
def test_fx_and_torchvisions_feature_extractor(ck, samples, expected, make):
    from torchvision.models.feature_extraction import create_feature_extractor

    images, _ = samples
    model = make(ck)
    with torch.no_grad():
        assert_any_batch(torch.fx.symbolic_trace(model), images, expected)
        features = create_feature_extractor(model, ["pool2", "fc3"])(images)
    assert features["pool2"].shape == (100, 96, 7, 7)
    torch.testing.assert_close(features["fc3"], expected, **CLOSE)


@every_network
def test_every_layer_is_at_one_place_as_captums_deeplift_wants(ck, name):
    with torch.device("meta"):
        model = ck.MODELS[name]()
        size = ck.input_size(model)
        images = torch.zeros(2, 3, size, size)
    runs = []
    for layer in model.modules():
        if not [*layer.children()]:
            layer.register_forward_hook(lambda layer, *_: runs.append(layer))
    model(images)
    assert len(runs) == len(set(runs)) > 10


@every_network
def test_a_hook_keeps_what_its_layer_gave(ck, samples, name):
    images, _ = samples
    model = ck.build_model(ck.Config(model=name), 10).eval()
    size = ck.input_size(model)
    seen = []
    for layer in model.modules():
        if not [*layer.children()]:
            layer.register_forward_hook(lambda *call: seen.append((call[2], call[2].clone())))
    with torch.no_grad():
        model(images[:2, :, :size, :size])
    assert all(torch.equal(now, then) for now, then in seen)


# ---- torch.func and derivatives of derivatives ---------------------------------------------------


def loss_of(model: nn.Module):
    """A function of the parameters, one image and its label."""

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

    return loss


def test_per_sample_gradients(ck, samples, control):
    images, labels = samples
    found = []
    for model in (load(ck).train(), control):
        model = copy.deepcopy(model)
        model.dropout1.p = model.dropout2.p = 0.0
        of_one = grad(loss_of(model))
        of_each = vmap(of_one, in_dims=(None, 0, 0))
        found.append(
            of_each(dict(model.named_parameters()), images[:4], labels[:4])["conv1.weight"]
        )
    torch.testing.assert_close(*found, atol=1e-4 * found[1].abs().max().item(), rtol=0)


def test_forward_mode_and_jacobians(ck, samples, control):
    images, direction = samples[0][:2], samples[0][2:4]
    model = load(ck)
    for one, other in (
        (jvp(model, (images,), (direction,))[1], jvp(control, (images,), (direction,))[1]),
        (jacrev(model)(images), jacrev(control)(images)),
    ):
        torch.testing.assert_close(one, other, atol=1e-4 * other.abs().max().item(), rtol=0)


def gradient_penalty(model: nn.Module, images: Tensor) -> Tensor:
    """Its gradient by the first layer's weights: a derivative of a derivative."""
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(images).logsumexp(1).sum(), images, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), model.conv1.weight)[0]


def test_gradient_penalty(ck, samples, control):
    images, _ = samples
    one, other = (gradient_penalty(model, images[:4]) for model in (load(ck), control))
    torch.testing.assert_close(one, other, atol=1e-4 * other.abs().max().item(), rtol=0)


def test_the_passes_say_what_they_cannot_do_and_who_can(ck, samples):
    images, _ = samples
    with pytest.raises(RuntimeError, match="load_trained"):
        gradient_penalty(of_a_classifier(ck), images[:2])


# ---- Weights, constructor, loops of others -------------------------------------------------------


def test_the_weights_are_contiguous(ck):
    model = load(ck)
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    assert len(vector) == 762_794


@pytest.mark.parametrize("name", ["krizhevsky", "alexnet"])
def test_json_holds_the_arguments_of_the_network(ck, name):
    """As huggingface_hub's PyTorchModelHubMixin keeps them."""
    for lrn in ((3, 0.5, 0.6, 1.5), None):
        with torch.device("meta"):
            options = json.loads(json.dumps({"num_classes": 7, "lrn": lrn, "dropout": 0.2}))
            layers = [*ck.MODELS[name](**options).modules()]
        norms = [m for m in layers if isinstance(m, ck.LocalResponseNormalization)]
        assert len(norms) == (2 if lrn else 0)
        assert all((m.size, m.alpha, m.beta, m.k) == lrn for m in norms)


def test_soft_labels_are_counted_by_their_largest(ck, samples):
    images, labels = samples
    soft = 0.9 * F.one_hot(labels, 10) + 0.01
    results = []
    for target in (labels, soft):
        model = load(ck)
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        torch.manual_seed(0)  # dropout
        results.append(
            ck.train_one_epoch(model, [(images, target)], nn.CrossEntropyLoss(), sgd, "cpu")
        )
    assert results[0][1] == results[1][1] > 80
    assert results[0][0] != results[1][0]


def test_the_classifier_takes_no_floats_and_no_other_size(ck):
    classifier = ck.Classifier(BEST, "cpu", "fp32")
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert len(classifier.classify(pixels)) == 2
    larger = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for wrong in (pixels / 255, larger, pixels[0], pixels.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\) torch.uint8, not"):
            classifier.classify(wrong)
