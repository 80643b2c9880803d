"""What shape does a convolution give?

A window of 3×3 pixels has 30 places in a row of 32, and 30 in a column. Six of them, each with weights of its own, make
six images of one: (1, 1, 32, 32) becomes (1, 6, 30, 30). The layer has 6·3·3 weights and 6 biases, wherever it looks.
"""

import torch

import tribp

device = "cuda" if torch.cuda.is_available() else "cpu"
images = torch.randn(1, 1, 32, 32, device=device)  # (images, channels, height, width)
layer = tribp.nn.Conv3x3(1, 6, device=device)  # the parameters of nn.Conv2d(1, 6, 3)
output = layer(images)

print("input   ", tuple(images.shape))
print("output  ", tuple(output.shape))
print("weights ", tuple(layer.weight.shape))
print("biases  ", tuple(layer.bias.shape))
