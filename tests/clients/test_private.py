import math

import numpy as np
import pytest

from clients.private import protected
from fedllm_flwr.errors import ShapeError
from fedllm_flwr.settings.privacy import CentralPrivacy, LocalPrivacy, NoPrivacy

START = {"shared": np.full(30_000, 0.3, np.float32), "cluster": np.zeros(10_000, np.float32)}


def trained(step: float) -> dict[str, np.ndarray]:
    return {name: values + np.float32(step) for name, values in START.items()}


def local(clip_norm: float, noise: float) -> LocalPrivacy:
    return LocalPrivacy(name="local", clip_norm=clip_norm, noise_multiplier=noise)


@pytest.mark.parametrize("privacy", [NoPrivacy(name="none"), CentralPrivacy(name="central")])
def test_who_has_others_do_it_sends_what_it_has(privacy: NoPrivacy | CentralPrivacy) -> None:
    values = trained(0.1)
    assert protected(privacy, values, START) is values


def test_an_update_within_the_norm_and_without_noise_keeps_its_bits() -> None:
    values = trained(0.1)
    found = protected(local(1e6, 0.0), values, START)
    for name, own in values.items():
        np.testing.assert_array_equal(found[name], own)
        assert found[name].dtype == np.float32


def test_the_whole_update_is_clipped_from_its_start() -> None:
    found = protected(local(0.5, 0.0), trained(0.1), START)
    update = np.concatenate([found[name].astype(np.float64) - START[name] for name in START])
    assert np.linalg.norm(update) == pytest.approx(0.5, rel=1e-4)
    assert update == pytest.approx(np.full(update.size, 0.5 / math.sqrt(update.size)), abs=1e-7)


def test_noise_is_relative_to_the_norm_and_never_the_same() -> None:
    values = trained(0.0)
    one, two = (protected(local(0.5, 3.0), values, START) for _ in range(2))
    noise = np.concatenate([one[name] - values[name] for name in START])
    assert noise.std() == pytest.approx(1.5, rel=4 / math.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * 1.5 / math.sqrt(noise.size)
    other = np.concatenate([two[name] - values[name] for name in START])
    assert abs(np.corrcoef(noise, other)[0, 1]) < 4 / math.sqrt(noise.size)


def test_parts_that_have_no_start_are_refused() -> None:
    with pytest.raises(ShapeError, match="expected parts"):
        protected(local(1.0, 1.0), {"shared": START["shared"]}, START)
