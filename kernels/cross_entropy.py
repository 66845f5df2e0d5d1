"""One rank's part of a cross-entropy over a split vocabulary: what each row of logits contributes, and its gradient, in place.

    forward    top = largest logit, total = sum of exp(x - top), label's logit; the logits become exp(x - top)
    backward   the exponentials become factor exp(x - top) - spread, and at the label what the caller says

What the ranks then tell each other is in `parallel/vocabulary.py`. Statistics are in at least float32.
"""

from __future__ import annotations

import torch


def statistics_of(
    logits: torch.Tensor, local: torch.Tensor, here: torch.Tensor, *, with_sum: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Turn logits [n, v_local] into exp(x - largest of the row), in place.

    Returns of each row its largest value, the sum of its exponentials, the label's logit (0 where it is not `here`), and the sum of its
    logits where asked for: [n] each. A rank without any id of a tiny vocabulary contributes -inf and 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    top = torch.full((logits.shape[0],), -torch.inf, dtype=dtype, device=logits.device)
    total, label = torch.zeros_like(top), torch.zeros_like(top)
    added = torch.zeros_like(top) if with_sum else None
    if logits.shape[1] == 0:
        return top, total, label, added
    for block in _row_blocks(logits):
        x = logits[block].to(dtype)
        label[block] = x.gather(1, local[block, None]).squeeze(1) * here[block]
        if added is not None:
            added[block] = x.sum(1)
        top[block] = x.amax(1)
        x = x.sub_(top[block, None]).exp_()  # where the dtype is the same, x is the block itself
        total[block] = x.sum(1)
        logits[block] = x
    return top, total, label, added


def gradient_of(
    exponentials: torch.Tensor,
    factor: torch.Tensor,
    spread: torch.Tensor | None,
    local: torch.Tensor,
    here: torch.Tensor,
    label: torch.Tensor,
) -> None:
    """Turn exponentials [n, v_local] into factor [n] times themselves minus spread [n], and `label` [n] in column `local` if `here`."""
    if exponentials.shape[1] == 0:
        return
    exponentials.mul_(factor[:, None].to(exponentials.dtype))
    if spread is not None:
        exponentials.sub_(spread[:, None].to(exponentials.dtype))
    others = exponentials.gather(1, local[:, None])
    exponentials.scatter_(1, local[:, None], torch.where(here[:, None], label[:, None].to(exponentials.dtype), others))


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    """Blocks of rows whose float32 copies stay in a CPU's cache; one block on a GPU."""
    size = rows.shape[0] if rows.is_cuda else max(1, 2**19 // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
