"""Text -> labels: hashtags are normalised and mapped, through WordNet 3.0, to the classes of a vocabulary."""

from .mapping import AMBIGUOUS_POLICIES, DROP_REASONS, HashtagMapping, Mapped
from .normalize import normalize_hashtag
from .vocabulary import Match, Vocabulary, VocabularyError, read_hashtag_counts
from .wordnet import WordNetError, load_wordnet, synset_to_wnid, wnid_to_synset

__all__ = [
    "AMBIGUOUS_POLICIES",
    "DROP_REASONS",
    "HashtagMapping",
    "Mapped",
    "Match",
    "Vocabulary",
    "VocabularyError",
    "WordNetError",
    "load_wordnet",
    "normalize_hashtag",
    "read_hashtag_counts",
    "synset_to_wnid",
    "wnid_to_synset",
]
