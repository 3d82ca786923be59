"""PNG or JPEG bytes [batch, 1] -> pixels [batch, 8, 8, 1] in 0..1, bright ink on a dark ground."""

import io

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image, ImageOps, UnidentifiedImageError

SIDE = 8
FORMATS = ("PNG", "JPEG")
# Pillow warns above this and refuses, as a decompression bomb, what has more than twice as many.
Image.MAX_IMAGE_PIXELS = 50_000_000


class TritonPythonModel:
    def execute(self, requests):
        return [answer(request) for request in requests]


def answer(request):
    images = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
    try:
        pixels = np.stack([pixels_from_bytes(data) for data in images.reshape(-1)])
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,  # Pillow's word for broken metadata, EXIF for one
        ValueError,
    ) as error:
        reason = str(error) if not isinstance(error, UnidentifiedImageError) else "not a readable image"
        message = f"input 'image': {reason}; expected the bytes of a PNG or JPEG file"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
    return pb_utils.InferenceResponse([pb_utils.Tensor("pixels", pixels)])


def pixels_from_bytes(data):
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        gray = gray_from_image(ImageOps.exif_transpose(image))
    if gray.size != (SIDE, SIDE):
        gray = gray.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(gray, dtype=np.float32) / 255.0
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if border.mean() > 0.5:  # dark ink on paper: the training scans are bright ink on black
        pixels = 1.0 - pixels
    return pixels[..., None]


def gray_from_image(image):
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:  # ink without a ground is drawn on paper
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("L")
