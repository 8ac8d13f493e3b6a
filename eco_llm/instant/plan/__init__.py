"""What a training step takes of a GPU's memory, foretold without a GPU and without torch. Page: docs/plan.md.

- allocator.py: PyTorch's caching allocator, in miniature: what blocks and segments a sequence of requests leads to.
- sizes.py: a job (model, batch, types, memory modes) and the sizes that follow from it.
- layers.py: what every operator of a block allocates and keeps, forward and backward, in the code's own order.
- step.py: a whole step as such a sequence, in every memory mode; `estimate` plays it and reads the peak.
- search.py: the largest batch, the largest model, the cheapest mode per block.
- text.py: a plan for people.
"""
