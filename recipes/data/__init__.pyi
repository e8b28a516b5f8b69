from .audio_files import read_sound as read_sound
from .audio_files import resample as resample
from .datamodule import SampleData as SampleData
from .images import on_white as on_white
from .images import to_tensor as to_tensor
from .packed_inputs import PackedData as PackedData
from .packed_inputs import write_packed as write_packed
from .samples import (
    IGNORED as IGNORED,
)
from .samples import (
    RATE as RATE,
)
from .samples import (
    Batch as Batch,
)
from .samples import (
    Sample as Sample,
)
from .samples import (
    Samples as Samples,
)
from .samples import (
    Turn as Turn,
)
from .speech_manifests import json_lines as json_lines
from .speech_manifests import need as need
from .splits import (
    SPLITS as SPLITS,
)
from .splits import (
    Split as Split,
)
from .splits import (
    check_split as check_split,
)
from .splits import (
    split_of as split_of,
)
from .text_corpus import (
    CORPUS_SPLITS as CORPUS_SPLITS,
)
from .text_corpus import (
    CorpusData as CorpusData,
)
from .text_corpus import (
    file_split as file_split,
)
from .text_corpus import (
    read_text as read_text,
)
from .tokenizers import (
    HFTokenizer as HFTokenizer,
)
from .tokenizers import (
    SmolLM2Tokenizer as SmolLM2Tokenizer,
)
from .tokenizers import (
    Tokenizer as Tokenizer,
)
from .tokenizers import (
    WordTokenizer as WordTokenizer,
)
