import hashlib

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.seeding import derive_seed, numpy_generator, torch_generator

ROOTS = st.integers(0, 2**63)
LABELS = st.lists(st.one_of(st.integers(-5, 10**9), st.text(max_size=8)), max_size=5)


@given(ROOTS, LABELS)
def test_an_address_has_one_seed_of_63_bits(root: int, labels: list[str | int]) -> None:
    seed = derive_seed(root, *labels)
    assert seed == derive_seed(root, *labels)
    assert 0 <= seed < 2**63


def test_a_seed_is_the_start_of_a_digest_of_the_address() -> None:
    digest = hashlib.sha256(b"int:7\x1fstr:client\x1fint:3").digest()
    assert derive_seed(7, "client", 3) == int.from_bytes(digest[:8], "big") >> 1


def test_different_addresses_have_different_seeds() -> None:
    addresses = [
        (0,),
        (1,),
        (0, "1"),
        (0, 1),
        (0, 1, 1),
        (0, 11),
        (0, "a", "b"),
        (0, "ab"),
        (0, "b", "a"),
        (0, ""),
    ]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)


def test_addresses_of_clients_and_rounds_do_not_collide() -> None:
    seeds = {derive_seed(0, "client", p, r) for p in range(200) for r in range(50)}
    assert len(seeds) == 200 * 50


def test_generators_are_their_addresses_and_leave_the_global_ones_alone() -> None:
    global_state = torch.get_rng_state()
    before = np.random.get_state()[1].copy()
    one, two = (numpy_generator(3, "x").standard_normal(4) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    three, four = (torch.rand(4, generator=torch_generator(3, "x")) for _ in range(2))
    assert torch.equal(three, four)
    assert not torch.equal(three, torch.rand(4, generator=torch_generator(3, "y")))
    assert torch.equal(torch.get_rng_state(), global_state)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
