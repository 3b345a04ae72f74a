"""Forward and backward passes → the rows of every layer's calls, and the proof that they make its gradient.

capture           hooks, and the micro-batch that they fill
autograd          the purpose of a backward pass, and when its graph is freed
constants         tables that all samples share
shared_outputs    layers that are called once for all samples
samples           how many samples a forward pass has
arbiter           captured rows against the gradient that autograd left
"""
