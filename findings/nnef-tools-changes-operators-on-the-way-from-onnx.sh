#!/usr/bin/env bash
# nnef-tools 1.0.11 (nnef 1.0.10, onnx 1.23.2, ONNX Runtime 1.32.0, torch 2.14.1): its converter turns three valid ONNX
# operators into others of NNEF and says nothing; its own interpreter then gives other numbers than ONNX Runtime.
# - Elu loses its alpha: NNEF's elu is written without one, and 1 is taken.
# - Softmax before opset 13, which normalizes over all dimensions from `axis` on together, becomes one over `axis` alone.
# - AveragePool with ceil_mode=1 and count_include_pad=1, as PyTorch exports nn.AvgPool2d(3, 2, ceil_mode=True): a window
#   that hangs over the edge is divided by nine, and not by what is there. With count_include_pad=0 it is right.
# LRN, MaxPool with ceil_mode=1 and Softmax of opset 13 are right. Of other operators it says "not implemented".
#
# Guess before it was run: LRN, Elu and Softmax right, both pools with ceil_mode=1 wrong.
# Seen: largest differences 0.49 (Elu), 0.92 (Softmax), 0.53 (AveragePool); below 2e-7 for the others.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet nnef==1.0.10 nnef-tools==1.0.11 onnx==1.23.2 onnxruntime==1.32.0 \
  torch==2.14.1 numpy==2.4.6
cat > "$folder/show.py" <<'PY'
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
from nnef_tools.interpreter.pytorch import Interpreter
from onnx import TensorProto, helper

POOL = {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}
CASES = {  # operator, opset, attributes, whether it comes out right
    "elu, alpha 1": ("Elu", 13, {"alpha": 1.0}, True),
    "elu, alpha 0.5": ("Elu", 13, {"alpha": 0.5}, False),
    "softmax, opset 13, axis 1": ("Softmax", 13, {"axis": 1}, True),
    "softmax, opset 11, axis 1": ("Softmax", 11, {"axis": 1}, False),
    "average pool, count_include_pad 0": ("AveragePool", 13, POOL | {"count_include_pad": 0}, True),
    "average pool, count_include_pad 1": ("AveragePool", 13, POOL | {"count_include_pad": 1}, False),
    "max pool": ("MaxPool", 13, POOL, True),
    "LRN": ("LRN", 13, {"size": 5, "alpha": 1.0, "beta": 0.75, "bias": 2.0}, True),
}
SHAPE = [2, 3, 8, 8]
x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
for number, (name, (operator, opset, attributes, is_right)) in enumerate(CASES.items()):
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], **attributes)],
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    onnx.save(model, f"{number}.onnx")
    session = onnxruntime.InferenceSession(f"{number}.onnx", providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"x": x})
    command = [sys.executable, "-m", "nnef_tools.convert", "--input-format", "onnx", "--output-format", "nnef"]
    command += ["--input-model", f"{number}.onnx", "--output-model", f"{number}.nnef"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said = done.stdout + done.stderr
    (given,) = Interpreter(f"{number}.nnef")([x]).values()
    difference = np.abs(np.asarray(given) - wanted).max()
    print(f"{name:<36} largest difference {difference:.1e}; said: {said.strip()}")
    assert said.strip() == f"Written '{number}.nnef'", said
    assert (difference < 1e-5) == is_right, name
PY
cd "$folder"
"$folder/venv/bin/python" show.py
