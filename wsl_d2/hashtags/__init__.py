"""Text -> labels: hashtags are normalized and mapped, through WordNet 3.0, to the classes of a vocabulary."""

from wsl_d2.errors import VocabularyError

from .counts import HashtagCounts, read_hashtag_counts
from .mapping import DROP_REASONS, HashtagMapping, Mapped
from .normalize import normalize_hashtag
from .parse import parse_caption, parse_hashtags
from .policy import AMBIGUOUS_POLICIES, MappingPolicy
from .vocabulary import Match, Vocabulary
from .wordnet import WordNetError, load_wordnet, synset_to_wnid, wnid_to_synset

__all__ = [
    "AMBIGUOUS_POLICIES",
    "DROP_REASONS",
    "HashtagCounts",
    "HashtagMapping",
    "Mapped",
    "MappingPolicy",
    "Match",
    "Vocabulary",
    "VocabularyError",
    "WordNetError",
    "load_wordnet",
    "normalize_hashtag",
    "parse_caption",
    "parse_hashtags",
    "read_hashtag_counts",
    "synset_to_wnid",
    "wnid_to_synset",
]
