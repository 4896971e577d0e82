"""How far a result may be from the exact one, measured in XLA's own error at the same precision.

The error against float64 is at most OUTPUT_FACTOR times XLA's for an output, GRADIENT_FACTOR times for a gradient, plus
SLACK of the magnitude (or of 1): sums are taken in another order, and gradients go through two operations.
"""

OUTPUT_FACTOR, GRADIENT_FACTOR, SLACK = 2.0, 3.0, 1e-5
