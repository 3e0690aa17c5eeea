"""The double-width (T-fold) network: its layers, its program, and the way back to one teacher's size."""
