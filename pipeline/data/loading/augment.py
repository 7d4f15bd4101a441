"""What DALI does to an image of its final size: colour jitter, automatic augmentation, erasing.

Which operation, how strong and where comes in as data, see `augment_params`; what the operations are is DALI's own
suites.
"""

from typing import Any

from nvidia.dali import fn
from nvidia.dali.auto_aug import augmentations, auto_augment, rand_augment, trivial_augment
from nvidia.dali.auto_aug.core import augmentation, select, signed_bin

from pipeline.config.data import DataConfig
from pipeline.data.augment_params import NUM_BINS, OPERATIONS, num_operations
from pipeline.data.loading.fetch import MEAN_COLOUR

FILL = 128  # grey, where a warped image does not reach


def augment(images: Any, draws: dict[str, Any], cfg: DataConfig) -> Any:
    """Build the part of a DALI graph that augments. To be called in a pipeline definition with conditionals.

    Args:
        images: uint8 HWC.
        draws: inputs by name, those that are wanted of "jitter" (4,), "ops" (N, 3), "erase" (4,); see `augment_params`.
    """
    if "jitter" in draws:
        brightness, contrast, saturation, hue = (draws["jitter"][i] for i in range(4))
        images = fn.color_twist(images, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
    if "ops" in draws:
        suite, shape = _suite(cfg.auto_augment), images.shape()
        for i in range(num_operations(cfg)):
            op, magnitude, sign = (draws["ops"][i, j] for j in range(3))
            images = select(
                suite,
                op,
                data=images,
                magnitude_bin=signed_bin(magnitude, random_sign=sign),
                num_magnitude_bins=NUM_BINS[cfg.auto_augment],
                fill_value=FILL,
                shape=shape,
            )
    if "erase" in draws:
        anchor, shape = draws["erase"][:2], draws["erase"][2:]
        images = fn.erase(images, anchor=anchor, shape=shape, axes=(0, 1), fill_value=MEAN_COLOUR)
    return images


def _suite(policy: str) -> list[Any]:
    """DALI's operations of a policy, in the order of OPERATIONS."""
    if policy == "trivial":
        operations = trivial_augment.get_trivial_augment_wide_suite(max_translate_abs=32)
    elif policy == "rand":
        operations = rand_augment.get_rand_augment_suite(use_shape=True)
    else:
        pairs = auto_augment.get_image_net_policy(use_shape=True).sub_policies
        operations = [operation for pair in pairs for operation, _, _ in pair] + [augmentations.identity]
    by_name = {operation.name: operation for operation in operations}
    return [_renamed(by_name[name]) for name in OPERATIONS[policy]]


def _sharpness(data: Any, kernel: Any) -> Any:
    return fn.filter(data, kernel)


def _equalize(data: Any, _: Any) -> Any:
    return fn.equalize(data)


def _renamed(operation: Any) -> Any:
    """The operation without the names that DALI itself warns of (fn.experimental.filter and .equalize)."""
    function = {"sharpness": _sharpness, "equalize": _equalize}.get(operation.name)
    if function is None:
        return operation
    names = ("mag_range", "randomly_negate", "mag_to_param", "param_device", "name")
    return augmentation(**{name: getattr(operation, name) for name in names})(function)
