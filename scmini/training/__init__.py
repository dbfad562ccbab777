"""The optimisation loop, its batches and its losses."""
