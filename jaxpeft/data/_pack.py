"""Several short texts in one sequence."""

import bisect

import numpy as np

from jaxpeft.data._encoded import Encoded


def pack(encoded: Encoded) -> Encoded:
    """Returns a split with several rows in each sequence, every token kept.

    Longest rows first, each goes where it leaves the least room (best fit), so that
    the same rows are always packed alike. In batches, `segment_ids` count the rows of
    a sequence from 1 and are 0 on padding, `positions` start anew with each.

    Args:
      encoded: a split of a writing task, from `jaxpeft.data.tokenize`.

    Returns:
      The split; its `rows` are sequences of at most `max_length` tokens now, and
      `facts["sequences"]` says how many there are.

    Raises:
      ValueError: if it is a split of a classification task, or packed already.

    Example:
      >>> packed = pack(encoded)  # doctest: +SKIP
    """
    if encoded.learn is None or encoded.segments is not None:
        kind = "packed already" if encoded.segments is not None else "not of text alone"
        raise ValueError(f"`encoded`, {encoded.name}, cannot be packed: it is {kind}.")
    lengths = encoded.lengths
    sequences: list[list[int]] = []
    room: dict[int, list[int]] = {}  # sequences by the tokens they have left
    rooms: list[int] = []  # its keys, rising
    for row in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[row])
        place = bisect.bisect_left(rooms, need)
        if place == len(rooms):
            left, chosen = encoded.max_length, len(sequences)
            sequences.append([])
        else:
            left = rooms[place]
            chosen = room[left].pop()
            if not room[left]:
                del room[left], rooms[place]
        sequences[chosen].append(row)
        left -= need
        if left not in room:
            bisect.insort(rooms, left)
        room.setdefault(left, []).append(chosen)
    order = np.concatenate(sequences).astype(np.int64)
    sizes = lengths[order]
    starts = np.cumsum(sizes) - sizes
    positions = np.arange(len(encoded.ids)) - np.repeat(starts, sizes)
    source = np.repeat(encoded.offsets[order], sizes) + positions
    counts = np.array([len(rows) for rows in sequences])
    numbers = np.concatenate([np.arange(1, count + 1) for count in counts])
    bounds = np.concatenate([[0], np.cumsum(counts)])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return encoded._replace(
        ids=encoded.ids[source],
        learn=encoded.learn[source],
        positions=positions.astype(np.int32),
        segments=np.repeat(numbers, sizes).astype(np.int32),
        offsets=ends[bounds].astype(np.int64),
        labels=np.add.reduceat(encoded.labels[order], bounds[:-1]).astype(np.int32),
        facts={**(encoded.facts or {}), "sequences": len(sequences)},
    )
