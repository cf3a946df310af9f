"""Hydra configuration groups; a package so that ``pkg://conf`` finds them."""
