"""By which rules a vocabulary's labels are found; part of the vocabulary, and of its checksum."""

from __future__ import annotations

from typing import NamedTuple

HASHTAGS, EXACT = MATCHINGS = ("hashtags", "exact")
AMBIGUOUS_POLICIES = ("most_frequent", "drop", "all")


class MappingPolicy(NamedTuple):
    """How a hashtag becomes a label.

    Attributes:
        matching: "hashtags": as people write them, by :mod:`wsl_d2.hashtags.mapping`; "exact": a normalized spelling of
            the vocabulary or nothing, for classes that are no words, such as names of folders.
        max_distance: hypernym steps allowed from a hashtag's own synset up to a label; 0 is the strict merge of arXiv
            1805.00932.
        ambiguous: a hashtag with several senses among the labels gets the most frequent one ("most_frequent"), none
            ("drop"), or all of them ("all").
    """

    matching: str = HASHTAGS
    max_distance: int = 0
    ambiguous: str = AMBIGUOUS_POLICIES[0]

    def check(self) -> MappingPolicy:
        """Returns itself; raises ValueError for a negative distance or an unknown name."""
        if self.matching not in MATCHINGS:
            raise ValueError(f"matching is one of {', '.join(MATCHINGS)}; got {self.matching!r}")
        if not isinstance(self.max_distance, int) or self.max_distance < 0:
            raise ValueError(f"max_distance is a number of hypernym steps, 0 or more; got {self.max_distance!r}")
        if self.ambiguous not in AMBIGUOUS_POLICIES:
            raise ValueError(f"ambiguous is one of {', '.join(AMBIGUOUS_POLICIES)}; got {self.ambiguous!r}")
        return self
