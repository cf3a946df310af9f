"""The server's half of a split model: the frozen language model over other parties' soft prompts.

Every prompt of a cohort is a row of one batch, so one forward and one backward pass serve all examples of all clients.
Rows are padded on the right and logits are read at each row's own last token, so padding changes nothing.

Axes: B prompts, m soft tokens, d width of the embeddings, h width of the final states, n tokens of the longest text,
t positions of a pass, K classes of the head.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from fedllm_flwr.errors import ConfigError, ShapeError
from fedllm_flwr.models.backbone import Backbone
from fedllm_flwr.models.heads import full_logits
from fedllm_flwr.models.soft import FixedCache, continued, embedding_width, fixed_cache
from fedllm_flwr.training.decoder import NO_ADAPTERS
from fedllm_flwr.training.find_decoder import find_decoder
from fedllm_flwr.training.server_texts import TextKeys, Texts, padded

Placement = Literal["alone", "before_text", "after_text"]
BATCH_POSITIONS = 1024
"""Positions of one pass: enough rows for matrix products to run at full speed, and bounded activations."""
Back = Callable[[Tensor], Tensor]
"""From the gradient of the final states [b, t, h] to that of the embeddings [b, t, d]."""


class ServerHalf:
    """Loss and gradient of a frozen model with respect to soft prompts.

    Args:
        backbone: The model, plain: nothing may be swapped or hooked into its layers.
        token_ids: The K tokens that the softmax is restricted to; None for the whole vocabulary.
        text_ids: Token ids of one text for all prompts, or of one for each prompt in their order; None if the
            prompt stands alone. Texts behind which the prompt stands are computed once, here.
        placement: Whether the prompt is all that the model reads, or stands before or after the text.
        with_keys: Gives the texts of single rows behind which prompts stand, with their keys and values, such as
            :meth:`TextKeys.kept` of an object that outlives this one; by default they are computed here.
        batch_positions: Positions of one pass; more rows are served in several passes.

    Raises:
        ConfigError: The placement is unknown, texts do not suit it, or a token is not in the vocabulary.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        token_ids: Sequence[int] | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
        placement: Placement = "alone",
        with_keys: Callable[[Sequence[Sequence[int]]], Texts] | None = None,
        batch_positions: int = BATCH_POSITIONS,
    ) -> None:
        _check_settings(backbone, token_ids, text_ids, placement, batch_positions)
        self._backbone = backbone
        self._decoder = find_decoder(backbone)
        self._token_ids = None if token_ids is None else tuple(token_ids)
        self._before = placement == "before_text"
        self._batch_positions = batch_positions
        self._cache: FixedCache | None = None
        self._texts = None if text_ids is None else padded(text_ids, backbone.device)
        if placement != "after_text" or text_ids is None or self._texts is None:
            return
        if len(text_ids) == 1:
            self._cache = fixed_cache(backbone, text_ids[0])
            self._texts = None if self._cache is not None else self._texts
        elif fixed_cache(backbone, [0]) is not None:  # the model can go on from keys and values
            self._texts = (with_keys or TextKeys(backbone, 0).kept)(text_ids)

    @property
    def num_classes(self) -> int:
        """K: the restricted tokens, or the vocabulary."""
        return len(self._backbone.head_weight(self._token_ids))

    def loss_and_gradient(self, prompts: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the token behind each row, and its gradient.

        Args:
            prompts: One for each example, [B, m, d].
            targets: The right class of each, [B]: an index into ``token_ids``, or a token id without them.

        Returns:
            Losses [B] in nats, and the gradient of each loss with respect to its own prompt [B, m, d]; float32.

        Raises:
            ShapeError: Sizes do not fit, or a target is no class.
        """
        self._check_prompts(prompts)
        targets = self._checked_targets(targets, len(prompts))

        def head(rows: slice, last: Tensor) -> tuple[Tensor, Tensor]:
            last = last.detach().requires_grad_()
            losses = self._backbone.row_losses(last, targets[rows], self._token_ids)
            [slope] = torch.autograd.grad(losses.sum(), last)
            return losses.detach().float(), slope

        passes = [self._there_and_back(prompts, rows, head) for rows in self._batches(prompts)]
        losses, gradients = zip(*passes, strict=True)
        return torch.cat(losses), torch.cat(gradients)

    @torch.no_grad()
    def logits(self, prompts: Tensor) -> Tensor:
        """Logits of the classes behind each row.

        Args:
            prompts: [B, m, d].

        Returns:
            [B, K], float32.

        Raises:
            ShapeError: Sizes do not fit.
        """
        self._check_prompts(prompts)
        found = []
        for rows in self._batches(prompts):
            states, last, _, _ = self._forward(prompts[rows], rows, keep=False)
            found.append(self._logits(_at(states, last)).float())
        return torch.cat(found)

    def gradient_from_logit_slope(self, prompts: Tensor, slope: Tensor) -> Tensor:
        """Carry the gradient of any loss of the logits back to the prompts, so that labels need not be known here.

        Args:
            prompts: [B, m, d]; their forward pass is computed again.
            slope: Gradient of the loss with respect to :meth:`logits`, such as softmax minus one-hot, [B, K].

        Returns:
            [B, m, d], float32.

        Raises:
            ShapeError: Sizes do not fit.

        Source:
            Vepakomma et al. 2018 (split learning), section 3.2, the U-shaped configuration without label sharing.
        """
        self._check_prompts(prompts)
        if slope.shape != (len(prompts), self.num_classes):
            wanted = [len(prompts), self.num_classes]
            raise ShapeError(f"logit slope: expected {wanted}, got {list(slope.shape)}")
        slope = slope.to(self._backbone.device)

        def head(rows: slice, last: Tensor) -> tuple[Tensor, Tensor]:
            last = last.detach().requires_grad_()
            logits = self._logits(last)
            [back] = torch.autograd.grad(logits, last, slope[rows].to(logits.dtype))
            return logits.detach(), back

        passes = [self._there_and_back(prompts, rows, head) for rows in self._batches(prompts)]
        return torch.cat([gradient for _, gradient in passes])

    def _there_and_back(
        self, prompts: Tensor, rows: slice, head: Callable[[slice, Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What the head gives for some rows, and the gradient of their prompts."""
        own = prompts[rows]
        states, last, soft, back = self._forward(own, rows, keep=True)
        with torch.enable_grad():
            value, slope = head(rows, _at(states, last))
        wide = torch.zeros_like(states)
        wide[torch.arange(len(own), device=wide.device), last] = slope.to(wide.dtype)
        found = back(wide)
        gradient = found.gather(1, soft[..., None].expand(-1, -1, found.shape[2]))
        return value, gradient.float()

    @torch.no_grad()
    def _forward(
        self, prompts: Tensor, rows: slice, *, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Back]:
        """Final states [b, t, h], each row's last position [b], where its prompt is [b, m], and the way back."""
        prompts = prompts.to(self._backbone.device, self._backbone.dtype)
        count, length = prompts.shape[:2]
        columns = torch.arange(length, device=prompts.device).expand(count, -1)
        if self._texts is None:
            states, back = self._run(prompts, self._cache, keep)
            return states, columns[:, -1], columns, back
        texts = self._texts.of(rows, count)
        if texts.layers:
            states, back = _run_behind(self._backbone, prompts, texts, keep)
            return states, columns[:, -1], columns, back
        soft = columns if self._before else columns + texts.lengths[:, None]
        states, back = self._run(self._joined(texts, prompts, soft), None, keep)
        return states, texts.lengths + length - 1, soft, back

    def _joined(self, texts: Texts, prompts: Tensor, soft: Tensor) -> Tensor:
        """Embeddings [b, n + m, d] of prompts and texts, in one piece from the left."""
        count, longest = texts.ids.shape
        embedded = self._backbone.model.get_input_embeddings()(texts.ids)
        start = prompts.shape[1] if self._before else 0
        wide = embedded.new_zeros(count, longest + prompts.shape[1], embedded.shape[2])
        wide[:, start : start + longest] = embedded
        return wide.scatter_(1, soft[..., None].expand_as(prompts), prompts)

    def _run(self, inputs: Tensor, cache: FixedCache | None, keep: bool) -> tuple[Tensor, Back]:
        """Compute embeddings [b, t, d] that are padded on the right."""
        if self._decoder is None:
            return _tracked(inputs, keep, lambda own: continued(self._backbone, own, cache))
        decoder, past = self._decoder, None if cache is None else cache.layers
        states, tape = decoder.forward(inputs, NO_ADAPTERS, keep=keep, to_inputs=True, past=past)

        def back(slope: Tensor) -> Tensor:
            with torch.no_grad():
                gradient = decoder.backward(slope, tape, NO_ADAPTERS, {})
            assert gradient is not None  # noqa: S101  # the tape was kept for it
            return gradient

        return states, back

    def _logits(self, last: Tensor) -> Tensor:
        """[b, K] from [b, h], differentiable."""
        backbone, transform = self._backbone, self._backbone.logit_transform
        chosen = slice(None) if self._token_ids is None else list(self._token_ids)
        if transform is None:
            return full_logits(backbone.model, last).float()[:, chosen]
        logits = (last @ backbone.head_weight(self._token_ids).t()).float()
        bias = getattr(backbone.model.get_output_embeddings(), "bias", None)
        logits = transform.scale * (logits if bias is None else logits + bias[chosen])
        if transform.softcap:
            logits = transform.softcap * torch.tanh(logits / transform.softcap)
        return logits

    def _batches(self, prompts: Tensor) -> list[slice]:
        """Rows that share a pass."""
        text = 0 if self._texts is None or self._texts.layers else self._texts.ids.shape[1]
        rows = max(1, self._batch_positions // (prompts.shape[1] + text))
        return [slice(start, start + rows) for start in range(0, len(prompts), rows)]

    def _check_prompts(self, prompts: Tensor) -> None:
        width = embedding_width(self._backbone)
        if (
            prompts.ndim != 3
            or not len(prompts)
            or not prompts.shape[1]
            or prompts.shape[2] != width
        ):
            raise ShapeError(
                f"soft prompts: expected [prompts, length, {width}], none of them 0, got {list(prompts.shape)}"
            )
        texts = 1 if self._texts is None else len(self._texts.ids)
        if texts not in (1, len(prompts)):
            raise ShapeError(
                f"soft prompts: expected one for each of {texts} texts, got {len(prompts)}"
            )

    def _checked_targets(self, targets: Tensor, count: int) -> Tensor:
        if targets.shape != (count,) or targets.is_floating_point():
            got = f"{targets.dtype} {list(targets.shape)}"
            raise ShapeError(f"targets: expected whole numbers [{count}], got {got}")
        wrong = targets[(targets < 0) | (targets >= self.num_classes)]
        if len(wrong):
            raise ShapeError(
                f"targets: expected classes from 0 to {self.num_classes - 1}, got {int(wrong[0])}"
            )
        return targets.to(self._backbone.device, torch.int64)


def _check_settings(
    backbone: Backbone,
    token_ids: Sequence[int] | None,
    text_ids: Sequence[Sequence[int]] | None,
    placement: Placement,
    batch_positions: int,
) -> None:
    if placement not in get_args(Placement):
        known = ", ".join(get_args(Placement))
        raise ConfigError(f"server half: expected a placement of {known}, got {placement!r}")
    if (text_ids is None) != (placement == "alone"):
        texts = "no text" if text_ids is None else f"{len(text_ids)} texts"
        raise ConfigError(
            f"server half: texts belong to before_text and after_text, got {placement} and {texts}"
        )
    if text_ids is not None and (not text_ids or not all(len(text) for text in text_ids)):
        raise ConfigError("server half: expected texts of at least one token, got an empty one")
    if token_ids is not None and not token_ids:
        raise ConfigError("server half: expected at least one class token, got none")
    if batch_positions < 1:
        raise ConfigError(f"server half: expected batch_positions >= 1, got {batch_positions}")
    size = len(backbone.head_weight())
    for token in (*(token_ids or ()), *(token for text in text_ids or () for token in text)):
        if not 0 <= token < size:
            raise ConfigError(f"server half: expected tokens from 0 to {size - 1}, got {token}")


def _run_behind(
    backbone: Backbone, prompts: Tensor, texts: Texts, keep: bool
) -> tuple[Tensor, Back]:
    """Compute prompts [b, m, d] behind a text of each row's own; padding between the two is masked."""
    count, length = prompts.shape[:2]
    mask = torch.cat([texts.mask(), texts.lengths.new_ones(count, length)], dim=1)
    positions = texts.lengths[:, None] + torch.arange(length, device=prompts.device)

    def states(own: Tensor) -> Tensor:
        output: Any = backbone.model.base_model(
            inputs_embeds=own,
            past_key_values=DynamicCache(list(texts.layers)),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
        )
        found: Tensor = output.last_hidden_state
        return found

    return _tracked(prompts, keep, states)


def _tracked(
    inputs: Tensor, keep: bool, compute: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Back]:
    """States by transformers, and the way back by automatic differentiation."""
    with torch.set_grad_enabled(keep):
        inputs = inputs.detach().requires_grad_(keep)
        states = compute(inputs)
    return states.detach(), lambda slope: torch.autograd.grad(states, inputs, slope)[0]


def _at(states: Tensor, positions: Tensor) -> Tensor:
    """One state [b, h] of each row of [b, t, h]."""
    return states[torch.arange(len(states), device=states.device), positions]
