#!/usr/bin/env python3
"""Compare the LRN of other libraries with a formula in float64, for results/lrn.md.

    python tests/lrn_elsewhere.py --json results/lrn.json

Libraries that are not installed are left out, and keep the row that they have in the file. Inputs are
normal with a standard deviation of 100, so that alpha = 1e-4 matters. Nothing passes or fails.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cifar_krizhevsky import LocalResponseNormalization

ALPHA, BETA, K = 1e-4, 0.75, 2.0
SHAPE = (2, 12, 5, 6)


def formula(x: np.ndarray, below: int, above: int, divisor: int) -> np.ndarray:
    """LRN over the channels from c - below to c + above."""
    squares = np.pad(x.astype(np.float64) ** 2, ((0, 0), (below, above), (0, 0), (0, 0)))
    window = below + above + 1
    total = sum(squares[:, shift : shift + x.shape[1]] for shift in range(window))
    return x / (K + ALPHA / divisor * total) ** BETA


def error(y: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, as a part of the largest output."""
    return float(np.abs(y - expected).max() / np.abs(expected).max())


def describe(y: np.ndarray, x: np.ndarray, size: int) -> str:
    """The channels of the window and the divisor of alpha that give this output."""
    for below, above in itertools.product(range(size + 1), repeat=2):
        for divisor in (size, 1):
            if error(y, formula(x, below, above, divisor)) < 1e-5:
                return f"c - {below} to c + {above}, alpha / {divisor}"
    return "no such formula"


# --------------------------------------------------------------------------------------------------
# The libraries. Each function takes the input in float32, the size, and whether to compute in bf16
# --------------------------------------------------------------------------------------------------


def in_torch(layer: torch.nn.Module, x: np.ndarray, bf16: bool) -> np.ndarray:
    images = torch.from_numpy(x)
    return layer(images.bfloat16() if bf16 else images).float().numpy()


def torch_layer(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    return in_torch(torch.nn.LocalResponseNorm(size, ALPHA, BETA, K), x, bf16)


def our_layer(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    return in_torch(LocalResponseNormalization(size, ALPHA, BETA, K), x, bf16)


def onnx_model(x: np.ndarray, size: int, bf16: bool):
    """A file of one LRN node, in bf16 between two casts."""
    from onnx import TensorProto, checker, helper

    constants = {"size": size, "alpha": ALPHA, "beta": BETA, "bias": K}
    nodes = [helper.make_node("LRN", ["x"], ["y"], **constants)]
    if bf16:
        nodes = [
            helper.make_node("Cast", ["x"], ["x16"], to=TensorProto.BFLOAT16),
            helper.make_node("LRN", ["x16"], ["y16"], **constants),
            helper.make_node("Cast", ["y16"], ["y"], to=TensorProto.FLOAT),
        ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "lrn", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    checker.check_model(model)
    return model


def onnx_reference(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx_model(x, size, bf16)).run(None, {"x": x})[0]


def onnxruntime(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    from onnxruntime import InferenceSession

    return InferenceSession(onnx_model(x, size, bf16).SerializeToString()).run(None, {"x": x})[0]


def openvino(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    import openvino

    core = openvino.Core()
    model = core.read_model(onnx_model(x, size, bf16).SerializeToString())
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}
    return core.compile_model(model, "CPU", hint)(x)[0]


def onnx2torch(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    from onnx2torch import convert

    return convert(onnx_model(x, size, bf16))(torch.from_numpy(x)).numpy()


def onnx2pytorch(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    from onnx2pytorch import ConvertModel

    return ConvertModel(onnx_model(x, size, bf16))(torch.from_numpy(x)).detach().numpy()


def save_onnx(x: np.ndarray, size: int, bf16: bool, folder: str) -> str:
    path = Path(folder, "lrn.onnx")
    path.write_bytes(onnx_model(x, size, bf16).SerializeToString())
    return str(path)


def tract(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    import tract

    with tempfile.TemporaryDirectory() as folder:
        model = tract.onnx().load(save_onnx(x, size, bf16, folder)).into_model()
    return model.into_runnable().run([x])[0].to_numpy()


def tinygrad(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    os.environ.setdefault("DEV", "PYTHON")  # its other device for a CPU needs clang
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    with tempfile.TemporaryDirectory() as folder:
        run = OnnxRunner(save_onnx(x, size, bf16, folder))
        return run({"x": Tensor(x)})["y"].numpy()


def ncnn(x: np.ndarray, size: int, bf16: bool) -> np.ndarray:
    import ncnn

    layer = f"LRN y 1 1 x y 0=0 1={size} 2={ALPHA} 3={BETA} 4={K}"
    outputs = []
    for image in x:
        net = ncnn.Net()
        net.opt.use_bf16_storage = bf16
        net.opt.num_threads = 1
        net.load_param_mem(f"7767517\n2 2\nInput x 0 1 x\n{layer}\n")
        net.load_model_mem(b"\0" * 4)
        extractor = net.create_extractor()
        extractor.input("x", ncnn.Mat(image).clone())
        outputs.append(np.array(extractor.extract("y")[1]))
    return np.stack(outputs)


NODE = "LRN node: size 5, bias 2"
LIBRARIES: dict[str, tuple[str, str, Callable[..., np.ndarray]]] = {
    "this script's `LocalResponseNormalization`": ("torch", "(5, 1e-4, 0.75, 2)", our_layer),
    "PyTorch, `nn.LocalResponseNorm`": ("torch", "(5, 1e-4, 0.75, 2)", torch_layer),
    "onnx, reference evaluator": ("onnx", NODE, onnx_reference),
    "ONNX Runtime": ("onnxruntime", NODE, onnxruntime),
    "OpenVINO": ("openvino", NODE, openvino),
    "tract": ("tract", NODE, tract),
    "tinygrad, its ONNX reader": ("tinygrad", NODE, tinygrad),
    "onnx2pytorch": ("onnx2pytorch", NODE, onnx2pytorch),
    "onnx2torch": ("onnx2torch", NODE, onnx2torch),
    "ncnn, its own layer": ("ncnn", "LRN 0=0 1=5 2=1e-4 3=0.75 4=2", ncnn),
}


def outcome(apply: Callable[[], str]) -> str:
    try:
        return apply()
    except ImportError:  # of another package, which says nothing about this one
        raise
    except Exception as refusal:
        print(f"  {type(refusal).__name__}: {str(refusal)[:150]}", file=sys.stderr)
        return "refused"


def measure(name: str) -> dict[str, str]:
    package, arguments, layer = LIBRARIES[name]
    x = np.random.default_rng(0).normal(0, 100, SHAPE).astype(np.float32)
    five = formula(x, 2, 2, 5)
    return {
        "library": name,
        "version": importlib.metadata.version(package).split("+")[0],
        "arguments": arguments,
        "error at size 5": outcome(lambda: f"{error(layer(x, 5, False), five):.1g}"),
        "a window of 4 is": outcome(lambda: describe(layer(x, 4, False), x, 4)),
        "error in bf16": outcome(lambda: f"{error(layer(x, 5, True), five):.1g}"),
        "measured": date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    path = parser.parse_args().json
    rows = {}
    if path.exists():
        rows = {row["library"]: row for row in json.loads(path.read_text())["rows"]}
    for name, (package, _, _) in LIBRARIES.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name}: not installed", file=sys.stderr)
            continue
        print(name, file=sys.stderr)
        try:
            rows[name] = measure(name)
        except ImportError as error:
            print(f"  not measured: {error}", file=sys.stderr)
    rows = [rows[name] for name in LIBRARIES if name in rows]
    path.write_text(json.dumps({"rows": rows}, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
