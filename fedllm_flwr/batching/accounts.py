"""What decomposing, packing and batching cost and save, by formula.

Source:
    Kolawole et al. 2025 (ParallelPrompt, arXiv 2506.18728) for decomposing; Cheng et al. 2023 (Batch Prompting) for
    packing. Unlike the harness of the former, serial and parallel answers are compared under the same limit of tokens,
    and the time to find the parts can be counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm_flwr.errors import ConfigError


@dataclass(frozen=True)
class ParallelAccount:
    """One prompt answered in one call, and in one call for each of its parts.

    Attributes:
        serial_seconds: Time of the one call.
        part_seconds: Time of each part's call, if all are made at once.
        schema_seconds: Time to find the parts.
        join_seconds: Time to join the answers.

    Raises:
        ConfigError: A time is negative, or there is no part.
    """

    serial_seconds: float
    part_seconds: tuple[float, ...]
    schema_seconds: float = 0.0
    join_seconds: float = 0.0

    def __post_init__(self) -> None:
        times = (self.serial_seconds, *self.part_seconds, self.schema_seconds, self.join_seconds)
        if not self.part_seconds or min(times) < 0:
            raise ConfigError(f"decompose: expected parts and times >= 0 s, got {times}")

    @property
    def parallel_seconds(self) -> float:
        """T_par = max_i T(x_i) + T_schema + T_join."""
        return self.calls_seconds + self.schema_seconds + self.join_seconds

    @property
    def calls_seconds(self) -> float:
        """The same without the time to find the parts and to join: max_i T(x_i)."""
        return max(self.part_seconds)

    @property
    def speedup(self) -> float:
        """T_serial / T_par."""
        return self.serial_seconds / self.parallel_seconds

    @property
    def speedup_of_calls(self) -> float:
        """T_serial / max_i T(x_i): what is left if the parts are known beforehand."""
        return self.serial_seconds / self.calls_seconds


def decomposed_tokens(
    prompt_tokens: Sequence[int], context_tokens: int, output_tokens: Sequence[int]
) -> int:
    """Tokens of all parts' calls: sum of (prompt_i + context) + sum of outputs.

    Args:
        prompt_tokens: Of each part, without the context.
        context_tokens: Of the context, which every call carries anew.
        output_tokens: Of each part's answer.

    Raises:
        ConfigError: Prompts and answers differ in number.
    """
    if len(prompt_tokens) != len(output_tokens):
        raise ConfigError(
            f"decompose: expected an answer for each of {len(prompt_tokens)} parts, got {len(output_tokens)}"
        )
    return sum(prompt_tokens) + len(prompt_tokens) * context_tokens + sum(output_tokens)


def packing_saving(items: int, instruction_tokens: float, item_tokens: float) -> float:
    """Input tokens of single calls over those of one packed call: N (s + x) / (s + N x).

    Args:
        items: N, at least 1.
        instruction_tokens: s, of the instruction that all items share.
        item_tokens: x, of one item.

    Returns:
        A ratio from 1 (one item, or no instruction) to N (items of no length).

    Raises:
        ConfigError: A number is out of range.
    """
    if items < 1 or min(instruction_tokens, item_tokens) < 0:
        raise ConfigError(
            f"pack: expected at least one item and tokens >= 0, got {items} items, {instruction_tokens} and "
            f"{item_tokens} tokens"
        )
    packed = instruction_tokens + items * item_tokens
    return items * (instruction_tokens + item_tokens) / packed if packed else 1.0


def packing_saving_with_fallback(
    items: int, instruction_tokens: float, item_tokens: float, failed_items: int
) -> float:
    """The same when some items are asked once more, each by itself: N (s + x) / (s + N x + F (s + x)).

    Args:
        items: N, at least 1.
        instruction_tokens: s.
        item_tokens: x.
        failed_items: F, of which no answer could be read.

    Raises:
        ConfigError: A number is out of range.
    """
    if not 0 <= failed_items <= items:
        raise ConfigError(f"pack: expected 0 to {items} failed items, got {failed_items}")
    inverse = 1 / packing_saving(items, instruction_tokens, item_tokens)
    return 1 / (inverse + failed_items / items)


def throughput_ceiling(max_batch: int, batch_seconds: float) -> float:
    """Requests per second that a server of full batches can answer at most: B / t_B.

    Args:
        max_batch: B.
        batch_seconds: t_B, time of a full batch.

    Raises:
        ConfigError: A number is not positive.
    """
    if max_batch < 1 or batch_seconds <= 0:
        raise ConfigError(
            f"batch: expected a size >= 1 and a time > 0 s, got {max_batch} and {batch_seconds}"
        )
    return max_batch / batch_seconds


def mean_queue_seconds(arrivals_per_second: float, max_batch: int, batch_seconds: float) -> float:
    """Mean wait of a server that takes one request at a time and is as fast as full batches are: M/D/1.

    A yardstick and no forecast: batches that are not full take less time, and members of a batch wait for each other.

    Args:
        arrivals_per_second: Of a Poisson process.
        max_batch: B.
        batch_seconds: t_B.

    Returns:
        Seconds in the queue, rho / (2 mu (1 - rho)) with mu = B / t_B; infinite from the ceiling on.

    Raises:
        ConfigError: A number is out of range.

    Source:
        Pollaczek-Khinchine formula for a constant service time.
    """
    rate = throughput_ceiling(max_batch, batch_seconds)
    if arrivals_per_second < 0:
        raise ConfigError(f"batch: expected arrivals >= 0 per second, got {arrivals_per_second}")
    load = arrivals_per_second / rate
    return load / (2 * rate * (1 - load)) if load < 1 else float("inf")
