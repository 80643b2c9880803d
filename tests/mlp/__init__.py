"""A multi-layer perceptron whose backward pass crosses its layers."""
