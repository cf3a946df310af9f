"""A reservoir that turns a context into a state, and a controller that turns the state into a soft prompt.

`network` is the frozen reservoir, `topology` its graphs, `embeddings` feeds it tokens, `controller` is what a client
trains, `surrogate` stands in for the server's language model, and `series` makes numeric contexts.
"""

from fedllm_flwr.reservoir.controller import Controller, ControllerSpec, OptimizerName
from fedllm_flwr.reservoir.embeddings import random_projection, rms_normalised, token_series
from fedllm_flwr.reservoir.network import Reservoir, ReservoirSpec, energy_share
from fedllm_flwr.reservoir.surrogate import SurrogateLM, cross_entropy
from fedllm_flwr.reservoir.topology import TOPOLOGIES, Topology

__all__ = [
    "TOPOLOGIES",
    "Controller",
    "ControllerSpec",
    "OptimizerName",
    "Reservoir",
    "ReservoirSpec",
    "SurrogateLM",
    "Topology",
    "cross_entropy",
    "energy_share",
    "random_projection",
    "rms_normalised",
    "token_series",
]
