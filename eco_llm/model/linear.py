"""A matrix without bias whose stored type need not be that of its products."""

from __future__ import annotations

from torch import Tensor, nn

from eco_llm.ops.products import linear, linear_unread


class Linear(nn.Linear):
    """weight [outputs, inputs], float32 or stored narrower (`--weights-dtype`); x [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """The product in the type of the input, or in autocast's."""
        return linear(input, self.weight)

    def unread(self, input: Tensor) -> Tensor:
        """`forward` where its value is not read: NaN [..., outputs], with the same gradients."""
        return linear_unread(input, self.weight)
