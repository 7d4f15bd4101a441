"""A network's weights by name: loaded only where names and shapes are the network's."""

from torch import Tensor, nn


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict whose names and shapes must be the model's.

    Raises:
        ValueError: naming the first difference.
    """
    check_weights(model, weights)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise ValueError, naming the first difference, where a state dict's names or shapes are not the model's."""
    shapes, saved = ({name: tuple(t.shape) for name, t in ts.items()} for ts in (model.state_dict(), weights))
    for name in sorted(shapes.keys() | saved.keys()):
        if name not in shapes or name not in saved:
            only = "model" if name in shapes else "saved weights"
            raise ValueError(f"{name} is only in the {only}; the networks differ")
        if shapes[name] != saved[name]:
            raise ValueError(f"{name} is {saved[name]} in the saved weights and {shapes[name]} in the model")
