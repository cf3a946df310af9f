from benchmarks import verification


def test_the_gates_are_figures_of_the_last_line() -> None:
    assert verification.__doc__ is not None
    for name in verification.GATES:
        assert name in verification.__doc__


def test_each_model_has_enough_others_beside_it() -> None:
    assert (
        verification.QUICK_SEEDS > verification.DEFAULT.retrains > verification.QUICK.retrains >= 5
    )
