"""Train the digits classifier and write it with its data: `train.py FOLDER`.

scikit-learn's scanned digits (1,797 images of 8 by 8 pixels, bundled with the package) and the ordinary
Keras example convnet. FOLDER gets

    digits.h5          the trained model, alone what the tools are given
    training.npz       the training images with labels, and five warped copies of each, for steps that train
    calibration.npz    256 training images, for the ranges of INT8
    tuning.npz         200 images with labels that no training sees, for choices made on the way
    evaluation.npz     the held-out third with labels, never seen in training, calibration or tuning
    samples/*.png      one held-out image of each digit
    samples.npz        the PNG bytes and labels of 64 held-out images, for the ensemble
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EPOCHS = 40
SEED = 7
TUNING = 200
COPIES = 5
INPUT = "pixels"

Split = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]


def split_digits() -> Split:
    """Training and held-out images [N, 8, 8, 1] in 0..1, and their labels [N]; a third is held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=1 / 3, random_state=SEED, stratify=digits.target
    )
    return train_x, test_x, train_y, test_y


def train(images: NDArray[Any], labels: NDArray[Any]) -> Any:
    """The Keras example convnet, fitted; the same seed gives nearly the same weights."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import keras

    keras.utils.set_random_seed(SEED)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name=INPUT),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, activation="softmax", name="probabilities"),
        ],
        name="digits",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(images, labels, batch_size=64, epochs=EPOCHS, verbose=0)
    return model


def warp(images: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """The images [N, 8, 8, 1], each turned, scaled and moved a little."""
    from scipy.ndimage import affine_transform

    centre = np.full(2, 3.5)
    warped = np.empty_like(images)
    for index, image in enumerate(images):
        angle, scale = random.normal(0, np.radians(8)), random.normal(1, 0.06)
        cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
        matrix = np.array([[cosine, -sine], [sine, cosine]])
        offset = centre - matrix @ centre + random.uniform(-0.6, 0.6, 2)
        warped[index, ..., 0] = affine_transform(image[..., 0], matrix, offset, order=1)
    return warped.clip(0, 1)


def png_from_image(image: NDArray[Any]) -> bytes:
    """A PNG of one image [8, 8, 1] in 0..1, bright ink on black."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.round(image[..., 0] * 255).astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def write_all(folder: Path) -> None:
    """Train, and write the model and its data into `folder`."""
    import warnings

    train_x, test_x, train_y, test_y = split_digits()
    tune_x, tune_y = train_x[:TUNING], train_y[:TUNING]
    train_x, train_y = train_x[TUNING:], train_y[TUNING:]
    model = train(train_x, train_y)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls .h5 a legacy format; it is what people have
        model.save(folder / "digits.h5")
    random = np.random.default_rng(SEED)
    seen = np.concatenate([train_x, *(warp(train_x, random) for _ in range(COPIES))])
    np.savez(folder / "training.npz", **{INPUT: seen, "target": np.tile(train_y, COPIES + 1)})
    np.savez(folder / "tuning.npz", **{INPUT: tune_x, "target": tune_y})
    np.savez(folder / "calibration.npz", **{INPUT: train_x[:256]})
    np.savez(folder / "evaluation.npz", **{INPUT: test_x, "target": test_y})

    pngs = [png_from_image(image) for image in test_x[:64]]
    labels = test_y[:64].astype("S")  # the ensemble answers in text
    np.savez(folder / "samples.npz", image=np.array(pngs, dtype="S")[:, None], target=labels)
    (folder / "samples").mkdir(exist_ok=True)
    for digit in range(10):
        image = test_x[int(np.flatnonzero(test_y == digit)[0])]
        (folder / "samples" / f"{digit}.png").write_bytes(png_from_image(image))
    accuracy = float((model.predict(test_x, verbose=0).argmax(axis=1) == test_y).mean())
    print(f"trained on {len(train_x)} images, accuracy {accuracy:.4f} on {len(test_x)} held out")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: train.py FOLDER")
    write_all(Path(sys.argv[1]))
