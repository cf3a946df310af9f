import pytest

from benchmarks import scale


def test_figures_leave_out_the_first_rounds() -> None:
    def record(number: int, cohort: int, seconds: float, memory: int) -> dict:
        return {
            "round": number, "cohort": list(range(cohort)), "train_seconds": seconds,
            "uplink_bytes": 100 * cohort, "server_memory_bytes": memory,
        }  # fmt: skip

    start = {"round": 0, "server_memory_bytes": 5}
    rounds = [start, record(1, 4, 99.0, 7), *(record(n, 4, 2.0 * n, 8) for n in (2, 3, 4))]
    assert scale.figures(rounds) == scale.Run(1.5, 8, 100.0)
    runs = [scale.Run(1.0, 5, 9.0), scale.Run(3.0, 4, 9.0), scale.Run(2.0, 9, 9.0)]
    assert scale.median(runs) == scale.Run(2.0, 5, 9.0)


def test_the_server_allocates_the_same_for_any_cohort() -> None:
    small, large = (scale.server_allocations(cohort, clients=80) for cohort in (10, 40))
    assert large < 1.2 * small  # a server that keeps its replies: above 2


@pytest.mark.slow
def test_a_run_in_its_own_process_is_measured() -> None:
    run = scale.run_once(4, clients=16, rounds=2, runtime="loopback")
    assert run.seconds_per_client > 0
    assert run.memory > 100e6  # torch alone takes more
    assert run.reply > 4 * 32 * 900  # rank 32 times the widths of all layers, float32
