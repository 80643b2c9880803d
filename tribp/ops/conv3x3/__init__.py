"""The 3×3 convolution: `op.py` the registered operators, `plan.py` their launches, `images.py` images in memory."""
