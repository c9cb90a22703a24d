"""The default network in plain PyTorch, TensorFlow and JAX, for `tests/benchmark.py --frameworks`.

What a user would write instead of cloning the script, each in its own library's usual way: images in
memory, already normalized and in the layout that the library is fast with; no augmentation, no
metrics. Each function returns one that takes a number of training steps and waits for the last.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Advance = Callable[[int], None]

CONVOLUTIONS = ((3, 96, True), (96, 96, True), (96, 192, False))  # inputs, outputs, with LRN
LINEAR = ((192 * 3 * 3, 256), (256, 256), (256, 10))
SIZE, ALPHA, BETA, K = 5, 1e-4, 0.75, 2.0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


def batches(images: np.ndarray, labels: np.ndarray, batch_size: int) -> Iterator[Any]:
    """Shuffled batches without end, each of them full."""
    generator = np.random.default_rng(0)
    while True:
        order = generator.permutation(len(labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            yield images[index], labels[index]


def pytorch(
    images: np.ndarray, labels: np.ndarray, batch_size: int, precision: str, compiled: bool
) -> Advance:
    """A loop of PyTorch's own layers; (N, 32, 32, 3) float images become channels_last tensors."""
    import torch
    from torch import nn, optim

    x_all = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels_last, since images are NHWC
    y_all = torch.from_numpy(labels)
    layers: list[nn.Module] = []
    for inputs, outputs, normalized in CONVOLUTIONS:
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.LocalResponseNorm(SIZE, ALPHA, BETA, K)] if normalized else []
        layers += [nn.MaxPool2d(3, 2)]
    layers += [nn.Flatten()]
    for inputs, outputs in LINEAR:
        layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=True)]
    model = nn.Sequential(*layers[:-1]).to(memory_format=torch.channels_last)
    model = torch.compile(model) if compiled else model
    optimizer = optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    criterion = nn.CrossEntropyLoss()
    endless = batches(np.arange(len(labels)), labels, batch_size)

    def advance(steps: int) -> None:
        for index, _ in itertools.islice(endless, steps):
            index = torch.from_numpy(index)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = criterion(model(x_all[index]).float(), y_all[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return advance


def tensorflow(images: np.ndarray, labels: np.ndarray, batch_size: int, precision: str) -> Advance:
    """Keras layers with TensorFlow's own LRN, and one tf.function for a training step."""
    import tensorflow as tf

    keras = tf.keras
    keras.mixed_precision.set_global_policy("mixed_bfloat16" if precision == "bf16" else "float32")

    def lrn(x: Any) -> Any:
        wide = tf.cast(x, tf.float32)  # there is no bf16 kernel for a CPU
        y = tf.nn.local_response_normalization(wide, SIZE // 2, K, ALPHA / SIZE, BETA)
        return tf.cast(y, x.dtype)

    model = keras.Sequential([keras.layers.Input((32, 32, 3))])
    for _, outputs, normalized in CONVOLUTIONS:
        model.add(keras.layers.Conv2D(outputs, 3, padding="same", activation="relu"))
        if normalized:
            model.add(keras.layers.Lambda(lrn))
        model.add(keras.layers.MaxPooling2D(3, 2))
    model.add(keras.layers.Flatten())
    for _, outputs in LINEAR[:-1]:
        model.add(keras.layers.Dense(outputs, activation="relu"))
    model.add(keras.layers.Dense(LINEAR[-1][1], dtype="float32"))
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    optimizer.build(model.trainable_variables)
    criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    endless = batches(images, labels, batch_size)

    @tf.function
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = criterion(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss

    def advance(steps: int) -> None:
        for x, y in itertools.islice(endless, steps):
            loss = step(tf.constant(x), tf.constant(y))
        loss.numpy()

    return advance


def jax(images: np.ndarray, labels: np.ndarray, batch_size: int, precision: str) -> Advance:
    """JAX's own convolution and reduce_window, and one jitted function for a training step."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    generator = np.random.default_rng(0)

    def layer(*shape: int) -> tuple[Any, Any]:
        bound = 1 / np.sqrt(np.prod(shape[:-1]))
        weight = generator.uniform(-bound, bound, shape).astype(np.float32)
        return jnp.asarray(weight), jnp.zeros(shape[-1])

    weights = [layer(3, 3, inputs, outputs) for inputs, outputs, _ in CONVOLUTIONS]
    weights += [layer(inputs, outputs) for inputs, outputs in LINEAR]
    velocity = jax.tree.map(jnp.zeros_like, weights)

    def window_sum(x: Any) -> Any:
        return lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, SIZE), (1, 1, 1, 1), "SAME")

    def logits_of(weights: list[Any], x: Any) -> Any:
        x = x.astype(dtype)
        for (weight, bias), (_, _, normalized) in zip(weights, CONVOLUTIONS):
            layout = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(
                x, weight.astype(dtype), (1, 1), "SAME", dimension_numbers=layout
            )
            x = jax.nn.relu(x + bias.astype(dtype))
            if normalized:
                wide = x.astype(jnp.float32)
                scale = (K + ALPHA / SIZE * window_sum(wide * wide)) ** -BETA
                x = (wide * scale).astype(dtype)
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = x.reshape(len(x), -1)
        for number, (weight, bias) in enumerate(weights[len(CONVOLUTIONS) :]):
            x = jax.nn.relu(x) if number else x
            x = x @ weight.astype(dtype) + bias.astype(dtype)
        return x.astype(jnp.float32)

    def loss_of(weights: list[Any], x: Any, y: Any) -> Any:
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_of(weights, x)), y[:, None], 1)
        return -chosen.mean()

    @jax.jit
    def step(weights: list[Any], velocity: list[Any], x: Any, y: Any) -> tuple[Any, Any]:
        gradients = jax.grad(loss_of)(weights, x, y)
        velocity = jax.tree.map(
            lambda v, g, w: MOMENTUM * v + g + WEIGHT_DECAY * w, velocity, gradients, weights
        )
        weights = jax.tree.map(lambda w, v: w - LEARNING_RATE * v, weights, velocity)
        return weights, velocity

    endless = batches(images, labels, batch_size)
    state = [weights, velocity]

    def advance(steps: int) -> None:
        for x, y in itertools.islice(endless, steps):
            state[:] = step(*state, x, y)
        jax.block_until_ready(state)

    return advance
