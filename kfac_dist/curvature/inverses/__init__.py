"""Inverses and eigenbases of factors, and their products with a gradient.

solvers         a damped factor's inverse or eigendecomposition
splits          factors of wide layers, cut into diagonal blocks
payloads        inverses that an owner keeps of each block, and sends
offload         payloads on the host between refreshes
precondition    payloads times gradients, block by block
"""
