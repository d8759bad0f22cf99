"""Calibration: what a corpus says about how well an MLP's input predicts its neurons."""
