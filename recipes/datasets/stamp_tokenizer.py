"""The closed vocabulary of questions and captions about stamps."""

from mm_sparse.recipes.data import WordTokenizer
from mm_sparse.recipes.datasets.stamps import ORDINALS, STAMPS, find_stamps

QUESTIONS = ("What is in the picture?", "What is in the row, column?", " ".join(ORDINALS))


class StampTokenizer(WordTokenizer):
    """Every word of every caption below `root`, and of questions about stamps."""

    def __init__(self, root: str = STAMPS, max_words: int | None = None) -> None:
        texts = [*QUESTIONS, *(stamp.caption for stamp in find_stamps(root, max_words))]
        words = {word for text in texts for word in self.PIECE.findall(text.lower())}
        super().__init__(sorted(words))
