"""Label noise for studies: a fraction of the labels replaced by draws from the labels' own distribution.

Which labels are replaced, and by what, is a function of the seed, the image's number and the label's place in it alone:
the same for every process, worker, order and resumed run. Nothing is written, and the index is not copied.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wsl_d2.data.order.sampler import mix64

_MAX_DRAWS = 1000


@dataclass(frozen=True)
class LabelNoise:
    """Replaces each (image, label) entry with probability ``fraction``.

    The new label is drawn from the marginal distribution of the labels, given that the image neither carries it nor got
    it for another entry; so no entry keeps its label by chance, and an image keeps its number of labels. An image that
    carries so many labels that others run out keeps the surplus ones as they are.

    Args:
        fraction: in [0, 1].
        seed: another seed gives other noise.
        counts: (C,) number of images with each label; draws are proportional to it.
    """

    fraction: float
    seed: int
    counts: np.ndarray

    def __post_init__(self):
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"label noise is a fraction in [0, 1], got {self.fraction}.")

    def replace(self, indptr: np.ndarray, labels: np.ndarray, first_image: int = 0) -> np.ndarray:
        """Returns the noisy labels of consecutive images.

        Args:
            indptr: (N + 1,) image i has ``labels[indptr[i]:indptr[i + 1]]``, sorted; starts at 0.
            labels: (L,) integers in [0, C).
            first_image: number of the first of these images in the dataset.

        Returns:
            (L,) of the same type, sorted within each image.
        """
        num_labels = len(self.counts)
        row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        place = np.arange(len(labels)) - indptr[row]
        # One number per entry that no other entry of the dataset has, up to 65,536 labels an image.
        entry = (np.uint64(first_image) + row.astype(np.uint64)) * np.uint64(1 << 16) + place.astype(np.uint64)

        def uniform(which: np.ndarray, draw: int) -> np.ndarray:
            key = int(np.random.SeedSequence([self.seed, draw]).generate_state(1, np.uint64)[0])
            return (mix64(mix64(which, key), ~key) >> np.uint64(11)).astype(np.float64) / float(1 << 53)

        replaced = uniform(entry, 0) < self.fraction
        free = np.count_nonzero(self.counts) - np.diff(indptr)
        rank: np.ndarray = np.cumsum(replaced) - replaced  # among the replaced entries of the image, below
        rank -= rank[np.minimum(indptr[row], max(0, len(labels) - 1))]
        replaced &= rank < free[row]

        clean = row * num_labels + labels  # ascending
        noisy = clean.copy()
        cumulative = np.cumsum(self.counts, dtype=np.float64)
        pending = np.flatnonzero(replaced)
        noisy[pending] = -1 - pending  # distinct, and no label
        for draw in range(1, _MAX_DRAWS):
            if not len(pending):
                break
            drawn = np.searchsorted(cumulative, uniform(entry[pending], draw) * cumulative[-1], side="right")
            candidate = row[pending] * num_labels + np.minimum(drawn, num_labels - 1)
            found = np.minimum(np.searchsorted(clean, candidate), len(clean) - 1)
            allowed = (clean[found] != candidate) & ~np.isin(candidate, noisy)
            _, first = np.unique(candidate, return_index=True)  # of two entries that drew the same, the first gets it
            allowed &= np.isin(np.arange(len(pending)), first)
            noisy[pending[allowed]] = candidate[allowed]
            pending = pending[~allowed]
        for i in pending:  # labels so rare that draws do not hit them: any that is left
            taken = np.concatenate([labels[row == row[i]], noisy[row == row[i]] - row[i] * num_labels])
            rest = np.setdiff1d(np.flatnonzero(self.counts), taken)
            noisy[i] = row[i] * num_labels + rest[int(mix64(entry[i : i + 1], self.seed)[0] % np.uint64(len(rest)))]
        return (np.sort(noisy) - row * num_labels).astype(labels.dtype)
