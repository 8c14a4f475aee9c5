"""Which answer belongs to which frame, and how long it took.

A server of Moshi's protocol answers frame by frame, in order, with as much sound as it hears; only
the first frames, as many as the model's delay, are answered with nothing. So the k-th frame of
sound that comes back is what the step of frame k + delay made. If a server leaves out a frame, all
later answers are matched to the frame before their own and look later than they were, never
earlier, and at the end a frame is left without an answer.
"""

from __future__ import annotations

import numpy as np


def latencies(due: np.ndarray, arrived: np.ndarray, delay: int) -> np.ndarray:
    """Seconds from when each frame was due until its answer was there.

    Args:
        due: when each frame was to be sent, `[F]`. Not when it was sent: a server that makes its
            clients wait must not be measured by the frames that it let through.
        arrived: when each answered frame arrived, `[K]`; several in one message arrived together.
        delay: of the model, in frames.

    Returns:
        `[F - delay]`, of the frames from `delay` on; infinite where no answer came.

    Raises:
        ValueError: an answer came before its frame was due, or more came than frames were sent.
    """
    waited = np.full(max(len(due) - delay, 0), np.inf)
    if len(arrived) > len(waited):
        raise ValueError(f"{len(arrived) + delay} frames were answered, but {len(due)} sent")
    waited[: len(arrived)] = arrived - due[delay : delay + len(arrived)]
    if (waited < 0).any():
        raise ValueError(
            f"an answer came {-waited.min():.3f} s before the frame that it belongs to"
        )
    return waited
