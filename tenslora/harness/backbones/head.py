"""A backbone and the classification head on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.config import DatasetConfig, ImageDatasetConfig
from tenslora.random_streams import stream_seed


@dataclass(frozen=True)
class Backbone:
    """A model that maps a batch to logits, with its classification head.

    Args:
        model: the Transformer, which is called with keyword inputs.
        head: the modules of `model` that are trained together with the adapter.
        input_name: the keyword by which `model` takes images.
        image_input: the images that an image model takes; None for a text model.
        max_tokens: the most tokens that a text model has positions for; None if there is no such limit.
        embedding_sizes: the number of rows of each embedding of a text model, by the input that is looked up in it.
    """

    model: nn.Module
    head: list[nn.Module]
    input_name: str
    image_input: ImageInput | None = None
    max_tokens: int | None = None
    embedding_sizes: Mapping[str, int] = field(default_factory=dict)

    def image_input_on(self, dataset: DatasetConfig) -> ImageInput | None:
        """How a run on a dataset turns an image into the model's input; None for a text model.

        Args:
            dataset: the dataset's settings.

        Raises:
            TensLoRAError: if the settings ask for a normalization that the model cannot have.
        """
        if self.image_input is None or not isinstance(dataset, ImageDatasetConfig):
            return None
        return self.image_input.under(dataset.transform)

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters by their names in the model."""
        in_head = {id(parameter) for module in self.head for parameter in module.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in in_head}


def draw_head(head: Sequence[nn.Module], seed: int) -> None:
    """Initialise a head anew: normal weights with standard deviation 0.02, and biases of zero.

    Args:
        head: the head's modules. All Linear layers in them are initialised, in place.
        seed: the seed of the random stream, from which nothing else is drawn: the head does not depend on the backbone.
    """
    generator = torch.Generator().manual_seed(stream_seed("head", seed))
    for module in head:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02, generator=generator)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
