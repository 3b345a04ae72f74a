"""Truncated Newton methods that use K-FAC as their preconditioner: conjugate gradients, Levenberg–Marquardt, planes."""
