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
    own = model.state_dict()
    for name in sorted(own.keys() | weights.keys()):
        mine, theirs = own.get(name), weights.get(name)
        if mine is None or theirs is None:
            raise ValueError(
                f"{name} is only in the {'model' if theirs is None else 'saved weights'}; the networks differ"
            )
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{name} is {tuple(theirs.shape)} in the saved weights and {tuple(mine.shape)} in the model"
            )
