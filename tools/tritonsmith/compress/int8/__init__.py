"""INT8 weights and activations: calibration, dialects, what helps accuracy, and what really runs in INT8."""
