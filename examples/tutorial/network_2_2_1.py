"""A network with two inputs, two hidden units and one output, by hand-made weights: one step of gradient descent.

The tutorial's own version of this program crashes. It sets the second layer's weight to [[3.0]], of shape (1, 1), by
assigning to `.data`, which checks nothing; but two hidden units need two weights, shape (1, 2). The first part below
makes that mistake and prints what torch says, which names neither the layer nor the argument, and what tribp says.

The second part is the corrected program, with [[3.0, 3.0]]. It prints every value on the way forward, the loss
½ Σ (output − target)², the gradients (each dz = dy · y · (1 − y); each dW = dzᵀ · x), and the weights after one step of
SGD with the learning rate 0.01: output 0.990112, loss 0.120105, dW2 = 0.00405701, 0.00331061.
"""

import torch

import tribp

device = "cuda" if torch.cuda.is_available() else "cpu"
# y is near 1, where 1 − y loses digits in float32: the tutorial's dW2 is 0.00405699 for that.
options = {"device": device, "dtype": torch.float64}
input, target = torch.tensor([[0.1, 0.8]], **options), torch.tensor([[0.5]], **options)


def network(first, second):
    """The layers `first` and `second` with their weights set and their biases 0."""
    first.weight.data = torch.tensor([[1.0, 2.0], [0.0, 1.0]], **options)
    first.bias.data.zero_()
    second.weight.data = torch.tensor([[3.0]], **options)  # .data: nothing is checked here
    second.bias.data.zero_()
    return first, second


def show(name, tensor):
    rows = ["  ".join(f"{value:.9g}" for value in row) for row in tensor.tolist()]
    print(f"  {name:17}" + f"\n{19 * ' '}".join(rows))


print("The mistake: a second weight of shape (1, 1)")
first, second = network(torch.nn.Linear(2, 2, **options), torch.nn.Linear(2, 1, **options))
try:
    second(first(input).sigmoid()).sigmoid()
except RuntimeError as error:
    print(f"  torch  {error}")
first, second = network(tribp.nn.LinearSigmoid(2, 2, **options), tribp.nn.LinearSigmoid(2, 1, **options))
try:
    second(first(input))
except ValueError as error:
    print(f"  tribp  {error}")

print("The corrected program: a second weight of shape (1, 2)")
second.weight.data = torch.tensor([[3.0, 3.0]], **options)
optimizer = tribp.optim.SGD([*first.parameters(), *second.parameters()], lr=0.01)
hidden = first(input)
output = second(hidden)
loss = (output - target).square().sum() / 2
show("input", input)
show("hidden", hidden)
show("output", output)
show("loss", loss.view(1, 1))

optimizer.zero_grad()
loss.backward()
dz2 = (output - target) * output * (1 - output)
dz1 = dz2 @ second.weight * hidden * (1 - hidden)
show("dz2", dz2)
show("dW2 by hand", dz2.T @ hidden)
show("dW2", second.weight.grad)
show("dz1", dz1)
show("dW1 by hand", dz1.T @ input)
show("dW1", first.weight.grad)

optimizer.step()
show("W1 after a step", first.weight)
show("W2 after a step", second.weight)
