"""How well generated answers match the true ones."""

from collections import Counter

from mm_sparse.recipes.metrics.word_error_rate import plain


def exact_match(said: str, wanted: str) -> bool:
    """Whether both are the same, case, punctuation and spaces aside.

    Example:
        >>> exact_match("A cat.", "a cat")
        True
    """
    return plain(said) == plain(wanted)


def token_f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of words, in [0, 1], as SQuAD has it.

    Example:
        >>> token_f1("a black cat", "a cat")
        0.8
    """
    own, true = plain(said).split(), plain(wanted).split()
    if not own or not true:
        return float(own == true)
    shared = (Counter(own) & Counter(true)).total()
    return 2 * shared / (len(own) + len(true))
