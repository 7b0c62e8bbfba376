"""What transformers asks about the tokens of a pass before it chooses an attention mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_NAME = "find_packed_sequence_indices"


@contextlib.contextmanager
def one_text_each() -> Iterator[None]:
    """Passes in which no sequence is several texts with positions of their own. transformers then need not look at the
    positions: it would wait for the device, and in a CUDA graph, where it cannot, take a mask of all pairs of
    positions, for which attention has slower kernels.
    """
    from transformers import masking_utils

    looking = getattr(masking_utils, _NAME, None)  # not in each version
    if looking is None:
        yield
        return
    setattr(masking_utils, _NAME, lambda *_, **__: None)
    try:
        yield
    finally:
        setattr(masking_utils, _NAME, looking)
